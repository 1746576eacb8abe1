"""The reader of Parquet, JSONL and CSV files through memory-mapped copies (``docs/decisions/0011``)."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
ROWS_PER_BATCH = 8192
FORMAT = "4"
"""Version of the copies in the cache."""


def default_cache_dir() -> Path:
    """Return ``$PARALLEL_DECOUPLING_CACHE``, or ``parallel_decoupling`` in the user's cache folder."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("PARALLEL_DECOUPLING_CACHE") or user_cache / "parallel_decoupling")


class Table:
    """The files of one subset, task or source as one mapped table, pickled by the names of the files.

    ``columns`` maps names here to names in the files, of what becomes texts or lists of texts; null if
    lacking. ``keep_others`` keeps all other columns with their types. ``owner`` begins error messages.
    """

    def __init__(
        self, owner: str, files: Sequence[Path], columns: Mapping[str, str], keep_others: bool = False
    ) -> None:
        self.owner, self.files, self.columns = owner, list(files), dict(columns)
        self._keep_others = keep_others
        texts = sorted(set(columns.values()))
        copies = [arrow_copy(file, texts, owner, keep_others) for file in self.files]
        parts = [pa.ipc.open_file(pa.memory_map(str(copy))).read_all() for copy in copies]
        self._found = [json.loads(part.schema.metadata[b"columns"]) for part in parts]
        self._first_rows = np.cumsum([0, *(len(part) for part in parts)])[:-1]
        rows = pa.concat_tables(parts, promote_options="default")
        cells = {name: rows[theirs] for name, theirs in columns.items() if theirs in rows.column_names}
        for name, column in cells.items():
            cells[name] = column.cast(pa.string()) if pa.types.is_null(column.type) else column
        others = rows.column_names if keep_others else ()
        self.rows = pa.table({name: rows[name] for name in others} | cells)

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.owner, self.files, self.columns, self._keep_others)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self.rows.slice(row, 1).to_pylist()[0])

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Return one whole column without copying it, or None if no file has it."""
        return self.rows[name] if name in self.rows.column_names else None

    def check(self, required: Iterable[str], single: Collection[str]) -> None:
        """Refuse files that lack a required column, lists in a single column, and lists in CSV cells."""
        for name in required:
            for file, found in zip(self.files, self._found, strict=True):
                if self.columns[name] not in found:
                    lacking = f"column {self.columns[name]!r} is missing; found {', '.join(found)}"
                    raise ValueError(f"{self.owner}, file {file}: {lacking}. Rename or add it.")
        for name, column in zip(self.rows.column_names, self.rows.columns, strict=True):
            if pa.types.is_list(column.type) and name in single:
                advice = "Only candidates and negatives may be lists"
                raise ValueError(f"{self.where(0, name)}: holds a list, where a row has one value. {advice}.")
            if self.files[0].suffix in (".csv", ".tsv") and name in self.columns and name not in single:
                row = pc.index(pc.match_substring_regex(column, r"^\s*\[\s*['\"]"), True).as_py()
                if row >= 0:
                    advice = "a cell of a CSV file holds one text. Keep lists in a JSONL or Parquet file."
                    raise ValueError(f"{self.where(row, name)}: {advice}")

    def where(self, row: int, *columns: str) -> str:
        """Name the owner, file, row in that file and the first known of some columns, for a message."""
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        name = next((self.columns[column] for column in columns if column in self.columns), columns[0])
        return f"{self.owner}, file {self.files[file]}, row {row - self._first_rows[file]}, column {name!r}"


def arrow_copy(file: Path, texts: Sequence[str], owner: str, keep_others: bool = False) -> Path:
    """Return the memory-mappable copy of a file, after writing it if the cache lacks it.

    Several processes may write it at the same time. Copies of earlier contents of the file are removed.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{owner}: cannot read {file}: {error}. Check data_dir and the name.") from error
    about = repr((FORMAT, str(file.resolve()), list(texts), keep_others))
    place = blake2b(about.encode(), digest_size=8).hexdigest()
    copy = default_cache_dir() / "tables" / f"{place}-{status.st_size}-{status.st_mtime_ns}.arrow"
    if copy.is_file():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    unfinished = copy.with_name(f"unfinished-{uuid4().hex}")
    try:
        _write(file, texts, keep_others, unfinished)
        for old in copy.parent.glob(f"{place}-*.arrow"):
            if old != copy:  # another process may have finished this one and be about to map it
                old.unlink(missing_ok=True)
        unfinished.replace(copy)
    except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError) as error:
        lines = ", with one JSON object per line and values of one type" if file.suffix == ".jsonl" else ""
        raise ValueError(f"{owner}: cannot read {file}: {error} Is it complete{lines}?") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return copy


def _write(file: Path, texts: Sequence[str], keep_others: bool, copy: Path) -> None:
    """Write the columns of a file that are wanted; ``columns`` of the metadata names all that it has."""
    batches: Iterable[pa.RecordBatch]
    if file.suffix == ".parquet":
        source = pq.ParquetFile(file)
        found = source.schema_arrow.names
        columns = None if keep_others else [name for name in found if name in texts]
        batches = source.iter_batches(ROWS_PER_BATCH, columns=columns)
    elif file.suffix in SUFFIXES:
        types = dict.fromkeys(texts, pa.string())
        convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
        delimiter = "\t" if file.suffix == ".tsv" else ","
        parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        is_jsonl = file.suffix == ".jsonl"
        table = _read_jsonl(file) if is_jsonl else pa.csv.read_csv(file, None, parse, convert)
        found, batches = table.column_names, table.to_batches(ROWS_PER_BATCH)
    else:
        raise ValueError(f"{file}: the file must end with one of {', '.join(SUFFIXES)}.")
    kept = [name for name in found if keep_others or name in texts]
    if len(set(kept)) < len(kept):
        raise ValueError(f"{file}: two columns have the same name; found {', '.join(found)}. Rename one.")
    writer = None
    with pa.OSFile(str(copy), "wb") as stream:
        for batch in batches:
            cells = [_to_copy(file, name, batch.column(name), name in texts) for name in kept]
            batch = pa.RecordBatch.from_arrays(cells, kept, metadata={"columns": json.dumps(found)})
            writer = writer or pa.ipc.new_file(stream, batch.schema)
            writer.write_batch(batch)
        if writer is None:
            raise ValueError(f"{file} has no rows. Remove it or fill it in.")
        writer.close()


def _read_jsonl(file: Path) -> pa.Table:
    """Read all columns with the types that JSON has, so that texts which look like dates stay texts."""
    parts = []
    with file.open(encoding="utf-8") as stream:
        lines = (line for line in stream if line.strip())
        while rows := [json.loads(line) for line in islice(lines, ROWS_PER_BATCH)]:
            if not all(isinstance(row, dict) for row in rows):
                raise pa.ArrowInvalid("a line is not a JSON object")
            names = dict.fromkeys(name for row in rows for name in row)
            parts.append(pa.table({name: [row.get(name) for row in rows] for name in names}))
    return pa.concat_tables(parts or [pa.table({})], promote_options="permissive")


def _to_copy(file: Path, name: str, cells: pa.Array, is_text: bool) -> pa.Array:
    """Cast numbers and all kinds of strings to text, alone or in lists; leave other columns as they are."""
    if not is_text:  # an Arrow file holds at most one dictionary per column
        return cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
    kind = cells.type
    if pa.types.is_null(kind):  # may stand for texts or for lists
        return cells
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    entry = kind.value_type if is_list else kind
    if pa.types.is_nested(entry) or entry in (pa.binary(), pa.large_binary()):
        advice = "not texts or lists of texts. Images must be files that a text column names"
        raise ValueError(f"{file}, column {name!r}: holds {kind}, {advice}.")
    return cells.cast(pa.list_(pa.string()) if is_list else pa.string())
