"""Loading a multimodal backbone, and one forward call to its last hidden state.

The only file that knows transformers' model classes. Elsewhere: names inside a family's models
(``families``), adapters (``adapters``), prefix attention (``attention``), pooling and paths (``encoder``),
which weights a checkpoint holds (``checkpoint``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig

from parallel_decoupling.model.adapters import AdapterConfig, add_adapters, reset_adapters
from parallel_decoupling.model.attention import (
    PrefixStates,
    decoder_layer_hook,
    deepstack,
    language_model_hook,
    register_prefix_attention,
)
from parallel_decoupling.model.families import FAMILIES, Family
from parallel_decoupling.model.geometries import GEOMETRIES

__all__ = ["TINY_BACKBONE_DIR", "AdapterConfig", "Backbone", "load_backbone", "meta_backbone"]

TINY_BACKBONE_DIR = Path(__file__).parent / "tiny"
"""The trained few-million-parameter Qwen2-VL that the package ships."""


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
        layers = cast(nn.ModuleList, base.get_submodule(family.layers))
        self.base = base
        self.processor = processor
        self.family = family if family.blocks else replace(family, blocks=(type(layers[0]).__name__,))
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
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(decoder_layer_hook, index), with_kwargs=True)
        add_between_layers = getattr(self.language_model, "_deepstack_process", None)
        if add_between_layers is not None:
            cast(Any, self.language_model)._deepstack_process = partial(deepstack, add_between_layers)

    def prepare(self, attention: str, *, gradient_checkpointing: bool) -> None:
        """Give the language model prefix attention on top of ``attention``; switch checkpointing on."""
        cast(Any, self.language_model).set_attn_implementation(register_prefix_attention(attention))
        if gradient_checkpointing:
            base = cast(Any, self.base)
            enable = getattr(base, "activation_checkpointing_enable", None)
            (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})

    def add_adapters(self, adapter: AdapterConfig) -> None:
        """Set what trains; see ``adapters.add_adapters``."""
        self.adapter = adapter
        self.adapted_modules = add_adapters(self.base, self.family, adapter)

    @property
    def language_model(self) -> nn.Module:
        """The text decoder inside the base model."""
        return self.base.get_submodule(self.family.language_module)

    @property
    def is_meta(self) -> bool:
        """Whether there are shapes only, as ``meta_backbone`` makes them."""
        return next(self.base.parameters()).is_meta

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
        reset_adapters(self.base, seed)


Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    adapter: AdapterConfig | None = None,
    gradient_checkpointing: bool = False,
    family: Family | None = None,
) -> Backbone:
    """Load a pretrained base model with prefix attention and the wanted trainable part.

    Args:
        name: ``"tiny"`` (shipped with the package), a local folder (never touches the network) or a hub id.
        revision: hub branch, tag or commit.
        dtype: of the backbone's weights; adapters and prefixes are always fp32.
        attention: of the language model; the vision tower uses the same without prefix.
        adapter: what trains; None is ``AdapterConfig()``, LoRA on the language model.
        gradient_checkpointing: recompute layers in the backward pass.
        family: names inside a model that is not in ``FAMILIES``; None looks it up.

    Returns:
        The backbone in training mode, on the CPU.

    Raises:
        ValueError: a folder that does not exist, a family not in ``FAMILIES``, missing or unexpected
            weights, adapter targets that match nothing.
    """
    source, options = _locate(name, revision)
    family = family or _family(name, _model_type(name, source, options))
    base, info = AutoModel.from_pretrained(
        source,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
        **options,
    )
    _check_weights(name, info, family)
    processor = cast(Any, AutoProcessor).from_pretrained(source, **options)
    commit = getattr(base.config, "_commit_hash", None)
    backbone = Backbone(base, processor, family, name=name, revision=commit or revision)
    backbone.prepare(attention, gradient_checkpointing=gradient_checkpointing)
    backbone.add_adapters(adapter or AdapterConfig())
    return backbone.train()


def meta_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    adapter: AdapterConfig | None = None,
    gradient_checkpointing: bool = False,
    family: Family | None = None,
) -> Backbone:
    """Build a backbone on the meta device: all its shapes and names, no weights, no processor.

    Args:
        name: a key of ``GEOMETRIES`` (needs no file at all), or what ``load_backbone`` takes; of a folder or
            hub model only the config is read.
        revision: hub branch, tag or commit.
        dtype: of the backbone's weights; adapters are fp32.
        attention: as in ``load_backbone``.
        adapter: as in ``load_backbone``.
        gradient_checkpointing: as in ``load_backbone``.
        family: as in ``load_backbone``.

    Raises:
        ValueError: as ``load_backbone``.

    Relations:
        Names, shapes and dtypes of all parameters and what trains equal those of ``load_backbone``.
    """
    if name in GEOMETRIES:
        arguments = dict(GEOMETRIES[name])
        config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    else:
        source, options = _locate(name, revision)
        _model_type(name, source, options)
        config = AutoConfig.from_pretrained(source, **options)
    family = family or _family(name, config.model_type)
    with torch.device("meta"):
        base = AutoModel.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
        backbone = Backbone(base, None, family, name=name, revision=revision)
        backbone.prepare(attention, gradient_checkpointing=gradient_checkpointing)
        backbone.add_adapters(adapter or AdapterConfig())
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


def _model_type(name: str, source: str, options: Mapping[str, Any]) -> str:
    """Read the ``model_type`` of the config, before any weight."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **options)
    except OSError as error:
        raise ValueError(f"backbone {name!r}: no readable model config there ({error})") from error
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError(f"backbone {name!r}: no config.json with a model_type in {source}")
    return str(model_type)


def _family(name: str, model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(
            f"backbone {name!r} has model_type {model_type!r}; known: {', '.join(FAMILIES)}. Another family "
            "needs the option `family` with image_token, language_module, vision_module, layers and "
            "position_ids, or a row in parallel_decoupling.model.families.FAMILIES."
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
