"""What can be encoded by number: one side of an evaluation task, or what ``predict`` is given."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import formats, image_size
from parallel_decoupling.data.names import file_of_id, id_of_file
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.tables import SUFFIXES, Table
from parallel_decoupling.data.tasks import EvalTask

ID, TEXT, IMAGE = "id", "text", "image"


class TaskSide:
    """The unique queries or candidates of a task; ``name`` is of the folder of their embeddings."""

    def __init__(self, task: EvalTask, side: str, data_dir: Path) -> None:
        self.task, self.side, self.data_dir = task, side, data_dir
        self.name = f"{task.task.name}/{side}"
        folder = os.path.abspath(data_dir)
        self.about: dict[str, Any] = {"source": self.name, "image_dir": folder, "instruction": ""}
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
        files = [self._rows[row].pictures[:1] for row in rows]
        folder = self.data_dir
        names = [_without_folder(os.path.abspath(str(file[0])), folder) if file else None for file in files]
        images = [name and id_of_file(name) for name in names]
        columns = {ID: [*map(str, rows)], TEXT: [self._rows[row].text for row in rows], IMAGE: images}
        return pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()})


class RowSource:
    """The images of a folder or the rows of a table (``docs/embedding_files.md``) with an instruction.

    A folder of Parquet files alone (but for names with _ or . first) is a table in the order of their names.
    ``left_out`` says what of a folder is not among the rows, "" for nothing.
    """

    name = ""

    def __init__(self, path: str | Path, instruction: str = "") -> None:
        self.path, self.instruction, is_dir = Path(path), instruction, Path(path).is_dir()
        files = sorted(self.path.glob("[!_.]*")) if is_dir else [self.path]
        if is_dir and any(file.suffix != ".parquet" for file in files):
            files = []
        found = (_read_table(self.path, files), "") if files else _list_images(self.path)
        self._fields, self.left_out = found
        source = os.path.abspath(self.path)
        self._image_dir = Path(source) if is_dir else Path(source).parent
        names = self._fields.column_names
        self._inputs = self._fields.select([name for name in (TEXT, IMAGE) if name in names])
        folder = str(self._image_dir)
        self.about: dict[str, Any] = {"source": source, "image_dir": folder, "instruction": instruction}

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, row: int) -> RawInput:
        cells = self._inputs.slice(row, 1).to_pylist()[0]
        image = cells.get(IMAGE)
        file = str(self._image_dir / file_of_id(image)) if image else None
        if file and not os.path.isfile(file):  # to open a pipe would take for ever
            raise ValueError(f"no image file {_without_folder(image, self._image_dir)!r}")
        return prompt(cells.get(TEXT), file, self.instruction or None)

    def where(self, row: int) -> str:
        """Name a row in an error message."""
        return f"{self.path}, row {row}"

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return ``id`` and the source's columns of ascending rows, without absolute paths of images."""
        first, stop = (rows[0], rows[-1] + 1) if rows else (0, 0)
        near = self._fields.slice(first, stop - first)  # take would copy whole columns
        table = near.take(pa.array([row - first for row in rows], pa.int64()))
        if IMAGE not in table.column_names:
            return table
        names = [cell and _without_folder(cell, self._image_dir) for cell in table[IMAGE].to_pylist()]
        return table.set_column(table.column_names.index(IMAGE), IMAGE, pa.array(names, pa.string()))


def _without_folder(file: str, folder: Path) -> str:
    """Return an absolute path as one from a folder, or as the file's name alone if it is elsewhere."""
    if not os.path.isabs(file):
        return file
    relative = os.path.relpath(file, folder)
    return Path(file).name if relative.startswith(os.pardir) else relative


def _read_table(path: Path, files: list[Path]) -> pa.Table:
    """Read a table, with ``id`` as its first column."""
    if files[0].suffix not in SUFFIXES:
        raise ValueError(f"{path} is neither a folder nor a file that ends with {', '.join(SUFFIXES)}.")
    texts = {name: name for name in (ID, TEXT, IMAGE)}
    table = Table("predict_source", files, texts, keep_others=True)
    names = table.rows.column_names
    if not {TEXT, IMAGE} & set(names):
        needed = f"needs a column {TEXT}, {IMAGE} (names of files) or both"
        raise ValueError(f"{path}: {needed}; found {', '.join(names)}.")
    table.check((), texts)
    try:
        pq.write_table(table.rows.schema.empty_table(), pa.BufferOutputStream())  # as predict will
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {error}. Give columns that a Parquet file can hold.") from error
    if taken := [name for name in names if re.fullmatch(r"aggregate|maxsim|path_\d+", name)]:
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


def _list_images(folder: Path) -> tuple[pa.Table, str]:
    """Return the pictures in a folder and those below, and what else is there, as text.

    A picture has a picture's suffix, or Pillow knows its beginning. Links are followed, to each folder once.
    """
    read = {*formats()}
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in read}
    names, left, seen = list[str](), defaultdict[str, list[str]](list), set[str]()

    def closed(error: OSError) -> None:
        left["folders that cannot be read"].append(str(error.filename))

    for place, folders, files in os.walk(folder, onerror=closed, followlinks=True):
        folders.sort(key=lambda each: (os.path.islink(os.path.join(place, each)), each))
        if (real := os.path.realpath(place)) in seen:
            left["folders that are there twice"].append(place)
            folders[:], files = [], []
        seen.add(real)
        for file in (os.path.join(place, name) for name in sorted(files)):
            if not os.path.isfile(file):
                left["links or special files"].append(file)
            elif os.path.splitext(file)[1].lower() in known or image_size(file):
                names.append(id_of_file(os.path.relpath(file, folder)))
            else:
                left["other files"].append(file)
    left_out = ", ".join(f"{len(files)} {what} ({_first(files, folder)})" for what, files in left.items())
    if not names:
        there = f"; it has {left_out}" if left_out else ""
        raise ValueError(f"{folder} holds no picture{there}. Give a folder of pictures.")
    return pa.table({ID: sorted(names), IMAGE: sorted(names)}), left_out


def _first(files: Sequence[str], folder: Path) -> str:
    shown = [id_of_file(os.path.relpath(file, folder)) for file in files[:3]]
    return ", ".join([*shown, "…"] if len(files) > 3 else shown)
