"""Embeddings and scores of two processes against those of one, also where a process has one side only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fit import kept_data, make_trainer, small_embedder
from tests.support.processes import run_ranks


def scores(folder: Path) -> dict[str, Any]:
    """Everything but times and what a run is called."""
    content = json.loads((folder / "scores.json").read_text())
    return {name: content[name] for name in ("means", "tasks", "metric_means", "hits", "warnings")}


def run(backbone: str, data_dir: str, folder: Path, devices: int, **settings: Any) -> None:
    module = small_embedder(backbone)
    trainer = make_trainer(folder, devices=devices, strategy="ddp" if devices > 1 else "auto")
    trainer.test(module, kept_data(module, folder / "kept", data_dir, **settings), verbose=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


@pytest.mark.parametrize(
    ("batch_size", "query_limit"), [(8, None), pytest.param(3, None, marks=pytest.mark.slow), (1, 3)]
)
def test_two_processes_embed_and_score_exactly_like_one_and_each_other(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, batch_size: int, query_limit: int | None
) -> None:
    """Batches of 8 leave one process a batch without rows; the files are the same to the last byte."""
    args = tiny_backbone_dir, tiny_mmeb_dir
    settings = {"eval_batch_size": batch_size, "query_limit": query_limit}
    run(*args, tmp_path / "one", 1, **settings)

    def two() -> None:
        run(*args, tmp_path / "two", 2, **settings)

    run_ranks(two, timeout=60)
    whole = contents(tmp_path / "one")
    assert len(whole) == 4
    assert contents(tmp_path / "two") == whole
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    lost = next((tmp_path / "two" / "kept").rglob("*.parquet"))
    lost.unlink()
    (tmp_path / "two" / "scores.json").unlink()
    run_ranks(two, timeout=60)
    assert contents(tmp_path / "two") == whole, "two processes resume what two have left"
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
