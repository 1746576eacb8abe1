"""What is written beside an exported model: its card, and paths that may leave the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from parallel_decoupling.model.locations import located, portable
from parallel_decoupling.model.model_card import model_card


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
def test_other_values_are_left_alone(value: Any) -> None:
    assert portable({"x": [value]}, "/a/b") == located({"x": [value]}, "/a/b") == {"x": [value]}


def test_an_instruction_is_not_a_path() -> None:
    instructions = {"query_instruction": "/imagine", "instruction": "../"}
    assert portable(instructions, "/a/b") == located(instructions, "/a/b") == instructions


def test_nothing_is_beside_a_folder_at_the_root(tmp_path: Path) -> None:
    assert portable({"model": str(tmp_path)}, "/embeddings") == {"model": None}


CONFIG: dict[str, Any] = {
    "backbone": {"name": "owner/model", "sha256": "abc"},
    "backbone_included": False,
    "settings": {"revision": "r1"},
    "paths": [0, 1],
    "embed_dim": 32,
    "aggregate_dim": 32,
    "query_instruction": "find | it",
    "candidate_instruction": "",
    "run": {"model": {"temperature": 0.05}, "rows_by_subset": {"b": 3, "a": 1}, "global_step": 480},
}
SCORES = {"means": {"classification": {"aggregate": 0.75, "path_0": 0.5}}}


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}")[1].split("\n## ")[0]


def test_sections_come_from_the_run() -> None:
    text = model_card(CONFIG, SCORES)
    assert ModelCard(text).data.library_name == "parallel-decoupling"
    assert "| revision | r1 |" in section(text, "Model")
    assert "| query instruction | find \\| it |" in section(text, "Model")
    assert '| rows seen by subset | {"b": 3, "a": 1} |' in section(text, "Training data")
    assert "| temperature | 0.05 |" in section(text, "Hyper-parameters")
    assert "| main steps | 480 |" in section(text, "Compute")
    assert "| classification | aggregate 75.0, path_0 50.0 |" in section(text, "Scores")


def test_what_is_not_known_is_left_out() -> None:
    card = model_card({**CONFIG, "run": {}})
    assert "not evaluated" in section(card, "Scores")
    for title in ("Training data", "Hyper-parameters", "Compute"):
        assert f"## {title}" not in card
