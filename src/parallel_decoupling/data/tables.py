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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".csv")
ROWS_PER_BATCH = 8192
JSON_BLOCK_BYTES = 1 << 26
CSV_PARSING = pa.csv.ParseOptions(newlines_in_values=True)
MAX_SHOWN = 200
"""Characters of a cell in an error message."""
FORMAT = 2
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
        lists: names in this package of the columns that may hold lists. In a CSV file one list makes such a
            column lists; any other column only if all of its cells are lists.

    Raises:
        ValueError: a file that cannot be read, a column that holds no text, or a cell that is no list in a
            CSV column of lists.
    """

    def __init__(
        self, owner: str, files: Sequence[Path], columns: Mapping[str, str], lists: Collection[str] = ()
    ) -> None:
        self.owner = owner
        self.files = list(files)
        self.columns = dict(columns)
        self.lists = tuple(lists)
        sources = sorted(set(columns.values()))
        list_sources = sorted({columns[name] for name in lists if name in columns})
        self._arrays: list[dict[str, pa.Array]] = []
        first_rows, stops = [], [0]
        for file in self.files:
            first_rows.append(stops[-1])
            copy = arrow_copy(file, sources, owner, list_sources)
            reader = pa.ipc.open_file(pa.memory_map(str(copy)))
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
        return Table, (self.owner, self.files, self.columns, self.lists)

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
    return list(read_jsonl(file).column_names) if file.suffix == ".jsonl" else _csv_names(file)


def arrow_copy(file: Path, columns: Sequence[str], owner: str, lists: Sequence[str] = ()) -> Path:
    """Return the memory-mappable copy of some columns of a file, written if it is not in the cache.

    It appears by one rename, so processes that write it at the same time do not disturb each other. Copies
    of earlier contents of the same file are removed.

    Args:
        file: parquet, JSONL or CSV.
        columns: those to copy; the ones that the file lacks are left out.
        owner: for error messages.
        lists: those of the columns that may hold lists.

    Raises:
        ValueError: the file is missing, broken, or holds something else than texts and lists of them.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{owner}: cannot read {file}: {error}. Check data_dir and the name.") from error
    place = _hash(str(file.resolve()), *columns, *(f"lists in {name}" for name in lists))
    state = _hash(str(FORMAT), str(status.st_size), str(status.st_mtime_ns))
    folder = default_cache_dir() / "tables"
    copy = folder / f"{place}-{state}.arrow"
    if copy.is_file():
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=folder, prefix="unfinished-")
    os.close(handle)
    try:
        _write(file, columns, lists, Path(unfinished))
        for old in folder.glob(f"{place}-*.arrow"):
            if old != copy:  # which another process may have finished meanwhile and be about to map
                old.unlink(missing_ok=True)
        Path(unfinished).replace(copy)
    except pa.ArrowException as error:
        raise ValueError(f"{owner}: cannot read {file}: {error}. Is it complete?") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return copy


def _hash(*parts: str) -> str:
    return blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _write(file: Path, columns: Sequence[str], lists: Collection[str], copy: Path) -> None:
    """Write the columns as texts or lists of texts, a batch of rows at a time."""
    writer = None
    with pa.OSFile(str(copy), "wb") as stream:
        for batch in _read(file, columns, lists):
            names, cells = batch.schema.names, batch.columns
            texts = [_as_text(file, name, cell) for name, cell in zip(names, cells, strict=True)]
            batch = pa.RecordBatch.from_arrays(texts, names)
            writer = writer or pa.ipc.new_file(stream, batch.schema)
            writer.write_batch(batch)
        if writer is None:
            raise ValueError(f"{file} has no rows. Remove it or fill it in.")
        writer.close()


def _read(file: Path, columns: Sequence[str], lists: Collection[str]) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        source = pq.ParquetFile(file)
        names = [name for name in source.schema_arrow.names if name in columns]
        yield from source.iter_batches(ROWS_PER_BATCH, columns=names)
    elif file.suffix == ".jsonl":
        yield from pa.table(_jsonl_columns(file, columns)).to_batches(ROWS_PER_BATCH)
    elif file.suffix == ".csv":
        yield from pa.table(_csv_columns(file, columns, lists)).to_batches(ROWS_PER_BATCH)
    else:
        raise ValueError(f"{file}: the file must end with one of {', '.join(SUFFIXES)}.")


def read_jsonl(
    file: Path, schema: pa.Schema | None = None, others: Literal["infer", "ignore"] = "infer"
) -> pa.Table:
    """Columns of a JSONL file: those of the schema with its types, the others as pyarrow finds or not at all.

    Texts that look like dates become times unless the schema has them as texts. A column of the schema that
    the file lacks is full of nulls.
    """
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
    read = pa.json.ReadOptions(block_size=JSON_BLOCK_BYTES)
    return pa.json.read_json(str(file), read_options=read, parse_options=parse)


def _jsonl_columns(file: Path, columns: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Some columns; pyarrow makes times of texts that look like dates, so these are read again as texts."""
    table = read_jsonl(file)
    found = {name: table[name] for name in table.column_names if name in columns}
    dates = []
    for name, column in found.items():
        if pa.types.is_temporal(column.type):
            dates.append((name, pa.string()))
        elif pa.types.is_list(column.type) and pa.types.is_temporal(column.type.value_type):
            dates.append((name, pa.list_(pa.string())))
    if dates:
        texts = read_jsonl(file, pa.schema(dates), others="ignore")
        found |= {name: texts[name] for name, _ in dates}
    return found


def _csv_names(file: Path) -> list[str]:
    with pa.csv.open_csv(str(file), parse_options=CSV_PARSING) as stream:
        return list(stream.schema.names)


def _csv_columns(file: Path, columns: Sequence[str], lists: Collection[str]) -> dict[str, pa.ChunkedArray]:
    """Some columns as texts, or as lists of texts; ``lists`` are those that may hold lists."""
    kept = [name for name in _csv_names(file) if name in columns]
    convert = pa.csv.ConvertOptions(
        include_columns=kept, column_types=dict.fromkeys(kept, pa.string()), strings_can_be_null=False
    )
    table = pa.csv.read_csv(str(file), convert_options=convert, parse_options=CSV_PARSING)
    return {name: _lists(file, name, table[name], may_hold_lists=name in lists) for name in kept}


def _lists(file: Path, name: str, column: pa.ChunkedArray, *, may_hold_lists: bool) -> pa.ChunkedArray:
    """A CSV column as lists if its cells are JSON lists of texts, else as it is.

    Where lists may be, one such cell is enough; then an empty cell is an empty list and any other an error. A
    column of nothing but lists as Python prints them is an error, too. Elsewhere all cells must be lists.
    """
    cells = column.to_pylist()
    lists = [_json_list(cell) for cell in cells]
    if not may_hold_lists:
        holds_lists = all(cell is not None for cell in lists)
    else:
        filled = [row for row, cell in enumerate(cells) if cell.strip()]
        wrong = [row for row in filled if lists[row] is None]
        printed = all(cells[row].startswith("['") and cells[row].endswith("]") for row in filled)
        holds_lists = bool(filled) and (len(wrong) < len(filled) or printed)
        if holds_lists and wrong:
            raise ValueError(
                f"{file}, row {wrong[0]}, column {name!r}: the column holds lists, but "
                f"{cells[wrong[0]][:MAX_SHOWN]!r} is no JSON list of texts. "
                'Write ["cat", "dog"], which is "[""cat"", ""dog""]" in a CSV file; leave the cell empty for '
                "no entry. If the column should hold texts that look like lists, use a JSONL or parquet file."
            )
    if not holds_lists:
        return column
    return pa.chunked_array([pa.array([cell or [] for cell in lists], pa.list_(pa.string()))])


def _json_list(cell: str) -> list[str | None] | None:
    """The entries of a JSON list of texts, None for any other cell."""
    if not cell.lstrip().startswith("["):
        return None
    try:
        entries = json.loads(cell)
    except json.JSONDecodeError:
        return None
    return entries if all(entry is None or isinstance(entry, str) for entry in entries) else None


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
