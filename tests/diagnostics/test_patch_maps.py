from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.diagnostics.patch_maps import (
    attention_maps,
    map_agreement,
    patch_contributions,
    recorded_attention,
)
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.support.families import save_tiny_family
from tests.support.tiny import noise_image


def encoder(backbone_dir: str, **options: Any) -> ParallelEncoder:
    settings = {"num_paths": 2, "prefix_length": 3, "prefix_init": "random", **options}
    return ParallelEncoder(load_backbone(backbone_dir), **settings).eval()


def asking(picture: Image.Image, text: str) -> RawInput:
    return RawInput(f"{IMAGE_PLACEHOLDER}\n{text}\n", (picture,))


@pytest.fixture(scope="module")
def inputs() -> list[RawInput]:
    """Two sizes of image, texts of different length."""
    large, small = noise_image(64, 64), noise_image(64, 32, seed=1)
    return [asking(large, "read the word and count"), asking(small, "read"), asking(large, "read")]


def test_weights_are_those_of_a_model_with_one_plain_prefix_cache(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    """Against stock eager attention, whose cache holds the prefix."""
    from transformers import DynamicCache

    model = encoder(tiny_backbone_dir)
    collator = Collator(model.processor, image_token=model.image_token)
    tokenised = collator.encode_inputs(inputs[:1])
    with recorded_attention(model) as (_, weights), torch.no_grad():
        model(tokenised)
    found = torch.stack(weights, dim=2)
    assert model.prefixes is not None
    stock = load_backbone(tiny_backbone_dir).eval().base
    stock.language_model.set_attn_implementation("eager")  # type: ignore[operator,union-attr]
    vision = dict(tokenised.vision[0])
    positions = model.backbone.position_ids(tokenised.tokens, vision)
    for path, states in enumerate(model.prefixes.key_values.detach()):
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states):
            cache.update(keys[None], values[None], layer)
        mask = torch.nn.functional.pad(tokenised.tokens["attention_mask"], (3, 0), value=1)
        tokens = {**tokenised.tokens, "attention_mask": mask}
        with torch.no_grad():
            output = stock(
                **tokens, **vision, position_ids=positions, past_key_values=cache, output_attentions=True
            )
        expected = torch.stack([weights[0, :, -1].mean(dim=0) for weights in output.attentions])
        torch.testing.assert_close(found[path, 0], expected)


def test_mass_and_patches_are_shares(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    found = attention_maps(Embedder(encoder(tiny_backbone_dir)), inputs)
    assert found.mass.shape == (2, 2, 3)
    assert (found.mass > 0).all()
    torch.testing.assert_close(found.mass.sum(dim=-1), torch.ones(2, 2))
    shapes = [tuple(patches.shape) for patches in found.patches]
    assert shapes == [(2, 4, 4), (2, 2, 4), (2, 4, 4)]
    for patches in found.patches:
        torch.testing.assert_close(patches.sum(dim=(1, 2)), torch.ones(2))


def test_layers_below_the_prefix_are_shared_and_have_none(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    found = attention_maps(Embedder(encoder(tiny_backbone_dir, prefix_layers=1)), inputs)
    assert (found.mass[:, 0, 0] == 0).all()
    assert (found.mass[:, 1, 0] > 0).all()
    torch.testing.assert_close(found.mass[0, 0], found.mass[1, 0])


def test_the_encoder_is_left_as_it_was(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    model = encoder(tiny_backbone_dir)
    former = copy.copy(model.backbone.language_model.config._attn_implementation)  # type: ignore[union-attr]
    attention_maps(Embedder(model), inputs[:1])
    assert model.backbone.language_model.config._attn_implementation == former  # type: ignore[union-attr]
    layers = model.backbone.base.get_submodule(model.backbone.family.layers)
    assert all(not layer.self_attn._forward_hooks for layer in layers)  # type: ignore[union-attr]


def test_a_backbone_that_cuts_images_into_tiles_has_masses_but_no_maps(tmp_path: Path) -> None:
    model = encoder(save_tiny_family("llava_next_mistral", tmp_path))
    found = attention_maps(Embedder(model), [asking(noise_image(64, 64), "read")])
    assert found.patches == []
    assert (found.mass > 0).all()


class QuadrantEmbedder:
    """Path 0 sees the top left quadrant only, path 1 the bottom right one."""

    def encode(self, inputs: Sequence[Any], **options: Any) -> Tensor:
        rows = []
        for item in inputs:
            pixels = np.asarray(item.convert("L"), float)
            parts = pixels[:4, :4], pixels[4:, 4:]
            rows.append(torch.tensor(np.stack([part.ravel() for part in parts])) + 1)
        return torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1)


@pytest.fixture
def picture() -> Image.Image:
    """Black with a white dot in the top left and in the bottom right quadrant, both off the diagonal."""
    picture = Image.new("RGB", (8, 8), "black")
    picture.putpixel((2, 1), (255, 255, 255))
    picture.putpixel((5, 7), (255, 255, 255))
    return picture


def test_each_path_depends_on_what_it_sees(picture: Image.Image) -> None:
    embedder: Any = QuadrantEmbedder()
    found = patch_contributions(embedder, [picture], grid=4)
    assert found.shape == (1, 2, 4, 4)
    changed = found > 1e-5
    assert changed[0, 0].nonzero().tolist() == [[0, 1]]
    assert changed[0, 1].nonzero().tolist() == [[3, 2]]
    assert map_agreement(list(found))[0, 1] == pytest.approx(-1 / 15)
