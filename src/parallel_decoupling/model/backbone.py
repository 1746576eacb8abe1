"""A multimodal backbone: loading it, and one forward call to its last hidden state.

Elsewhere on purpose: names inside a family's models (``families``), pooling and paths (``encoder``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, BitsAndBytesConfig, PreTrainedConfig

from parallel_decoupling.model.adapters import AdapterConfig, add_adapters, load_adapter, reset_adapters
from parallel_decoupling.model.attention import PrefixStates, register_prefix_attention
from parallel_decoupling.model.families import Family, family_of
from parallel_decoupling.model.paths import decoder_layer_hook, deepstack, language_model_hook

__all__ = ["TINY_BACKBONE_DIR", "AdapterConfig", "Backbone", "load_backbone", "meta_backbone"]

TINY_BACKBONE_DIR = Path(__file__).parent / "tiny"
"""The trained few-million-parameter Qwen2-VL that the package ships."""

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]


class Backbone(nn.Module):
    """A base model (without language-model head), its processor and the names inside it.

    Args:
        base: the stock base model.
        processor: the stock processor.
        family: a row of ``FAMILIES``.
        name: what the user asked for: ``"tiny"``, a folder or a hub id.
        revision: commit of a hub model, else None.
    """

    def __init__(
        self, base: nn.Module, processor: Any, family: Family, *, name: str, revision: str | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.processor = processor
        self.family = family.resolved(base, processor)
        self.name = name
        self.revision = revision
        self.adapter = AdapterConfig(kind="full")
        self.initial_adapter: str | None = None
        self.adapted_modules: tuple[str, ...] = ()
        self.config: Any = cast(Any, base).config
        text = self.config.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.num_layers: int = text.num_hidden_layers
        self.num_key_value_heads: int = text.num_key_value_heads
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.image_token = self.family.image_token
        for index, layer in enumerate(self.layers):
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

    def add_adapters(self, adapter: AdapterConfig, initial_adapter: str | None = None) -> None:
        """Set what trains; see ``adapters.add_adapters`` and ``adapters.load_adapter``."""
        self.adapter, self.initial_adapter = adapter, initial_adapter
        if initial_adapter is None:
            self.adapted_modules = add_adapters(self.base, self.family, adapter)
        else:
            self.adapter, self.adapted_modules = load_adapter(
                self.base, self.family, adapter, initial_adapter
            )

    @property
    def language_model(self) -> nn.Module:
        """The text decoder inside the base model."""
        return self.base.get_submodule(self.family.language_module)

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers of the language model."""
        return cast(nn.ModuleList, self.base.get_submodule(self.family.layers))

    @property
    def vision_tower(self) -> nn.Module:
        """The image encoder inside the base model."""
        return self.base.get_submodule(self.family.vision_module)

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
        """Return positions of real tokens, from 0 despite a prefix: ``[3, B, L]`` (M-RoPE) or ``[B, L]``."""
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
    def text_embeddings(self, text: str, min_length: int = 1) -> Tensor:
        """Return a text's input embeddings ``[T, D]`` fp32, repeated until it has ``min_length`` tokens."""
        ids: list[int] = []
        repeats = 0
        while len(ids) < min_length:
            repeats += 1
            ids = self.processor.tokenizer(" ".join([text] * repeats), add_special_tokens=False)["input_ids"]
        embed = cast(Any, self.language_model).get_input_embeddings()
        return cast(Tensor, embed(torch.tensor(ids, device=embed.weight.device))).float()

    @torch.no_grad()
    def text_states(self, text: str, min_length: int = 1) -> Tensor:
        """Return ``prompt_states`` of ``text_embeddings``: ``[Y, 2, K, T, H]`` fp32, without graph.

        Always with SDPA: prefixes start while the backbone is on the CPU, where FlashAttention has no kernel
        and flex attention compiles for minutes.
        """
        embeddings_1TD = self.text_embeddings(text, min_length).unsqueeze(0)
        config = cast(Any, self.language_model).config
        wanted = config._attn_implementation
        config._attn_implementation = register_prefix_attention("sdpa")
        try:
            return self.prompt_states(embeddings_1TD.to(self.dtype))[0].float()
        finally:  # not by set_attn_implementation, which would ask for a GPU
            config._attn_implementation = wanted

    def prompt_states(self, embeddings: Tensor) -> Tensor:
        """Compute the keys (post-rotary) and values that the language model gives to prompts run alone.

        Positions are 0 to P - 1. Modules are in evaluation mode meanwhile (no dropout on prompts), as
        gradient checkpointing drops caches in training mode.

        Args:
            embeddings: ``[N, P, D]`` in the backbone's dtype; gradient flows back to them and to the weights.

        Returns:
            ``[N, Y, 2, K, P, H]`` for all layers.
        """
        training = [module for module in self.base.modules() if module.training]
        self.base.eval()
        try:
            output = self.language_model(inputs_embeds=embeddings, use_cache=True)
        finally:
            for module in training:
                module.training = True
        layers = output.past_key_values.layers
        return torch.stack([torch.stack((layer.keys, layer.values), 1) for layer in layers], 1)

    def reset_adapters(self, seed: int) -> None:
        """Draw fresh LoRA weights from ``seed`` alone; those of an initial adapter stay.

        The global random state is left untouched.
        """
        if self.initial_adapter is None:
            reset_adapters(self.base, seed)


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    adapter: AdapterConfig | None = None,
    initial_adapter: str | None = None,
    gradient_checkpointing: bool = False,
    quantization: Literal["4bit"] | None = None,
    family: Family | None = None,
) -> Backbone:
    """Load a pretrained base model with prefix attention and the wanted trainable part.

    Args:
        name: ``"tiny"`` (shipped with the package), a local folder (never touches the network) or a hub id.
        revision: hub branch, tag or commit.
        dtype: of the backbone's weights; adapters and prefixes are always fp32.
        attention: of the language model; the vision tower uses the same without prefix (sdpa beside flex).
            ``flash_attention_2`` (needs flash-attn and a half-precision dtype) and ``flex_attention`` train
            on a GPU only.
        adapter: what trains; None is ``AdapterConfig()``, LoRA on the language model.
        initial_adapter: folder or hub id of a published LoRA or DoRA adapter to continue from; see
            ``adapters.load_adapter``.
        gradient_checkpointing: recompute layers in the backward pass.
        quantization: ``"4bit"`` keeps frozen weights in 4 bits (NF4; needs bitsandbytes); not with
            ``kind="full"``.
        family: for a model whose family is not in ``FAMILIES``; None looks it up.

    Returns:
        The backbone in training mode, on the CPU; quantized on this process's GPU.

    Raises:
        ValueError: a folder that does not exist, a family not in ``FAMILIES``, missing or unexpected
            weights, adapter targets that match nothing, a missing package.
    """
    adapter = adapter or AdapterConfig()
    _check_options(dtype, attention, adapter, quantization)
    source, options = _source(name, revision)
    family = family or family_of(name, _model_type(name, source, options))
    base, info = AutoModel.from_pretrained(
        source,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa" if attention == "flex_attention" else attention,  # of the vision tower
        output_loading_info=True,
        **options,
        **(_quantized(dtype) if quantization else {}),
    )
    _check_weights(name, info, family)
    processor = cast(Any, AutoProcessor).from_pretrained(source, **options)
    commit = getattr(base.config, "_commit_hash", None)
    backbone = Backbone(base, processor, family, name=name, revision=commit or revision)
    backbone.prepare(attention, gradient_checkpointing=gradient_checkpointing)
    backbone.add_adapters(adapter, initial_adapter)
    return backbone.train()


def meta_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    adapter: AdapterConfig | None = None,
    initial_adapter: str | None = None,
    family: Family | None = None,
    **without_shape: Any,
) -> Backbone:
    """Build what ``load_backbone`` loads on the meta device, without weights; the arguments are the same.

    Relations:
        Names, shapes and dtypes of all parameters and what trains equal those of ``load_backbone`` without
        quantization.
    """
    source, options = _source(name, revision)
    family = family or family_of(name, _model_type(name, source, options))
    config = AutoConfig.from_pretrained(source, **options)
    processor = cast(Any, AutoProcessor).from_pretrained(source, **options)
    with torch.device("meta"):
        base = cast(Any, AutoModel).from_config(config, dtype=getattr(torch, dtype))
        backbone = Backbone(base, processor, family, name=name, revision=revision)
        backbone.add_adapters(adapter or AdapterConfig(), initial_adapter)
    return backbone.train()


def check_dtype(dtype: str) -> None:
    """Raise a ValueError for a dtype that weights are not loaded in."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")


def _check_options(dtype: str, attention: str, adapter: AdapterConfig, quantization: str | None) -> None:
    """Refuse what cannot work before anything is read."""
    check_dtype(dtype)
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ValueError(
            "attention='flash_attention_2' needs a GPU and flash-attn (pip install flash-attn); "
            "attention='sdpa' works everywhere"
        )
    if attention == "flash_attention_2" and dtype == "float32":
        raise ValueError("attention='flash_attention_2' needs dtype='bfloat16' or 'float16'")
    if quantization not in (None, "4bit"):
        raise ValueError(f"quantization must be '4bit' or None, got {quantization!r}")
    if quantization and find_spec("bitsandbytes") is None:
        raise ValueError("quantization='4bit' needs: pip install 'parallel-decoupling[quantized]'")
    if quantization and adapter.kind == "full":
        raise ValueError("quantized weights cannot train: set adapter.kind to lora, dora or frozen")


def _quantized(dtype: Dtype) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` for frozen weights in 4 bits, computed with in ``dtype``.

    They are made on this process's GPU. bitsandbytes repacks weights on a CPU in evaluation, after which they
    cannot train there.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    config = cast(Any, BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _source(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Return what transformers should load, and how."""
    folder = TINY_BACKBONE_DIR if name == "tiny" else Path(name).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True}
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
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
    if config.get("model_type") is None:
        raise ValueError(f"backbone {name!r}: no config.json with a model_type in {source}")
    return str(config["model_type"])


def _check_weights(name: str, info: Mapping[str, Any], family: Family) -> None:
    """Raise a ValueError when the files and the model do not hold the same weights."""
    missing = sorted(map(str, info["missing_keys"]))
    unexpected = sorted(map(str, set(info["unexpected_keys"]) - set(family.ignored_weights)))
    mismatched = sorted(map(str, info["mismatched_keys"]))
    if missing or unexpected or mismatched:
        raise ValueError(
            f"backbone {name!r} does not fit its config: missing weights {missing}, unexpected {unexpected}, "
            f"wrong shape {mismatched}. Missing ones would be random numbers, so this is an error."
        )
