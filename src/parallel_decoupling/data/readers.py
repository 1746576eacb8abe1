"""Rows of MMEB's files and of your own: training rows on demand, evaluation tasks whole."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from parallel_decoupling.batch import RawInput, RawPair
from parallel_decoupling.data import tasks
from parallel_decoupling.data.images import ImageError, ImageFolder, load_image
from parallel_decoupling.data.names import printable
from parallel_decoupling.data.prompts import PromptRules, prompt, split_candidate, split_query, written_text
from parallel_decoupling.data.tables import Table
from parallel_decoupling.data.tasks import INSTRUCTIONS, ROLES, EvalTask, Source, Task, read_tasks

LimitBy = Literal["sample", "first"]
MissingImages = Literal["error", "skip"]

Side: TypeAlias = tuple[str, str]
"""Text and image file of a query or candidate, "" for none; or the names of the columns that hold them."""

QUERY, CANDIDATE, NEGATIVE = zip(ROLES[::2], ROLES[1::2], strict=True)
"""Columns of a table, named by their roles. MMEB's names follow."""
MMEB_TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
MMEB_EVAL = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path", "qry_inst", "tgt_inst")
"""The last two columns are those of MMEB_Test_Instruct, which splits instructions off."""

MAX_UNREADABLE_ROWS = 100
"""After so many rows without readable images the folder is at fault, not a file."""
MAX_POOL_ENTRIES = 20_000_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowReader:
    """A table with columns by role, and how its cells become inputs; ``source`` is None in MMEB's layout."""

    table: Table
    images: ImageFolder
    rules: PromptRules = PromptRules()
    source: Source | None = None

    def input(self, row: int, columns: Side, side: Side, instruction: str | None = None) -> RawInput:
        """Return one query or candidate; ``instruction`` is the one that MMEB_Test_Instruct splits off."""
        (text, image), is_query = side, columns == QUERY
        try:
            if self.source is not None:
                own = self.source.query_instruction if is_query else self.source.candidate_instruction
                text = prompt(text, image or None, own).text
            else:
                if instruction is not None:
                    join = split_query if is_query else split_candidate
                    text = join(instruction, text, self.rules, has_image=bool(image))
                drop = is_query and not self.rules.query_image
                text = written_text(text, has_image=bool(image), drop_placeholder=drop)
            return RawInput(text, (self.images.get(image),) if image else ())
        except ValueError as error:
            raise type(error)(f"{self.table.where(row, *columns)}: {error}") from error

    def sides(self, row: int, columns: Side, cells: Mapping[str, Any]) -> list[Side]:
        """Pair two cells that hold lists of one length, or one list and one value for all of its entries."""
        both: list[Any] = [cells.get(column) for column in columns]
        lengths = {len(cell) for cell in both if isinstance(cell, list)} or {1}
        if len(lengths) > 1:
            found = f"{len(both[0])} texts but {len(both[1])} image paths"
            rule = "The lists must be index-aligned; use '' for no text or no image."
            raise ValueError(f"{self.table.where(row, *columns)}: {found}. {rule}")
        texts, images = (cell if isinstance(cell, list) else [cell] * max(lengths) for cell in both)
        return [(text or "", image or "") for text, image in zip(texts, images, strict=True)]


def open_train(data_dir: Path, subset: str, split: str) -> RowReader:
    """Open a training subset of MMEB-train or of your own."""
    task = tasks.task_of_subset(read_tasks(data_dir), subset) or Task(subset, "retrieval", False)
    source, single, root = task.source, (*QUERY, *CANDIDATE), data_dir / "MMEB-train"
    owner, columns = f"training subset {subset!r}", dict(zip(ROLES, MMEB_TRAIN, strict=True))
    if source is None or source.train_file is None:
        table = Table(owner, _files(owner, root / subset, split), columns)
        table.check(single, single)
        return RowReader(table, ImageFolder(root), task.prompt)
    table = Table(owner, [source.train_file], source.columns)
    table.check(source.columns, single)
    return RowReader(table, ImageFolder(source.image_dir), source=source)


def open_eval(data_dir: Path, task: Task, *, must_exist: bool = True) -> RowReader:
    """Open an evaluation task; both published formats are recognised by their columns."""
    source, roles, root = task.source, (*QUERY, *CANDIDATE), data_dir / "MMEB-eval"
    owner, columns = (
        f"evaluation task {task.name!r}",
        dict(zip((*roles, *INSTRUCTIONS), MMEB_EVAL, strict=True)),
    )
    if source is None or source.eval_file is None:
        table = Table(owner, _files(owner, root / task.name, "test"), columns)
        table.check(roles[::2] if table.column(INSTRUCTIONS[0]) is not None else roles, QUERY)
        roots = (root, root / "image-tasks", data_dir / "image-tasks")
        return RowReader(table, ImageFolder(*roots, must_exist=must_exist), task.prompt)
    used = {role: name for role, name in source.columns.items() if role in roles}
    table = Table(owner, [source.eval_file], used)
    table.check(used, QUERY)
    return RowReader(table, ImageFolder(source.image_dir, must_exist=must_exist), source=source)


def _files(owner: str, folder: Path, split: str) -> list[Path]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        others = ", ".join(sorted(file.name for file in folder.glob("*.parquet"))) or "no parquet file"
        raise ValueError(f"{owner}: no file {folder / split}-*.parquet; the folder holds {others}.")
    return files


class TrainSubset:
    """One training subset: a mapped table whose rows become ``RawPair``.

    Rows with neither text nor image on one side are left out, as in VLM2Vec; ``blank_rows`` counts them. The
    arguments are those of ``MMEBDataModule``. A row has exactly ``hard_negatives`` negatives, None where the
    file has fewer; a blank text without image does not count. With ``missing_images="skip"`` the next
    readable row replaces one whose images cannot be read; that choice depends on the files alone.
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
        missing_images: MissingImages = "error",
    ) -> None:
        self.subset, self.hard_negatives, self.missing_images = subset, hard_negatives, missing_images
        self.num_skipped = 0
        self.reader = open_train(Path(data_dir), subset, split)
        self.table = self.reader.table
        blank = np.zeros(len(self.table), dtype=bool)
        for side in (QUERY, CANDIDATE):
            columns = [column for column in map(self.table.column, side) if column is not None]
            blank |= np.logical_and.reduce([_is_blank(column).to_numpy() for column in columns])
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
        if self.missing_images == "error":
            return self._read(index)
        for step in range(min(len(self), MAX_UNREADABLE_ROWS)):
            place = (index + step) % len(self)
            try:
                pair = self._read(place)
                for side in (pair.query, pair.candidate, *filter(None, pair.negatives)):
                    for image in side.images:
                        load_image(image)
                return pair
            except ImageError as error:
                last = printable(f"row {self.kept[place]}: {error}")
            self.num_skipped += 1
            if self.num_skipped.bit_count() == 1:  # each time that the number doubles
                count = f"rows skipped so far: {self.num_skipped}"
                log.warning("%s, %s. The last: %s", self.table.owner, count, last)
        what = f"{step + 1} rows in a row have unreadable images, {last}"
        advice = "Skipping is for single files; `lightning verify` finds out what is wrong with the folder."
        raise ValueError(f"{self.table.owner}: {what} {advice}")

    def _read(self, index: int) -> RawPair:
        row, reader = int(self.kept[index]), self.reader
        cells = self.table[row]
        query, positive = (reader.input(row, side, _side(cells, side)) for side in (QUERY, CANDIDATE))
        negatives: list[RawInput | None] = []
        if self.hard_negatives:
            sides = [side for side in reader.sides(row, NEGATIVE, cells) if side[0].strip() or side[1]]
            negatives += [reader.input(row, NEGATIVE, side) for side in sides[: self.hard_negatives]]
            negatives += [None] * (self.hard_negatives - len(negatives))
        return RawPair(query, positive, tuple(negatives), self.subset, row)

    def log_gaps(self) -> None:
        """Warn of rows that were left out, and of hard negatives that no row has."""
        if self.blank_rows:
            what = "rows with neither text nor image on a side"
            log.warning("%s: left out %d %s", self.table.owner, self.blank_rows, what)
        texts = [column for column in map(self.table.column, NEGATIVE) if column is not None]
        if self.hard_negatives and all(pc.all(_is_blank(column)).as_py() for column in texts):
            advice = "so data.hard_negatives only adds padding that matches no query"
            log.warning("%s: no row has a hard negative, %s", self.table.owner, advice)


class TrainRows(Dataset[RawPair]):
    """Rows of all subsets by ``(subset, row)``."""

    def __init__(self, subsets: Sequence[TrainSubset]) -> None:
        self.subsets = subsets

    def __getitem__(self, place: tuple[int, int]) -> RawPair:
        return self.subsets[place[0]][place[1]]


def _side(cells: Mapping[str, Any], columns: Side) -> Side:
    return cells.get(columns[0]) or "", cells.get(columns[1]) or ""


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
    reader = open_eval(Path(data_dir), known[task], must_exist=must_exist)
    table = reader.table
    is_split = table.column(INSTRUCTIONS[0]) is not None
    pool = [] if reader.source is None else _pool(table)
    count = len(table) if limit is None else min(limit, len(table))
    queries: dict[tuple[str, ...], int] = {}
    candidates: dict[Side, int] = {}
    read = EvalTask(known[task], [], [], [], [])
    for number in range(count):
        row = number * len(table) // count
        cells = table[row]
        asked, shown = (cells.get(name) or "" if is_split else None for name in INSTRUCTIONS)
        query = _side(cells, QUERY)
        read.query_of_row.append(queries.setdefault((asked or "", *query), len(queries)))
        if len(queries) > len(read.queries):
            read.queries.append(reader.input(row, QUERY, query, asked))
        keys: list[int] = []
        for side in reader.sides(row, CANDIDATE, cells) + pool:
            keys.append(candidates.setdefault(_identity(known[task], side), len(candidates)))
            if len(candidates) > len(read.candidates):
                read.candidates.append(reader.input(row, CANDIDATE, side, shown))
        read.candidates_of_row.append(list(dict.fromkeys(keys)) if pool else keys)
        if len({*read.candidates_of_row[-1]}) < 2:
            found = f"{table.where(row, *CANDIDATE)}: {len({*read.candidates_of_row[-1]})} candidates"
            raise ValueError(f"{found}. A row needs its positive and at least one other that differs.")
    return read


def _identity(task: Task, side: Side) -> Side:
    """Return what makes a candidate the same as another one; quotes around a caption do not."""
    text, image = side
    if task.identity == "text":
        return side
    return ("" if image else text, image) if task.identity == "image" else (text.strip('"'), image)


def _pool(table: Table) -> list[Side]:
    """Return all positives of a file that names only the positive of each row, nothing if it has lists."""
    if any(pa.types.is_list(column.type) for column in filter(None, map(table.column, CANDIDATE))):
        return []
    pool = list(dict.fromkeys(_side(table[row], CANDIDATE) for row in range(len(table))))
    if len(pool) * len(table) > MAX_POOL_ENTRIES:
        many = f"{len(table)} rows with {len(pool)} candidates each are too many"
        raise ValueError(f"{table.owner}: {many}. Give every row its own list of candidates.")
    return pool
