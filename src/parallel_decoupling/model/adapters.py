"""What trains in a backbone: nothing, LoRA or DoRA layers, fresh or published, or every weight.

peft is imported where it is used, as that takes half a second and ``fit --help`` does not need it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from parallel_decoupling.model.families import Family
from parallel_decoupling.model.path_lora import PathLoRA
from parallel_decoupling.option_types import Fraction, Names, PositiveInt, check_memory, check_values

OTHER_TARGETS = frozenset(("out_proj", "qkv_proj", "gate_up_proj"))
"""Targets that a family may lack: VLM2Vec's one list serves CLIP towers and fused layers as well."""


@dataclass(frozen=True)
class AdapterConfig:
    """Which part of the backbone trains.

    Attributes:
        kind: ``"frozen"`` (nothing: prefixes only), ``"lora"``, ``"dora"`` or ``"full"`` (every weight).
        rank: of the low-rank update.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on the input of the update.
        scope: where LoRA and DoRA go: the language model, the vision tower or both.
        targets: last names of the linear layers to adapt; None is the family's default.
        per_path: every path has a LoRA of its own in the language model, from the first layer of
            ``prefix_layers`` on; the layers below share one. Needs ``kind="lora"``, deep prefixes and a scope
            other than vision.
    """

    kind: Literal["frozen", "lora", "dora", "full"] = "lora"
    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Fraction = 0.0
    scope: Literal["language", "vision", "both"] = "language"
    targets: Names | None = None
    per_path: bool = False

    def __post_init__(self) -> None:
        check_values(AdapterConfig, vars(self), "adapter.")
        if self.per_path and (self.kind != "lora" or self.scope == "vision"):
            rule = "adapter.per_path needs adapter.kind=lora and adapter.scope=language or both"
            raise ValueError(f"{rule}, got {self.kind} and {self.scope}.")


def adapted_layers(base: nn.Module) -> dict[str, Any]:
    """Return the layers with LoRA or DoRA by name; peft's are known by a method, not by an import."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, PathLoRA) or hasattr(module, "reset_lora_parameters")
    }


def add_adapters(base: nn.Module, family: Family, adapter: AdapterConfig) -> None:
    """Set what trains in ``base``, adding LoRA or DoRA in fp32 if asked for."""
    base.requires_grad_(adapter.kind == "full")
    if adapter.kind not in ("lora", "dora"):
        return
    from peft import LoraConfig, inject_adapter_in_model

    modules = target_modules(base, family, adapter)
    layers: list[Any] = [base.get_submodule(name) for name in modules]
    sides = sum(layer.in_features + layer.out_features for layer in layers)
    check_memory(f"adapter.rank={adapter.rank}", 4.0 * adapter.rank * sides)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(modules),
        use_dora=adapter.kind == "dora",
    )
    with _seeded(base, 0):
        inject_adapter_in_model(config, base)
    _train_adapters_only(base)


def load_adapter(base: nn.Module, family: Family, adapter: AdapterConfig, source: str) -> AdapterConfig:
    """Continue from a published LoRA or DoRA adapter, such as VLM2Vec's, and return its settings.

    Of ``adapter`` only ``kind`` counts: what the adapter is (it trains on), or frozen (it stays as it is).
    A tensor that does not land is a ValueError.
    """
    config = _read_config(source, adapter.kind)
    cast(Any, base).add_adapter(config, "default")
    _train_adapters_only(base)
    if not next(base.parameters()).is_meta:
        _copy_weights(base, source, config)
    if adapter.kind == "frozen":
        base.requires_grad_(False)
    names = adapted_layers(base)
    roots = {name.startswith(f"{family.vision_module}.") for name in names}
    return AdapterConfig(
        kind=adapter.kind,
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        scope="both" if len(roots) > 1 else "vision" if True in roots else "language",
        targets=tuple(sorted({name.rsplit(".", 1)[-1] for name in names})),
        per_path=adapter.per_path,
    )


def _read_config(source: str, kind: str) -> Any:
    """Read ``adapter_config.json`` and refuse what would not be continued faithfully."""
    from peft import PeftConfig, PeftType

    try:
        config: Any = PeftConfig.from_pretrained(source)
    except ValueError as error:
        raise ValueError(f"initial_adapter {source!r} is not a folder or hub id: {error}") from error
    found = "dora" if getattr(config, "use_dora", False) else "lora"
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"initial adapter {source!r} is {config.peft_type}, not LoRA or DoRA")
    if kind not in (found, "frozen"):
        advice = f"set adapter.kind to {found} (it trains on) or frozen, not {kind}"
        raise ValueError(f"initial adapter {source!r} is {found}: {advice}")
    for name, plain in (
        ("bias", ("none", None)),
        ("modules_to_save", (None,)),
        ("alpha_pattern", ({}, None)),
        ("init_lora_weights", (True, False, "gaussian")),  # others change the backbone's own weights
    ):
        if getattr(config, name) not in plain:
            advice = "which cannot be continued faithfully; convert it to a plain LoRA adapter first"
            raise ValueError(f"initial adapter {source!r} has {name}={getattr(config, name)!r}, {advice}")
    config.inference_mode = False
    if kind == "frozen":
        config.lora_dropout = 0.0  # what does not train needs no noise
    config.init_lora_weights = True
    return config


def _copy_weights(model: Any, source: str, config: Any) -> None:
    """Copy every tensor of the file, exactly, into the fresh fp32 adapter layers."""
    from peft import load_peft_weights

    # transformers knows a module's older paths, but not peft's short name for DoRA's magnitudes
    weights = {
        f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: tensor
        for name, tensor in load_peft_weights(source, device="cpu").items()
    }
    info = model.load_adapter(
        peft_config=config,
        adapter_state_dict=weights,
        adapter_name="default",
        is_trainable=True,
        hotswap=True,
        ignore_mismatched_sizes=True,  # they are reported below
    )
    if info.missing_keys or info.unexpected_keys or info.mismatched_keys:
        problem = f"initial adapter {source!r} does not fit this backbone: missing {info.missing_keys}"
        others = f"unexpected {info.unexpected_keys}, wrong shape {info.mismatched_keys}"
        raise ValueError(f"{problem}, {others}")


def target_modules(base: nn.Module, family: Family, adapter: AdapterConfig) -> tuple[str, ...]:
    """Return the full names of the linear layers that ``adapter`` means, in model order."""
    found, names = [], set()
    for scope, root, defaults in (
        ("language", family.language_module, family.language_targets),
        ("vision", family.vision_module, family.vision_targets),
    ):
        if adapter.scope not in (scope, "both"):
            continue
        if root is None:
            advice = "the backbone has no vision tower; set it to language"
            raise ValueError(f"adapter.scope={adapter.scope}: {advice}.")
        for name, module in base.get_submodule(root).named_modules(prefix=root):
            if isinstance(module, nn.Linear):
                last = name.rsplit(".", 1)[-1]
                names.add(last)
                if last in (adapter.targets or defaults):
                    found.append(name)
    unknown = [target for target in adapter.targets or () if target not in names | OTHER_TARGETS]
    if unknown or not found:
        there = f"{unknown or adapter.targets}; there are {', '.join(sorted(names))}"
        raise ValueError(f"adapter.targets: no linear layer in scope {adapter.scope!r} is called {there}.")
    return tuple(found)


def split_adapters(base: nn.Module, num_paths: int, layers: str, first_layer: int) -> None:
    """Give each path its own copy of the LoRA in every decoder layer from ``first_layer`` on.

    ``layers`` is the start of the decoder layers' names, such as ``language_model.layers.``.
    """
    shared = sum(4.0 * p.numel() for name, p in base.named_parameters() if "lora_" in name)
    check_memory(f"num_paths={num_paths} with adapter.per_path", shared * num_paths)
    for name, module in adapted_layers(base).items():
        if name.startswith(layers) and int(name.removeprefix(layers).split(".")[0]) >= first_layer:
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, PathLoRA(module, num_paths))


def draw_adapters(base: nn.Module, seed: int, *, fresh: bool) -> None:
    """Draw LoRA weights anew from ``seed`` alone, leaving the global random state untouched.

    Without ``fresh`` (a published adapter) they stay, and all paths but the first move apart a little.

    Relations:
        Path 0 of ``adapter.per_path`` starts as the shared adapter does, whatever the number of paths.
    """
    modules = adapted_layers(base).values()
    own = [module for module in modules if isinstance(module, PathLoRA)]
    with _seeded(base, seed):
        for module in modules if fresh else ():
            if isinstance(module, PathLoRA):
                module.draw(0)
            else:
                module.reset_lora_parameters("default", True)
        for path in range(1, own[0].num_paths if own else 1):
            for module in own:
                module.draw(path) if fresh else module.perturb(path)


@contextmanager
def _seeded(base: nn.Module, seed: int) -> Iterator[None]:
    """Draw from ``seed`` on the CPU and on the GPU of quantised weights; no other GPU is initialised."""
    device = next(base.parameters()).device
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def _train_adapters_only(base: nn.Module) -> None:
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
