"""A backbone, with or without vision: loading it, what makes its tokens, and one call to its last state."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, BitsAndBytesConfig, DynamicCache

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.model.adapters import AdapterConfig, add_adapters, load_adapter
from parallel_decoupling.model.attention import PathStates, prefix_attention
from parallel_decoupling.model.families import FAMILIES, Family
from parallel_decoupling.model.paths import calling, deepstack, enter_layer, hand_down, pooled_only, same_call
from parallel_decoupling.model.turns import set_training
from parallel_decoupling.option_types import checked

TINY_BACKBONE_DIR = Path(__file__).parent / "tiny"
"""The trained few-million-parameter Qwen2-VL that the package ships."""

GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""Which of the image tensors say how large images and videos are, and how fast the latter."""
Tensors = Mapping[str, Tensor]
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]


class Backbone(nn.Module):
    """A stock base model (without language-model head), its processor and the names inside it.

    ``name`` is what the user asked for, ``revision`` the commit of a hub model, ``image_token`` what stands
    for an image in its text: the placeholder itself for a model without vision, whose processor refuses it.
    """

    def __init__(
        self,
        base: Any,
        processor: Any,
        family: Family,
        *,
        name: str,
        revision: str | None = None,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.processor, self.name, self.revision = processor, name, revision
        self.family = family.resolved(base, processor)
        self.adapter = AdapterConfig(kind="full")
        self.initial_adapter: str | None = None
        self.config: Any = base.config
        text = base.config.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.num_layers: int = text.num_hidden_layers
        self.num_key_value_heads: int = text.num_key_value_heads
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.image_token = self.family.image_token or IMAGE_PLACEHOLDER
        self.template = self.family.prompt
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(enter_layer, index), with_kwargs=True)
        self.language_model.register_forward_pre_hook(hand_down, with_kwargs=True)
        mlp = getattr(self.layers[-1], "mlp", None)
        if mlp is not None:  # another family may call it otherwise, and then computes what is not read
            mlp.forward = partial(pooled_only, mlp.forward)
        add_between_layers = getattr(self.language_model, "_deepstack_process", None)
        if add_between_layers is not None:
            self.language_model._deepstack_process = partial(deepstack, add_between_layers)
        self.language_model.set_attn_implementation(prefix_attention(attention))
        if gradient_checkpointing:
            enable = getattr(base, "activation_checkpointing_enable", None)
            (enable or base.gradient_checkpointing_enable)({"use_reentrant": False, "context_fn": same_call})

    @property
    def language_model(self) -> Any:
        """Return the text decoder inside the base model."""
        return self.base.get_submodule(self.family.language_module)

    @property
    def layers(self) -> nn.ModuleList:
        """Return the decoder layers of the language model."""
        return cast(nn.ModuleList, self.base.get_submodule(self.family.layers))

    @property
    def vision_tower(self) -> nn.Module:
        """Return the image encoder inside the base model, an empty module if there is none."""
        name = self.family.vision_module
        return nn.Module() if name is None else cast(nn.Module, self.base.get_submodule(name))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the base model's own weights (adapters are fp32)."""
        return cast(torch.dtype, self.base.dtype)

    def forward(self, tokens: Tensors, vision: Tensors, path_states: PathStates | None = None) -> Tensor:
        """Run the vision tower once and the language model once per path.

        ``tokens`` are ``[B, L]``, ``vision`` the image tensors of all rows, concatenated. The result is
        ``[N * B, L, D]``, path-major and after the final norm; with ``path_states.pooled`` only those tokens'
        states are right.

        Relations:
            ``path_states=None`` equals the stock base model bit for bit.
        """
        positions = self.position_ids(tokens, vision)
        with calling(path_states):
            output = self.base(**tokens, **vision, position_ids=positions, use_cache=False)
        return cast(Tensor, output.last_hidden_state)

    def position_ids(self, tokens: Tensors, vision: Tensors) -> Tensor:
        """Return positions of real tokens, from 0 despite a prefix: M-RoPE's ``[3, B, L]``, or ``[B, L]``."""
        mask = tokens["attention_mask"]
        position_BL = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.family.position_ids == "sequential":
            return position_BL
        if not vision:
            return position_BL.expand(3, -1, -1)
        positions, _ = self.base.get_rope_index(
            tokens["input_ids"],
            mm_token_type_ids=tokens["mm_token_type_ids"],
            attention_mask=mask,
            **{key: vision[key] for key in GRIDS if key in vision},
        )
        return cast(Tensor, positions)

    @torch.no_grad()
    def text_embeddings(self, text: str, min_length: int = 1) -> Tensor:
        """Return a text's input embeddings ``[T, D]`` fp32, repeated until it has ``min_length`` tokens."""
        words = [text]
        tokenizer = partial(self.processor.tokenizer, add_special_tokens=False)
        while len(ids := tokenizer(" ".join(words))["input_ids"]) < min_length:
            words.append(text)
        embed = self.language_model.get_input_embeddings()
        return cast(Tensor, embed(torch.tensor(ids, device=embed.weight.device))).float()

    @torch.no_grad()
    def text_states(self, text: str, min_length: int = 1) -> Tensor:
        """Return ``prompt_states`` of ``text_embeddings``: ``[Y, 2, K, T, H]`` fp32, without graph.

        Always with SDPA, as prefixes start on the CPU, where FlashAttention has no kernel.
        """
        embeddings_1TD = self.text_embeddings(text, min_length).unsqueeze(0)
        config = self.language_model.config
        wanted = config._attn_implementation
        config._attn_implementation = prefix_attention("sdpa")
        try:
            return self.prompt_states(embeddings_1TD.to(self.dtype))[0].float()
        finally:  # not by set_attn_implementation, which would ask for a GPU
            config._attn_implementation = wanted

    def prompt_states(self, embeddings: Tensor) -> Tensor:
        """Compute keys (post-rotary) and values of prompts ``[N, P, D]`` run alone: ``[N, Y, 2, K, P, H]``.

        Modules are in evaluation mode meanwhile, as gradient checkpointing drops caches in training mode. The
        cache keeps every position in sliding layers too: a prefix stands in front of their windows.
        """
        trained, cache = set_training(self.base.modules(), False), DynamicCache()
        try:
            self.language_model(inputs_embeds=embeddings, use_cache=True, past_key_values=cache)
        finally:
            set_training(trained, True)
        return torch.stack([torch.stack((each.keys, each.values), 1) for each in cast(Any, cache).layers], 1)


@checked()
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
    local_files_only: bool = False,
    meta: bool = False,
) -> Backbone:
    """Load a pretrained base model in training mode, on the CPU; quantized on this process's GPU.

    ``PDFEmbedder`` documents the arguments; ``meta`` gives shapes alone, on the meta device. A local folder
    or ``local_files_only`` never touches the network. The vision tower has sdpa beside flex.

    Relations:
        With ``meta`` names, shapes and dtypes of all parameters and what trains are those without it.
    """
    adapter = adapter or AdapterConfig()
    if quantization and adapter.kind == "full":
        raise ValueError("quantization needs adapter.kind lora, dora or frozen")
    folder = TINY_BACKBONE_DIR if name == "tiny" else Path(name).expanduser()
    source, options = name, {"revision": revision, "local_files_only": local_files_only}
    if os.path.isdir(folder):  # False for names that no folder can have
        source, options = str(folder), {"local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone {name!r} has no config that can be read: {error}") from error
    if family is None and config.model_type not in FAMILIES:
        found = f"backbone {name!r} has model_type {config.model_type!r}; tested: {', '.join(FAMILIES)}"
        advice = "give the option `family`, with what transformers does not tell of it"
        raise ValueError(f"{found}. To try another family, {advice}.")
    family = family or FAMILIES[config.model_type]
    kind: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if meta:
        with torch.device("meta"):
            base = cast(Any, AutoModel).from_config(config, **kind)
    else:
        kind["use_safetensors"] = True  # nothing is unpickled
        kind["attn_implementation"] = "sdpa" if attention == "flex_attention" else attention
        if quantization:  # on this process's GPU: a CPU repacks the weights in evaluation, and cannot train
            gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            kind["device_map"] = {"": gpu if torch.cuda.is_available() else "cpu"}
            bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            config_of = cast(Any, BitsAndBytesConfig)
            kind["quantization_config"] = config_of(**bits, bnb_4bit_compute_dtype=kind["dtype"])
        load = cast(Any, AutoModel).from_pretrained
        try:
            base, info = load(source, output_loading_info=True, **kind, **options)
        except SafetensorError as error:
            raise ValueError(f"the weights of backbone {name!r} are damaged: {error}") from error
        except OSError as error:
            if error.errno is not None:  # of the disk
                raise
            advice = "save it anew with save_pretrained of transformers"
            raise ValueError(f"backbone {name!r} has no weights in safetensors: {error} {advice}") from error
        except ImportError as error:
            needed = f"attention={attention!r}, quantization={quantization!r}"
            raise ValueError(f"a package for {needed} is not installed: {error}") from error
        missing, mismatched = info["missing_keys"], info["mismatched_keys"]
        unexpected = set(info["unexpected_keys"]) - set(family.ignored_weights)
        if missing or unexpected or mismatched:  # missing weights would be random numbers
            found = f"missing {missing}, unexpected {unexpected}, wrong shape {mismatched}"
            raise ValueError(f"backbone {name!r} does not fit its config: {found}")
    processor = load_processor(source, config, **options)
    commit = getattr(config, "_commit_hash", None)
    made: dict[str, Any] = {"attention": attention, "gradient_checkpointing": gradient_checkpointing}
    backbone = Backbone(base, processor, family, name=name, revision=commit or revision, **made)
    with torch.device("meta" if meta else "cpu"):
        backbone.adapter, backbone.initial_adapter = adapter, initial_adapter
        if initial_adapter is None:
            add_adapters(base, backbone.family, adapter)
        else:
            backbone.adapter = load_adapter(base, backbone.family, adapter, initial_adapter)
    return backbone.train()


class TextProcessor:
    """The tokenizer of a language model without vision, called like a processor.

    A tokenizer without a padding token, such as Llama 3's, pads with its end token: the mask hides it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(
        self, text: Sequence[str], images: Sequence[Any] | None = None, **options: Any
    ) -> Mapping[str, Tensor]:
        """Tokenise ``B`` rows; a picture is a ``ValueError``."""
        if images is not None:
            raise ValueError("the backbone reads text alone. Leave the picture out, or take one with vision.")
        return cast(Mapping[str, Tensor], self.tokenizer(text, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def load_processor(source: str | Path, config: Any, **options: Any) -> Any:
    """Load the processor of a backbone with this config, or its tokenizer if the config is a text model's."""
    if config.get_text_config() is config:  # whose files may name a processor all the same, as Gemma 3's do
        return TextProcessor(AutoTokenizer.from_pretrained(source, **options))
    return cast(Any, AutoProcessor).from_pretrained(source, **options)
