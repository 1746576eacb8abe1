"""A random-weight OpenCLIP model of the stock classes, saved the way such models are published.

Two layers per tower, 32x32-pixel images, texts of at most 16 tokens of open_clip's own vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

CONTEXT_LENGTH = 16
MODEL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 16, "heads": 2, "layers": 2},
}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16, "patch_size": None}
"""A vision tower with batch normalisation."""
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.4, 0.5], "interpolation": "bilinear"}


def tiny_clip(seed: int = 0, **model: Any) -> nn.Module:
    """Build the model; ``model`` replaces parts of ``MODEL``."""
    import open_clip  # most tests do not need it

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = open_clip.CLIP(**{**MODEL, **model})
        with torch.no_grad():  # the stock start is so small that all texts nearly agree
            for name, parameter in clip.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
                elif not name.startswith("logit"):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            for name, buffer in clip.named_buffers():
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
    return clip


def save_tiny_clip(folder: str | Path, seed: int = 0, **model: Any) -> str:
    """Write ``open_clip_config.json`` and weights; returns the folder as a string."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": {**MODEL, **model}, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tiny_clip(seed, **model).state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)
