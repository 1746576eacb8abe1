"""Paths in files that may leave the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling.model.locations import located, portable


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
