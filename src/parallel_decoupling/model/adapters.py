"""What trains in a backbone: nothing, LoRA or DoRA layers, or every weight.

Here: which linear layers get an adapter, adding fresh ones, loading published ones. Elsewhere: the names of a
family's layers (``families``), loading the backbone itself (``backbone``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from parallel_decoupling.model.families import Family


@dataclass(frozen=True)
class AdapterConfig:
    """Which part of the backbone trains.

    Attributes:
        kind: ``"frozen"`` (nothing: prefixes only), ``"lora"``, ``"dora"`` or ``"full"`` (every weight).
        rank: of the low-rank update, at least 1.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on the input of the update, in [0, 1).
        scope: where LoRA and DoRA go: the language model, the vision tower or both.
        targets: last names of the linear layers to adapt; None is the family's default.
    """

    kind: Literal["frozen", "lora", "dora", "full"] = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    scope: Literal["language", "vision", "both"] = "language"
    targets: tuple[str, ...] | None = None


def add_adapters(base: nn.Module, family: Family, adapter: AdapterConfig) -> tuple[str, ...]:
    """Set what trains in ``base``, adding LoRA or DoRA layers in fp32 if asked for.

    Returns:
        Full names of the adapted linear layers, in model order.

    Raises:
        ValueError: when no linear layer matches the targets.
    """
    base.requires_grad_(adapter.kind == "full")
    if adapter.kind not in ("lora", "dora"):
        return ()
    modules = target_modules(base, family, adapter)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(modules),
        use_dora=adapter.kind == "dora",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, base)
    _train_adapters_only(base)
    return modules


def target_modules(base: nn.Module, family: Family, adapter: AdapterConfig) -> tuple[str, ...]:
    """Full names of the linear layers that ``adapter`` means, in model order.

    Raises:
        ValueError: when there are none.
    """
    scopes = {
        "language": (family.language_module, family.language_targets),
        "vision": (family.vision_module, family.vision_targets),
    }
    found = []
    for scope in ("language", "vision") if adapter.scope == "both" else (adapter.scope,):
        root, defaults = scopes[scope]
        targets = adapter.targets or defaults
        for name, module in base.get_submodule(root).named_modules():
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets:
                found.append(f"{root}.{name}")
    if not found:
        raise ValueError(
            f"no linear layer in scope {adapter.scope!r} is called {list(adapter.targets or ())}; "
            f"defaults are language {list(family.language_targets)}, vision {list(family.vision_targets)}"
        )
    return tuple(found)


def reset_adapters(base: nn.Module, seed: int) -> None:
    """Draw LoRA weights anew from ``seed`` alone, leaving the global random state untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in base.modules():
            if isinstance(module, LoraLayer):
                cast(Any, module).reset_lora_parameters("default", True)


def _train_adapters_only(base: nn.Module) -> None:
    for name, parameter in base.named_parameters():
        is_adapter = "lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()
