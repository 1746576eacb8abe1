"""Names, loading and tokenising of OpenCLIP models, against open_clip itself."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.dual_backbone import (
    DualBackbone,
    DualProcessor,
    absolute_name,
    is_dual_encoder,
    load_dual_backbone,
)
from tests.support.tiny import noise_image
from tests.support.tiny_clip import CONTEXT_LENGTH, MODEL, save_tiny_clip, tiny_clip


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this test allows no network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def own_architecture(monkeypatch: pytest.MonkeyPatch, tiny_clip_dir: str) -> str:
    """``tiny-clip`` and its tag ``mine``, among open_clip's own; the "download" is a local file."""
    weights = f"{tiny_clip_dir}/open_clip_model.safetensors"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", MODEL)
    tag = {"file": weights, "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"mine": tag})
    return weights


def loaded(backbone: DualBackbone) -> dict[str, Tensor]:
    return dict(backbone.base.state_dict())


def assert_same_weights(backbone: DualBackbone, expected: dict[str, Tensor]) -> None:
    assert loaded(backbone).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded(backbone).items())


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_loaded_without_network(tiny_clip_dir: str) -> None:
    backbone = load_dual_backbone(tiny_clip_dir)
    assert_same_weights(backbone, load_file(f"{tiny_clip_dir}/open_clip_model.safetensors"))
    assert backbone.config.to_dict()["model"]["embed_dim"] == 24
    assert backbone.config.to_dict()["preprocess"]["mean"] == [0.5, 0.4, 0.3]
    assert backbone.training


@pytest.mark.usefixtures("no_network")
def test_a_tag_brings_its_weights_preprocessing_and_activation(own_architecture: str) -> None:
    backbone = load_dual_backbone("open_clip:tiny-clip/mine")
    assert_same_weights(backbone, load_file(own_architecture))
    assert backbone.config.preprocess["mean"] == (0.1, 0.2, 0.3)
    assert type(backbone.base.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.usefixtures("no_network")
def test_a_weights_file_is_loaded_by_a_relative_path(
    own_architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    shutil.copy(own_architecture, tmp_path / "weights" / "epoch_1.safetensors")
    monkeypatch.chdir(tmp_path)
    name = "open_clip:tiny-clip/weights/epoch_1.safetensors"
    backbone = load_dual_backbone(name)
    assert_same_weights(backbone, load_file(own_architecture))
    assert type(backbone.base.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    assert absolute_name(name) == f"open_clip:tiny-clip/{tmp_path}/weights/epoch_1.safetensors"
    assert_same_weights(load_dual_backbone(absolute_name(name)), load_file(own_architecture))


def test_names_of_both_kinds_are_told_apart(
    tiny_clip_dir: str, tiny_backbone_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = ("open_clip:ViT-B-32/openai", "open_clip:hf-hub:owner/model", tiny_clip_dir)
    other = ("tiny", "Qwen/Qwen2-VL-2B-Instruct", tiny_backbone_dir, "nowhere")
    assert [is_dual_encoder(name) for name in clip + other] == [True] * 3 + [False] * 4
    unchanged = ("tiny", "Qwen/Qwen2-VL-2B-Instruct", "open_clip:ViT-B-32/openai", "open_clip:ViT-B-32")
    assert [absolute_name(name) for name in unchanged] == list(unchanged)
    Path("folder").mkdir()
    assert absolute_name("folder") == str(tmp_path / "folder")


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "open_clip_model.safetensors")
    del weights["text_projection"]
    save_file(weights, folder / "open_clip_model.safetensors")


def misspell_the_config(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_size"] = config["model_cfg"].pop("embed_dim")
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "weights .*could not be loaded"),
        (drop_a_weight, "text_projection"),
        (misspell_the_config, "embed_size"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{"), "Could not load valid config"),
    ],
)
def test_a_damaged_folder_is_one_error_with_its_name(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    save_tiny_clip(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)backbone '{tmp_path}': .*{message}"):
        load_dual_backbone(str(tmp_path))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-33/openai", "no architecture 'ViT-B-33'; similar: ViT-B-32"),
        ("open_clip:", "no architecture ''"),
        ("open_clip:ViT-B-32", "'' is neither a file nor .* tags: openai, .*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/laion9b", "'laion9b' is neither a file nor a pretrained tag of ViT-B-32"),
    ],
)
def test_a_name_that_does_not_exist_is_one_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dual_backbone(name)


def test_weights_that_cannot_be_had_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", offline)
    for name in ("open_clip:ViT-B-32/openai", "open_clip:hf-hub:owner/model"):
        with pytest.raises(ValueError, match=f"backbone '{name}': .*no route to host"):
            load_dual_backbone(name)


def test_what_trains(tiny_clip_dir: str) -> None:
    full = load_dual_backbone(tiny_clip_dir)
    untrained = [name for name, p in full.base.named_parameters() if not p.requires_grad]
    assert untrained == ["logit_scale"]
    frozen = load_dual_backbone(tiny_clip_dir, adapter=AdapterConfig(kind="frozen"))
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ValueError, match="set full or frozen"):
        load_dual_backbone(tiny_clip_dir, adapter=AdapterConfig(kind="lora"))


def test_another_dtype_is_refused(tiny_clip_dir: str) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'bf16'"):
        load_dual_backbone(tiny_clip_dir, dtype="bf16")  # type: ignore[arg-type]


def test_gradient_checkpointing_is_switched_on(tiny_clip_dir: str) -> None:
    backbone = load_dual_backbone(tiny_clip_dir, gradient_checkpointing=True)
    assert backbone.base.transformer.grad_checkpointing
    assert backbone.base.visual.transformer.grad_checkpointing


TEXTS = {
    "a red circle": False,
    "!": False,
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen": False,  # 16 tokens
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen !": True,
    "word " * 50: True,
}


def test_tokens_are_open_clips_and_cut_texts_are_marked(tiny_clip_dir: str) -> None:
    processor = load_dual_backbone(tiny_clip_dir).processor
    data = processor(text=[f"{IMAGE_PLACEHOLDER}\n{text}\n" for text in TEXTS])
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip_dir}")
    assert torch.equal(data["input_ids"], tokenizer(list(TEXTS)))
    assert data["truncated"].bool().all(dim=1).tolist() == list(TEXTS.values())
    assert data["truncated"].bool().any(dim=1).tolist() == list(TEXTS.values())
    assert data["attention_mask"].sum(dim=1).tolist() == [CONTEXT_LENGTH] * len(TEXTS)


@pytest.mark.parametrize(("padding", "at_the_end"), [(1, []), (0, [7])])
def test_cut_texts_are_marked_for_other_tokenizers(padding: int, at_the_end: list[int]) -> None:
    """SigLIP drops signs and pads with its end token 1; another one ends every row with a class token 7."""

    def tokenizer(texts: list[str], context_length: int = 8) -> Tensor:
        room = context_length - len(at_the_end) - 1
        words = [[word for word in text.split() if word.isalpha()] for text in texts]
        rows = [[10 + len(word) for word in row][:room] + [1] for row in words]
        return torch.tensor([row + [padding] * (room + 1 - len(row)) + at_the_end for row in rows])

    processor = DualProcessor(tokenizer, lambda _: torch.zeros(3, 4, 4))
    room = 8 - len(at_the_end) - 1
    data = processor(text=["!", *("a " * count for count in (1, room - 1, room, room + 1, 60))])
    assert data["truncated"].bool().any(dim=1).tolist() == [False, False, False, False, True, True]


def test_rows_without_text_or_image_are_told_apart(tiny_clip_dir: str) -> None:
    processor = load_dual_backbone(tiny_clip_dir).processor
    image = noise_image(40, 30)
    rows = [f"{IMAGE_PLACEHOLDER}\n", "text", f"{IMAGE_PLACEHOLDER}\n{IMAGE_PLACEHOLDER}\nboth\n"]
    data = processor(text=rows, images=[image] * 3, padding=True, return_tensors="pt")
    assert data["attention_mask"].float().mean(dim=1).tolist() == [0, 1, 1]
    assert data["pixel_values"].shape == (3, 3, 32, 32)
    assert data["image_sizes"].tolist() == [[30, 40]] * 3
    nested = processor(text=rows, images=[[image], [], [image, image]])
    assert all(torch.equal(value, nested[key]) for key, value in data.items())
    with pytest.raises(ValueError, match="needs a text or an image"):
        processor(text=["text", " \n"])


def test_the_tiny_model_tells_inputs_apart() -> None:
    """Or the tests of embeddings would prove little."""
    model, tokenizer = tiny_clip().eval(), open_clip.get_tokenizer("ViT-B-32", context_length=CONTEXT_LENGTH)
    text = model.encode_text(tokenizer(["a red circle", "a blue square", "green"]), normalize=True)
    image = model.encode_image(torch.randn(3, 3, 32, 32), normalize=True)
    for unit in (text, image):
        assert (unit @ unit.T).tril(-1).max() < 0.95
