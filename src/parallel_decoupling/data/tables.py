"""Tables of texts on disk, read row by row through Arrow memory mapping.

Parquet has to be decoded, so it cannot be mapped: every process that reads it holds its own decoded
copy. So the columns that are needed are written once to an Arrow file in the cache, which the operating
system maps into every process and loader worker and keeps in memory once. The copy is keyed by the
source's place, size and time of change.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".csv")
ROWS_PER_BATCH = 8192
JSON_BLOCK_BYTES = 1 << 26
FORMAT = 1
"""Of the copies in the cache."""


def default_cache_dir() -> Path:
    """Return ``$PARALLEL_DECOUPLING_CACHE``, or ``parallel_decoupling`` in the user's cache folder."""
    configured = os.environ.get("PARALLEL_DECOUPLING_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "parallel_decoupling"


class Table:
    """The files of one subset or task as one table of texts and lists of texts.

    Pickled by file names, so a spawned worker maps the files again.

    Args:
        owner: what the rows are, for error messages.
        files: parquet, JSONL or CSV files with the same columns, one after the other.
        columns: name in this package to name in the files; those that a file lacks are left out.

    Raises:
        ValueError: a file that cannot be read, or a column that holds no text.
    """

    def __init__(self, owner: str, files: Sequence[Path], columns: Mapping[str, str]) -> None:
        self.owner = owner
        self.files = list(files)
        self.columns = dict(columns)
        self._arrays: list[dict[str, pa.Array]] = []
        first_rows, stops = [], [0]
        for file in self.files:
            first_rows.append(stops[-1])
            reader = pa.ipc.open_file(
                pa.memory_map(str(arrow_copy(file, sorted(set(columns.values())), owner)))
            )
            present = {name: source for name, source in columns.items() if source in reader.schema.names}
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                self._arrays.append({name: batch.column(source) for name, source in present.items()})
                stops.append(stops[-1] + len(batch))
        self._first_rows, self._stops = np.array(first_rows), np.array(stops[1:])

    def require(self, names: Iterable[str]) -> None:
        """Check that every file has some columns, by their names in this package.

        Raises:
            ValueError: one is missing; names the file and what it has.
        """
        for name in names:
            if self.column(name) is None:
                for file in self.files:
                    found = column_names(file)
                    if self.columns[name] not in found:
                        raise ValueError(
                            f"{self.owner}, file {file}: column {self.columns[name]!r} is missing; found "
                            f"{', '.join(found)}. Rename or add it."
                        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it takes to open the files again."""
        return Table, (self.owner, self.files, self.columns)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The cells of one row by this package's column names."""
        number = int(np.searchsorted(self._stops, row, side="right"))
        offset = row - (int(self._stops[number - 1]) if number else 0)
        return {name: array[offset].as_py() for name, array in self._arrays[number].items()}

    def column(self, name: str) -> pa.ChunkedArray | None:
        """One whole column without copying it, or None if a file lacks it."""
        if not all(name in arrays for arrays in self._arrays):
            return None
        return pa.chunked_array([arrays[name] for arrays in self._arrays])

    def where(self, row: int, *columns: str) -> str:
        """Name the owner, file, row in that file and the first of some columns that the file has.

        For an error message.
        """
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        name = next((self.columns[column] for column in columns if column in self.columns), columns[0])
        return f"{self.owner}, file {self.files[file]}, row {row - self._first_rows[file]}, column {name!r}"


def column_names(file: Path) -> list[str]:
    """Column names of a parquet, JSONL or CSV file."""
    if file.suffix == ".parquet":
        return list(pq.read_schema(file).names)
    return [name for name, _ in _text_columns(file, None)]


def arrow_copy(file: Path, columns: Sequence[str], owner: str) -> Path:
    """Return the memory-mappable copy of some columns of a file, written if it is not in the cache.

    It appears by one rename, so processes that write it at the same time do not disturb each other. Copies
    of earlier contents of the same file are removed.

    Args:
        file: parquet, JSONL or CSV.
        columns: those to copy; the ones that the file lacks are left out.
        owner: for error messages.

    Raises:
        ValueError: the file is missing, broken, or holds something else than texts.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{owner}: cannot read {file}: {error}. Check data_dir and the name.") from error
    place = _hash(str(file.resolve()), *columns)
    state = _hash(str(FORMAT), str(status.st_size), str(status.st_mtime_ns))
    folder = default_cache_dir() / "tables"
    copy = folder / f"{place}-{state}.arrow"
    if copy.is_file():
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=folder, prefix="unfinished-")
    os.close(handle)
    try:
        _write(file, columns, Path(unfinished))
        for old in folder.glob(f"{place}-*.arrow"):
            old.unlink(missing_ok=True)
        Path(unfinished).replace(copy)
    except pa.ArrowException as error:
        raise ValueError(f"{owner}: cannot read {file}: {error}. Is it complete?") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return copy


def _hash(*parts: str) -> str:
    return blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _write(file: Path, columns: Sequence[str], copy: Path) -> None:
    """Write the columns as texts or lists of texts, a batch of rows at a time."""
    writer = None
    with pa.OSFile(str(copy), "wb") as stream:
        for batch in _read(file, columns):
            names, cells = batch.schema.names, batch.columns
            texts = [_as_text(file, name, cell) for name, cell in zip(names, cells, strict=True)]
            batch = pa.RecordBatch.from_arrays(texts, names)
            writer = writer or pa.ipc.new_file(stream, batch.schema)
            writer.write_batch(batch)
        if writer is None:
            raise ValueError(f"{file} has no rows. Remove it or fill it in.")
        writer.close()


def _read(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        source = pq.ParquetFile(file)
        names = [name for name in source.schema_arrow.names if name in columns]
        yield from source.iter_batches(ROWS_PER_BATCH, columns=names)
    elif file.suffix in SUFFIXES:
        yield from pa.table(dict(_text_columns(file, columns))).to_batches(ROWS_PER_BATCH)
    else:
        raise ValueError(f"{file}: the file must end with one of {', '.join(SUFFIXES)}.")


def _text_columns(file: Path, columns: Sequence[str] | None) -> list[tuple[str, pa.ChunkedArray]]:
    """Columns of a JSONL or CSV file; a CSV column in which every cell is a JSON list becomes lists."""
    if file.suffix == ".jsonl":
        read = pa.json.ReadOptions(block_size=JSON_BLOCK_BYTES)
        table = pa.json.read_json(str(file), read_options=read)
        return [(name, table[name]) for name in table.column_names if columns is None or name in columns]
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(str(file), parse_options=parse) as stream:
        names = stream.schema.names
    kept = [name for name in names if columns is None or name in columns]
    convert = pa.csv.ConvertOptions(
        include_columns=kept, column_types=dict.fromkeys(kept, pa.string()), strings_can_be_null=False
    )
    table = pa.csv.read_csv(str(file), convert_options=convert, parse_options=parse)
    return [(name, _lists(table[name])) for name in kept]


def _lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    cells = column.to_pylist()
    if not cells or not all(cell.startswith("[") and cell.endswith("]") for cell in cells):
        return column
    try:
        return pa.chunked_array([pa.array([json.loads(cell) for cell in cells], pa.list_(pa.string()))])
    except (json.JSONDecodeError, pa.ArrowException):
        return column


def _as_text(file: Path, name: str, cells: pa.Array) -> pa.Array:
    """Cast numbers and all kinds of strings to text, alone or in lists."""
    kind = cells.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    inner = kind.value_type if is_list else kind
    if pa.types.is_nested(inner) or pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
        raise ValueError(
            f"{file}, column {name!r}: holds {kind}, not texts or lists of texts. Images must be files "
            "that a text column names."
        )
    return cells.cast(pa.list_(pa.string()) if is_list else pa.string())
