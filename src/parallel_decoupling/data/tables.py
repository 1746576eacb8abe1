"""The reader of Parquet, JSONL and CSV files through memory-mapped copies (``docs/decisions/0011``)."""

import codecs
import csv
import io
import json
import os
import re
import shutil
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from parallel_decoupling.data.names import unique_keys
from parallel_decoupling.files import FullDiskError, atomic_write, expand_paths

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
ROWS_PER_BATCH = 8192
ROWS_WITH_PICTURES = 64
FORMAT = "8"  # version of the copies in the cache
DELIMITERS = ",;\t"
CSV_BLOCK = 1 << 26  # bytes that a row of a CSV file may have
MARKS = {"utf-8-sig": (codecs.BOM_UTF8,), "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)}
MARKS["utf-16"] = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the former is the start of one before it
"""Byte order marks by encoding; a text without one must be UTF-8."""


def default_cache_dir() -> Path:
    """Return ``$PARALLEL_DECOUPLING_CACHE``, or ``parallel_decoupling`` in the user's cache folder."""
    of_user = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "parallel_decoupling")
    return Path(expand_paths(os.environ.get("PARALLEL_DECOUPLING_CACHE") or of_user, "cache_dir"))


class Table:
    """The files of one subset, task or source as one mapped table, pickled by the names of the files.

    ``columns`` maps names here to names in the files, of what becomes texts or lists of texts; null if
    lacking. ``keep_others`` keeps all other columns with their types. ``owner`` begins error messages. In
    columns of pictures, whose names here end in "image", the bytes of a file or a struct of ``bytes`` and
    ``path``, as ``datasets`` writes, become files in the cache, and the cells their names.
    """

    def __init__(
        self, owner: str, files: Sequence[Path], columns: Mapping[str, str], keep_others: bool = False
    ) -> None:
        self.owner, self.files, self.columns = owner, list(files), dict(columns)
        self._keep_others = keep_others
        pictures = {theirs for name, theirs in columns.items() if name.endswith("image")}
        texts = {theirs: theirs in pictures for theirs in sorted(set(columns.values()))}
        copies = [arrow_copy(file, texts, owner, keep_others) for file in self.files]
        parts = [pa.ipc.open_file(pa.memory_map(str(copy))).read_all() for copy in copies]
        self._found = [json.loads(part.schema.metadata[b"columns"]) for part in parts]
        self._first_rows = np.cumsum([0, *(len(part) for part in parts)])[:-1]
        rows = _joined(list(zip(self.files, parts, strict=True)), "default", f"{owner}: ")
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
        file, number = self.place(row)
        name = next((self.columns[column] for column in columns if column in self.columns), columns[0])
        return f"{self.owner}, file {file}, row {number}, column {name!r}"

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file of a row, and its number there."""
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.files[file], row - int(self._first_rows[file])


def _joined(parts: Sequence[tuple[str | Path, pa.Table]], promote: str, start: str = "") -> pa.Table:
    """Put tables, with their places, below each other; a ``ValueError`` names a column of two types."""
    seen: dict[str, tuple[str | Path, pa.Field]] = {}
    for place, part in parts:
        for field in part.schema:
            before, known = seen.get(field.name, (place, field))
            try:
                merged = pa.unify_schemas([pa.schema([known]), pa.schema([field])], promote_options=promote)
            except pa.ArrowException as error:
                what = f"column {field.name!r} holds {known.type} in {before}, but {field.type} in {place}"
                raise ValueError(f"{start}{what}. Give it one type.") from error
            seen[field.name] = (place if pa.types.is_null(known.type) else before), merged.field(0)
    return pa.concat_tables([part for _, part in parts], promote_options=promote)


def find_tables(owner: str, folder: Path, *patterns: str) -> list[Path]:
    """Return the files of the first pattern that has any, in the order of their names."""
    found = [[file for file in sorted(folder.glob(each)) if file.suffix in SUFFIXES] for each in patterns]
    if not any(found):
        there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        looked = f"{folder} holds no {' or '.join(patterns)} that ends with {', '.join(SUFFIXES)}"
        raise ValueError(f"{owner}: {looked}; found {there:.200}.")
    return next(filter(None, found))


def arrow_copy(file: Path, texts: Mapping[str, bool], owner: str, keep_others: bool = False) -> Path:
    """Return the copy of a file by its contents, written if the cache lacks it, in place of earlier ones.

    ``texts`` are the columns in use, and whether they may hold pictures. Several processes may write it.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{owner}: {file} is not a regular file. Give a file on a disk.")
    content = blake2b(digest_size=16)
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
    except OSError as error:
        raise ValueError(f"{owner}: cannot read {file}: {error}. Check data_dir and the name.") from error
    about = repr((FORMAT, str(file.resolve()), dict(texts), keep_others))
    place = blake2b(about.encode(), digest_size=8).hexdigest()
    copy = default_cache_dir() / "tables" / f"{place}-{content.hexdigest()}.arrow"
    if _is_whole(copy):
        return copy
    try:
        with atomic_write(copy) as unfinished:
            _write(file, texts, keep_others, unfinished, copy.with_suffix(".d"))
            for old in copy.parent.glob(f"{place}-*.arrow"):
                if old != copy:  # another process may have finished this one and be about to map it
                    old.unlink(missing_ok=True)
                    shutil.rmtree(old.with_suffix(".d"), ignore_errors=True)
    except (ValueError, pa.ArrowException, OSError) as error:
        elsewhere = str(getattr(error, "filename", None) or file) != str(file)  # such as a read-only cache
        if elsewhere or isinstance(error, FullDiskError):
            raise
        lines = ", with one JSON object per line and values of one type" if file.suffix == ".jsonl" else ""
        advice = f" Is it complete{lines}?" if isinstance(error, pa.ArrowException | OSError) else ""
        raise ValueError(f"{owner}: cannot read {file}: {error}{advice}") from error
    return copy


def _is_whole(copy: Path) -> bool:
    """Tell whether a copy is there and ends as it should."""
    try:
        return b"columns" in (pa.ipc.open_file(pa.memory_map(str(copy))).schema.metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _write(file: Path, texts: Mapping[str, bool], keep_others: bool, copy: Path, pictures: Path) -> None:
    """Write the columns of a file that are wanted; ``columns`` of the metadata names all that it has."""
    batches: Iterable[pa.RecordBatch]
    if file.suffix == ".parquet":
        source = pq.ParquetFile(pa.OSFile(os.fsencode(file)))
        found = source.schema_arrow.names
        columns = None if keep_others else [name for name in found if name in texts]
        held = any(texts.get(field.name) and _is_held(field.type) for field in source.schema_arrow)
        batches = source.iter_batches(ROWS_WITH_PICTURES if held else ROWS_PER_BATCH, columns=columns)
    elif file.suffix in SUFFIXES:
        table = _read_jsonl(file) if file.suffix == ".jsonl" else _read_csv(file, [*texts])
        found, batches = table.column_names, table.to_batches(ROWS_PER_BATCH)
    else:
        raise ValueError(f"it must end with one of {', '.join(SUFFIXES)}.")
    kept = [name for name in found if keep_others or name in texts]
    if len(set(kept)) < len(kept):
        raise ValueError(f"two columns have the same name; found {', '.join(found)}. Rename one.")
    writer, rows, places = None, 0, (pictures, copy.parent)
    with pa.OSFile(str(copy), "wb") as stream:
        for part in batches:
            cells = []
            for name in kept:
                try:
                    cells.append(_to_copy(name, part.column(name), texts.get(name), places))
                    cells[-1].validate(full=True)  # texts that are not UTF-8
                except pa.ArrowException as error:
                    where = f"rows {rows} to {rows + len(part) - 1}, column {name!r}"
                    raise ValueError(f"{where}: {error}.") from error
            batch = pa.RecordBatch.from_arrays(cells, kept, metadata={"columns": json.dumps(found)})
            writer = writer or pa.ipc.new_file(stream, batch.schema)
            writer.write_batch(batch)
            rows += len(part)  # even where no column is wanted
        if not rows or writer is None:
            raise ValueError("it has no rows. Remove it or fill it in.")
        writer.close()


def _decoded(file: Path) -> TextIO:
    """Return the text of a file by its byte order mark, else as UTF-8; every line keeps its end."""
    content = file.read_bytes()
    encoding = next((name for name, marks in MARKS.items() if content.startswith(marks)), "utf-8")
    try:
        text = content.decode(encoding)
        if "\0" in text[:1024]:
            raise UnicodeDecodeError(encoding, content, content.index(0), len(content), "a zero byte")
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "ignore").count("\n")
        row = max(0, line - (file.suffix != ".jsonl"))
        what = f"row {row} (line {line + 1}) is not {encoding.removesuffix('-sig').upper()}, {error.reason}"
        raise ValueError(f"{what}. Save the file as UTF-8.") from error
    return io.StringIO(text, newline="")


def _read_csv(file: Path, texts: Sequence[str]) -> pa.Table:
    """Read all columns, with the delimiter that gives most of the wanted ones, or else most columns.

    Columns beside ``texts`` are numbers or dates only where these, written out, are what the file has. The
    rows are first read by Python, which, other than Arrow, says where a row or a quotation is wrong.
    """
    limit = csv.field_size_limit(sys.maxsize)
    row, stream = -1, _decoded(file)  # the header
    header = stream.readline()
    try:
        split = {each: next(csv.reader([header], delimiter=each), []) for each in DELIMITERS}
        delimiter = max(DELIMITERS, key=lambda each: (len({*split[each]} & {*texts}), len(split[each])))
        stream.seek(0)
        rows = filter(None, csv.reader(stream, delimiter=delimiter, strict=True))
        columns = len(next(rows, []))
        for row, cells in enumerate(rows):
            if len(cells) != columns:
                raise ValueError(f"row {row} has {len(cells)} cells, where the header has {columns}.")
    except csv.Error as error:
        advice = " Is a quotation mark left open?" if "end of data" in str(error) else ""
        raise ValueError(f"row {row + 1}: {error}.{advice}") from error
    finally:
        csv.field_size_limit(limit)
    stream.seek(0)
    parse = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
    content, read = stream.read().encode(), pa.csv.ReadOptions(block_size=CSV_BLOCK)

    def typed(texts: Iterable[str]) -> pa.Table:
        types = dict.fromkeys(texts, pa.string())
        convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False, null_values=[""])
        return pa.csv.read_csv(pa.BufferReader(content), read, parse, convert)

    table = typed(texts)
    written = typed(table.column_names)
    for place, (name, column) in enumerate(zip(table.column_names, written.columns, strict=True)):
        short = pc.replace_substring_regex(column, r"(\.\d*[1-9])0+$|\.0+$", r"\1")  # 1.50 is 1.5
        if pc.any(pc.not_equal(short, table.column(place).cast(pa.string()))).as_py():
            table = table.set_column(place, name, column)
    if len(table) != row + 1:
        raise ValueError(f"it has {row + 1} rows for Python and {len(table)} for Arrow. Use one line ending.")
    return table


def _read_jsonl(file: Path) -> pa.Table:
    """Read all columns with the types that JSON has, so that texts which look like dates stay texts."""
    parts, first, rows = [], 0, _json_rows(_decoded(file))
    while part := list(islice(rows, ROWS_PER_BATCH)):
        names = dict.fromkeys(name for row in part for name in row)
        cells = {name: _json_column(name, part, first) for name in names}
        first += len(part)
        parts.append((f"rows up to {first - 1}", pa.table(cells)))
    return _joined(parts or [("", pa.table({}))], "permissive")


def _json_column(name: str, rows: Sequence[Mapping[str, Any]], first: int) -> pa.Array:
    """Return the cells of some rows; a ``ValueError`` names the first that does not fit those before it."""
    cells = [row.get(name) for row in rows]

    def problem(stop: int) -> str:
        try:
            pa.array(cells[:stop])
        except (pa.ArrowException, OverflowError) as error:
            return str(error)
        return ""

    if what := problem(len(cells)):
        row = bisect_left(range(1, len(cells)), True, key=lambda stop: bool(problem(stop)))
        advice = "A column has values of one type, and integers of 64 bits"
        raise ValueError(f"row {first + row}, column {name!r}: {what}. {advice}.")
    return pa.array(cells)


def _json_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Parse lines that are not blank; NaN is null."""
    for row, line in enumerate(line for line in lines if line.strip()):
        try:
            cells = json.loads(
                line,
                parse_constant=lambda name: None if name == "NaN" else float(name),
                object_pairs_hook=unique_keys,
            )
            if not isinstance(cells, dict):
                raise ValueError("a line is not a JSON object")
            if re.search(r"\\u[dD][89a-fA-F]", line):
                json.dumps(cells, ensure_ascii=False).encode()  # a half of a character is an error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"row {row}: {error}.") from error
        yield cells


def _without_views(kind: pa.DataType) -> pa.DataType:
    """Return a type that holds the same: Arrow cannot take single rows of views, on their own or inside."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    for is_list, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_without_views(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(_without_views(kind.key_type), _without_views(kind.item_type))
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)


def _entry(kind: pa.DataType) -> pa.DataType:
    """Return the type of the entries of lists, or the type itself."""
    lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    return kind.value_type if any(is_list(kind) for is_list in lists) else kind


def _is_held(kind: pa.DataType) -> bool:
    """Tell whether cells hold pictures: bytes, or structs of ``bytes`` and ``path``, alone or in lists."""
    kind = _entry(kind)
    if not pa.types.is_struct(kind):
        return kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    types = {field.name: re.sub("^large_|_view$", "", str(field.type)) for field in kind}
    return types.get("bytes") in ("binary", "null") and types.get("path", "null") in ("string", "null")


def _save_pictures(cells: pa.Array, folder: Path, workplace: Path) -> pa.Array:
    """Write pictures to files named by their contents; return the names, or a path that has no bytes."""

    def saved(cell: Any) -> Any:
        if isinstance(cell, list):
            return [saved(each) for each in cell]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None:
            return path
        file = folder / f"{blake2b(data, digest_size=16).hexdigest()}{Path(path or '').suffix[:9]}"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (workplace / file.name).write_bytes(data)
            (workplace / file.name).replace(file)
        return str(file)

    names = [saved(cell) for cell in cells.to_pylist()]
    return pa.array(names, pa.string() if _entry(cells.type) == cells.type else pa.list_(pa.string()))


def _to_copy(name: str, cells: pa.Array, is_picture: bool | None, places: tuple[Path, Path]) -> pa.Array:
    """Cast numbers and all kinds of strings to text, alone or in lists; leave other columns as they are.

    NaN becomes null. ``is_picture`` is None for other columns; pictures become files in the first of
    two ``places``, by way of the second.
    """
    cells = cells.cast(_without_views(cells.type))
    if is_picture and _is_held(cells.type):
        return _save_pictures(cells, *places)
    if is_picture is None:  # an Arrow file holds at most one dictionary per column
        return cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
    kind = cells.type
    if pa.types.is_null(kind):  # may stand for texts or for lists
        return cells
    entry = _entry(kind)
    if pa.types.is_nested(entry) or entry in (pa.binary(), pa.large_binary()):
        advice = "not texts or lists of texts, nor a column of pictures"
        raise ValueError(f"column {name!r} holds {kind}, {advice}.")
    texts = cells.cast(pa.string() if entry is kind else pa.list_(pa.string()))
    if not pa.types.is_floating(entry):
        return texts
    numbers = {"nan": None}
    rows = [
        [numbers.get(each, each) for each in row] if isinstance(row, list) else numbers.get(row, row)
        for row in texts.to_pylist()
    ]
    return pa.array(rows, texts.type)
