"""OpenCLIP models: names, loading, tokens and embeddings against open_clip's own calls."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.encoder import absolute_name, build_encoder
from parallel_decoupling.model.open_clip import (
    OpenCLIPEncoder,
    OpenCLIPProcessor,
    is_open_clip,
    load_open_clip,
)
from parallel_decoupling.training.grad_cache import encode_in_chunks
from tests.model.test_families import collate
from tests.support.tiny import noise_image
from tests.support.tiny_clip import MODEL, RESNET, save_tiny_clip

IMAGES = [noise_image(40, 30, seed=1), noise_image(64, 64, seed=2), noise_image(20, 90, seed=3)]
ROWS = [
    prompt("a red circle"),
    prompt(image=IMAGES[0]),
    prompt("what colour is it?", IMAGES[1]),
    prompt(images=IMAGES),
    prompt("which of them is red?", images=IMAGES[1:]),
    prompt("what is to the left?"),
]


@pytest.fixture
def own_architecture(monkeypatch: pytest.MonkeyPatch, tiny_clip_dir: str) -> str:
    """``tiny-clip`` and its tag ``mine``, among open_clip's own; the "download" is a local file."""
    weights = f"{tiny_clip_dir}/open_clip_model.safetensors"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", MODEL)
    tag = {"file": weights, "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"mine": tag})
    return weights


def test_a_folder_a_tag_and_a_weights_file_are_loaded(
    tiny_clip_dir: str, own_architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(own_architecture, "epoch_1.safetensors")
    file, tag = "open_clip:tiny-clip/epoch_1.safetensors", "open_clip:tiny-clip/mine"
    assert absolute_name(file) == f"open_clip:tiny-clip/{tmp_path}/epoch_1.safetensors"
    clip_mean = (0.48145466, 0.4578275, 0.40821073)
    for name, mean, activation in (
        (tiny_clip_dir, (0.5, 0.4, 0.3), "GELU"),
        (tag, (0.1, 0.2, 0.3), "QuickGELU"),
        (file, clip_mean, "GELU"),
        (absolute_name(file), clip_mean, "GELU"),
    ):
        encoder = load_open_clip(name)
        found, expected = encoder.backbone.base.state_dict(), load_file(own_architecture)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        assert tuple(encoder.backbone.config["preprocess"]["mean"]) == mean
        assert type(encoder.backbone.base.transformer.resblocks[0].mlp.gelu).__name__ == activation
        assert encoder.training


def test_names_of_both_kinds_are_told_apart(
    tiny_clip_dir: str, tiny_backbone_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = ("open_clip:ViT-B-32/openai", "open_clip:hf-hub:owner/model", tiny_clip_dir)
    other = ("tiny", "Qwen/Qwen2-VL-2B-Instruct", tiny_backbone_dir)
    assert [is_open_clip(name) for name in clip + other] == [True] * 3 + [False] * 3
    unchanged = ("tiny", "Qwen/Qwen2-VL-2B-Instruct", "open_clip:ViT-B-32/openai")
    assert [absolute_name(name) for name in unchanged] == list(unchanged)
    Path("folder").mkdir()
    assert absolute_name("folder") == str(tmp_path / "folder")


def test_what_trains(tiny_clip_dir: str) -> None:
    full = load_open_clip(tiny_clip_dir)
    untrained = [name for name, p in full.backbone.base.named_parameters() if not p.requires_grad]
    assert untrained == ["logit_scale"]
    frozen = load_open_clip(tiny_clip_dir, adapter=AdapterConfig(kind="frozen"))
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ValueError, match="set full or frozen"):
        load_open_clip(tiny_clip_dir, adapter=AdapterConfig(kind="lora"))


LONG = "word " * 50
TEXTS = {
    "a red circle": False,
    "!": False,
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen": False,  # 16 tokens
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen !": True,
    LONG: True,
}


def test_tokens_are_open_clips_and_cut_texts_are_known(tiny_clip_dir: str) -> None:
    processor = load_open_clip(tiny_clip_dir).processor
    assert processor.cut_rows(list(TEXTS)) == list(TEXTS.values())
    data = processor(text=[f"{IMAGE_PLACEHOLDER}\n{text}\n" for text in TEXTS])
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip_dir}")
    assert torch.equal(data["input_ids"], tokenizer(list(TEXTS)))
    assert data["attention_mask"].all()


@pytest.mark.parametrize(("padding", "at_the_end"), [(1, []), (0, [7])])
def test_cut_texts_of_other_tokenizers(padding: int, at_the_end: list[int]) -> None:
    """SigLIP drops signs and pads with its end token 1; another one ends every row with a class token 7."""

    def tokenizer(texts: list[str], context_length: int = 8) -> Tensor:
        room = context_length - len(at_the_end) - 1
        words = [[word for word in text.split() if word.isalpha()] for text in texts]
        rows = [[10 + len(word) for word in row][:room] + [1] for row in words]
        return torch.tensor([row + [padding] * (room + 1 - len(row)) + at_the_end for row in rows])

    room = 8 - len(at_the_end) - 1
    texts = ["!", *("a " * count for count in (1, room - 1, room, room + 1, 60))]
    processor = OpenCLIPProcessor(tokenizer, lambda _: torch.zeros(3, 4, 4))
    assert [processor.cut_rows([text]) for text in texts] == [[False]] * 4 + [[True]] * 2


def test_rows_without_text_or_image_are_told_apart(tiny_clip_dir: str) -> None:
    processor = load_open_clip(tiny_clip_dir).processor
    image = noise_image(40, 30)
    rows = [f"{IMAGE_PLACEHOLDER}\n", "text", f"{IMAGE_PLACEHOLDER}\n{IMAGE_PLACEHOLDER}\nboth\n"]
    data = processor(text=rows, images=[[image], [], [image] * 2], padding=True, return_tensors="pt")
    assert data["attention_mask"].float().mean(dim=1).tolist() == [0, 1, 1]
    assert data["pixel_values"].shape == (3, 3, 32, 32)
    assert data["image_sizes"].tolist() == [[30, 40]] * 3
    with pytest.raises(ValueError, match="needs a text or an image"):
        processor(text=["text", " \n"])


def encoder_of(folder: str, **options: Any) -> OpenCLIPEncoder:
    return load_open_clip(folder, **options).eval()


@cache
def stock(folder: str) -> Any:
    """Open_clip's own model, transform and tokenizer."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def by_hand(folder: str, row: RawInput) -> Tensor:
    """``[D]``: the fusion rule with open_clip's calls only."""
    model, transform, tokenizer = stock(folder)
    total = torch.zeros(24)
    text = row.text.replace(IMAGE_PLACEHOLDER, "").strip()
    if text:
        (feature,) = model.encode_text(tokenizer(text))
        total += feature / feature.norm()
    if row.images:
        mean = torch.zeros(24)
        for image in row.images:
            (feature,) = model.encode_image(transform(load_image(image)).unsqueeze(0))
            mean += feature / feature.norm() / len(row.images)
        total += mean / mean.norm()
    return total / total.norm()


def test_embeddings_are_open_clips_fused_by_the_rule(tiny_clip_dir: str) -> None:
    encoder = encoder_of(tiny_clip_dir)
    embeddings = encoder(collate(encoder, ROWS))
    assert embeddings.shape == (len(ROWS), 1, 24)
    expected = torch.stack([by_hand(tiny_clip_dir, row) for row in ROWS])
    torch.testing.assert_close(embeddings[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder(collate(encoder, ROWS), [0]), embeddings)
    torch.testing.assert_close(encoder.aggregate(embeddings), embeddings[:, 0])
    for paths in ([], [1], [0, 0]):
        with pytest.raises(ValueError, match="path 0 only"):
            encoder(collate(encoder, ROWS), paths)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_and_recomputed_layers_give_the_same_gradient(tiny_clip_dir: str, checkpointing: bool) -> None:
    def gradients(chunk_size: int | None, **options: Any) -> list[Tensor]:
        encoder = encoder_of(tiny_clip_dir, **options).train()
        encoding = encode_in_chunks(encoder, collate(encoder, ROWS), chunk_size=chunk_size, seed_parts=(0,))
        encoding.embeddings[:, 0].cumsum(0).square().sum().backward()
        encoding.backward()
        return [p.grad for p in encoder.parameter_groups()["adapters"] if p.grad is not None]

    plain, chunked = gradients(None), gradients(2, gradient_checkpointing=checkpointing)
    assert all(bool(gradient.any()) for gradient in plain), "both towers"
    assert len(plain) == len(chunked) > 20
    for one, other in zip(plain, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_single(tiny_clip_dir: str, dtype: Any) -> None:
    exact, half = encoder_of(tiny_clip_dir), encoder_of(tiny_clip_dir, dtype=dtype)
    embeddings = half(collate(half, ROWS))
    assert embeddings.dtype == torch.float32
    assert half.backbone.base.transformer.resblocks[0].mlp.c_fc.weight.dtype == getattr(torch, dtype)
    assert ((embeddings * exact(collate(exact, ROWS))).sum(-1) > 0.99).all()


def test_batch_normalisation_keeps_its_statistics(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path, vision_cfg=RESNET)
    encoder = encoder_of(folder)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    expected = encoder(collate(encoder, ROWS))
    torch.testing.assert_close(encoder.train()(collate(encoder, ROWS)), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


@pytest.mark.parametrize(
    ("option", "words"),
    [({"num_paths": 2}, "set num_paths=1"), ({"prefix_length": 8}, "set prefix_length=0")],
)
def test_settings_that_an_openclip_model_does_not_have_are_refused(
    tiny_clip_dir: str, option: dict[str, Any], words: str
) -> None:
    settings = {"num_paths": 1, "prefix_length": 0, "attention": "sdpa", "revision": None, "mi_weight": 0.1}
    assert isinstance(build_encoder(tiny_clip_dir, settings), OpenCLIPEncoder)
    with pytest.raises(ValueError, match=words):
        build_encoder(tiny_clip_dir, {**settings, **option})
