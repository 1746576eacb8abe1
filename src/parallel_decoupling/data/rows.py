"""What ``predict`` embeds besides evaluation tasks: a folder of images, or the rows of one table.

Here: reading. Elsewhere on purpose: batches (``row_loaders``), the benchmark's
tables (``tables``), writing (``training.prediction_writer``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import IMAGE_SUFFIXES, image_size
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.tables import SUFFIXES, read_jsonl

ID, TEXT, IMAGE, AGGREGATE = "id", "text", "image", "aggregate"
PATH_NAME = re.compile(r"path_\d+")


@dataclass(frozen=True)
class RowSource:
    """Rows with a text, an image file or both.

    Attributes:
        path: what the user named.
        image_dir: what relative image names are relative to.
        ids: texts, one per row, no two the same.
        fields: the source's columns, as they are, without ``id``.
        texts: or nulls.
        images: names of files, or nulls.
    """

    path: Path
    image_dir: Path
    ids: pa.ChunkedArray
    fields: pa.Table
    texts: pa.ChunkedArray
    images: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.ids)

    def raw_input(self, row: int, instruction: str = "") -> RawInput:
        """The prompt of one row, as ``encode`` writes it; files are not opened.

        Raises:
            ValueError: neither text nor image.
        """
        return prompt(self.texts[row].as_py(), self._image_file(row), instruction or None)

    def size(self, row: int) -> tuple[tuple[int, int] | None, int]:
        """Width and height of the image, from the header of its file, and characters of the text."""
        image, text = self._image_file(row), self.texts[row].as_py()
        return (None if image is None else image_size(image)), len(text or "")

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Ids and source fields of rows in ascending order."""
        if not rows:
            return self._columns(0, 0)
        first, stop = rows[0], rows[-1] + 1
        return self._columns(first, stop - first).take(pa.array([row - first for row in rows]))

    def _columns(self, first: int, count: int) -> pa.Table:
        return self.fields.slice(first, count).add_column(0, ID, self.ids.slice(first, count))

    def _image_file(self, row: int) -> str | None:
        name = self.images[row].as_py()
        return str(self.image_dir / name) if name else None


def open_rows(path: str | Path) -> RowSource:
    """Open a folder of images (with all folders in it), or a Parquet, JSONL or CSV file.

    A table has a column ``text``, a column ``image`` with names of files relative to the table, or both; a
    column ``id`` if rows are not to be called by their numbers (from 0). Image files of a folder are called
    by their names relative to it.

    Raises:
        ValueError: nothing there to embed, or a table that cannot be read; says what to do.
    """
    path = Path(path)
    if path.is_dir():
        return _image_folder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Check the name.")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} is neither a folder of images nor a file that ends with one of {', '.join(SUFFIXES)}."
        )
    try:
        table = _read_table(path)
    except (OSError, pa.ArrowException) as error:
        hint = "Is it complete?"
        if path.suffix == ".jsonl":
            hint = "It must hold one JSON object per line, and values of one type under the same name."
        raise ValueError(f"cannot read {path}: {str(error).rstrip('.')}. {hint}") from error
    _check_names(table, path)
    ids = pa.chunked_array([pa.array(range(len(table))).cast(pa.string())])
    if ID in table.column_names:
        ids = _ids(table, path)
    fields = table.drop_columns([ID]) if ID in table.column_names else table
    texts, images = (_text_column(table, name, path) for name in (TEXT, IMAGE))
    return RowSource(path, path.resolve().parent, ids, fields.replace_schema_metadata(None), texts, images)


def _image_folder(path: Path) -> RowSource:
    files = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(file.relative_to(path).as_posix() for file in files if file.is_file())
    if not names:
        raise ValueError(
            f"{path} holds no file that ends with one of {', '.join(IMAGE_SUFFIXES)}. Name a folder of "
            f"images, or a file that ends with one of {', '.join(SUFFIXES)}."
        )
    images = pa.chunked_array([pa.array(names)])
    texts = pa.chunked_array([pa.nulls(len(names), pa.string())])
    return RowSource(path, path.resolve(), images, pa.table({IMAGE: images}), texts, images)


def _read_table(path: Path) -> pa.Table:
    """All columns with their types; those that this package reads are texts in CSV and JSONL."""
    if path.suffix == ".parquet":
        return pq.read_table(path, partitioning=None)
    if path.suffix == ".csv":
        parse = pa.csv.ParseOptions(newlines_in_values=True)
        types = dict.fromkeys((ID, TEXT, IMAGE), pa.string())
        convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
        return pa.csv.read_csv(path, parse_options=parse, convert_options=convert)
    texts = [(TEXT, pa.string()), (IMAGE, pa.string())]
    table = read_jsonl(path, pa.schema(texts))
    if ID in table.column_names and pa.types.is_temporal(table[ID].type):
        table = read_jsonl(path, pa.schema([*texts, (ID, pa.string())]))
    return table.drop_columns([name for name in (TEXT, IMAGE) if table[name].null_count == len(table)])


def _check_names(table: pa.Table, path: Path) -> None:
    found = ", ".join(table.column_names)
    if not {TEXT, IMAGE} & set(table.column_names):
        raise ValueError(
            f"{path}: needs a column {TEXT}, {IMAGE} (names of files) or both; found {found or 'none'}."
        )
    if not len(table):
        raise ValueError(f"{path} has no rows.")
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"{path}: two columns of the same name; found {found}. Rename one.")
    for name in table.column_names:
        if name == AGGREGATE or PATH_NAME.fullmatch(name):
            raise ValueError(f"{path}: a column {name!r} holds embeddings in the result. Rename yours.")


def _ids(table: pa.Table, path: Path) -> pa.ChunkedArray:
    ids = _text_column(table, ID, path)
    if ids.null_count:
        row = pc.index(ids.is_null(), True).as_py()
        raise ValueError(f"{path}, row {row}: no {ID}. Fill in every {ID}, or leave the column out.")
    counts = pc.value_counts(ids)
    if len(counts) < len(ids):
        several = next(count["values"] for count in counts.to_pylist() if count["counts"] > 1)
        row = pc.index(ids, several).as_py()
        raise ValueError(f"{path}, row {row}: the {ID} {several!r} stands in other rows, too.")
    return ids


def _text_column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    """A column as texts; nulls if there is none."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.string())])
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        what = "names of image files" if name == IMAGE else "texts"
        raise ValueError(f"{path}, column {name!r}: holds {kind}, not {what}.")
    return column.cast(pa.string())
