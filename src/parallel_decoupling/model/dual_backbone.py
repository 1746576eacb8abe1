"""OpenCLIP models: their names, loading, and their tokenizer and image transform as one processor.

The only file that imports open_clip, and only when such a model is asked for. Elsewhere: fusing both towers
(``dual_encoder``), choosing between this and a multimodal LLM (``build``), image decoding (``data.collate``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.sources import check_dtype

PREFIX = "open_clip:"
CONFIG_FILE = "open_clip_config.json"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""open_clip's names; with the last two normalisation layers stay fp32."""
UNUSED_PARAMETERS = ("logit_scale", "logit_bias")
"""Of OpenCLIP's own loss; ours has its temperature."""


def is_dual_encoder(name: str) -> bool:
    """Whether a backbone is OpenCLIP's: ``open_clip:...``, or a folder with ``open_clip_config.json``."""
    return name.startswith(PREFIX) or (Path(name).expanduser() / CONFIG_FILE).is_file()


def absolute_name(name: str) -> str:
    """Return any backbone's name with a local folder or weights file in it as an absolute path."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    architecture, slash, weights = name.partition("/")
    if name.startswith(PREFIX) and Path(weights).is_file():
        return f"{architecture}{slash}{Path(weights).resolve()}"
    return name


class DualProcessor:
    """Texts and images to tensors, called like a Hugging Face processor.

    Image placeholders are taken out of the text. Images get the model's own evaluation transform, also in
    training (no augmentation).

    Args:
        tokenizer: open_clip's, called with texts and optionally another ``context_length``.
        transform: an RGB image to ``[3, height, width]``.

    Attributes:
        context_length: L, tokens that the text tower takes.
    """

    def __init__(self, tokenizer: Callable[..., Tensor], transform: Callable[[Image.Image], Tensor]) -> None:
        self.tokenizer = tokenizer
        self.transform = transform
        empty_1L = tokenizer([""])
        self.context_length: int = empty_1L.shape[1]
        self.padding_id = int(empty_1L[0, -2])  # the very last one may be a class token

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Image.Image | Sequence[Image.Image]] | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Tokenise rows and transform their images.

        Args:
            text: ``B`` prompts with one ``IMAGE_PLACEHOLDER`` per image.
            images: of all rows in the order of the placeholders, in one list or in one per row.
            options: of Hugging Face processors; padding and the kind of tensor are always the same here.

        Returns:
            Each ``[B, L]``: ``input_ids``, padded; ``attention_mask``, all 1 for a row with text (the text
            tower always runs over L tokens), all 0 for one without; ``truncated``, all 1 for a row whose
            text has more than L tokens and is cut. One entry per image: ``pixel_values``, ``image_sizes``
            (height and width as given).

        Raises:
            ValueError: a row with neither text nor image.
        """
        texts = [row.replace(IMAGE_PLACEHOLDER, " ").strip() for row in text]
        for row, rest in zip(text, texts, strict=True):
            if not rest and IMAGE_PLACEHOLDER not in row:
                raise ValueError("An input needs a text or an image.")
        ids_BL = self.tokenizer(texts)
        has_text_B = torch.tensor([bool(rest) for rest in texts])
        by_row = {"attention_mask": has_text_B, "truncated": self._truncated(texts, ids_BL)}
        data = {key: value.long().unsqueeze(1).expand_as(ids_BL) for key, value in by_row.items()}
        data["input_ids"] = ids_BL
        rows = [[each] if isinstance(each, Image.Image) else each for each in images or ()]
        flat = [image for row in rows for image in row]
        if flat:
            data["pixel_values"] = torch.stack([self.transform(image) for image in flat])
            data["image_sizes"] = torch.tensor([[image.height, image.width] for image in flat])
        return data

    def _truncated(self, texts: Sequence[str], ids_BL: Tensor) -> Tensor:
        """Whether each text has more tokens than fit: whether twice the room holds more of them, ``[B]``."""
        real_BL = ids_BL != self.padding_id
        truncated_B = torch.zeros(len(texts), dtype=torch.bool)
        full = real_BL[:, -2:].any(dim=1).nonzero()[:, 0].tolist()  # the last may be an end token that pads
        if full:
            longer = self.tokenizer([texts[row] for row in full], context_length=2 * self.context_length)
            truncated_B[full] = (longer != self.padding_id).sum(dim=1) > real_BL[full].sum(dim=1)
        return truncated_B


class DualConfig:
    """What an OpenCLIP model is, in the form in which ``model.identity`` asks for it.

    Args:
        model: open_clip's model configuration.
        preprocess: open_clip's image preprocessing.
    """

    model_type = "open_clip"

    def __init__(self, model: dict[str, Any], preprocess: dict[str, Any]) -> None:
        self.model = model
        self.preprocess = preprocess

    def to_dict(self) -> dict[str, Any]:
        """Both as plain values."""
        return {"model": self.model, "preprocess": self.preprocess}


class DualBackbone(nn.Module):
    """An OpenCLIP model with its processor and its name.

    Args:
        base: open_clip's model.
        processor: of that model.
        config: of that model.
        name: what the user asked for.
        input_dtype: of the image tower's input.
    """

    revision: str | None = None
    num_layers = 1
    """For counting compute: no layer is shared between paths."""

    def __init__(
        self,
        base: nn.Module,
        processor: DualProcessor,
        config: DualConfig,
        *,
        name: str,
        input_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base: Any = base
        self.processor = processor
        self.config = config
        self.name = name
        self.input_dtype = input_dtype


def load_dual_backbone(
    name: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    adapter: AdapterConfig | None = None,
    gradient_checkpointing: bool = False,
) -> DualBackbone:
    """Load an OpenCLIP model with its weights.

    Args:
        name: ``open_clip:<architecture>/<tag>`` with a pretrained tag of open_clip or a weights file,
            ``open_clip:hf-hub:<owner>/<model>``, or a local folder with ``open_clip_config.json``, weights
            and, unless it is open_clip's own, the tokenizer.
        dtype: of the weights.
        adapter: only its kind counts: ``"full"`` (default; both towers) or ``"frozen"``.
        gradient_checkpointing: recompute layers in the backward pass.

    Returns:
        The backbone in training mode, on the CPU.

    Raises:
        ValueError: another dtype or adapter, unknown architecture or tag, weights that cannot be had or do
            not fit.
    """
    check_dtype(dtype)
    kind = "full" if adapter is None else adapter.kind
    if kind not in ("full", "frozen"):
        raise ValueError(f"adapter.kind={kind} is not offered for an open_clip backbone: set full or frozen.")
    import open_clip

    precision = PRECISIONS[dtype]
    source, weights = _locate(name)
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(source, weights) if weights else {}
    try:
        base, transform = open_clip.create_model_from_pretrained(
            source, weights, precision=precision, force_quick_gelu=bool(tag.get("quick_gelu"))
        )
        tokenizer = open_clip.get_tokenizer(source)
        config = DualConfig(open_clip.get_model_config(source), open_clip.get_model_preprocess_cfg(base))
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"backbone {name!r}: open_clip cannot load it: {error}") from error
    if gradient_checkpointing:
        base.set_grad_checkpointing(True)
    for parameter_name, parameter in base.named_parameters():
        parameter.requires_grad_(kind == "full" and parameter_name not in UNUSED_PARAMETERS)
    processor = DualProcessor(tokenizer, transform)
    input_dtype = getattr(torch, dtype)
    return DualBackbone(base, processor, config, name=name, input_dtype=input_dtype).train()


def _locate(name: str) -> tuple[str, str | None]:
    """Return model name and pretrained weights as open_clip wants them; both are checked before loading."""
    import open_clip

    if not name.startswith(PREFIX):
        return f"local-dir:{Path(name).expanduser()}", None
    source = name.removeprefix(PREFIX)
    if source.startswith("hf-hub:"):
        return source, None
    architecture, _, weights = source.partition("/")
    architectures = open_clip.list_models()
    if architecture not in architectures:
        close = ", ".join(get_close_matches(architecture, architectures, n=3)) or "none"
        raise ValueError(
            f"backbone {name!r}: open_clip has no architecture {architecture!r}; similar: {close}. "
            f"Write open_clip:<architecture>/<tag or file>, open_clip:hf-hub:<owner>/<model>, "
            f"or a folder with {CONFIG_FILE}."
        )
    if not open_clip.is_pretrained_cfg(architecture, weights) and not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ValueError(
            f"backbone {name!r}: {weights!r} is neither a file nor a pretrained tag of {architecture}; "
            f"tags: {tags}. Write open_clip:{architecture}/<tag or file>."
        )
    return architecture, weights
