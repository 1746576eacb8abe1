"""Mined negatives: a loop over scores, and a split that training reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from parallel_decoupling import cli, mining
from parallel_decoupling.data.readers import TrainSubset
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.embedder import Embedder
from tests.support.mmeb import train_row, write_train


@pytest.mark.parametrize(
    ("ranks", "margin", "most"), [(range(5), 0.0, 2), (range(1, 4), 0.1, 9), (range(50), -2, 50)]
)
def test_negatives_equal_a_loop(ranks: range, margin: float, most: int) -> None:
    """Rows 0 and 2 have one query, row 1 has two candidates of its own."""
    query, candidate = torch.randn(2, 4), torch.randn(8, 4)
    task = EvalTask(Task("t", "retrieval", False), [], [], [0, 1, 0], [[3], [1, 2], [4]])
    expected = []
    for number, own in ((0, [3, 4]), (1, [1, 2]), (0, [4, 3])):
        scores = [float(query[number] @ each) for each in candidate]
        ranking = sorted((c for c in range(8) if c not in own), key=lambda c: -scores[c])
        near = [c for rank, c in enumerate(ranking) if rank in ranks and scores[c] <= scores[own[0]] - margin]
        expected.append(near[:most])
    assert mining.hard_negatives(query, candidate, task, ranks, margin, most) == expected


def test_a_mined_split_is_read_by_training_and_made_once(
    tiny_mmeb_dir: str, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures of a colour belong to one query; a row without a text is left out."""
    data = shutil.copytree(tiny_mmeb_dir, tmp_path / "data")
    rows = [train_row(pos="a"), train_row(pos="b"), train_row("q", "c"), train_row("")]
    write_train(data, "texts", rows)
    embedder.save_pretrained(tmp_path / "model")
    command = ["mine", str(data), str(tmp_path / "model"), str(tmp_path / "kept"), "--negatives", "2"]
    cli.main([*command, "--margin", "-2"])
    mined, read = (
        TrainSubset(data, "colours_t2i", "mined", hard_negatives=2),
        TrainSubset(data, "colours_t2i"),
    )
    candidates = embedder.encode([read[row].candidate for row in range(24)])
    ranking = (candidates @ embedder.encode(mined[5].query)).argsort(descending=True).tolist()
    best = [read[row].candidate for row in ranking if row % 4 != 5 % 4][:2]
    assert list(mined[5].negatives) == best
    pairs = [TrainSubset(data, "texts", "mined", hard_negatives=2)[row] for row in range(3)]
    assert [{each.text for each in pair.negatives if each} for pair in pairs] == [{"c"}, {"c"}, {"a", "b"}]
    monkeypatch.setattr(mining, "encode_rows", None)
    cli.main([*command, "--margin", "2"])
    assert TrainSubset(data, "colours_t2i", "mined", hard_negatives=1)[5].negatives == (None,)
