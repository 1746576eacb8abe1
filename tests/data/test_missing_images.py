"""Images that cannot be read: an error that says where, or skipped alike on every process, and counted."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling import distributed
from parallel_decoupling.data.datamodule import MMEBDataModule
from tests.data.mmeb_files import eval_row, train_row, write_eval, write_image, write_train
from tests.data.test_datamodule import CharacterProcessor, queries, texts
from tests.support.fit import stand_in_model

ROWS = 24
GONE = (3, 4, 11, 23)
BROKEN = 17
BAD = (*GONE, BROKEN)


class ImageProcessor(CharacterProcessor):
    """Takes images and ignores them."""

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> Any:
        return super().__call__(text, **options)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Queries q0, q1, ... with an image each, some of which are not there."""
    images = tmp_path / "MMEB-train" / "images"
    for row in set(range(ROWS)) - set(GONE):
        write_image(images / f"{row}.png")
    (images / f"{BROKEN}.png").write_bytes(b"broken")
    rows = [train_row(f"q{row}\n", f"p{row}", qry_image_path=f"images/{row}.png") for row in range(ROWS)]
    write_train(tmp_path, "S", rows)
    return tmp_path


def module(data_dir: Path, **options: Any) -> MMEBDataModule:
    data = MMEBDataModule(str(data_dir), batch_size=8, **options)
    data.connect(stand_in_model(ImageProcessor()))
    data.setup("fit")
    return data


def test_a_missing_image_stops_training_and_says_where(data_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"subset 'S', file .*, row (3|4|11|23), column 'qry': no image file"
    ):
        list(module(data_dir).train_dataloader())
    for row in GONE:
        write_image(data_dir / f"MMEB-train/images/{row}.png")
    with pytest.raises(ValueError, match=r"training subset 'S', row 17: Cannot read image .*17.png"):
        list(module(data_dir).train_dataloader())


def expected_queries(data_dir: Path) -> list[list[str]]:
    """By hand: the sampler's rows, where a bad one is replaced by the next good one."""
    sampler = module(data_dir).train_dataloader().batch_sampler
    assert sampler is not None
    good = {
        row: next((row + n) % ROWS for n in range(ROWS) if (row + n) % ROWS not in BAD) for row in range(ROWS)
    }
    steps = range(ROWS // 8)
    return [[f"<image>\nq{good[row]}\n" for _, row in sampler.batch(step)] for step in steps]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_skipping_is_the_same_for_all_processes_and_workers(
    data_dir: Path, world_size: int, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        data = module(data_dir, missing_images="skip", num_workers=num_workers)
        parts.append(queries(data.train_dataloader()))
    assert [sum(step, []) for step in zip(*parts, strict=True)] == expected_queries(data_dir)


def test_skipped_rows_are_counted_in_the_log(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(data_dir, missing_images="skip")
    with caplog.at_level(logging.WARNING):
        list(data.train_dataloader())
    assert data.train_data[0].num_skipped == 6, "row 3 passes over 3 and 4"
    assert "training subset 'S', rows skipped so far: 1. The last: row" in caplog.messages[0]
    assert [re.findall(r"so far: (\d)", message) for message in caplog.messages] == [["1"], ["2"], ["4"]]


def test_the_positive_stays_with_its_query_and_a_repeated_row_is_no_negative(data_dir: Path) -> None:
    for batch in module(data_dir, missing_images="skip").train_dataloader():
        asked = [text.strip().removeprefix("<image>\nq") for text in texts(batch.query)]
        assert texts(batch.candidate) == [f"p{row}" for row in asked]
        ids = batch.candidate_ids.tolist()
        assert [[a == b for b in ids] for a in ids] == [[a == b for b in asked] for a in asked]


def test_a_broken_evaluation_image_is_named_by_task_and_row(tmp_path: Path) -> None:
    write_image(tmp_path / "MMEB-eval/GQA/0.png")
    (tmp_path / "MMEB-eval/GQA/1.png").write_bytes(b"broken")
    rows = [eval_row("q", ["a", "b"], qry_img_path=f"GQA/{row}.png") for row in range(2)]
    write_eval(tmp_path, "GQA", rows)
    data = MMEBDataModule(str(tmp_path))
    data.connect(stand_in_model(ImageProcessor()))
    data.setup("test")
    loader, _ = data.test_dataloader()
    with pytest.raises(ValueError, match=r"evaluation task 'GQA', row 1, query: Cannot read image .*1.png"):
        list(loader)
