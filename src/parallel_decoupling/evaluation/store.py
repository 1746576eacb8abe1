"""The one format of embeddings on disk: a folder of Parquet shards (``docs/embedding_files.md``).

A shard holds consecutive rows of one source and is complete or absent, so a killed run resumes.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.row_sources import RowSource, TaskSide
from parallel_decoupling.distributed import gather_objects, rank
from parallel_decoupling.files import atomic_write, expand_paths, reading, remove_leftovers
from parallel_decoupling.model.identity import check_seal, rows_hash, sealed, weights_hash
from parallel_decoupling.model.locations import located, portable
from parallel_decoupling.option_types import check_values, checked

METADATA_KEY = b"parallel_decoupling"
SHARD_NAME = re.compile(r"embeddings-(\d{5,})\.parquet")
AGGREGATE = "aggregate"
ROWS_PER_SHARD = 4096  # unless a caller says otherwise
ROW_GROUP_SIZE = 16_384  # rows that a reader holds at once
OWN_KEYS = ("shard", "rows_sha256", "chunks_sha256", "bad_rows")  # differ between shards
COMPARED = (
    *("identity", "columns", "dtype", "instruction", "images"),
    *("num_rows", "rows_per_shard", "rows_sha256"),
)
"""Metadata in which a shard that is kept must agree with the run that keeps it."""
REPAIR = "If it is damaged, delete it and run predict again."

VectorType = Literal["float32", "float16"]
Source = RowSource | TaskSide
Vectors = Mapping[str, Tensor]  # by the name of their column


def path_column(path: int) -> str:
    """Return the name of the column that holds one path's embeddings."""
    return f"path_{path}"


def path_vectors(embeddings_BND: Tensor, paths: Iterable[int] | None = None) -> dict[str, Tensor]:
    """Name the embeddings of paths, by default of all, by their columns."""
    numbers = range(embeddings_BND.shape[1]) if paths is None else paths
    return dict(zip(map(path_column, numbers), embeddings_BND.unbind(1), strict=True))


class StoreWriter:
    """Writes the shards of one source; their bytes depend on rows and ``about``, not on the writing process.

    ``about`` are plain values that hold for every shard: those of ``COMPARED``, and anything worth keeping
    about the model and the source. Files in them are kept by ``portable``.
    """

    def __init__(
        self, folder: str | Path, rows: Source, about: Mapping[str, Any], dtype: VectorType = "float32"
    ) -> None:
        self.folder, self.rows, self.kept = Path(folder), rows, frozenset[int]()
        self.about: dict[str, Any] = json.loads(json.dumps({**portable(about, folder), "dtype": dtype}))

    @property
    def num_shards(self) -> int:
        """Number of shards of a complete folder."""
        return int(-(-self.about["num_rows"] // self.about["rows_per_shard"]))

    def rows_of(self, shard: int) -> range:
        """Return the row numbers of a shard."""
        first = shard * self.about["rows_per_shard"]
        return range(first, min(first + self.about["rows_per_shard"], self.about["num_rows"]))

    def write(
        self, shard: int, numbers: Sequence[int], vectors: Vectors, bad_rows: Mapping[int, str]
    ) -> None:
        """Write one shard, whole or not at all: ``vectors`` by column of the rows ``numbers``, in any order.

        ``bad_rows`` are the others, each with the reason.
        """
        bad, order = sorted(bad_rows), torch.tensor(numbers, dtype=torch.long).argsort()
        assert len(numbers) + len(bad) == len(self.rows_of(shard)), "a shard accounts for all of its rows"
        table = fields = self.rows.columns(sorted(numbers))
        for name in self.about["columns"]:
            cells_BD = vectors[name][order].float().numpy().astype(self.about["dtype"])
            table = table.append_column(name, to_cells(cells_BD))
        reasons = [
            {"row": row, "id": name, "reason": _without_folders(bad_rows[row], self.rows, row)}
            for row, name in zip(bad, self.rows.columns(bad)["id"].to_pylist(), strict=True)
        ]
        own = {"shard": shard, "rows_sha256": self.rows_sha256(shard), "bad_rows": reasons}
        own["dims"] = {name: vectors[name].shape[1] for name in self.about["columns"]}
        compression = dict.fromkeys(table.column_names, "none") | dict.fromkeys(fields.column_names, "zstd")
        options: dict[str, Any] = {"use_dictionary": fields.column_names, "compression": compression}
        options |= {"write_page_checksum": True, "row_group_size": ROW_GROUP_SIZE}
        with atomic_write(self.folder / shard_name(shard)) as unfinished:
            pq.write_table(table, unfinished, **options)
            own["chunks_sha256"] = _chunk_hashes(unfinished)
            metadata = {METADATA_KEY: json.dumps(sealed({**self.about, **own}))}  # comes after all chunks
            pq.write_table(table.replace_schema_metadata(metadata), unfinished, **options)

    def rows_sha256(self, shard: int) -> str:
        """Identify the rows of a shard with their fields; one that cannot be used counts by the reason."""

        def content(row: int) -> RawInput:
            try:
                return self.rows[row]
            except ValueError as error:
                return RawInput(f"error: {error}")

        fields, stream = self.rows.columns(self.rows_of(shard)).combine_chunks(), pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, fields.schema) as writer:
            writer.write_table(fields)
        return rows_hash(map(content, self.rows_of(shard)), fields=stream.getvalue())


@dataclass
class Keeper:
    """The stores of one run of ``test`` or ``predict`` below ``root``, one per source of rows.

    ``model`` returns what is known of the model, and is called when its weights are loaded. With ``replace``,
    what another model or other rows have left is encoded again; otherwise it is refused.
    """

    root: str | Path
    model: Callable[[], Mapping[str, Any]]
    dtype: VectorType = "float32"
    replace: bool = False
    writers: dict[str, StoreWriter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = expand_paths(self.root, "root")
        check_values(Keeper, vars(self))

    def open(self, rows: Source, about: Mapping[str, Any]) -> StoreWriter:
        """Say where the embeddings of some rows go, and what their files tell of them."""
        writer = StoreWriter(Path(self.root, rows.name), rows, {**self.model(), **about}, self.dtype)
        self.writers[rows.name] = writer
        return writer

    def finished(self, rows: Source, about: Mapping[str, Any], with_bad_rows: bool = True) -> frozenset[int]:
        """Open the store of some rows and return the shards that are done, the same on all processes.

        Without ``with_bad_rows`` a shard in which some rows could not be embedded does not count.
        """
        writer, done, problem = self.open(rows, about), set[int](), None
        if rank() == 0:
            remove_leftovers(writer.folder)
            for shard, file in shard_files(writer.folder).items():
                found = read_metadata(file)
                wanted = {**writer.about, "rows_sha256": writer.rows_sha256(shard)}
                difference = _difference(found, wanted, COMPARED)
                if difference and not self.replace:
                    problem = f"{file} was written with another {difference}"
                    break
                if difference:
                    file.unlink()
                elif with_bad_rows or not found["bad_rows"]:
                    done.add(shard)
        done, problem = gather_objects((done, problem))[0]
        if problem:
            raise ValueError(f"{problem}. Give another output_dir, or empty this one.")
        writer.kept = frozenset(done)
        return writer.kept

    def written(self) -> tuple[int, int, list[dict[str, Any]]]:
        """Return how many shards are missing, how many rows are there, and those that were not embedded."""
        missing, num_rows, bad_rows = 0, 0, []
        for writer in self.writers.values():
            there = shard_files(writer.folder)
            missing += writer.num_shards - len(there)
            num_rows += sum(len(writer.rows_of(shard)) for shard in there)
            bad_rows += [row for file in there.values() for row in read_metadata(file)["bad_rows"]]
        return missing, num_rows, bad_rows


class Store:
    """Reads a complete folder of shards; vectors one row group, ``batch_sizes`` rows, at a time.

    A folder that lacks shards or mixes those of several runs is refused.
    """

    @checked()
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = list(shard_files(self.folder).values())
        if not self.files:
            advice = "give the output_dir of a predict run"
            raise ValueError(f"{self.folder} holds no embeddings-*.parquet: {advice}.")
        self.metadata: dict[str, Any] = {}
        self.bad_rows: list[dict[str, Any]] = []
        schemas = list[pa.Schema]()
        self.batch_sizes: list[int] = []
        self._groups: list[tuple[Path, int, list[str]]] = []
        self._compared: set[tuple[int, int]] = set()  # chunks that were those of the hash when first read
        for file in self.files:
            with reading(file):
                about, content = read_metadata(file), pq.read_metadata(file)
                schema = content.schema.to_arrow_schema().remove_metadata()
            common = {key: value for key, value in about.items() if key not in OWN_KEYS}
            common = located(common, self.folder)
            self.metadata = self.metadata or common
            if difference := _difference(common, self.metadata, common):
                found = f"{file} differs from {self.files[0].name} in {difference}"
                raise ValueError(f"{found}. Keep one run's files in a folder.")
            schemas.append(schema)
            if not schema.equals(schemas[0]):
                raise ValueError(f"{file} has other columns than {self.files[0].name}: embed the rows again.")
            self.bad_rows += about["bad_rows"]
            for group in range(content.num_row_groups):
                if size := content.row_group(group).num_rows:
                    self._groups.append((file, group, about["chunks_sha256"][group]))
                    self.batch_sizes.append(size)
        missing = -(-self.metadata["num_rows"] // self.metadata["rows_per_shard"]) - len(self.files)
        if missing:
            raise ValueError(f"{self.folder} lacks {missing} files: run the same predict command again.")
        if not self.batch_sizes:
            raise ValueError(f"{self.folder} has no embeddings: all {len(self.bad_rows)} rows were refused.")
        self._schema, self.columns = schemas[0], tuple[str, ...](self.metadata["columns"])
        self.ends = list(accumulate(self.batch_sizes))
        self.starts = [0, *self.ends][: len(self.ends)]

    def __len__(self) -> int:
        return sum(self.batch_sizes)

    def read(self, batch: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one row group; ``columns`` are names of any columns, None reads all."""
        if batch not in range(len(self._groups)):
            raise ValueError(f"{self.folder} has {len(self._groups)} row groups, got batch {batch!r}")
        file, group, hashes = self._groups[batch]
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as content:
                for place, wanted in enumerate(hashes):
                    chunk = content.metadata.row_group(group).column(place)
                    name = chunk.path_in_schema  # "column", or "column.part"
                    is_read = columns is None or any(f"{name}.".startswith(f"{each}.") for each in columns)
                    if not is_read or (batch, place) in self._compared:
                        continue
                    if _chunk_hash(file, chunk) != wanted:
                        raise OSError(f"the column {name} is not what was written")
                    self._compared.add((batch, place))
                return content.read_row_group(group, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} cannot be read ({error}). {REPAIR}") from error

    def vectors(self, batch: int, column: str) -> Tensor:
        """Read a column of one row group as float32 ``[rows, D]``."""
        return to_tensor(self.read(batch, [column])[column])

    def column(self, column: str) -> Tensor:
        """Read a whole column, float32 ``[len(self), D]``."""
        if column not in self.columns:
            raise ValueError(f"{self.folder} has the vectors {', '.join(self.columns)}, got {column!r}")
        empty = torch.empty(0, self.metadata["dims"][column], device="cpu")
        return torch.cat([empty, *(self.vectors(batch, column) for batch in range(len(self.batch_sizes)))])

    def source_rows(self) -> list[int]:
        """Return the row number in the source of every row of the store."""
        bad = {row["row"] for row in self.bad_rows}
        return [row for row in range(self.metadata["num_rows"]) if row not in bad]

    def fields(self, batch: int) -> pa.Table:
        """Read ``id`` and the source's columns of one row group."""
        return self.read(batch, [name for name in self._schema.names if name not in self.columns])

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read ``id`` and the source's columns of some rows, in the order asked for."""
        if outside := [index for index in indices if index not in range(len(self))]:
            raise ValueError(f"{self.folder} has {len(self)} rows, from 0; got {outside[0]}")
        found: dict[int, dict[str, Any]] = {}
        for batch in {bisect_right(self.ends, index) for index in indices}:
            first = self.starts[batch]
            wanted = [index for index in indices if first <= index < self.ends[batch]]
            rows = self.fields(batch).take([index - first for index in wanted])
            found |= dict(zip(wanted, python_rows(rows, self.folder), strict=True))
        return [found[index] for index in indices]


def python_rows(table: pa.Table, where: str | Path) -> list[dict[str, Any]]:
    """Turn rows into Python values; ``where`` is named if a cell has none, such as a date after 9999."""
    cells = {}
    for name in table.column_names:
        try:
            cells[name] = table[name].to_pylist()
        except (ValueError, ArithmeticError, LookupError) as error:
            found = f"{where}, column {name!r}, of {table.schema.field(name).type}"
            advice = "Embed the rows again with this column as text"
            raise ValueError(f"{found}: Python cannot hold a value ({error}). {advice}") from error
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def to_cells(vectors_BD: np.ndarray) -> pa.FixedSizeListArray:
    """Turn vectors ``[rows, D]`` into the cells of a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_BD.reshape(-1)), vectors_BD.shape[1])


def to_tensor(column: pa.ChunkedArray) -> Tensor:
    """Turn a column of vectors into float32 ``[rows, D]``."""
    cells = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    numbers = cells.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(numbers.reshape(-1, cells.type.list_size).astype("float32"))


def shard_name(shard: int) -> str:
    """Return the name of a shard's file."""
    return f"embeddings-{shard:05d}.parquet"


def shard_files(folder: Path) -> dict[int, Path]:
    """Return the shards in a folder by their number, in order."""
    found = ((SHARD_NAME.fullmatch(file.name), file) for file in folder.glob("embeddings-*.parquet"))
    return dict(sorted((int(match[1]), file) for match, file in found if match and file.is_file()))


def read_metadata(file: Path) -> dict[str, Any]:
    """Read what a shard says about itself; ``ValueError`` if it is not a shard as it was written."""
    try:
        content = pq.read_metadata(file)
        schema = content.schema.to_arrow_schema()
        about = check_seal(dict(json.loads((schema.metadata or {})[METADATA_KEY])), "it")
        for name, dim in about["dims"].items():
            if schema.field(name).type != pa.list_(pa.from_numpy_dtype(about["dtype"]), dim):
                raise OSError(f"the column {name} holds {schema.field(name).type}")
        rows = min(about["rows_per_shard"], about["num_rows"] - about["shard"] * about["rows_per_shard"])
        for what, found, written in (
            ("name", file.name, shard_name(about["shard"])),
            ("number of rows", content.num_rows, rows - len(about["bad_rows"])),
            (
                "columns by row group",
                [content.num_columns] * content.num_row_groups,
                [*map(len, about["chunks_sha256"])],
            ),
        ):
            if found != written:
                raise OSError(f"its {what} is {found} instead of {written}")
        return about
    except (OSError, pa.ArrowException, LookupError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{file} is not a complete file of embeddings ({error}). {REPAIR}") from error


def _chunk_hash(file: Path, chunk: pq.ColumnChunkMetaData) -> str:
    """Hash the bytes in a file of one column in one row group, and its name."""
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = np.fromfile(file, np.uint8, chunk.total_compressed_size, offset=start)
    return weights_hash({chunk.path_in_schema: torch.from_numpy(content)})


def _chunk_hashes(file: Path) -> list[list[str]]:
    """Hash every column of every row group."""
    content = pq.read_metadata(file)
    groups = map(content.row_group, range(content.num_row_groups))
    return [[_chunk_hash(file, group.column(n)) for n in range(content.num_columns)] for group in groups]


def chosen_columns(names: Collection[str] | None, num_paths: int) -> tuple[str, ...]:
    """Return column names in the order of a file; None stands for the aggregate and every path."""
    known = (AGGREGATE, *map(path_column, range(num_paths)))
    if names is not None and (not names or not set(known).issuperset(names)):
        raise ValueError(f"predict_columns {list(names)}: name some of this model's {', '.join(known)}.")
    return tuple(name for name in known if names is None or name in names)


def _without_folders(reason: str, rows: Source, row: int) -> str:
    """Name the pictures of a row by their last part only, as they are or as ``repr`` has them."""
    try:
        files = [image for image in rows[row].pictures if isinstance(image, str)]
    except ValueError:
        return reason
    for place in (place for file in files for place in (os.path.realpath(file), file)):
        for written in (str, lambda text: repr(text)[1:-1]):
            reason = reason.replace(written(place), written(os.path.basename(place)))
    return reason


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """Return the first key under which the two differ, and how."""
    for key in keys:
        one, other = found.get(key), wanted.get(key)
        if one != other and isinstance(one, dict) and isinstance(other, dict):
            return f"{key}: {', '.join(sorted(k for k in one | other if one.get(k) != other.get(k)))}"
        if one != other:
            return f"{key}: {one!r} instead of {other!r}"
    return None
