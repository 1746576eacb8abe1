"""OpenCLIP, the baseline without a multimodal LLM: a text and an image tower that look like one encoder."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, EncoderInputs
from parallel_decoupling.model.adapters import AdapterConfig
from parallel_decoupling.model.backbone import Dtype
from parallel_decoupling.model.turns import Turns

PREFIX = "open_clip:"
CONFIG_FILE = "open_clip_config.json"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NEUTRAL = {"num_paths": 1, "prefix_length": 0, "prefix_layers": 0, "aggregation": "mean", "attention": "sdpa"}
"""What options of multimodal LLMs must be; every other one must be None, or changes nothing."""


def is_open_clip(name: str) -> bool:
    """Whether a backbone is OpenCLIP's: ``open_clip:...``, or a folder with ``open_clip_config.json``."""
    return name.startswith(PREFIX) or os.path.isfile(Path(name).expanduser() / CONFIG_FILE)


class OpenCLIPProcessor:
    """Turn texts and images into tensors, called like a Hugging Face processor.

    Images get the model's own evaluation transform, also in training.
    """

    def __init__(self, tokenizer: Callable[..., Tensor], transform: Callable[[Image.Image], Tensor]) -> None:
        self.tokenizer = tokenizer
        self.transform = transform
        empty_1L = tokenizer([""])
        self.context_length: int = empty_1L.shape[1]  # L
        self.padding_id = int(empty_1L[0, -2])  # the very last one may be a class token

    def __call__(
        self, text: Sequence[str], images: Sequence[Sequence[Image.Image]] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Tokenise ``B`` rows, with a list of images for each.

        ``attention_mask`` ``[B, L]`` is all 1 for a row with text, and all 0 for one without.
        """
        texts = [row.replace(IMAGE_PLACEHOLDER, " ").strip() for row in text]
        if any(not rest and IMAGE_PLACEHOLDER not in row for row, rest in zip(text, texts, strict=True)):
            raise ValueError("An input needs a text or an image.")
        ids_BL = self.tokenizer(texts)
        has_text_B1 = torch.tensor([[bool(rest)] for rest in texts])
        data = {"input_ids": ids_BL, "attention_mask": has_text_B1.long().expand_as(ids_BL)}
        flat = [image for row in images or () for image in row]
        if flat:
            data["pixel_values"] = torch.stack([self.transform(image) for image in flat])
            data["image_sizes"] = torch.tensor([[image.height, image.width] for image in flat])
        return data

    def cut_rows(self, texts: Sequence[str]) -> list[bool]:
        """Tell which texts do not fit: of which twice the room holds more tokens."""
        if all(len(text.encode()) < self.context_length - 1 for text in texts):  # no token is shorter
            return [False] * len(texts)
        bare = [text.replace(IMAGE_PLACEHOLDER, " ").strip() for text in texts]
        short, long = (self.tokenizer(bare, context_length=n * self.context_length) for n in (1, 2))
        counts = [(ids_BL != self.padding_id).sum(dim=1) for ids_BL in (short, long)]
        return (counts[1] > counts[0]).tolist()


class OpenCLIPBackbone(nn.Module):
    """An OpenCLIP model with the attributes of a ``Backbone`` that it can have."""

    revision: str | None = None
    num_layers = 1  # for counting compute: no layer is shared between paths

    def __init__(self, base: Any, name: str, config: Any, adapter: AdapterConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.name, self.config, self.adapter, self.dtype = base, name, config, adapter, dtype


class OpenCLIPEncoder(nn.Module):
    """One unit-norm embedding of each input from an OpenCLIP model.

    ``normalize(t + normalize(mean of v))`` with the unit-norm embeddings ``t`` of the text and ``v`` of every
    image; what a row does not have is left out: score-level fusion as in UniIR's CLIP_SF.

    Relations:
        A text is open_clip's ``encode_text`` and an image without text its ``encode_image``, normalised.
    """

    num_paths = 1
    prefix_layers = 0
    image_token = IMAGE_PLACEHOLDER  # the processor takes it out
    template = None

    def __init__(self, backbone: OpenCLIPBackbone, processor: OpenCLIPProcessor) -> None:
        super().__init__()
        self.backbone, self.turns = backbone, Turns()
        self.embed_dim: int = backbone.config["model"]["embed_dim"]
        self.aggregate_dim: int = self.embed_dim
        self.processor: Any = processor

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what trains: the weights of both towers, or none."""
        towers = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        return {"adapters": towers, "prefixes": [], "aggregation": []}

    def train(self, mode: bool = True) -> "OpenCLIPEncoder":
        """Set the mode; batch normalisation keeps its statistics, which no checkpoint holds."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed ``B`` rows of ``OpenCLIPProcessor``: ``[B, 1, D]`` fp32, unit norm."""
        if paths is not None and list(paths) != [0]:
            raise ValueError(f"an OpenCLIP model has path 0 only, got paths {list(paths)}")
        ids_BL = inputs.tokens["input_ids"]
        sum_BD = torch.zeros(len(inputs), self.embed_dim, device=ids_BL.device)
        with_text = inputs.tokens["attention_mask"].any(dim=1).nonzero()[:, 0]
        if len(with_text):
            text = self.backbone.base.encode_text(ids_BL[with_text])
            sum_BD = sum_BD.index_add(0, with_text, F.normalize(text.float(), dim=-1))
        with_images = [row for row, vision in enumerate(inputs.vision) if vision]
        if with_images:
            pixels = [inputs.vision[row]["pixel_values"] for row in with_images]
            images = self.backbone.base.encode_image(torch.cat(pixels).to(self.backbone.dtype))
            by_row = torch.split(F.normalize(images.float(), dim=-1), [len(each) for each in pixels])
            means = torch.stack([each.mean(dim=0) for each in by_row])
            rows = torch.tensor(with_images, device=ids_BL.device)
            sum_BD = sum_BD.index_add(0, rows, F.normalize(means, dim=-1))
        return F.normalize(sum_BD, dim=-1).unsqueeze(1)

    def aggregate(self, embeddings: Tensor) -> Tensor:
        """Return the one path: ``[B, 1, D]`` to ``[B, D]``."""
        return F.normalize(embeddings.float().mean(dim=1), dim=-1)


def load_open_clip(
    name: str,
    *,
    dtype: Dtype = "float32",
    adapter: AdapterConfig | None = None,
    gradient_checkpointing: bool = False,
    **options: Any,
) -> OpenCLIPEncoder:
    """Load an OpenCLIP model with its weights, in training mode, on the CPU.

    ``name`` is ``open_clip:<architecture>/<tag>`` with a pretrained tag of open_clip or a weights file,
    ``open_clip:hf-hub:<owner>/<model>``, or a local folder with ``open_clip_config.json``, weights and,
    unless it is open_clip's own, the tokenizer. ``adapter.kind`` is full or frozen.
    """
    wrong = [
        f"{option}={NEUTRAL.get(option, 'null')} (got {value})"
        for option, value in options.items()
        if option not in ("prefix_type", "prefix_init", "seed") and value != NEUTRAL.get(option)
    ]
    if wrong:
        advice = f"set {', '.join(wrong)}, as in lightning_configs/openclip.yaml"
        raise ValueError(f"backbone {name!r} is an OpenCLIP model, with one path and no prefix: {advice}.")
    adapter = adapter or AdapterConfig(kind="full")
    if adapter.kind not in ("full", "frozen"):
        raise ValueError(f"adapter.kind={adapter.kind} does not exist for OpenCLIP: set full or frozen.")
    import open_clip

    source, weights = f"local-dir:{Path(name).expanduser()}", None
    if name.startswith(PREFIX):
        source = name.removeprefix(PREFIX)
        if not source.startswith("hf-hub:"):
            source, _, weights = source.partition("/")
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(source, weights) if weights else {}
    base, transform = open_clip.create_model_from_pretrained(
        source, weights, precision=PRECISIONS[dtype], force_quick_gelu=bool(tag.get("quick_gelu"))
    )
    processor = OpenCLIPProcessor(open_clip.get_tokenizer(source), transform)
    model, preprocess = open_clip.get_model_config(source), open_clip.get_model_preprocess_cfg(base)
    if gradient_checkpointing:
        base.set_grad_checkpointing(True)
    for parameter_name, parameter in base.named_parameters():
        ours = parameter_name not in ("logit_scale", "logit_bias")  # of OpenCLIP's own loss
        parameter.requires_grad_(adapter.kind == "full" and ours)
    config = {"model": model, "preprocess": preprocess}
    backbone = OpenCLIPBackbone(base, name, config, adapter, getattr(torch, dtype))
    return OpenCLIPEncoder(backbone, processor).train()
