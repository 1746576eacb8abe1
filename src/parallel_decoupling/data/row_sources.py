"""What can be encoded by number: one side of an evaluation task, or what ``predict`` is given."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import IMAGE_SUFFIXES
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.tables import SUFFIXES, Table
from parallel_decoupling.data.tasks import EvalTask

ID, TEXT, IMAGE = "id", "text", "image"


class TaskSide:
    """The unique queries or candidates of a task; ``name`` is of the folder of their embeddings."""

    def __init__(self, task: EvalTask, side: str, data_dir: Path) -> None:
        self.task, self.side, self.data_dir = task, side, data_dir
        self.name = f"{task.task.name}/{side}"
        self.about: dict[str, Any] = {"source": self.name, "instruction": ""}
        self._rows = task.queries if side == "query" else task.candidates

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> RawInput:
        return self._rows[row]

    def where(self, row: int) -> str:
        """Name the task, the first row of it that uses an input, and its side, for an error message."""
        task, is_query = self.task, self.side == "query"
        if not is_query and task.relevance_of_row is not None:
            return f"evaluation task {task.task.name!r}, candidate {row}"
        used = [[query] for query in task.query_of_row] if is_query else task.candidates_of_row
        first = next(number for number, inputs in enumerate(used) if row in inputs)
        return f"evaluation task {task.task.name!r}, row {first}, {self.side}"

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return ``id``, ``text`` and ``image`` (the first one, relative to ``data_dir``) of some rows."""
        files = [self._rows[row].images[:1] for row in rows]
        images = [os.path.relpath(str(file[0]), self.data_dir) if file else None for file in files]
        columns = {ID: [*map(str, rows)], TEXT: [self._rows[row].text for row in rows], IMAGE: images}
        return pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()})


class RowSource:
    """The images of a folder or the rows of a table (``docs/embedding_files.md``) with an instruction."""

    name = ""

    def __init__(self, path: str | Path, instruction: str = "") -> None:
        self.path, self.instruction, is_dir = Path(path), instruction, Path(path).is_dir()
        self._fields = _list_images(self.path) if is_dir else _read_table(self.path)
        self._image_dir = image_dir = self.path.resolve() if is_dir else self.path.resolve().parent
        names = self._fields.column_names
        self._inputs = self._fields.select([name for name in (TEXT, IMAGE) if name in names])
        source = str(self.path.resolve())
        self.about = {"source": source, "image_dir": str(image_dir), "instruction": instruction}

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, row: int) -> RawInput:
        cells = self._inputs.slice(row, 1).to_pylist()[0]
        image = cells.get(IMAGE)
        file = str(self._image_dir / image) if image else None
        return prompt(cells.get(TEXT), file, self.instruction or None)

    def where(self, row: int) -> str:
        """Name a row in an error message."""
        return f"{self.path}, row {row}"

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return ``id`` and the source's columns of rows in ascending order."""
        first, stop = (rows[0], rows[-1] + 1) if rows else (0, 0)
        near = self._fields.slice(first, stop - first)  # take would copy whole columns
        return near.take(pa.array([row - first for row in rows], pa.int64()))


def _read_table(path: Path) -> pa.Table:
    """Read a table, with ``id`` as its first column."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is neither a folder nor a file that ends with {', '.join(SUFFIXES)}.")
    texts = {name: name for name in (ID, TEXT, IMAGE)}
    table = Table("predict_source", [path], texts, keep_others=True)
    names = table.rows.column_names
    if not {TEXT, IMAGE} & set(names):
        needed = f"needs a column {TEXT}, {IMAGE} (names of files) or both"
        raise ValueError(f"{path}: {needed}; found {', '.join(names)}.")
    table.check((), texts)
    if taken := [name for name in names if re.fullmatch(r"aggregate|path_\d+", name)]:
        raise ValueError(f"{path}: a column {taken[0]!r} holds embeddings in the result. Rename yours.")
    if ID not in names:
        return table.rows.add_column(0, ID, pa.array(map(str, range(len(table))), pa.string()))
    ids = table.rows[ID]
    if ids.null_count or pc.count_distinct(ids).as_py() < len(ids):
        counts = Counter(ids.to_pylist())
        row = next(row for row, each in enumerate(ids.to_pylist()) if each is None or counts[each] > 1)
        rule = f"every row needs an {ID} of its own, got {ids[row]}. Correct them, or leave the column out."
        raise ValueError(f"{table.where(row, ID)}: {rule}")
    return table.rows.select([ID, *(name for name in names if name != ID)])


def _list_images(folder: Path) -> pa.Table:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())
    if not names:
        raise ValueError(f"{folder} holds no file that ends with one of {', '.join(IMAGE_SUFFIXES)}.")
    return pa.table({ID: names, IMAGE: names})
