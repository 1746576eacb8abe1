"""MMEB as rows of a table, and the readers of its training and evaluation files.

The task table, the subset names, the column names and the placeholder convention come from MMEB
(`TIGER-Lab/MMEB-train`, `TIGER-Lab/MMEB-eval`). Text is kept verbatim: the trailing newline of an
MMEB prompt is the token that last-token pooling reads. Sampling is in ``mixture``, tokenisation
and image decoding are in ``collate``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput, RawPair

MetaTask = Literal["classification", "vqa", "retrieval", "grounding"]

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


@dataclass(frozen=True)
class Task:
    """One evaluation task.

    Attributes:
        name: folder under ``MMEB-eval``.
        meta_task: the group whose mean the task counts in.
        in_distribution: whether MMEB also trains on this dataset.
    """

    name: str
    meta_task: MetaTask
    in_distribution: bool


# (in distribution, out of distribution) by meta-task, as MMEB v1 splits its 36 tasks.
_MMEB: dict[MetaTask, tuple[str, str]] = {
    "classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "vqa": (
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA VizWiz GQA TextVQA",
    ),
    "retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}

MMEB_TASKS: dict[str, Task] = {
    name: Task(name, meta_task, in_distribution)
    for meta_task, groups in _MMEB.items()
    for in_distribution, names in zip((True, False), groups, strict=True)
    for name in names.split()
}
"""The 36 tasks of MMEB v1; other folders of ``MMEB-eval`` (such as ``CIFAR-100``) are no tasks."""

MMEB_TRAIN_SUBSETS: tuple[str, ...] = tuple(
    name.replace("ImageNet-1K", "ImageNet_1K") for name, task in MMEB_TASKS.items() if task.in_distribution
)
"""The 20 training subsets; MMEB spells ``ImageNet_1K`` with an underscore here and a hyphen in evaluation."""


def check_names(names: Sequence[str], available: Sequence[str], what: str) -> None:
    """Raise ``ValueError`` for a name that does not exist, with the closest one and the full list."""
    for name in names:
        if name not in available:
            close = get_close_matches(name, available, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Unknown {what} {name!r}.{hint} Found: {', '.join(sorted(available)) or 'none'}."
            )


def read_tasks(data_dir: str | Path) -> dict[str, Task]:
    """Return MMEB's task table plus the rows of ``data_dir/tasks.json``, which win.

    The file makes a custom benchmark known without code:
    ``{"<task>": {"meta_task": "vqa", "in_distribution": true}, ...}``.

    Raises:
        ValueError: the file is no such mapping.
    """
    tasks_file = Path(data_dir) / "tasks.json"
    tasks = dict(MMEB_TASKS)
    if not tasks_file.is_file():
        return tasks
    try:
        rows = json.loads(tasks_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{tasks_file} is not valid JSON: {error}. Correct or remove it.") from error
    if not isinstance(rows, dict):
        raise ValueError(f"{tasks_file} must hold an object of tasks by name, not {type(rows).__name__}.")
    for name, row in rows.items():
        tasks[name] = _task(name, row, tasks_file)
    return tasks


def _task(name: str, row: object, tasks_file: Path) -> Task:
    if not isinstance(row, dict) or set(row) != {"meta_task", "in_distribution"}:
        raise ValueError(
            f"{tasks_file}, task {name!r}: the keys must be meta_task and in_distribution, got {row!r}."
        )
    meta_task, in_distribution = row["meta_task"], row["in_distribution"]
    if meta_task not in get_args(MetaTask) or not isinstance(in_distribution, bool):
        raise ValueError(
            f"{tasks_file}, task {name!r}: meta_task must be one of {', '.join(get_args(MetaTask))} "
            f"and in_distribution true or false, got {row!r}."
        )
    return Task(name, cast(MetaTask, meta_task), in_distribution)


def find_train_subsets(data_dir: str | Path, split: str = "original") -> list[str]:
    """Names of the subsets under ``MMEB-train`` that have files of this split, sorted."""
    return sorted({file.parent.name for file in (Path(data_dir) / "MMEB-train").glob(f"*/{split}-*.parquet")})


def find_eval_tasks(data_dir: str | Path) -> list[str]:
    """Names of the tasks that are both under ``MMEB-eval`` and in the task table, in table order."""
    found = {file.parent.name for file in (Path(data_dir) / "MMEB-eval").glob("*/test-*.parquet")}
    return [name for name in read_tasks(data_dir) if name in found]


class _Rows:
    """The parquet shards of one subset or task as one Arrow table, with the place of each row."""

    def __init__(
        self, owner: str, folder: Path, split: str, required: Sequence[str], optional: Sequence[str] = ()
    ):
        self.owner = owner
        self.files = sorted(folder.glob(f"{split}-*.parquet"))
        if not self.files:
            others = ", ".join(sorted(file.name for file in folder.glob("*.parquet"))) or "no parquet file"
            raise ValueError(
                f"{owner}: no file {folder / split}-*.parquet; the folder holds {others}. "
                "Check data_dir, the name and the split."
            )
        tables = [self._read(file, required, optional) for file in self.files]
        self.stops = np.cumsum([len(table) for table in tables])
        self.table = pa.concat_tables(tables, promote_options="permissive")

    def _read(self, file: Path, required: Sequence[str], optional: Sequence[str]) -> Any:
        columns = pq.read_schema(file).names
        missing = [name for name in required if name not in columns]
        if missing:
            hint = (
                " Split-off instructions (MMEB_Test_Instruct) are not read; use TIGER-Lab/MMEB-eval."
                if "qry_inst" in columns
                else f" Rename or add it; the columns must be {', '.join(required)}."
            )
            raise ValueError(
                f"{self.owner}, file {file}: column {missing[0]!r} is missing; found {', '.join(columns)}."
                + hint
            )
        keep = [name for name in (*required, *optional) if name in columns]
        return pq.read_table(file, columns=keep, memory_map=True)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.table.column(name)[row].as_py() for name in self.table.column_names}

    def where(self, row: int, column: str) -> str:
        """Name subset or task, file, row in that file and column, for an error message."""
        shard = int(np.searchsorted(self.stops, row, side="right"))
        first = int(self.stops[shard - 1]) if shard else 0
        return f"{self.owner}, file {self.files[shard]}, row {row - first}, column {column!r}"


def _find_image(root: Path, image: str, where: str) -> str:
    for name in (image, f"images/{image}", image.removeprefix("images/")):
        file = root / name
        if file.is_file():
            return str(file)
    raise ValueError(
        f"{where}: no image file {image!r} under {root} (also tried with and without a leading 'images/'). "
        "Unpack the dataset's images there; a truncated download shows up like this."
    )


def _raw_input(text: str | None, image: str | None, root: Path, where: str) -> RawInput:
    """One side of a row: verbatim text, image as a file.

    An image whose text has no placeholder gets ``IMAGE_PLACEHOLDER`` as a first line, the form of
    MMEB's templates (an image without text becomes the placeholder line alone).
    """
    text = text or ""
    count = text.count(IMAGE_PLACEHOLDER)
    if not image:
        if count:
            raise ValueError(
                f"{where}: {IMAGE_PLACEHOLDER} in the text but no image. Remove it or add the image."
            )
        if not text.strip():
            raise ValueError(f"{where}: neither text nor image. Remove the row from the file or fill it in.")
        return RawInput(text)
    if count > 1:
        raise ValueError(
            f"{where}: {count} placeholders {IMAGE_PLACEHOLDER} for one image. Keep exactly one."
        )
    if count == 0:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    return RawInput(text, (_find_image(root, image, where),))


def _aligned(texts: Any, images: Any, where: str) -> list[tuple[str, str]]:
    """Pairs of two columns that hold lists, or one list and one value for all of its entries."""
    if not isinstance(texts, list):
        texts = [texts] * (len(images) if isinstance(images, list) else 1)
    if not isinstance(images, list):
        images = [images] * len(texts)
    if len(texts) != len(images):
        raise ValueError(
            f"{where}: {len(texts)} texts but {len(images)} image paths. "
            "The lists must be index-aligned; use '' for no text or no image."
        )
    return [(text or "", image or "") for text, image in zip(texts, images, strict=True)]


class TrainSubset:
    """One subset of ``MMEB-train``: an Arrow table whose rows become ``RawPair``.

    Args:
        data_dir: folder that holds ``MMEB-train``.
        subset: folder name of the subset.
        split: file name prefix, ``original`` or ``diverse_instruction`` in MMEB.
        limit: keep at most this many rows, drawn once with ``seed`` and kept in file order.
        hard_negatives: negatives per row. A row with fewer repeats its own; a row without any
            repeats its positive, whose equal id masks it for that row, so that every batch of
            every process has ``batch size * (1 + hard_negatives)`` candidates.
        seed: seed of the ``limit`` draw, >= 0.

    Raises:
        ValueError: no file, a missing column, or (on reading) a bad row.
    """

    def __init__(
        self,
        data_dir: str | Path,
        subset: str,
        split: str = "original",
        limit: int | None = None,
        *,
        hard_negatives: int = 0,
        seed: int = 0,
    ) -> None:
        self.subset = subset
        self.root = Path(data_dir) / "MMEB-train"
        self.hard_negatives = hard_negatives
        negatives = NEGATIVE_COLUMNS if hard_negatives else ()
        self.rows = _Rows(f"training subset {subset!r}", self.root / subset, split, TRAIN_COLUMNS, negatives)
        self.kept: np.ndarray[Any, np.dtype[np.int64]] | None = None
        if limit is not None and limit < len(self.rows):
            rng = np.random.default_rng([seed, zlib.crc32(subset.encode())])
            self.kept = np.sort(rng.choice(len(self.rows), limit, replace=False))

    def __len__(self) -> int:
        return len(self.rows) if self.kept is None else len(self.kept)

    def __getitem__(self, index: int) -> RawPair:
        row = index if self.kept is None else int(self.kept[index])
        cells = self.rows[row]
        query = _raw_input(cells["qry"], cells["qry_image_path"], self.root, self.rows.where(row, "qry"))
        positive = _raw_input(
            cells["pos_text"], cells["pos_image_path"], self.root, self.rows.where(row, "pos_text")
        )
        return RawPair(query, positive, self._negatives(row, cells, positive), self.subset, row)

    def _negatives(self, row: int, cells: Mapping[str, Any], positive: RawInput) -> tuple[RawInput, ...]:
        if not self.hard_negatives:
            return ()
        where = self.rows.where(row, "neg_text")
        pairs = _aligned(cells.get("neg_text"), cells.get("neg_image_path"), where)
        pairs = [pair for pair in pairs if any(pair)][: self.hard_negatives]
        own = [_raw_input(text, image, self.root, where) for text, image in pairs] or [positive]
        return tuple(own[number % len(own)] for number in range(self.hard_negatives))


@dataclass
class EvalTask:
    """One evaluation task with its unique queries and candidates.

    Attributes:
        task: row of the task table.
        queries: unique queries in order of first use.
        candidates: unique candidates (text AND image decide) in order of first use.
        query_of_row: index into ``queries`` per row.
        candidates_of_row: indices into ``candidates`` per row; the positive is first.
    """

    task: Task
    queries: list[RawInput]
    candidates: list[RawInput]
    query_of_row: list[int]
    candidates_of_row: list[list[int]]


class _Unique:
    """Distinct inputs by their raw cells; each image is looked up once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index: dict[tuple[str, str], int] = {}
        self.inputs: list[RawInput] = []

    def add(self, cells: tuple[str, str], where: str) -> int:
        if cells not in self.index:
            self.inputs.append(_raw_input(*cells, self.root, where))
            self.index[cells] = len(self.inputs) - 1
        return self.index[cells]


def read_eval_task(data_dir: str | Path, task: str, limit: int | None = None) -> EvalTask:
    """Read one task of ``MMEB-eval`` (columns of MMEB v1; the positive is candidate 0).

    Args:
        data_dir: folder that holds ``MMEB-eval``.
        task: name in the task table.
        limit: keep at most this many rows, evenly spaced over the file.

    Raises:
        ValueError: unknown task, missing file, column or image, or a bad row.
    """
    tasks = read_tasks(data_dir)
    check_names([task], list(tasks), "evaluation task")
    root = Path(data_dir) / "MMEB-eval"
    rows = _Rows(f"evaluation task {task!r}", root / task, "test", EVAL_COLUMNS)
    count = len(rows) if limit is None else min(limit, len(rows))
    queries, candidates = _Unique(root), _Unique(root)
    read = EvalTask(tasks[task], queries.inputs, candidates.inputs, [], [])
    for number in range(count):
        row = number * len(rows) // count
        cells = rows[row]
        query = (cells["qry_text"] or "", cells["qry_img_path"] or "")
        read.query_of_row.append(queries.add(query, rows.where(row, "qry_text")))
        where = rows.where(row, "tgt_text")
        targets = _aligned(cells["tgt_text"], cells["tgt_img_path"], where)
        if len(targets) < 2:
            raise ValueError(
                f"{where}: {len(targets)} candidates. A row needs its positive and at least one other."
            )
        read.candidates_of_row.append([candidates.add(target, where) for target in targets])
    return read
