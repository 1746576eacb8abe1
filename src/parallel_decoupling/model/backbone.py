"""Loading a multimodal backbone: the family table, adapters, and one forward call to its last hidden state.

The only file that knows transformers' model classes and peft. Elsewhere: prefix attention (``attention``),
pooling and paths (``encoder``), which weights a checkpoint holds (``checkpoint``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, PreTrainedConfig

from parallel_decoupling.model.attention import (
    PrefixStates,
    decoder_layer_hook,
    language_model_hook,
    register_prefix_attention,
)

TINY_BACKBONE_DIR = Path(__file__).parent / "tiny"
"""The trained few-million-parameter Qwen2-VL that the package ships."""


@dataclass(frozen=True)
class Family:
    """What differs between model families; one row of ``FAMILIES``.

    Attributes:
        image_token: placeholder that the processor expands to an image's tokens.
        language_module: name of the language model inside the base model.
        vision_module: name of the vision tower inside the base model.
        layers: name of the list of decoder layers inside the base model.
        position_ids: ``"mrope"`` (time, height and width of each token) or ``"sequential"``.
        lora_targets: default last names of the linear layers to adapt, per scope.
        blocks: class names of the repeated blocks, for sharding.
        ignored_weights: weights of the published checkpoint that the base model rightly leaves out.
    """

    image_token: str
    language_module: str
    vision_module: str
    layers: str
    position_ids: Literal["mrope", "sequential"]
    lora_targets: Mapping[str, tuple[str, ...]]
    blocks: tuple[str, ...]
    ignored_weights: tuple[str, ...] = ("lm_head.weight",)


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        image_token="<|image_pad|>",
        language_module="language_model",
        vision_module="visual",
        layers="language_model.layers",
        position_ids="mrope",
        lora_targets={
            "language": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "vision": ("qkv", "proj", "fc1", "fc2"),
        },
        blocks=("Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"),
    ),
}
"""Supported families by ``model_type`` of their config."""


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


class Backbone(nn.Module):
    """A base model (without language-model head), its processor and its row of the family table.

    Args:
        base: the stock base model, prefix attention set on its text part.
        processor: the stock processor.
        family: the row of ``FAMILIES``.
        name: what the user asked for: ``"tiny"``, a folder or a hub id.
        revision: commit of a hub model, else None.
    """

    def __init__(
        self, base: nn.Module, processor: Any, family: Family, *, name: str, revision: str | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.processor = processor
        self.family = family
        self.name = name
        self.revision = revision
        self.adapter = AdapterConfig(kind="full")
        self.adapted_modules: tuple[str, ...] = ()
        self.config: Any = cast(Any, base).config
        text = self.config.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.num_layers: int = text.num_hidden_layers
        self.num_key_value_heads: int = text.num_key_value_heads
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.image_token = family.image_token
        for index, layer in enumerate(cast(nn.ModuleList, base.get_submodule(family.layers))):
            layer.register_forward_pre_hook(partial(decoder_layer_hook, index), with_kwargs=True)

    @property
    def language_model(self) -> nn.Module:
        """The text decoder inside the base model."""
        return self.base.get_submodule(self.family.language_module)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base model's own weights (adapters are fp32)."""
        return cast(torch.dtype, cast(Any, self.base).dtype)

    def forward(
        self,
        tokens: Mapping[str, Tensor],
        vision: Mapping[str, Tensor],
        prefix_states: PrefixStates | None = None,
    ) -> Tensor:
        """Run the vision tower once and the language model once per path.

        Args:
            tokens: ``input_ids``, ``attention_mask`` and whatever else the processor made, ``[B, L]``.
            vision: image tensors of all rows, concatenated; empty without images.
            prefix_states: the paths' prefixes; None is the stock model.

        Returns:
            ``[N * B, L, D]`` path-major, after the final norm.

        Relations:
            ``prefix_states=None`` equals the stock base model bit for bit.
        """
        with self._handing_down(prefix_states):
            output = self.base(
                **tokens, **vision, position_ids=self.position_ids(tokens, vision), use_cache=False
            )
        return cast(Tensor, output.last_hidden_state)

    @contextmanager
    def _handing_down(self, states: PrefixStates | None) -> Iterator[None]:
        if states is None:
            yield
            return
        hook = self.language_model.register_forward_pre_hook(
            cast(Callable[..., Any], partial(language_model_hook, states)), with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()

    def position_ids(self, tokens: Mapping[str, Tensor], vision: Mapping[str, Tensor]) -> Tensor:
        """Positions of real tokens, from 0 despite a prefix: ``[3, B, L]`` for M-RoPE, else ``[B, L]``."""
        mask = tokens["attention_mask"]
        position_BL = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.family.position_ids == "sequential":
            return position_BL
        if not vision:
            return position_BL.expand(3, -1, -1)
        token_types = tokens.get("mm_token_type_ids")
        if token_types is None:
            token_types = (tokens["input_ids"] == self.config.image_token_id).int()
        positions, _ = cast(Any, self.base).get_rope_index(
            tokens["input_ids"],
            mm_token_type_ids=token_types,
            image_grid_thw=vision["image_grid_thw"],
            attention_mask=mask,
        )
        return cast(Tensor, positions)

    @torch.no_grad()
    def text_states(self, text: str, min_length: int = 1) -> Tensor:
        """Keys (post-rotary) and values that the language model itself computes for a text.

        Args:
            text: run alone, without special tokens.
            min_length: the text is repeated until it has that many tokens.

        Returns:
            ``[Y, 2, K, T, H]`` fp32 for all layers, ``T >= min_length``.
        """
        ids: list[int] = []
        repeats = 0
        while len(ids) < min_length:
            repeats += 1
            ids = self.processor.tokenizer(" ".join([text] * repeats), add_special_tokens=False)["input_ids"]
        was_training = self.base.training
        self.base.eval()  # gradient checkpointing drops caches in training mode
        try:
            output = self.language_model(
                input_ids=torch.tensor([ids], device=next(self.base.parameters()).device), use_cache=True
            )
        finally:
            self.base.train(was_training)
        layers = output.past_key_values.layers
        return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers]).float()

    def reset_adapters(self, seed: int) -> None:
        """Draw LoRA weights anew from ``seed`` alone, leaving the global random state untouched."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in self.base.modules():
                if isinstance(module, LoraLayer):
                    cast(Any, module).reset_lora_parameters("default", True)


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: Literal["sdpa", "eager"] = "sdpa",
    adapter: AdapterConfig | None = None,
    gradient_checkpointing: bool = False,
) -> Backbone:
    """Load a pretrained base model with prefix attention and the wanted trainable part.

    Args:
        name: ``"tiny"`` (shipped with the package), a local folder (never touches the network) or a hub id.
        revision: hub branch, tag or commit.
        dtype: of the backbone's weights; adapters and prefixes are always fp32.
        attention: of the language model; the vision tower uses the same without prefix.
        adapter: what trains; None is ``AdapterConfig()``, LoRA on the language model.
        gradient_checkpointing: recompute layers in the backward pass.

    Returns:
        The backbone in training mode, on the CPU.

    Raises:
        ValueError: a folder that does not exist, a family not in ``FAMILIES``, missing or unexpected
            weights, adapter targets that match nothing.
    """
    source, options = _locate(name, revision)
    family = _family(name, source, options)
    base, info = AutoModel.from_pretrained(
        source,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
        **options,
    )
    _check_weights(name, info, family)
    base.set_attn_implementation({"text_config": register_prefix_attention(attention)})
    if gradient_checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    processor = cast(Any, AutoProcessor).from_pretrained(source, **options)
    commit = getattr(base.config, "_commit_hash", None)
    backbone = Backbone(base, processor, family, name=name, revision=commit or revision)
    _adapt(backbone, adapter or AdapterConfig())
    return backbone.train()


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Return what transformers should load, and how."""
    folder = TINY_BACKBONE_DIR if name == "tiny" else Path(name).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True}
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ValueError(
            f"backbone {name!r}: the folder {folder} does not exist, and it is not a hub id 'owner/model'"
        )
    return name, {"revision": revision}


def _family(name: str, source: str, options: Mapping[str, Any]) -> Family:
    """Look up the family by the ``model_type`` of the config, before any weight is read."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **options)
    except OSError as error:
        raise ValueError(f"backbone {name!r}: no readable model config there ({error})") from error
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError(f"backbone {name!r}: no config.json with a model_type in {source}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"backbone {name!r} has model_type {model_type!r}; known: {', '.join(FAMILIES)}. "
            "Another family needs a row in parallel_decoupling.model.backbone.FAMILIES."
        )
    return FAMILIES[model_type]


def _check_weights(name: str, info: Mapping[str, Any], family: Family) -> None:
    missing = sorted(map(str, info["missing_keys"]))
    unexpected = sorted(map(str, set(info["unexpected_keys"]) - set(family.ignored_weights)))
    mismatched = sorted(map(str, info["mismatched_keys"]))
    if missing or unexpected or mismatched:
        raise ValueError(
            f"backbone {name!r} does not fit its config: missing weights {missing}, unexpected {unexpected}, "
            f"wrong shape {mismatched}. Missing ones would be random numbers, so this is an error."
        )


def _adapt(backbone: Backbone, adapter: AdapterConfig) -> None:
    """Set what trains, adding LoRA or DoRA layers if asked for."""
    backbone.adapter = adapter
    backbone.requires_grad_(adapter.kind == "full")
    if adapter.kind not in ("lora", "dora"):
        return
    backbone.adapted_modules = _target_modules(backbone, adapter)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(backbone.adapted_modules),
        use_dora=adapter.kind == "dora",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, backbone.base)
    for parameter_name, parameter in backbone.base.named_parameters():
        is_adapter = "lora_" in parameter_name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()


def _target_modules(backbone: Backbone, adapter: AdapterConfig) -> tuple[str, ...]:
    """Full names of the linear layers to adapt, in model order."""
    family = backbone.family
    roots = {"language": family.language_module, "vision": family.vision_module}
    found = []
    for scope in ("language", "vision") if adapter.scope == "both" else (adapter.scope,):
        targets = adapter.targets or family.lora_targets[scope]
        for module_name, module in backbone.base.get_submodule(roots[scope]).named_modules():
            if isinstance(module, nn.Linear) and module_name.rsplit(".", 1)[-1] in targets:
                found.append(f"{roots[scope]}.{module_name}")
    if not found:
        raise ValueError(
            f"no linear layer in scope {adapter.scope!r} is called {list(adapter.targets or ())}; "
            f"defaults are {dict(family.lora_targets)}"
        )
    return tuple(found)
