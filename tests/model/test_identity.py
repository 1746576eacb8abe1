"""What tells weights, backbones, processors and rows apart, and paths in what is written."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from parallel_decoupling.batch import RawInput
from parallel_decoupling.model.backbone import AdapterConfig, Backbone, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.identity import (
    backbone_fingerprint,
    check_fingerprint,
    encoder_identity,
    load_trainable_state,
    path_hashes,
    processor_hash,
    rows_hash,
    trainable_state,
    weights_hash,
)
from parallel_decoupling.model.locations import located, portable
from parallel_decoupling.model.open_clip import OpenCLIPProcessor
from tests.support.families import save_tiny_backbone


def test_the_hash_of_weights_covers_names_shapes_dtypes_and_every_bit() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    found = weights_hash(weights)
    assert weights_hash(dict(reversed(weights.items()))) == found
    changed = [
        {**weights, "a": weights["a"].reshape(3, 2)},
        {**weights, "a": weights["a"] + torch.tensor([0.0, 0.0, 1e-6])},
        {**weights, "b": torch.ones(2, dtype=torch.float16)},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
    ]
    assert len({found, *map(weights_hash, changed)}) == 6


def test_fingerprint_tells_backbones_apart_whatever_trains_or_dtype(
    tiny_backbone_dir: str, tmp_path: Any
) -> None:
    fingerprint = backbone_fingerprint(load_backbone(tiny_backbone_dir))
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    for options in ({"adapter": AdapterConfig(kind="frozen")}, {"dtype": "bfloat16"}, {"attention": "eager"}):
        check_fingerprint(fingerprint, backbone_fingerprint(load_backbone(tiny_backbone_dir, **options)))
    check_fingerprint(
        fingerprint, backbone_fingerprint(load_backbone(save_tiny_backbone(tmp_path / "moved")))
    )
    other = load_backbone(save_tiny_backbone(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="frozen weights differ"):
        check_fingerprint(fingerprint, backbone_fingerprint(other))
    changed = load_backbone(tiny_backbone_dir)
    with torch.no_grad():
        changed.base.get_submodule("language_model.norm").weight[3] += 0.1
    with pytest.raises(ValueError, match="frozen weights differ"):
        check_fingerprint(fingerprint, backbone_fingerprint(changed))


@pytest.fixture
def backbone(tiny_backbone_dir: str) -> Backbone:
    return load_backbone(tiny_backbone_dir)


def written_before(
    backbone: Backbone, *, transformers_version: str = "5.22.2", **vision: Any
) -> dict[str, Any]:
    """The fingerprint of the same weights under another transformers, with other defaults of the vision."""
    other = deepcopy(backbone)
    for name, value in vision.items():
        setattr(other.config.vision_config, name, value)
    return backbone_fingerprint(other) | {"transformers_version": transformers_version}


def test_a_default_that_another_transformers_added_is_one_warning(backbone: Backbone) -> None:
    """As 5.23.0 added ``vision_use_head`` to SigLIP's config; here both ways around."""
    old, new = (
        written_before(backbone, vision_use_head=True, other_default=None),
        backbone_fingerprint(backbone),
    )
    assert old["sha256"] != new["sha256"]
    assert old["weights_sha256"] == new["weights_sha256"]
    for stored, current in ((old, new), (new, old)):
        with pytest.warns(UserWarning, match="5.22.2") as caught:
            check_fingerprint(stored, current)
        assert len(caught) == 1
        assert "vision_config.other_default, vision_config.vision_use_head" in str(caught[0].message)


def test_a_changed_value_and_other_weights_are_refused_whatever_the_version(backbone: Backbone) -> None:
    new = backbone_fingerprint(backbone)
    same_version = {"transformers_version": new["transformers_version"]}
    for old, message in (
        (written_before(backbone, hidden_act="relu", new_default=1), "hidden_act was 'relu' and is 'quick_"),
        (written_before(backbone, own=1, **same_version), "only one has vision_config.own"),
        (new | {"sha256": "0" * 64}, "the file was changed"),
        (written_before(backbone, own=1) | {"weights_sha256": "0" * 64}, "frozen weights differ"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fingerprint(old, new)
    with pytest.raises(ValueError, match="own was None and is"):
        check_fingerprint(written_before(backbone, own=None), written_before(backbone, own={"one": 1}))


def change_lora_alpha(encoder: Any) -> None:
    next(module for module in encoder.modules() if hasattr(module, "lora_A")).scaling["default"] *= 2


def change_family(encoder: Any) -> None:
    encoder.backbone.family = replace(encoder.backbone.family, position_ids="sequential")


CHANGES: list[tuple[Any, str | None]] = [
    (lambda encoder: encoder.parameter_groups()["adapters"][0].data.view(-1)[0].add_(1e-6), "weights_sha256"),
    (change_lora_alpha, None),
    (change_family, None),
    (lambda encoder: encoder.processor.tokenizer.add_tokens(["<new>"]), "processor_sha256"),
    (
        lambda encoder: setattr(encoder.processor.image_processor, "image_mean", [0.1, 0.2]),
        "processor_sha256",
    ),
]


@pytest.mark.parametrize(("change", "part"), CHANGES)
def test_the_identity_covers_what_the_encoder_holds(
    change: Any, part: str | None, backbone: Backbone
) -> None:
    encoder = ParallelEncoder(backbone)
    before = encoder_identity(encoder)
    assert json.loads(json.dumps(before)) == before
    encoder.processor(text=["a", "a longer text"], padding=True)  # a tokenizer remembers how it padded
    assert encoder_identity(encoder) == before
    change(encoder)
    after = encoder_identity(encoder)
    assert after["sha256"] != before["sha256"]
    assert part is None or after[part] != before[part]


def test_the_identity_covers_the_backbone_and_the_conditions(backbone: Backbone) -> None:
    encoder = ParallelEncoder(backbone)
    fingerprint = backbone_fingerprint(backbone)
    found = encoder_identity(encoder, precision="32-true")
    assert found == encoder_identity(encoder, fingerprint=fingerprint, precision="32-true")
    assert found["backbone_sha256"] == fingerprint["sha256"]
    other = encoder_identity(encoder, fingerprint={**fingerprint, "sha256": "b"}, precision="32-true")
    assert len({each["sha256"] for each in (found, other, encoder_identity(encoder, precision="bf16"))}) == 3


def test_the_hash_of_an_open_clip_processor_covers_its_vocabulary() -> None:
    found = []
    for words in ({"a": 1}, {"b": 1}):
        tokenizer = type("Words", (), {"encoder": words, "__call__": lambda *_: torch.zeros(1, 4).long()})()
        found.append(processor_hash(OpenCLIPProcessor(tokenizer, lambda image: torch.zeros(3, 2, 2))))
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_path_has_its_own_hash_and_the_weights_of_all(kind: Any, tiny_backbone_dir: str) -> None:
    backbone = load_backbone(tiny_backbone_dir, adapter=AdapterConfig(kind=kind))
    encoder = ParallelEncoder(backbone, num_paths=3, aggregation="learned")
    before = path_hashes(encoder)
    assert len(set(before)) == 3
    assert encoder.prefixes is not None
    with torch.no_grad():
        next(iter(encoder.prefixes.parameters()))[1, 0] += 1
    assert [old == new for old, new in zip(before, path_hashes(encoder), strict=True)] == [True, False, True]
    with torch.no_grad():
        encoder.backbone.base.get_submodule("language_model.norm").weight[3] += 0.1
    assert not set(before) & set(path_hashes(encoder))
    assert path_hashes(encoder.bfloat16()) == path_hashes(encoder), "in another precision, too"


def test_the_hash_of_rows_covers_order_texts_and_images(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    rows = [RawInput("one"), RawInput("two", (red,))]
    found = [rows, rows[::-1], [RawInput("one"), RawInput("two", (blue,))], [RawInput("onetwo", (red,))]]
    assert len({rows_hash(each) for each in found}) == 4
    assert rows_hash(iter(rows)) == rows_hash([RawInput("one"), RawInput("two", (red.copy(),))])


def test_an_image_file_counts_by_the_end_of_its_path_and_its_content(tmp_path: Path) -> None:
    here, there = (tmp_path / name / "pictures" / "a.bin" for name in ("here", "there"))
    content = bytes(range(256)) * 64
    for file in (here, there):
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    row, moved = [RawInput("", (str(here),))], [RawInput("", (str(there),))]
    before, by_name = rows_hash(row), rows_hash(row, files=False)
    assert (rows_hash(moved), rows_hash(moved, files=False)) == (before, by_name)
    assert rows_hash([RawInput("", (str(here.with_name("b.bin")),))], files=False) != by_name
    for place in (0, 5000, len(content) - 1):
        here.write_bytes(content[:place] + b"\xaa" + content[place + 1 :])
        assert rows_hash(row) != before
    here.write_bytes(content + b"x")
    assert rows_hash(row) != before
    assert rows_hash(row, files=False) == by_name
    here.unlink()
    gone = rows_hash(row)
    assert gone not in (before, by_name)
    os.mkfifo(here)
    assert rows_hash(row) == gone, "not waited for"


def test_names_and_shapes_that_do_not_fit_raise_and_change_nothing(backbone: Backbone) -> None:
    encoder = ParallelEncoder(backbone, aggregation="learned")
    before = trainable_state(encoder)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    missing = {name: tensor for name, tensor in zeros.items() if name != "prefixes.key_values"}
    for state, message in (
        (missing, r"missing \['prefixes.key_values'\]"),
        ({**zeros, "extra.weight": torch.zeros(1)}, r"unexpected \['extra.weight'\]"),
        ({**zeros, "path_logits": torch.zeros(3)}, "path_logits"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trainable_state(encoder, state)
    for name, tensor in trainable_state(encoder).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/run/embeddings/x.png", "./x.png"),
        ("/a/run/checkpoints/last.ckpt", "../checkpoints/last.ckpt"),
        ("/a/run", ".."),
        ("/a/run/embeddings", "."),
        ("/a/run/embeddings/.hidden/x", "./.hidden/x"),
        ("open_clip:ViT-B-32//a/run/weights.pt", "open_clip:ViT-B-32/../weights.pt"),
        ("/a/runs/other", None),
        ("/home/some one/x", None),
        ("~/x", None),
        ("open_clip:ViT-B-32//b/weights.pt", None),
    ],
)
def test_a_path_is_relative_to_its_holder_or_left_out(path: str, expected: str | None) -> None:
    values = {"model": path, "parts": [{"again": path}]}
    written = portable(values, "/a/run/embeddings")
    assert written == {"model": expected, "parts": [{"again": expected}]}
    if expected is not None:
        assert located(written, "/a/run/embeddings") == values
        assert "/b/run" in located(written, "/b/run/embeddings")["model"], "it moves with its folder"


@pytest.mark.parametrize(
    "value", ["tiny", "Qwen/Qwen2-VL-2B", "open_clip:ViT-B-32/laion2b", "mini-mmeb", 3, None, True, ""]
)
def test_other_values_and_instructions_are_left_alone(value: Any) -> None:
    values = {"x": [value], "query_instruction": "/imagine", "instruction": "../"}
    assert portable(values, "/a/b") == located(values, "/a/b") == values


def test_nothing_is_beside_a_folder_at_the_root(tmp_path: Path) -> None:
    assert portable({"model": str(tmp_path)}, "/embeddings") == {"model": None}
