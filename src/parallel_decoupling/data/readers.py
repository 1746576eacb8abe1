"""Rows of MMEB's files and of your own: training rows on demand, evaluation tasks whole."""

import logging
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from parallel_decoupling.batch import PairBatch, RawInput, RawPair
from parallel_decoupling.data import tasks
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImageFolder
from parallel_decoupling.data.layouts import RIGHT, open_judged, open_video_set, read_judged
from parallel_decoupling.data.names import check_file_name, printable
from parallel_decoupling.data.row_reader import CANDIDATE, NEGATIVE, QUERY, RowReader, Side, side_of, target
from parallel_decoupling.data.tables import Table, find_tables
from parallel_decoupling.data.tasks import INSTRUCTIONS, ROLES, TEACHER, EvalTask, Task, read_tasks
from parallel_decoupling.data.unusable import RowError, doubled, one_row
from parallel_decoupling.option_types import check_memory

LimitBy = Literal["sample", "first"]
MissingImages = Literal["error", "skip"]

MMEB_TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
MMEB_EVAL = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path", "qry_inst", "tgt_inst")
"""The last two columns are those of MMEB_Test_Instruct, which splits instructions off."""

FP32_MAX = float(np.finfo(np.float32).max)
MAX_UNUSABLE_ROWS = 100  # after so many rows that cannot be embedded the folder is at fault, not a file

log = logging.getLogger(__name__)


def open_train(data_dir: Path, subset: str, split: str) -> RowReader:
    """Open a training subset of MMEB-train or of your own."""
    task = tasks.task_of_subset(read_tasks(data_dir), subset) or Task(subset, "retrieval", False)
    source, root = task.source, data_dir / "MMEB-train"
    owner, columns = f"training subset {subset!r}", dict(zip(ROLES, MMEB_TRAIN, strict=True))
    if source is None or source.train_file is None:
        check_file_name(split, "split")
        columns |= {name: name for name in (TEACHER, tasks.NEIGHBOURS)}
        table = Table(owner, find_tables(owner, root / subset, f"{split}-*.parquet"), columns)
        table.check((*QUERY, *CANDIDATE), QUERY)
        return RowReader(table, ImageFolder(root), task.prompt)
    table = Table(owner, [source.train_file], source.columns)
    table.check(source.columns, QUERY)
    return RowReader(table, ImageFolder(source.image_dir), source=source)


def open_sides(data_dir: Path, task: Task) -> list[RowReader]:
    """Open what holds the queries and candidates of a task: its rows, or its queries and its corpus."""
    if task.source is None or task.source.eval_dir is None:
        return [open_eval(data_dir, task)]
    return [*open_judged(task)[:2]]


def open_eval(data_dir: Path, task: Task, *, must_exist: bool = True) -> RowReader:
    """Open an evaluation task of rows; both published formats are recognised by their columns."""
    source, roles, root = task.source, (*QUERY, *CANDIDATE), data_dir / "MMEB-eval"
    owner = f"evaluation task {task.name!r}"
    columns = dict(zip((*roles, *INSTRUCTIONS), MMEB_EVAL, strict=True))
    if source is None or source.eval_file is None:
        table = Table(owner, find_tables(owner, root / task.name, "test-*.parquet"), columns)
        table.check(roles[::2] if table.column(INSTRUCTIONS[0]) is not None else roles, QUERY)
        roots = (root, root / "image-tasks", data_dir / "image-tasks")
        return RowReader(table, ImageFolder(*roots, must_exist=must_exist), task.prompt)
    if source.published is not None:
        images = ImageFolder(source.image_dir, must_exist=must_exist)
        return RowReader(open_video_set(owner, source), images, task.prompt, source)
    used = {role: name for role, name in source.columns.items() if role in roles}
    table = Table(owner, [source.eval_file], used)
    table.check(used, QUERY)
    return RowReader(table, ImageFolder(source.image_dir, must_exist=must_exist), source=source)


class TrainSubset:
    """One training subset: a mapped table whose rows become ``RawPair``.

    Rows with neither text nor image on one side are left out, as in VLM2Vec; ``blank_rows`` counts them. The
    arguments are those of ``MMEBDataModule``. A row has exactly ``positives`` positives and
    ``hard_negatives`` negatives, the first of its lists that are not blank, None where the file has fewer.
    """

    def __init__(
        self,
        data_dir: str | Path,
        subset: str,
        split: str = "original",
        limit: int | None = None,
        *,
        limit_by: LimitBy = "sample",
        positives: int = 1,
        hard_negatives: int = 0,
        seed: int = 0,
        missing_images: MissingImages = "error",
    ) -> None:
        self.subset, self.hard_negatives, self.missing_images = subset, hard_negatives, missing_images
        self.num_skipped, self.positives = 0, positives
        self.reader = open_train(Path(data_dir), subset, split)
        self.table = self.reader.table
        blank = np.zeros(len(self.table), dtype=bool)
        for side in (QUERY, CANDIDATE):
            columns = [column for column in map(self.table.column, side) if column is not None]
            blank |= np.logical_and.reduce([_blank_rows(column) for column in columns])
        if limit_by == "first":
            blank, limit = blank[:limit], None
        self.blank_rows = int(blank.sum())
        self.kept = np.flatnonzero(~blank)
        if not len(self.kept):
            what = "every row has neither text nor image on one side. Leave the subset out or fill it in."
            raise ValueError(f"{self.table.owner}, file {self.table.files[0]}: {what}")
        if limit is not None and limit < len(self.kept):
            rng = np.random.default_rng([seed, zlib.crc32(subset.encode())])
            self.kept = self.kept[np.sort(rng.choice(len(self.kept), limit, replace=False))]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> RawPair:
        return self._read(index) if self.missing_images == "error" else self.usable(index)

    def usable(self, index: int, collator: Collator | None = None) -> RawPair:
        """Return a row, or the next one that can be read and, if a collator is given, embedded."""
        for step in range(min(len(self), MAX_UNUSABLE_ROWS)):
            place = (index + step) % len(self)
            try:
                with one_row(f"row {self.kept[place]}: "):
                    pair = self._read(place)
                    if collator is not None:
                        others = filter(None, (*pair.positives, *pair.negatives))
                        collator.encode_inputs([pair.query])
                        collator.encode_inputs([pair.candidate, *others])
                return pair
            except RowError as error:
                last = printable(str(error))
            self.num_skipped += 1
            if doubled(self.num_skipped - 1, 1):
                count = f"rows skipped so far: {self.num_skipped}"
                log.warning("%s, %s. The last: %s", self.table.owner, count, last)
        what = f"{step + 1} rows in a row cannot be embedded, {last}."
        advice = "Skipping is for single files; `lightning verify` finds out what is wrong with the folder."
        raise ValueError(f"{self.table.owner}: {what} {advice}")

    def neighbour_order(self) -> Any:
        """Return the rows in the order that ``mine`` found, with neighbours side by side."""
        if (places := self.table.column(tasks.NEIGHBOURS)) is None:
            advice = "Run `parallel-decoupling mine` and set data.split to mined, or take another data.policy"
            raise ValueError(f"{self.table.owner}: no column {tasks.NEIGHBOURS} for neighbours. {advice}.")
        return np.argsort(pc.cast(places, pa.int64()).to_numpy()[self.kept])

    def _read(self, index: int) -> RawPair:
        row, reader = int(self.kept[index]), self.reader
        cells = self.table[row]
        kinds = (CANDIDATE, NEGATIVE) if self.hard_negatives or cells.get(TEACHER) else (CANDIDATE,)
        sides = [(kind, side) for kind in kinds for side in reader.filled(row, kind, cells)]
        scores = self._scores(row, cells.get(TEACHER), len(sides))
        own: list[tuple[RawInput | None, float]] = []
        for kind, count in ((CANDIDATE, self.positives), (NEGATIVE, self.hard_negatives)):
            of_kind = [(side, score) for (its, side), score in zip(sides, scores, strict=True) if its == kind]
            own += [(reader.input(row, kind, side), score) for side, score in islice(of_kind, count)]
            own += [(None, math.nan)] * (count - len(of_kind))
        (first, *others), teacher = zip(*own, strict=True)
        assert first is not None, "blank rows are left out"
        query = reader.input(row, QUERY, side_of(cells, QUERY))
        positives, negatives = others[: self.positives - 1], others[self.positives - 1 :]
        return RawPair(query, first, tuple(negatives), self.subset, row, tuple(positives), teacher)

    def _scores(self, row: int, cell: Any, count: int) -> list[float]:
        """Return a teacher's score of every positive and negative of a row, NaN if the row has none."""
        if not cell:
            return [math.nan] * count
        try:
            scores = [math.nan if each is None else float(each) for each in cell]
        except ValueError:
            scores = []
        if isinstance(cell, str) or len(scores) != count or any(abs(each) > FP32_MAX for each in scores):
            rule = f"must be a list of {count} finite numbers, one for each positive, then for each negative"
            raise ValueError(f"{self.table.where(row, TEACHER)}: {rule}; got {cell!r:.200}.")
        return scores

    def most(self, side: Side) -> int:
        """Return how many positives or negatives the row with most of them has."""
        found = [column for column in map(self.table.column, side) if column is not None]
        return max((int(_lengths(column).max()) for column in found), default=0)

    def log_gaps(self) -> None:
        """Warn of rows and positives that are left out, and of hard negatives that no row has."""
        if self.blank_rows:
            what = "rows with neither text nor image on a side"
            log.warning("%s: left out %d %s", self.table.owner, self.blank_rows, what)
        if (most := self.most(CANDIDATE)) > self.positives:
            what = "rows have up to %d positives; data.positives takes the first %d"
            log.warning(f"%s: {what}", self.table.owner, most, self.positives)
        texts = [column for column in map(self.table.column, NEGATIVE) if column is not None]
        if self.hard_negatives and all(pc.all(_is_blank(column)).as_py() for column in texts):
            advice = "so data.hard_negatives only adds padding that matches no query"
            log.warning("%s: no row has a hard negative, %s", self.table.owner, advice)


@dataclass(frozen=True)
class TrainRows(Dataset[RawPair]):
    """Rows of all subsets by ``(subset, row)``."""

    subsets: Sequence[TrainSubset]

    def __getitem__(self, place: tuple[int, int]) -> RawPair:
        return self.subsets[place[0]][place[1]]


@dataclass(frozen=True)
class TrainCollator:
    """Batches training rows; with ``missing_images="skip"`` usable rows replace those that are not.

    Which ones depends on files and model alone.
    """

    collator: Collator
    subsets: Sequence[TrainSubset]

    def __call__(self, pairs: Sequence[RawPair]) -> PairBatch:
        """Batch rows; only where that fails are they looked at one by one."""
        try:
            return self.collator(pairs)
        except RowError:
            if any(subset.missing_images == "error" for subset in self.subsets):
                raise
        return self.collator([self._usable(pair) for pair in pairs])

    def _usable(self, pair: RawPair) -> RawPair:
        subset = next(subset for subset in self.subsets if subset.subset == pair.subset)
        return subset.usable(int(np.searchsorted(subset.kept, pair.row)), self.collator)


def _lengths(column: pa.ChunkedArray) -> Any:
    """Return how many values each row has."""
    if not pa.types.is_list(column.type):
        return np.ones(len(column), dtype=np.int64)
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def _blank_rows(column: pa.ChunkedArray) -> Any:
    """Return which rows have nothing in a column, or in no entry of their list."""
    blank = np.ones(len(column), dtype=bool)
    blank[np.repeat(np.arange(len(column)), _lengths(column))[~_is_blank(column).to_numpy()]] = False
    return blank


def _is_blank(texts: Any) -> Any:
    """Return which texts, alone or in lists, are null, empty or only whitespace."""
    texts = pc.list_flatten(texts) if pa.types.is_list(texts.type) else texts
    empty = pc.equal(pc.binary_length(texts), 0)
    return pc.fill_null(pc.or_(empty, pc.utf8_is_space(texts)), True)


def read_eval_task(
    data_dir: str | Path, task: str, limit: int | None = None, *, must_exist: bool = True
) -> EvalTask:
    """Read one evaluation task of MMEB, in either published format, or of your own.

    ``limit`` keeps at most this many rows, evenly spaced; without ``must_exist`` image files may be missing.
    """
    known = read_tasks(data_dir)
    tasks.check_names([task], known, "evaluation task")
    if (source := known[task].source) is not None and source.eval_dir is not None:
        return read_judged(known[task], limit, must_exist=must_exist)
    reader = open_eval(Path(data_dir), known[task], must_exist=must_exist)
    table = reader.table
    is_split = table.column(INSTRUCTIONS[0]) is not None
    pool = [] if reader.source is None else _pool(table)
    pool += [(label, "") for label in ((reader.source and reader.source.published) or {}).get("labels", ())]
    count = len(table) if limit is None else min(limit, len(table))
    queries: dict[tuple[str, ...], int] = {}
    candidates: dict[Side, int] = {}
    read = EvalTask(known[task], [], [], [], [])
    for number in range(count):
        row = number * len(table) // count
        cells = table[row]
        asked, shown = (cells.get(name) or "" if is_split else None for name in INSTRUCTIONS)
        query = side_of(cells, QUERY)
        read.query_of_row.append(queries.setdefault((asked or "", *query), len(queries)))
        if len(queries) > len(read.queries):
            read.queries.append(reader.input(row, QUERY, query, asked))
        keys: list[int] = []
        for side in reader.sides(row, CANDIDATE, cells) + pool:
            keys.append(candidates.setdefault(target(known[task], side), len(candidates)))
            if len(candidates) > len(read.candidates):
                read.candidates.append(reader.input(row, CANDIDATE, side, shown))
        read.candidates_of_row.append(list(dict.fromkeys(keys)) if pool else keys)
        if cells.get(RIGHT) is not None:
            read.relevance_of_row = [*(read.relevance_of_row or ()), dict.fromkeys(keys[: cells[RIGHT]], 1.0)]
        if len({*read.candidates_of_row[-1]}) < 2:
            found = f"{table.where(row, *CANDIDATE)}: {len({*read.candidates_of_row[-1]})} candidates"
            raise ValueError(f"{found}. A row needs its positive and at least one other that differs.")
    return read


def _pool(table: Table) -> list[Side]:
    """Return all positives of a file that names only the positive of each row, nothing if it has lists."""
    if any(pa.types.is_list(column.type) for column in filter(None, map(table.column, CANDIDATE))):
        return []
    pool = list(dict.fromkeys(side_of(table[row], CANDIDATE) for row in range(len(table))))
    many = f"{table.owner}: {len(table)} rows with {len(pool)} candidates each, without lists of their own,"
    check_memory(many, 8.0 * len(pool) * len(table))
    return pool
