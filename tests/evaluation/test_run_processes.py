"""Embeddings and scores of two processes against those of one, also where a process has one side only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.processes import run_ranks


def scores(folder: Path) -> dict[str, Any]:
    """Everything but times and what a run is called."""
    content = json.loads((folder / "scores.json").read_text())
    return {name: content[name] for name in ("means", "tasks", "metric_means", "hits", "warnings")}


def run(backbone: str, data_dir: str, folder: Path, devices: int, **settings: Any) -> None:
    trainer = make_trainer(folder, devices=devices, strategy="ddp" if devices > 1 else "auto")
    trainer.test(small_embedder(backbone), small_data(data_dir, **settings), verbose=False)


def assert_same_embeddings(first: Path, second: Path) -> None:
    """Same files, same bits."""
    names = sorted(file.name for file in first.iterdir())
    assert len(names) == 2
    assert names == sorted(file.name for file in second.iterdir())
    for name in names:
        one, two = load_file(first / name), load_file(second / name)
        for side in ("query", "candidate"):
            assert torch.equal(one[side], two[side]), (name, side)


@pytest.mark.parametrize(
    ("batch_size", "query_limit"), [(8, None), pytest.param(3, None, marks=pytest.mark.slow), (1, 3)]
)
def test_two_processes_embed_and_score_exactly_like_one(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, batch_size: int, query_limit: int | None
) -> None:
    """Batches of 8 give each process one side of every task; of seven inputs one is encoded twice."""
    args = tiny_backbone_dir, tiny_mmeb_dir
    settings = {"eval_batch_size": batch_size, "query_limit": query_limit}
    run(*args, tmp_path / "one", 1, embedding_cache=True, **settings)

    def two() -> None:
        run(*args, tmp_path / "two", 2, embedding_cache=True, **settings)

    run_ranks(two, timeout=60)
    assert_same_embeddings(tmp_path / "one" / "embeddings", tmp_path / "two" / "embeddings")
    assert scores(tmp_path / "two") == scores(tmp_path / "one")


def test_two_processes_share_a_prediction(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path) -> None:
    """Each encodes its part of the rows; the files are those of one process."""

    def predict(folder: Path, devices: int) -> int:
        trainer = make_trainer(folder, devices=devices, strategy="ddp" if devices > 1 else "auto")
        data = small_data(tiny_mmeb_dir, eval_batch_size=2)
        batches = trainer.predict(small_embedder(tiny_backbone_dir), datamodule=data)
        return sum(len(batch["indices"]) for task in batches for batch in task)

    rows = predict(tmp_path / "one", 1)

    def two() -> None:
        assert predict(tmp_path / "two", 2) <= rows // 2 + 2

    run_ranks(two, timeout=60)
    files = sorted((tmp_path / "one" / "predictions").iterdir())
    assert len(files) == 2
    for file in files:
        one = torch.load(file, weights_only=True)
        other = torch.load(tmp_path / "two" / "predictions" / file.name, weights_only=True)
        torch.testing.assert_close(other, one)


@pytest.mark.slow
def test_the_cache_of_two_processes_serves_one_and_the_other_way_round(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    args = tiny_backbone_dir, tiny_mmeb_dir

    def two() -> None:
        run(*args, tmp_path / "two", 2, embedding_cache=str(tmp_path / "cache"))

    run_ranks(two, timeout=60)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    run(*args, tmp_path / "one", 1, embedding_cache=str(tmp_path / "cache"))
    files[0].unlink()
    (tmp_path / "two" / "scores.json").unlink()
    run_ranks(two, timeout=60)
    assert sorted((tmp_path / "cache").iterdir()) == files
    assert files[1].stat().st_mtime_ns == times[1]
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
