"""Rows of MMEB's files and of your own: training rows on demand, evaluation tasks whole."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parallel_decoupling.batch import RawInput, RawPair
from parallel_decoupling.data.images import ImageError, ImageFolder, check_images
from parallel_decoupling.data.prompts import PromptRules, prompt, split_candidate, split_query, written_text
from parallel_decoupling.data.tables import Table
from parallel_decoupling.data.tasks import (
    ROLES,
    EvalTask,
    Source,
    Task,
    check_names,
    read_tasks,
    task_of_subset,
)

LimitBy = Literal["sample", "first"]

Columns: TypeAlias = tuple[str, str]
"""Names of the text and the image column of a query or candidate."""

Side: TypeAlias = tuple[str, str]
"""The cells of these columns in one row, "" for none."""

TRAIN_QUERY, TRAIN_CANDIDATE = ("qry", "qry_image_path"), ("pos_text", "pos_image_path")
NEGATIVES = ("neg_text", "neg_image_path")
EVAL_QUERY, EVAL_CANDIDATE = ("qry_text", "qry_img_path"), ("tgt_text", "tgt_img_path")
INSTRUCTIONS = ("qry_inst", "tgt_inst")
"""Columns of MMEB_Test_Instruct, which splits instructions off."""

TRAIN_ROLES = dict(zip(ROLES, (*TRAIN_QUERY, *TRAIN_CANDIDATE, *NEGATIVES), strict=True))
EVAL_ROLES = dict(zip(ROLES, (*EVAL_QUERY, *EVAL_CANDIDATE), strict=False))
"""What a column of your own data can be, and MMEB's column of that meaning."""

MAX_UNREADABLE_ROWS = 100
"""After so many rows without readable images the folder is at fault, not a file."""
MAX_POOL_ENTRIES = 20_000_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowReader:
    """A table under MMEB's column names, and how its cells become inputs.

    Attributes:
        table: the rows.
        images: where the pictures are.
        rules: how the task's prompts are put together.
        source: of your own data, whose texts are bare; None for MMEB's layout.
        split: whether instructions have columns of their own; otherwise MMEB's texts are finished prompts.
    """

    table: Table
    images: ImageFolder
    rules: PromptRules
    source: Source | None = None
    split: bool = False

    def input(self, row: int, columns: Columns, side: Side, instruction: str = "") -> RawInput:
        """Return one query or candidate; ``instruction`` is the one that the file splits off.

        Raises:
            ValueError: text and image do not fit or the image is missing; names file, row and column.
        """
        text, image = side
        is_query = columns in (TRAIN_QUERY, EVAL_QUERY)
        try:
            if self.source is not None:
                source = self.source
                own = source.query_instruction if is_query else source.candidate_instruction
                text = prompt(text, image or None, own).text
            else:
                if self.split:
                    join = split_query if is_query else split_candidate
                    text = join(instruction, text, self.rules, has_image=bool(image))
                drop = is_query and not self.rules.query_image
                text = written_text(text, has_image=bool(image), drop_placeholder=drop)
            return RawInput(text, (self.images.get(image),) if image else ())
        except ValueError as error:
            raise type(error)(f"{self.table.where(row, *columns)}: {error}") from error

    def sides(self, row: int, columns: Columns, cells: Mapping[str, Any]) -> list[Side]:
        """Pair two cells that hold lists, or one list and one value for all of its entries.

        Raises:
            ValueError: the two lists differ in length.
        """
        both: list[Any] = [cells.get(column) for column in columns]
        lengths = {len(cell) for cell in both if isinstance(cell, list)} or {1}
        if len(lengths) > 1:
            raise ValueError(
                f"{self.table.where(row, *columns)}: {len(both[0])} texts but {len(both[1])} image paths. "
                "The lists must be index-aligned; use '' for no text or no image."
            )
        texts, images = (cell if isinstance(cell, list) else [cell] * max(lengths) for cell in both)
        return [(text or "", image or "") for text, image in zip(texts, images, strict=True)]


def open_train(data_dir: Path, subset: str, split: str, *, must_exist: bool = True) -> RowReader:
    """Open a training subset of MMEB-train or of your own.

    Raises:
        ValueError: no file, a missing column, or a list where one value belongs.
    """
    owner, one_value = f"training subset {subset!r}", (*TRAIN_QUERY, *TRAIN_CANDIDATE)
    task = task_of_subset(read_tasks(data_dir), subset)
    if task is not None and task.source is not None and task.source.train_file is not None:
        reader = _open_own(owner, task.source.train_file, task.source, TRAIN_ROLES, NEGATIVES, must_exist)
    else:
        root = data_dir / "MMEB-train"
        table = _open_mmeb(owner, root / subset, split, (*one_value, *NEGATIVES))
        table.require(one_value)
        rules = PromptRules() if task is None else task.prompt
        reader = RowReader(table, ImageFolder(root, must_exist=must_exist), rules)
    advice = "Put further candidates into columns of the roles negative_text and negative_image."
    reader.table.refuse_lists(one_value, f"a training row has one query and one positive. {advice}")
    return reader


def open_eval(data_dir: Path, task: Task, *, must_exist: bool = True) -> RowReader:
    """Open an evaluation task; both published formats are recognised by their columns.

    Pictures are looked for in ``MMEB-eval``, ``MMEB-eval/images`` and ``image-tasks`` (of either folder).

    Raises:
        ValueError: no file, a missing column, or a list where one value belongs.
    """
    owner, source = f"evaluation task {task.name!r}", task.source
    if source is not None and source.eval_file is not None:
        reader = _open_own(owner, source.eval_file, source, EVAL_ROLES, EVAL_CANDIDATE, must_exist)
    else:
        root = data_dir / "MMEB-eval"
        written = (*EVAL_QUERY, *EVAL_CANDIDATE)
        table = _open_mmeb(owner, root / task.name, "test", (*written, *INSTRUCTIONS))
        split = table.column("qry_inst") is not None
        table.require(("qry_text", "tgt_text") if split else written)
        roots = (root, root / "image-tasks", data_dir / "image-tasks")
        reader = RowReader(table, ImageFolder(*roots, must_exist=must_exist), task.prompt, split=split)
    reader.table.refuse_lists(EVAL_QUERY, "a row has one query. Give every query a row.")
    return reader


def _open_own(
    owner: str, file: Path, source: Source, roles: Mapping[str, str], lists: Collection[str], must_exist: bool
) -> RowReader:
    columns = {roles[role]: name for role, name in source.columns.items() if role in roles}
    table = Table(owner, [file], columns, lists)
    table.require(columns)
    return RowReader(table, ImageFolder(source.image_dir, must_exist=must_exist), PromptRules(), source)


def _open_mmeb(owner: str, folder: Path, split: str, names: Collection[str]) -> Table:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        others = ", ".join(sorted(file.name for file in folder.glob("*.parquet"))) or "no parquet file"
        raise ValueError(f"{owner}: no file {folder / split}-*.parquet; the folder holds {others}.")
    return Table(owner, files, {name: name for name in names})


def prepare_tables(data_dir: Path, subsets: Sequence[str], split: str, tasks: Sequence[str]) -> None:
    """Write the copies that are mapped into memory, so that no process has to do it at the same time."""
    known = read_tasks(data_dir)
    for subset in subsets:
        open_train(data_dir, subset, split)
    for task in tasks:
        if task in known:
            open_eval(data_dir, known[task])


class TrainSubset:
    """One training subset: a mapped table whose rows become ``RawPair``.

    Rows with neither text nor image on one side are left out, as in VLM2Vec; ``blank_rows`` counts them.

    Args:
        data_dir: folder that holds ``MMEB-train`` or ``tasks.json``.
        subset: folder name of the subset, or name in ``tasks.json``.
        split: file name prefix, ``original`` or ``diverse_instruction`` in MMEB.
        limit: keep at most this many rows, in file order.
        limit_by: ``sample`` draws them once with ``seed``, ``first`` takes the first (VLM2Vec's caps).
        hard_negatives: negatives per row, padded with None, so that every batch of every process has
            ``batch size * (1 + hard_negatives)`` candidates. A blank text without image does not count.
        seed: seed of the ``limit`` draw, >= 0.
        must_exist: False keeps the names of image files that are not there.

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
        self.subset, self.hard_negatives = subset, hard_negatives
        self.reader = open_train(Path(data_dir), subset, split, must_exist=must_exist)
        self.table = self.reader.table
        blank = _blank_rows(self.table, TRAIN_QUERY) | _blank_rows(self.table, TRAIN_CANDIDATE)
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
        row, reader = int(self.kept[index]), self.reader
        cells = self.table[row]
        query = reader.input(row, TRAIN_QUERY, _side(cells, TRAIN_QUERY))
        positive = reader.input(row, TRAIN_CANDIDATE, _side(cells, TRAIN_CANDIDATE))
        negatives: list[RawInput | None] = []
        if self.hard_negatives:
            sides = [side for side in reader.sides(row, NEGATIVES, cells) if side[0].strip() or side[1]]
            negatives += [reader.input(row, NEGATIVES, side) for side in sides[: self.hard_negatives]]
            negatives += [None] * (self.hard_negatives - len(negatives))
        return RawPair(query, positive, tuple(negatives), self.subset, row)

    def log_gaps(self) -> None:
        """Warn of rows that were left out, and of hard negatives that no row has."""
        owner, what = self.table.owner, "rows with neither text nor image on a side"
        if self.blank_rows:
            log.warning("%s: left out %d %s", owner, self.blank_rows, what)
        columns = [self.table.column(name) for name in NEGATIVES]
        if self.hard_negatives and all(column is None or _all_blank(column) for column in columns):
            log.warning(
                "%s: no row has a hard negative, so data.hard_negatives only adds padding that matches no "
                "query. Set it to 0 unless another subset has some",
                owner,
            )

    def readable(self, index: int) -> RawPair:
        """Return the row, or the next one (the first after the last) whose images can all be read.

        The choice depends on the files alone, so every process and every run makes the same one. ``skipped``
        of the result says which rows were passed over and why.

        Raises:
            ValueError: a row is bad for another reason, or none of many rows can be read.
        """
        reasons: list[str] = []
        for step in range(min(len(self), MAX_UNREADABLE_ROWS)):
            place = (index + step) % len(self)
            try:
                pair = self[place]
                for side in (pair.query, pair.candidate, *filter(None, pair.negatives)):
                    check_images(side)
            except ImageError as error:
                reasons.append(f"training subset {self.subset!r}, row {self.kept[place]}: {error}")
                continue
            return replace(pair, skipped=tuple(reasons))
        raise ValueError(
            f"{len(reasons)} rows in a row have images that cannot be read. The last: {reasons[-1]} "
            "Skipping is for single files; find out with `lightning verify` what is wrong with the folder."
        )


def _side(cells: Mapping[str, Any], columns: Columns) -> Side:
    return cells.get(columns[0]) or "", cells.get(columns[1]) or ""


def _is_blank(texts: Any) -> Any:
    """Return which texts are null, empty or only whitespace."""
    empty = pc.equal(pc.binary_length(texts), 0)
    return pc.fill_null(pc.or_(empty, pc.utf8_is_space(texts)), True)


def _all_blank(column: pa.ChunkedArray) -> bool:
    texts = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return bool(pc.all(_is_blank(texts)).as_py())


def _blank_rows(table: Table, columns: Columns) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which rows have neither text nor image on a side."""
    blank = np.ones(len(table), dtype=bool)
    for column in filter(None, map(table.column, columns)):
        blank &= _is_blank(column).to_numpy()
    return blank


def read_eval_task(
    data_dir: str | Path, task: str, limit: int | None = None, *, must_exist: bool = True
) -> EvalTask:
    """Read one evaluation task of MMEB, in either published format, or of your own.

    Args:
        data_dir: folder that holds ``MMEB-eval`` or ``tasks.json``.
        task: name in the task table.
        limit: keep at most this many rows, evenly spaced over the file.
        must_exist: False keeps the names of image files that are not there.

    Raises:
        ValueError: unknown task, missing file, column or image, or a bad row.
    """
    tasks = read_tasks(data_dir)
    check_names([task], tasks, "evaluation task")
    reader = open_eval(Path(data_dir), tasks[task], must_exist=must_exist)
    table = reader.table
    pool = [] if reader.source is None else _pool(table)
    count = len(table) if limit is None else min(limit, len(table))
    query_index: dict[tuple[str, ...], int] = {}
    candidate_index: dict[Side, int] = {}
    read = EvalTask(tasks[task], [], [], [], [])
    for number in range(count):
        row = number * len(table) // count
        cells = table[row]
        query, instruction = _side(cells, EVAL_QUERY), cells.get("qry_inst") or ""
        key = (instruction, *query)
        if key not in query_index:
            query_index[key] = len(read.queries)
            read.queries.append(reader.input(row, EVAL_QUERY, query, instruction))
        read.query_of_row.append(query_index[key])
        sides = reader.sides(row, EVAL_CANDIDATE, cells) + pool
        keys = [_identity(tasks[task], side) for side in sides]
        for side, identity in zip(sides, keys, strict=True):
            if identity not in candidate_index:
                candidate_index[identity] = len(read.candidates)
                instruction = cells.get("tgt_inst") or ""
                read.candidates.append(reader.input(row, EVAL_CANDIDATE, side, instruction))
        row_candidates = [candidate_index[identity] for identity in (dict.fromkeys(keys) if pool else keys)]
        if len(row_candidates) < 2:
            found = f"{table.where(row, *EVAL_CANDIDATE)}: {len(row_candidates)} candidates"
            raise ValueError(f"{found}. A row needs its positive and at least one other.")
        read.candidates_of_row.append(row_candidates)
    return read


def _identity(task: Task, side: Side) -> Side:
    """Return what makes a candidate the same as another one; quotes around a caption do not."""
    text, image = side
    if task.identity == "text":
        return side
    if task.identity == "image":
        return ("" if image else text), image
    return text.strip('"'), image


def _pool(table: Table) -> list[Side]:
    """Return all positives of a file that names only the positive of each row, nothing if it has lists."""
    if any(pa.types.is_list(column.type) for column in filter(None, map(table.column, EVAL_CANDIDATE))):
        return []
    pool = list(dict.fromkeys(_side(table[row], EVAL_CANDIDATE) for row in range(len(table))))
    if len(pool) * len(table) > MAX_POOL_ENTRIES:
        many = f"{len(table)} rows with {len(pool)} candidates each are too many"
        raise ValueError(f"{table.owner}: {many}. Give every row its own list of candidates.")
    return pool
