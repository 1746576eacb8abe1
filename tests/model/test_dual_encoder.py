"""Embeddings of OpenCLIP models, against open_clip's own calls, one text and one image at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.build import build_encoder
from parallel_decoupling.model.dual_backbone import load_dual_backbone
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.training.grad_cache import encode_in_chunks
from tests.support.tiny import noise_image
from tests.support.tiny_clip import RESNET, save_tiny_clip

IMAGES = [noise_image(40, 30, seed=1), noise_image(64, 64, seed=2), noise_image(20, 90, seed=3)]
ROWS = [
    prompt("a red circle"),
    prompt(image=IMAGES[0]),
    prompt("what colour is it?", IMAGES[1]),
    prompt(images=IMAGES),
    prompt("which of them is red?", images=IMAGES[1:]),
    prompt("word " * 40),
]


def encoder_of(folder: str, **options: Any) -> DualEncoder:
    return DualEncoder(load_dual_backbone(folder, **options)).eval()


def inputs_of(encoder: DualEncoder, rows: list[RawInput]) -> EncoderInputs:
    return Collator(encoder.processor, image_token=encoder.image_token).encode_inputs(rows)


@torch.no_grad()
def by_hand(folder: str, row: RawInput) -> Tensor:
    """``[D]``: the fusion rule with open_clip's calls only."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    total = torch.zeros(24)
    text = row.text.replace(IMAGE_PLACEHOLDER, "").strip()
    if text:
        (feature,) = model.encode_text(tokenizer(text))
        total += feature / feature.norm()
    if row.images:
        mean = torch.zeros(24)
        for image in row.images:
            (feature,) = model.encode_image(transform(image).unsqueeze(0))
            mean += feature / feature.norm() / len(row.images)
        total += mean / mean.norm()
    return total / total.norm()


def test_embeddings_are_open_clips_fused_by_the_rule(tiny_clip_dir: str) -> None:
    encoder = encoder_of(tiny_clip_dir)
    embeddings = encoder(inputs_of(encoder, ROWS))
    assert embeddings.shape == (len(ROWS), 1, 24)
    expected = torch.stack([by_hand(tiny_clip_dir, row) for row in ROWS])
    torch.testing.assert_close(embeddings[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder(inputs_of(encoder, ROWS), [0]), embeddings)


def test_score_of_fused_inputs_is_proportional_to_the_sum_of_four_cosines(tiny_clip_dir: str) -> None:
    parts = [prompt("red"), prompt(image=IMAGES[0]), prompt("blue"), prompt(image=IMAGES[1])]
    fused = [prompt("red", IMAGES[0]), prompt("blue", IMAGES[1])]
    encoder = encoder_of(tiny_clip_dir)
    t, v, u, w = encoder(inputs_of(encoder, parts))[:, 0]
    first, second = encoder(inputs_of(encoder, fused))[:, 0]
    cosines = t @ u + t @ w + v @ u + v @ w
    torch.testing.assert_close(first @ second, cosines / (t + v).norm() / (u + w).norm())


def test_each_row_alone_equals_the_batch(tiny_clip_dir: str) -> None:
    encoder = encoder_of(tiny_clip_dir)
    alone = torch.cat([encoder(inputs_of(encoder, [row])) for row in ROWS])
    torch.testing.assert_close(encoder(inputs_of(encoder, ROWS)), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paths", [[], [1], [0, 0]])
def test_there_is_one_path(tiny_clip_dir: str, paths: list[int]) -> None:
    encoder = encoder_of(tiny_clip_dir)
    embeddings = encoder(inputs_of(encoder, ROWS))
    torch.testing.assert_close(encoder.aggregate(embeddings), embeddings[:, 0])
    with pytest.raises(ValueError, match="path 0 only"):
        encoder(inputs_of(encoder, ROWS), paths)


def test_gradient_reaches_both_towers_and_not_the_own_temperature(tiny_clip_dir: str) -> None:
    encoder = encoder_of(tiny_clip_dir).train()
    encoder(inputs_of(encoder, ROWS))[:, 0, 0].sum().backward()
    without = [name for name, p in encoder.backbone.base.named_parameters() if p.grad is None]
    assert without == ["logit_scale"]
    assert all(p.grad is not None and bool(p.grad.any()) for p in encoder.adapter_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_and_recomputed_layers_give_the_same_gradient(tiny_clip_dir: str, checkpointing: bool) -> None:
    def gradients(chunk_size: int | None, **options: Any) -> list[Tensor]:
        encoder = encoder_of(tiny_clip_dir, **options).train()
        encoding = encode_in_chunks(encoder, inputs_of(encoder, ROWS), chunk_size=chunk_size, seed_parts=(0,))
        encoding.embeddings[:, 0].cumsum(0).square().sum().backward()
        encoding.backward()
        return [p.grad for p in encoder.adapter_parameters() if p.grad is not None]

    plain, chunked = gradients(None), gradients(2, gradient_checkpointing=checkpointing)
    assert len(plain) == len(chunked) > 20
    for one, other in zip(plain, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_single(tiny_clip_dir: str, dtype: Any) -> None:
    exact, half = encoder_of(tiny_clip_dir), encoder_of(tiny_clip_dir, dtype=dtype)
    embeddings = half(inputs_of(half, ROWS))
    assert embeddings.dtype == torch.float32
    assert half.backbone.base.transformer.resblocks[0].mlp.c_fc.weight.dtype == getattr(torch, dtype)
    assert ((embeddings * exact(inputs_of(exact, ROWS))).sum(-1) > 0.99).all()


def test_batch_normalisation_keeps_its_statistics(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path, vision_cfg=RESNET)
    encoder = encoder_of(folder)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    expected = encoder(inputs_of(encoder, ROWS))
    torch.testing.assert_close(encoder.train()(inputs_of(encoder, ROWS)), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


def test_every_row_is_counted_once(tiny_clip_dir: str) -> None:
    encoder = encoder_of(tiny_clip_dir)
    inputs = inputs_of(encoder, ROWS)
    with torch.inference_mode():
        encoder(inputs)
    assert encoder.take_text_counts().tolist() == [4, 1]
    assert encoder.take_text_counts().tolist() == [0, 0]
    encoder.train()
    encode_in_chunks(encoder, inputs, chunk_size=None, seed_parts=(0,))
    encoding = encode_in_chunks(encoder, inputs, chunk_size=2, seed_parts=(0,))
    encoding.embeddings.sum().backward()
    encoding.backward()
    assert encoder.take_text_counts().tolist() == [8, 2]


def build(backbone: str, **settings: Any) -> ParallelEncoder | DualEncoder:
    paths: dict[str, Any] = {"num_paths": 1, "prefix_length": 0, "prefix_layers": 0, "prefix_init": "meta"}
    paths |= {"aggregation": "mean", "seed": 0}
    loading: dict[str, Any] = {"attention": "sdpa", "revision": None, "dtype": "float32"}
    loading |= {"adapter": AdapterConfig(kind="full"), "gradient_checkpointing": False}
    for name, value in settings.items():
        (paths if name in paths else loading)[name] = value
    return build_encoder(backbone, loading, paths)


def test_the_backbone_decides_which_encoder_is_built(tiny_clip_dir: str, tiny_backbone_dir: str) -> None:
    assert isinstance(build(tiny_clip_dir), DualEncoder)
    assert isinstance(build(tiny_backbone_dir), ParallelEncoder)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("num_paths", 2, "set num_paths=1"),
        ("prefix_length", 8, "set prefix_length=0"),
        ("prefix_layers", 1, "set prefix_layers=0"),
        ("aggregation", "learned", "set aggregation=mean"),
        ("attention", "eager", "set attention=sdpa"),
        ("revision", "main", "set revision=null"),
    ],
)
def test_settings_that_an_openclip_model_does_not_have_are_refused(
    tiny_clip_dir: str, setting: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build(tiny_clip_dir, **{setting: value})


def test_selected_rows_have_the_same_embeddings(tiny_clip_dir: str) -> None:
    """Also rows without any text, of which no token is left."""
    encoder = encoder_of(tiny_clip_dir)
    inputs = inputs_of(encoder, ROWS)
    for rows in ([1, 3], [0], [5, 4, 1]):
        torch.testing.assert_close(encoder(inputs.select(rows)), encoder(inputs)[rows], rtol=1e-4, atol=1e-5)
