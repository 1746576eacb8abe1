"""Published sizes on the meta device, against the parameter counts and shapes that are known of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel_decoupling.model.backbone import AdapterConfig, load_backbone, meta_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.geometries import GEOMETRIES

# (billions of parameters with the language-model head, as the leaderboard and the model cards print them;
#  rows of an untied head; prefix shape of N=4, P=8; LoRA targets in the language model and the vision tower)
PUBLISHED: dict[str, tuple[float, int, tuple[int, ...], int, int]] = {
    "Qwen/Qwen2-VL-2B-Instruct": (2.21, 0, (4, 28, 2, 2, 8, 128), 28 * 7, 32 * 4),
    "Qwen/Qwen2-VL-7B-Instruct": (8.29, 152064, (4, 28, 2, 4, 8, 128), 28 * 7, 32 * 4),
    "llava-hf/llava-v1.6-mistral-7b-hf": (7.57, 32064, (4, 32, 2, 8, 8, 128), 32 * 7, 24 * 6),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (7.06, 32064, (4, 32, 2, 32, 8, 128), 32 * 7, 24 * 6),
    "Qwen/Qwen3-VL-2B-Instruct": (2.13, 0, (4, 28, 2, 8, 8, 128), 28 * 7, 24 * 4 + 3 * 2 + 2),
}


def test_every_geometry_is_checked() -> None:
    assert GEOMETRIES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_prefix_shape_and_targets(name: str) -> None:
    billions, head_rows, prefix_shape, language, vision = PUBLISHED[name]
    backbone = meta_backbone(name, dtype="bfloat16", adapter=AdapterConfig(scope="both"))
    weights = [p for parameter, p in backbone.base.named_parameters() if "lora_" not in parameter]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    count = sum(weight.numel() for weight in weights) + head_rows * backbone.hidden_size
    assert round(count / 1e9, 2) == billions
    roots = [module.split(".")[0] for module in backbone.adapted_modules]
    assert roots.count(backbone.family.language_module) == language
    assert roots.count(backbone.family.vision_module) == vision
    encoder = ParallelEncoder(backbone, num_paths=4, prefix_length=8)
    assert encoder.prefixes is not None
    assert encoder.prefixes.key_values.shape == prefix_shape
    assert all(parameter.is_meta for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ["frozen", "lora", "dora", "full"])
def test_meta_backbone_has_the_parameters_of_the_loaded_one(tiny_backbone_dir: str, kind: Any) -> None:
    options: dict[str, Any] = {"adapter": AdapterConfig(kind=kind), "dtype": "bfloat16"}

    def described(backbone: Any) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in backbone.named_parameters()}

    meta, loaded = meta_backbone(tiny_backbone_dir, **options), load_backbone(tiny_backbone_dir, **options)
    assert described(meta) == described(loaded)
    assert meta.adapted_modules == loaded.adapted_modules
    assert meta.is_meta
    assert not loaded.is_meta


def test_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match="not a hub id"):
        meta_backbone("nowhere")
