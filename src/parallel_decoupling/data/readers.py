"""Rows of MMEB's files, and of your own: training rows on demand, evaluation tasks whole.

Here: which cells make up a query, a positive, negatives and candidates. Elsewhere on purpose: one side of a
row (``inputs``), the task table (``tasks``), the choice of rows (``mixture``), tokens and pixels
(``collate``).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parallel_decoupling.batch import RawInput, RawPair
from parallel_decoupling.data.images import ImageError, check_images
from parallel_decoupling.data.inputs import (
    NEGATIVE_COLUMNS,
    Inputs,
    Side,
    aligned_sides,
    eval_table,
    train_table,
)
from parallel_decoupling.data.tables import Table
from parallel_decoupling.data.tasks import EvalTask, Task, check_names, read_tasks, task_of_subset

LimitBy = Literal["sample", "first"]

BAD_ROWS_IN_A_ROW = 100
"""After so many rows without readable images the folder is at fault, not a file."""

WHITESPACE_LENGTH = 8
"""Texts of at least so many bytes are not searched for whitespace alone."""

MAX_POOL_ENTRIES = 20_000_000

log = logging.getLogger(__name__)


class TrainSubset:
    """One subset of ``MMEB-train`` or of your own: a mapped table whose rows become ``RawPair``.

    Rows with neither text nor image on one side are left out, as in VLM2Vec; ``blank_rows`` counts them.

    Args:
        data_dir: folder that holds ``MMEB-train`` or ``tasks.json``.
        subset: folder name of the subset, or name in ``tasks.json``.
        split: file name prefix, ``original`` or ``diverse_instruction`` in MMEB.
        limit: keep at most this many rows, in file order.
        limit_by: ``sample`` draws them once with ``seed``, ``first`` takes the first (VLM2Vec's caps).
        hard_negatives: negatives per row. A row with fewer is padded with None, so that every batch of
            every process has ``batch size * (1 + hard_negatives)`` candidates; padding is nobody's negative.
            Like a side of MMEB without text and image, a negative of whitespace is none.
        seed: seed of the ``limit`` draw, >= 0.
        must_exist: False leaves image files that are not there to whoever opens them.

    Raises:
        ValueError: no file, a missing column, no usable row, or (on reading) a bad row.
    """

    def __init__(
        self,
        data_dir: str | Path,
        subset: str,
        split: str = "original",
        limit: int | None = None,
        *,
        limit_by: LimitBy = "sample",
        hard_negatives: int = 0,
        seed: int = 0,
        must_exist: bool = True,
    ) -> None:
        self.subset = subset
        self.hard_negatives = hard_negatives
        task = task_of_subset(read_tasks(data_dir), subset)
        self.table, folder = train_table(Path(data_dir), subset, split, task)
        own = task is not None and task.source is not None
        self.inputs = Inputs(task, folder, "bare" if own else "written", must_exist=must_exist)
        blank = _blank(self.table, "qry", "qry_image_path") | _blank(self.table, "pos_text", "pos_image_path")
        if limit_by == "first":
            blank, limit = blank[:limit], None
        self.blank_rows = int(blank.sum())
        self.kept = np.flatnonzero(~blank)
        if not len(self.kept):
            raise ValueError(
                f"{self.table.owner}, file {self.table.files[0]}: every row has neither text nor image on "
                "one side. Leave the subset out or fill it in."
            )
        if limit is not None and limit < len(self.kept):
            rng = np.random.default_rng([seed, zlib.crc32(subset.encode())])
            self.kept = self.kept[np.sort(rng.choice(len(self.kept), limit, replace=False))]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> RawPair:
        row = int(self.kept[index])
        cells = self.table[row]
        query = self.inputs.query(
            _side(cells, "qry", "qry_image_path"), self.table.where(row, "qry", "qry_image_path")
        )
        side, where = (
            _side(cells, "pos_text", "pos_image_path"),
            self.table.where(row, "pos_text", "pos_image_path"),
        )
        positive = self.inputs.candidate(side, where)
        return RawPair(query, positive, self._negatives(row, cells), self.subset, row)

    def log_gaps(self) -> None:
        """Warn of rows that were left out, and of hard negatives that no row has."""
        if self.blank_rows:
            log.warning(
                "%s: left out %d rows with neither text nor image on a side",
                self.table.owner,
                self.blank_rows,
            )
        if self.hard_negatives and not any(_any_text(self.table.column(name)) for name in NEGATIVE_COLUMNS):
            log.warning(
                "%s: no row has a hard negative. data.hard_negatives %d adds as many stand-ins per row to "
                "encode, which are nobody's negative; set it to 0 unless another subset has some",
                self.table.owner,
                self.hard_negatives,
            )

    def readable(self, index: int) -> RawPair:
        """The row, or the next one of the subset (the first after the last) whose images can all be read.

        It depends on the files alone, so every process and every run takes the same one. ``skipped`` of
        the result says which rows were passed over and why.

        Raises:
            ValueError: a row is bad otherwise, or none of many rows can be read.
        """
        reasons: list[str] = []
        for step in range(min(len(self), BAD_ROWS_IN_A_ROW)):
            place = (index + step) % len(self)
            try:
                pair = self[place]
                for side in (pair.query, pair.candidate, *filter(None, pair.negatives)):
                    check_images(side)
            except ImageError as error:
                reasons.append(f"training subset {self.subset!r}, row {self.kept[place]}: {error}")
                continue
            return RawPair(pair.query, pair.candidate, pair.negatives, pair.subset, pair.row, tuple(reasons))
        raise ValueError(
            f"{len(reasons)} rows in a row have images that cannot be read. The last: {reasons[-1]} "
            "Skipping is for single files; find out with `lightning verify` what is wrong with the folder."
        )

    def _negatives(self, row: int, cells: Mapping[str, Any]) -> tuple[RawInput | None, ...]:
        if not self.hard_negatives:
            return ()
        where = self.table.where(row, "neg_text", "neg_image_path")
        sides = aligned_sides(cells.get("neg_text"), cells.get("neg_image_path"), where)
        sides = [(text, image) for text, image in sides if text.strip() or image][: self.hard_negatives]
        own = [self.inputs.candidate(side, where) for side in sides]
        return (*own, *[None] * (self.hard_negatives - len(own)))


def _side(cells: Mapping[str, Any], text: str, image: str) -> Side:
    return cells.get(text) or "", cells.get(image) or ""


def _any_text(column: pa.ChunkedArray | None) -> bool:
    """Whether a cell, or an entry of a cell's list, is more than whitespace."""
    for cells in () if column is None else column.chunks:
        texts = pc.list_flatten(cells) if pa.types.is_list(cells.type) else cells
        if pc.any(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0)).as_py():
            return True
    return False


def _blank(table: Table, text: str, image: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows have neither text (whitespace does not count) nor image on a side."""
    blank = np.ones(len(table), dtype=bool)
    for name, length in ((text, WHITESPACE_LENGTH), (image, 1)):
        column = table.column(name)
        if column is not None:
            blank &= pc.fill_null(pc.binary_length(column), 0).to_numpy() < length
    column = table.column(text)
    if column is not None and blank.any():
        stripped = pc.utf8_trim_whitespace(column.take(np.flatnonzero(blank)))
        blank[blank] = pc.fill_null(pc.binary_length(stripped), 0).to_numpy() == 0
    return blank


def read_eval_task(
    data_dir: str | Path, task: str, limit: int | None = None, *, must_exist: bool = True
) -> EvalTask:
    """Read one task of ``MMEB-eval`` in either published format, or of your own.

    Args:
        data_dir: folder that holds ``MMEB-eval`` or ``tasks.json``.
        task: name in the task table.
        limit: keep at most this many rows, evenly spaced over the file.
        must_exist: False leaves image files that are not there to the loader.

    Raises:
        ValueError: unknown task, missing file, column or image, or a bad row.
    """
    tasks = read_tasks(data_dir)
    check_names([task], list(tasks), "evaluation task")
    known = tasks[task]
    table, folder, form = eval_table(Path(data_dir), known)
    inputs = Inputs(known, folder, form, must_exist=must_exist)
    pool = _pool(table) if form == "bare" else []
    count = len(table) if limit is None else min(limit, len(table))
    query_index: dict[tuple[str, ...], int] = {}
    candidate_index: dict[Side, int] = {}
    read = EvalTask(known, [], [], [], [])
    for number in range(count):
        row = number * len(table) // count
        cells = table[row]
        query, instruction = _side(cells, "qry_text", "qry_img_path"), cells.get("qry_inst") or ""
        key = (instruction, *query)
        if key not in query_index:
            query_index[key] = len(read.queries)
            read.queries.append(
                inputs.query(query, table.where(row, "qry_text", "qry_img_path"), instruction)
            )
        read.query_of_row.append(query_index[key])
        where, instruction = table.where(row, "tgt_text", "tgt_img_path"), cells.get("tgt_inst") or ""
        sides = aligned_sides(cells.get("tgt_text"), cells.get("tgt_img_path"), where) + pool
        keys = _identities(known, sides)
        for side, identity in zip(sides, keys, strict=True):
            if identity not in candidate_index:
                candidate_index[identity] = len(read.candidates)
                read.candidates.append(inputs.candidate(side, where, instruction))
        row_candidates = [candidate_index[identity] for identity in (dict.fromkeys(keys) if pool else keys)]
        if len(row_candidates) < 2:
            raise ValueError(
                f"{where}: {len(row_candidates)} candidates. A row needs its positive and at least one other."
            )
        read.candidates_of_row.append(row_candidates)
    return read


def _identities(task: Task, sides: list[Side]) -> list[Side]:
    """What makes each candidate the same as another one; quotes around a caption do not."""
    if task.identity == "text":
        return sides
    if task.identity == "image":
        return [("" if image else text, image) for text, image in sides]
    return [(text.strip('"'), image) for text, image in sides]


def _pool(table: Table) -> list[Side]:
    """All positives of a file that names only the positive of each row; empty if it has lists."""
    columns = [table.column(name) for name in ("tgt_text", "tgt_img_path")]
    values = [[""] * len(table) if column is None else column.to_pylist() for column in columns]
    if any(isinstance(value, list) for column in values for value in column):
        return []
    pool = list(dict.fromkeys((text or "", image or "") for text, image in zip(*values, strict=True)))
    if len(pool) * len(table) > MAX_POOL_ENTRIES:
        raise ValueError(
            f"{table.owner}: {len(table)} rows with {len(pool)} candidates each are too many. "
            "Give every row its own list of candidates."
        )
    return pool
