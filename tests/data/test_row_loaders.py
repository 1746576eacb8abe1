"""Which process embeds which rows, and in which batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.data.row_loaders import (
    RowBatches,
    RowLoader,
    RowPlan,
    Shards,
    TokenEstimate,
    chosen_columns,
)
from parallel_decoupling.data.row_sources import RowSource, open_rows


@pytest.fixture
def source(tmp_path: Path) -> RowSource:
    """Fifty texts of different lengths."""
    lengths = random.Random(0).choices(range(1, 40), k=50)
    pq.write_table(pa.table({"text": ["word " * length for length in lengths]}), tmp_path / "rows.parquet")
    return open_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("finished", [(), (0, 3), range(7)])
def test_every_row_is_done_once_whatever_the_number_of_processes(
    source: RowSource, world_size: int, finished: tuple[int, ...]
) -> None:
    shards = Shards(len(source), 8)
    plans = [
        RowPlan(source, shards, TokenEstimate(), finished, 3, rank, world_size) for rank in range(world_size)
    ]
    batches = [list(plan) for plan in plans]
    assert len({len(each) for each in batches}) == 1, "as many steps on every process"
    assert [len(plan) for plan in plans] == [len(each) for each in batches]
    rows = [row for each in batches for place in each for row in place.rows]
    expected = [row for row in range(50) if row // 8 not in finished]
    assert sorted(rows) == expected
    assert sum(plan.num_rows for plan in plans) == len(expected)


def test_a_shard_is_one_process_s_from_its_largest_row_to_its_last_batch(source: RowSource) -> None:
    shards = Shards(len(source), 20)
    row_plan = RowPlan(source, shards, TokenEstimate(), (), 6, 0, 1)
    plan = list(row_plan)
    for shard in range(3):
        batches = [place for place in plan if place.shard == shard]
        rows = [row for place in batches for row in place.rows]
        assert sorted(rows) == list(shards.rows(shard))
        lengths = [row_plan.estimate(*source.size(row)) for row in rows]
        assert lengths == sorted(lengths, reverse=True)
        assert [place.last for place in batches] == [False] * (len(batches) - 1) + [True]
    assert [place.shard for place in plan] == sorted(cast(int, place.shard) for place in plan)


def test_sorting_saves_padding(source: RowSource) -> None:
    def padded(batches: list[tuple[int, ...]]) -> int:
        return sum(len(rows) * max(source.size(row)[1] for row in rows) for rows in batches)

    in_order = [tuple(range(start, min(start + 5, 50))) for start in range(0, 50, 5)]
    plan = [place.rows for place in RowPlan(source, Shards(50, 50), TokenEstimate(), (), 5, 0, 1)]
    assert padded(plan) < 0.75 * padded(in_order)


@pytest.fixture
def collator(tiny_backbone_dir: str) -> Collator:
    return Collator(AutoProcessor.from_pretrained(tiny_backbone_dir), image_token="<|image_pad|>")


def test_the_estimate_is_near_the_tokens_of_a_row(collator: Collator, tmp_path: Path) -> None:
    sides = {"small.png": (16, 24), "medium.png": (32, 32), "large.png": (40, 64), "huge.png": (200, 50)}
    for name, side in sides.items():
        Image.new("RGB", side).save(tmp_path / name)
    pq.write_table(pa.table({"image": list(sides)}), tmp_path / "rows.parquet")
    source = open_rows(tmp_path / "rows.parquet")
    for policy in (ImagePolicy(), ImagePolicy(max_pixels=32 * 32), ImagePolicy(min_pixels=48 * 48)):
        limited = Collator(collator.processor, image_token="<|image_pad|>", images=policy)
        estimate = TokenEstimate.of(limited)
        around = int(limited.encode_inputs([source.raw_input(0)]).lengths) - estimate(*source.size(0))
        for row in range(1, 4):
            tokens = int(limited.encode_inputs([source.raw_input(row)]).lengths)
            assert estimate(*source.size(row)) + around == tokens
    squares = TokenEstimate.of(Collator(collator.processor, image_token="x", images=ImagePolicy("low")))
    assert squares((10, 10), 0) == squares((100, 100), 0) > squares(None, 0) == 0
    assert squares((10, 10), 80) == squares((10, 10), 0) + 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_rows_are_named_and_the_others_are_as_without_them(
    collator: Collator, num_workers: int, tmp_path: Path
) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cells = {
        "text": ["red", "", "blue", "", "", "a <|image_pad|>"],
        "image": ["red.png", "missing.png", "", "broken.png", "", ""],
    }
    pq.write_table(pa.table(cells), tmp_path / "rows.parquet")
    source = open_rows(tmp_path / "rows.parquet")
    batches = RowBatches(source, collator, "", ("aggregate",))
    (batch,) = RowLoader(batches, RowPlan(source, Shards(6, 6), TokenEstimate(), (), 6, 0, 1), num_workers)
    assert sorted(batch.rows) == [0, 2]
    assert sorted(batch.bad_rows) == [1, 3, 4, 5]
    words = ("missing.png", "broken.png", "text or an image", "own image token")
    assert all(word in batch.bad_rows[row] for row, word in zip((1, 3, 4, 5), words, strict=True))
    alone = collator.encode_inputs([source.raw_input(row) for row in batch.rows])
    assert torch.equal(batch.inputs.tokens["input_ids"], alone.tokens["input_ids"])
    (only_bad,) = RowLoader(
        batches, RowPlan(source, Shards(6, 1), TokenEstimate(), (0, 2, 3, 4, 5), 6, 0, 1), num_workers
    )
    assert (only_bad.rows, set(only_bad.bad_rows), len(only_bad.inputs)) == ((), {1}, 1)


def test_columns_are_those_of_the_model() -> None:
    assert chosen_columns(None, 2) == ("aggregate", "path_0", "path_1")
    assert chosen_columns(["path_1", "aggregate"], 2) == ("aggregate", "path_1")
    with pytest.raises(ValueError, match="'path_2' is unknown; this model has aggregate, path_0, path_1"):
        chosen_columns(["path_2"], 2)
    with pytest.raises(ValueError, match="empty"):
        chosen_columns([], 2)
