from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImagePolicy, load_image
from parallel_decoupling.diagnostics.attention import attention_maps, pooled_attention, token_grid
from parallel_decoupling.evaluation.encode import to_raw_inputs
from parallel_decoupling.model.backbone import load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.support.families import save_tiny_family
from tests.support.tiny import noise_image


def encoder(backbone_dir: str, **options: object) -> ParallelEncoder:
    settings = {"num_paths": 2, "prefix_length": 3, "prefix_init": "random", **options}
    made = ParallelEncoder(load_backbone(backbone_dir), **settings)  # type: ignore[arg-type]
    return made.eval()


@pytest.fixture(scope="module")
def inputs() -> list[RawInput]:
    """Two sizes of image, texts of different length."""
    pictures = [noise_image(64, 64), noise_image(64, 32, seed=1)]
    long, short = to_raw_inputs(pictures, "read the word and count"), to_raw_inputs(pictures, "read")
    return [long[0], short[1], short[0]]


def test_weights_are_those_of_a_model_with_one_plain_prefix_cache(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    """Against stock eager attention, whose cache holds the prefix."""
    from transformers import DynamicCache

    model = encoder(tiny_backbone_dir)
    collator = Collator(model.processor, image_token=model.image_token)
    tokenised = collator.encode_inputs(inputs[:1])
    found = pooled_attention(model, tokenised)
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
    found = attention_maps(encoder(tiny_backbone_dir), inputs)
    assert found.mass.shape == (2, 2, 3)
    assert (found.mass > 0).all()
    torch.testing.assert_close(found.mass.sum(dim=-1), torch.ones(2, 2))
    shapes = [tuple(patches.shape) for patches in found.patches]
    assert shapes == [(2, 4, 4), (2, 2, 4), (2, 4, 4)]
    for patches in found.patches:
        torch.testing.assert_close(patches.sum(dim=(1, 2)), torch.ones(2))


def test_maps_are_the_mean_over_layers_with_each_token_in_its_place(
    tiny_backbone_dir: str, inputs: list[RawInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 0 looks with weight 0.6 at row 0, column 1 of the tokens, layer 1 with 0.2 at row 1, column 2."""
    model = encoder(tiny_backbone_dir)
    image_id = model.processor.tokenizer.convert_tokens_to_ids(model.image_token)

    def planted(model: ParallelEncoder, tokenised: EncoderInputs) -> torch.Tensor:
        is_image = tokenised.tokens["input_ids"] == image_id
        weights = torch.zeros(2, len(is_image), 2, 3 + is_image.shape[1])
        weights[..., 0] = torch.tensor([0.4, 0.8])
        for row, vision in enumerate(tokenised.vision):
            first = 3 + int(is_image[row].nonzero()[0])
            _, width = token_grid(vision, int(is_image[row].sum())) or (0, 0)
            weights[:, row, 0, first + 1] = 0.6
            weights[:, row, 1, first + width + 2] = 0.2
        return weights

    monkeypatch.setattr("parallel_decoupling.diagnostics.attention.pooled_attention", planted)
    found = attention_maps(model, inputs)
    torch.testing.assert_close(found.mass[0], torch.tensor([[0.4, 0.6, 0.0], [0.8, 0.2, 0.0]]))
    for patches in found.patches:
        expected = torch.zeros_like(patches)
        expected[:, 0, 1], expected[:, 1, 2] = 0.75, 0.25
        torch.testing.assert_close(patches, expected)


def test_equal_prefixes_give_equal_maps_and_batches_change_nothing(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    model = encoder(tiny_backbone_dir)
    together, alone = attention_maps(model, inputs), attention_maps(model, inputs, batch_size=1)
    torch.testing.assert_close(together.mass, alone.mass)
    for first, second in zip(together.patches, alone.patches, strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.allclose(together.mass[0], together.mass[1], atol=1e-3)
    assert model.prefixes is not None
    with torch.no_grad():
        model.prefixes.key_values[1] = model.prefixes.key_values[0]
    same = attention_maps(model, inputs)
    torch.testing.assert_close(same.mass[0], same.mass[1])


def test_with_zero_queries_attention_is_uniform(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    model = encoder(tiny_backbone_dir)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "language_model" in name and "q_proj" in name:
                parameter.zero_()
    found = attention_maps(model, inputs[:1])
    keys = int(Collator(model.processor, image_token=model.image_token).encode_inputs(inputs[:1]).lengths) + 3
    expected = torch.tensor([3 / keys, 16 / keys, (keys - 19) / keys])
    torch.testing.assert_close(found.mass, expected.expand(2, 2, 3))
    torch.testing.assert_close(found.patches[0], torch.full((2, 4, 4), 1 / 16))


def test_layers_below_the_prefix_are_shared_and_have_none(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    found = attention_maps(encoder(tiny_backbone_dir, prefix_layers=1), inputs)
    assert (found.mass[:, 0, 0] == 0).all()
    assert (found.mass[:, 1, 0] > 0).all()
    torch.testing.assert_close(found.mass[0, 0], found.mass[1, 0])


def test_the_encoder_is_left_as_it_was(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    model = encoder(tiny_backbone_dir)
    former = copy.copy(model.backbone.language_model.config._attn_implementation)  # type: ignore[union-attr]
    attention_maps(model, inputs[:1])
    assert model.backbone.language_model.config._attn_implementation == former  # type: ignore[union-attr]
    layers = model.backbone.layers
    assert all(not layer.self_attn._forward_hooks for layer in layers)  # type: ignore[union-attr]


def test_inputs_without_one_image_are_named(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    with pytest.raises(ValueError, match="input 1 has 0 images"):
        attention_maps(encoder(tiny_backbone_dir), [inputs[0], RawInput("only text")])


def test_token_grid_of_merged_patches_of_a_square_and_of_neither() -> None:
    assert token_grid({"image_grid_thw": torch.tensor([[1, 4, 8]])}, 8) == (2, 4)
    assert token_grid({}, 9) == (3, 3)
    assert token_grid({}, 10) is None


def test_a_backbone_that_cuts_images_into_tiles_has_masses_but_no_maps(tmp_path: Path) -> None:
    model = encoder(save_tiny_family("llava_next_mistral", tmp_path))
    found = attention_maps(model, to_raw_inputs([noise_image(64, 64)], "read"))
    assert found.patches == []
    assert (found.mass > 0).all()


def test_pictures_are_resized_first(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    model = encoder(tiny_backbone_dir)
    low = ImagePolicy(size="low")
    square = [replace(each, images=tuple(low(load_image(image)) for image in each.images)) for each in inputs]
    found, expected = attention_maps(model, inputs, images=low), attention_maps(model, square)
    torch.testing.assert_close(found.mass, expected.mass)
    assert not torch.allclose(found.mass, attention_maps(model, inputs).mass, atol=1e-4)
