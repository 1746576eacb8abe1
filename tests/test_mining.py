"""Mined negatives: a loop over scores, and a split that training reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling import cli, mining
from parallel_decoupling.data.readers import TrainSubset
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.embedder import Embedder
from tests.support.mmeb import OWN_ENTRY, train_row, write_image, write_train
from tests.support.processes import run_ranks


@pytest.mark.parametrize(("ranks", "margin"), [(range(2), 0.0), (range(1, 4), 0.1), (range(50), -2.0)])
def test_negatives_equal_a_loop(ranks: range, margin: float) -> None:
    """Rows 0 and 2 have one query, row 1 has two candidates of its own."""
    query, candidate = torch.randn(2, 4), torch.randn(8, 4)
    task = EvalTask(Task("t", "retrieval", False), [], [], [0, 1, 0], [[3], [1, 2], [4]])
    expected = []
    for number, own in ((0, [3, 4]), (1, [1, 2]), (0, [4, 3])):
        scores = [float(query[number] @ each) for each in candidate]
        ranking = sorted((c for c in range(8) if c not in own), key=lambda c: -scores[c])
        near = [c for rank, c in enumerate(ranking) if rank in ranks and scores[c] <= scores[own[0]] - margin]
        expected.append(near)
    assert mining.hard_negatives(query, candidate, task, ranks, margin) == expected


def dense_graph(near: list[list[int]], own: list[int]) -> torch.Tensor:
    """Weight between every two rows, by the definition."""
    graph = torch.zeros(len(own), len(own), dtype=torch.float64)
    for row, candidates in enumerate(near):
        for number, candidate in enumerate(candidates):
            for other in range(len(own)):
                if own[other] == candidate:
                    graph[row, other] += 1 / (1 + number)
                    graph[other, row] += 1 / (1 + number)
    return graph


def test_neighbour_order_equals_a_recursion_over_dense_matrices() -> None:
    """Some candidates belong to several rows, and some rows have no negative."""

    def halved(rows: list[int]) -> list[int]:
        if len(rows) < 4:
            return rows
        part = graph[rows][:, rows]
        degree, value = part.sum(1) + 1e-9, torch.arange(len(rows), dtype=torch.float64)
        for _ in range(50):
            value = value - (degree @ value) / degree.sum()
            value = value + part @ value / degree
        rows = [rows[place] for place in sorted(range(len(rows)), key=lambda each: value[each])]
        return halved(rows[: len(rows) // 2]) + halved(rows[len(rows) // 2 :])

    own = torch.randint(24, (32,)).tolist()
    near = [[each for each in torch.randperm(24)[:5].tolist() if each != own[row]] for row in range(32)]
    near[3] = near[17] = []
    graph = dense_graph(near, own)
    assert mining.neighbour_order(near, own).tolist() == halved(list(range(32)))


@pytest.mark.parametrize("step", [1, 3])
def test_neighbours_stand_side_by_side_also_where_rows_are_left_out(step: int) -> None:
    """Groups of 12 rows are each other's negatives; a random order keeps few of them together."""
    group = (torch.arange(96) // 12)[torch.randperm(96)].tolist()
    rows = range(96)
    near = [[each for each in rows if group[each] == group[row] and each != row] for row in rows]
    order = mining.neighbour_order(near, list(rows)).tolist()
    assert sorted(order) == list(rows)
    kept = [group[row] for row in order if row % step == 0]
    changes = sum(one != other for one, other in zip(kept, kept[1:], strict=False))
    assert changes == len(set(kept)) - 1


def test_rows_with_one_candidate_are_not_neighbours() -> None:
    """Of 4 pairs of labels that are mixed up with each other, both are in every cluster, evenly."""
    own = torch.arange(8).repeat(8)[torch.randperm(64)].tolist()
    order = mining.neighbour_order([[label ^ 1] for label in own], own).tolist()
    for start in range(0, 64, 8):
        labels = [own[row] for row in order[start : start + 8]]
        assert len(set(labels)) == 2
        assert 2 <= labels.count(labels[0]) <= 6


def test_a_mined_split_is_read_by_training_and_made_once(
    tiny_mmeb_dir: str, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures of a colour belong to one query; a row without a text is left out, as is another group."""
    data = shutil.copytree(tiny_mmeb_dir, tmp_path / "data")
    rows = [train_row(pos="a"), train_row(pos="b"), train_row("q", "c"), train_row("")]
    write_train(data, "texts", rows)
    table = {"shelf": {**OWN_ENTRY, "group": "elsewhere"}}
    (data / "tasks.json").write_text(json.dumps(json.loads((data / "tasks.json").read_text()) | table))
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
    assert sorted(mined.neighbour_order()) == list(range(24))
    few = TrainSubset(data, "colours_t2i", "mined", limit=9)
    kept = [row for row in mined.kept[mined.neighbour_order()] if row in few.kept]
    assert few.kept[few.neighbour_order()].tolist() == kept
    pairs = [TrainSubset(data, "texts", "mined", hard_negatives=2)[row] for row in range(3)]
    assert [{each.text for each in pair.negatives if each} for pair in pairs] == [{"c"}, {"c"}, {"a", "b"}]
    monkeypatch.setattr(mining, "encode_rows", None)
    there = {file: file.read_bytes() for file in data.rglob("mined-*.parquet")}
    with pytest.raises(ValueError, match="no row has a negative in colours_i2t, colours_t2i, texts, where"):
        mining.mine(str(data), str(tmp_path / "model"), str(tmp_path / "kept"), margin=2.0)
    assert there == {file: file.read_bytes() for file in data.rglob("mined-*.parquet")}


def test_two_processes_write_what_one_writes_and_resume(
    tiny_mmeb_dir: str, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 5 rows, of which some are there already; a side of 4 rows is one process's alone."""
    embedder.save_pretrained(tmp_path / "model")
    folders = [shutil.copytree(tiny_mmeb_dir, tmp_path / name) for name in ("one", "two")]

    encode = mining.encode_rows

    def on_a_rank(folder: Path) -> None:
        def noted(encoder: Any, collator: Any, part: Any, **options: Any) -> Any:
            with (folder / f"rank_{os.environ['RANK']}.txt").open("a") as file:
                file.write(f"{part.dataset.name} {part.indices}\n")
            return encode(encoder, collator, part, **options)

        mining.ROWS_PER_SHARD, mining.encode_rows = 5, noted  # type: ignore[assignment]
        mining.mine(str(folder), str(tmp_path / "model"), str(folder / "kept"), margin=-2.0, last_rank=9)

    run_ranks(on_a_rank, folders[0], processes=1)
    shutil.copytree(folders[0] / "kept", folders[1] / "kept")
    for lost in (file for file in (folders[1] / "kept").rglob("*.parquet") if "00001" not in file.name):
        lost.unlink()
    run_ranks(on_a_rank, folders[1])
    did = [{*(folders[1] / f"rank_{rank}.txt").read_text().splitlines()} for rank in range(2)]
    assert (len(did[0]) > 0, len(did[1]) > 0, did[0] & did[1]) == (True, True, set())
    contents = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.parquet")}
        for folder in folders
    ]
    assert len([file for file in contents[0] if file.name.startswith("mined")]) == 2
    assert len([file for file in contents[0] if file.parts[0] == "kept"]) == 2 * (5 + 1)
    assert contents[0] == contents[1]


def test_copies_of_a_picture_are_one_candidate(tmp_path: Path) -> None:
    pictures = [write_image(tmp_path / "MMEB-train" / f"{name}.png", name) for name in ("red", "blue")]
    shutil.copy(pictures[0], tmp_path / "MMEB-train" / "copy.png")
    names = ("red.png", "copy.png", "blue.png")
    rows = [train_row(name, "", pos_image_path=name) for name in names]
    write_train(tmp_path, "S", rows)
    task, sides = mining.as_task(TrainSubset(tmp_path, "S"))
    assert task.candidates_of_row == [[0], [0], [1]]
    assert [image for _, image in sides] == ["red.png", "blue.png"]


def test_ranks_in_the_wrong_order_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="first_rank must be below last_rank, got 10 and 5"):
        mining.mine("nowhere", "no model", "out", first_rank=10, last_rank=5)
