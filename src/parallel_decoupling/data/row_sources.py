"""What ``predict`` embeds besides evaluation tasks: a folder of images, or the rows of one table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import IMAGE_SUFFIXES, image_size
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.tables import SUFFIXES, Table

ID, TEXT, IMAGE, AGGREGATE = "id", "text", "image", "aggregate"
PATH_NAME = re.compile(r"path_\d+")


@dataclass(frozen=True)
class RowSource:
    """Rows with a text, an image file or both.

    ``ids`` are texts that all differ, ``fields`` are the other columns, and ``image_dir`` is what relative
    names of images are relative to.
    """

    path: Path
    image_dir: Path
    ids: pa.ChunkedArray
    fields: pa.Table

    def __len__(self) -> int:
        return len(self.ids)

    def raw_input(self, row: int, instruction: str = "") -> RawInput:
        """Return the prompt of one row, as ``encode`` writes it, or raise ``ValueError`` for an empty row."""
        return prompt(self._cell(TEXT, row), self._image_file(row), instruction or None)

    def size(self, row: int) -> tuple[tuple[int, int] | None, int]:
        """Return width and height of the image, from the file's header, and the characters of the text."""
        image = self._image_file(row)
        return (None if image is None else image_size(image)), len(self._cell(TEXT, row) or "")

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return ids and source fields of rows in ascending order."""
        first, stop = (rows[0], rows[-1] + 1) if rows else (0, 0)
        near = self.fields.slice(first, stop - first)
        near = near.add_column(0, ID, self.ids.slice(first, stop - first))
        return near.take(pa.array([row - first for row in rows], pa.int64()))

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, as plain JSON."""
        source, image_dir = str(self.path.resolve()), str(self.image_dir)
        return {"source": source, "image_dir": image_dir, "num_rows": len(self)}

    def _cell(self, name: str, row: int) -> str | None:
        return self.fields[name][row].as_py() if name in self.fields.column_names else None

    def _image_file(self, row: int) -> str | None:
        name = self._cell(IMAGE, row)
        return str(self.image_dir / name) if name else None


def open_rows(path: str | Path) -> RowSource:
    """Open a folder of images (with all folders in it), or a Parquet, JSONL or CSV file.

    A table has a column ``text``, a column ``image`` with names of files relative to the table, or both. A
    column ``id`` names the rows; without it they are called by their numbers, from 0. Image files of a folder
    are called by their names relative to it.

    Raises:
        ValueError: there is nothing to embed, or the table cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _image_folder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Check the name.")
    if path.suffix not in SUFFIXES:
        kinds = f"a folder of images nor a file that ends with one of {', '.join(SUFFIXES)}"
        raise ValueError(f"{path} is neither {kinds}.")
    texts = {name: name for name in (ID, TEXT, IMAGE)}
    table = Table("predict_source", [path], texts, (), keep_others=True)
    names = table.rows.column_names
    if not {TEXT, IMAGE} & set(names):
        needed = f"needs a column {TEXT}, {IMAGE} (names of files) or both"
        raise ValueError(f"{path}: {needed}; found {', '.join(names)}.")
    table.refuse_lists(texts, "a row has one text and one image.")
    for name in names:
        if name == AGGREGATE or PATH_NAME.fullmatch(name):
            raise ValueError(f"{path}: a column {name!r} holds embeddings in the result. Rename yours.")
    if ID in names:
        return RowSource(path, path.resolve().parent, _checked_ids(table), table.rows.drop_columns([ID]))
    numbers = pa.chunked_array([pa.array(range(len(table))).cast(pa.string())])
    return RowSource(path, path.resolve().parent, numbers, table.rows)


def _image_folder(path: Path) -> RowSource:
    files = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(file.relative_to(path).as_posix() for file in files if file.is_file())
    if not names:
        raise ValueError(f"{path} holds no file that ends with one of {', '.join(IMAGE_SUFFIXES)}.")
    ids = pa.chunked_array([pa.array(names)])
    return RowSource(path, path.resolve(), ids, pa.table({IMAGE: ids}))


def _checked_ids(table: Table) -> pa.ChunkedArray:
    ids = table.rows[ID]
    if ids.null_count:
        row = pc.index(ids.is_null(), True).as_py()
        raise ValueError(f"{table.where(row, ID)}: no {ID}. Fill in every {ID}, or leave the column out.")
    counts = pc.value_counts(ids)
    if len(counts) < len(ids):
        repeated = next(count["values"] for count in counts.to_pylist() if count["counts"] > 1)
        row = pc.index(ids, repeated).as_py()
        raise ValueError(f"{table.where(row, ID)}: the {ID} {repeated!r} stands in other rows, too.")
    return ids
