"""The one format of embeddings on disk: a folder of Parquet shards (``docs/embedding_files.md``).

A shard holds consecutive rows of one source and is complete or absent, so a killed run resumes.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.row_sources import RowSource, TaskSide
from parallel_decoupling.distributed import gather_objects, rank
from parallel_decoupling.files import atomic_write, remove_leftovers
from parallel_decoupling.model.identity import check_seal, rows_hash, sealed
from parallel_decoupling.model.locations import located, portable

METADATA_KEY = b"parallel_decoupling"
SHARD_NAME = re.compile(r"embeddings-(\d{5,})\.parquet")
AGGREGATE = "aggregate"
ROW_GROUP_SIZE = 16_384  # rows that a reader holds at once
OWN_KEYS = ("shard", "first_row", "rows_sha256", "bad_rows")  # differ between the shards of one folder
COMPARED = (
    *("identity", "columns", "dtype", "instruction", "images"),
    *("num_rows", "rows_per_shard", "rows_sha256"),
)
"""Metadata in which a shard that is kept must agree with the run that keeps it."""

VectorType = Literal["float32", "float16"]
Source = RowSource | TaskSide
Vectors = Mapping[str, Tensor]  # by the name of their column


def path_column(path: int) -> str:
    """Return the name of the column that holds one path's embeddings."""
    return f"path_{path}"


class StoreWriter:
    """Writes shards into a folder; their bytes depend on rows and ``about``, not on the writing process.

    ``about`` are plain values that hold for every shard: those of ``COMPARED``, ``num_paths``,
    ``aggregation``, and anything worth keeping about the source. Files in them are kept by ``portable``.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], dtype: VectorType = "float32") -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = json.loads(json.dumps({**portable(about, folder), "dtype": dtype}))

    @property
    def num_shards(self) -> int:
        """Number of shards of a complete folder."""
        return int(-(-self.about["num_rows"] // self.about["rows_per_shard"]))

    def rows_of(self, shard: int) -> range:
        """Return the row numbers of a shard."""
        first = shard * self.about["rows_per_shard"]
        return range(first, min(first + self.about["rows_per_shard"], self.about["num_rows"]))

    def problem(self, shard: int, file: Path, rows_sha256: str) -> str | None:
        """Say why the file of a shard, whose rows have this hash, cannot be kept; None if it can."""
        if shard >= self.num_shards:
            return f"{file} is beyond the {self.num_shards} files of this run"
        wanted = {**self.about, "rows_sha256": rows_sha256}
        difference = _difference(read_metadata(file), wanted, COMPARED)
        return f"{file} was written with another {difference}" if difference else None

    def write(
        self,
        shard: int,
        fields: pa.Table,
        vectors: Vectors,
        *,
        rows_sha256: str,
        bad_rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write one shard, complete or not at all: fields and vectors of the embedded rows, in row order."""
        assert len(fields) + len(bad_rows) == len(self.rows_of(shard)), "a shard accounts for all of its rows"
        table = fields
        for name in self.about["columns"]:
            numbers = vectors[name].float().numpy().astype(self.about["dtype"])
            assert len(numbers) == len(fields), f"{name} has as many rows as the fields"
            cells = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])
            table = table.append_column(name, cells)
        own = {"shard": shard, "first_row": self.rows_of(shard).start, "rows_sha256": rows_sha256}
        metadata = {**self.about, **own, "bad_rows": [dict(row) for row in bad_rows]}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(sealed(metadata))})
        compression = dict.fromkeys(table.column_names, "none") | dict.fromkeys(fields.column_names, "zstd")
        options: dict[str, Any] = {"use_dictionary": fields.column_names, "compression": compression}
        options["write_page_checksum"] = True
        with atomic_write(self.folder / f"embeddings-{shard:05d}.parquet") as unfinished:
            pq.write_table(table, unfinished, row_group_size=ROW_GROUP_SIZE, **options)


class Keeper:
    """The stores of one run of ``test`` or ``predict`` below ``root``, one per source of rows.

    ``model`` returns what is known of the model, and is called when its weights are loaded. With ``replace``,
    what another model or other rows have left is encoded again; otherwise it is refused.
    """

    def __init__(
        self,
        root: str | Path,
        model: Callable[[], Mapping[str, Any]],
        *,
        dtype: VectorType = "float32",
        replace: bool = False,
    ) -> None:
        self.root, self._model, self._dtype, self._replace = Path(root), model, dtype, replace
        self.writers: dict[str, StoreWriter] = {}
        self.kept: dict[str, frozenset[int]] = {}

    def open(self, rows: Source, about: Mapping[str, Any]) -> StoreWriter:
        """Say where the embeddings of some rows go, and what their files tell of them."""
        self.writers[rows.name] = StoreWriter(self.root / rows.name, {**self._model(), **about}, self._dtype)
        return self.writers[rows.name]

    def finished(self, rows: Source, about: Mapping[str, Any], with_bad_rows: bool = True) -> frozenset[int]:
        """Open the store of some rows and return the shards that are done, the same on all processes.

        Without ``with_bad_rows`` a shard in which some rows could not be embedded does not count.
        """
        writer = self.open(rows, about)
        done, problem = set[int](), None
        if rank() == 0:
            remove_leftovers(writer.folder)
            for shard, file in shard_files(writer.folder).items():
                problem = writer.problem(shard, file, _shard_hash(rows, writer.rows_of(shard)))
                if problem and not self._replace:
                    break
                if not problem and (with_bad_rows or not read_metadata(file)["bad_rows"]):
                    done.add(shard)
        done, problem = gather_objects((done, problem))[0]
        if problem and not self._replace:
            raise ValueError(f"{problem}. Give another output_dir, or empty this one.")
        self.kept[rows.name] = frozenset(done)
        return frozenset(done)

    def write(
        self, rows: Source, shard: int, numbers: Sequence[int], vectors: Vectors, bad_rows: Mapping[int, str]
    ) -> None:
        """Write one shard: ``vectors`` by column of the rows ``numbers``, in any but the same order."""
        writer, bad = self.writers[rows.name], sorted(bad_rows)
        order = torch.tensor(numbers, dtype=torch.long).argsort()
        ids = rows.columns(bad)["id"].to_pylist()
        reasons = [
            {"row": row, "id": id_, "reason": _without_folders(bad_rows[row], rows, row)}
            for row, id_ in zip(bad, ids, strict=True)
        ]
        in_order = {name: vectors_BD[order] for name, vectors_BD in vectors.items()}
        known = _shard_hash(rows, writer.rows_of(shard))
        writer.write(shard, rows.columns(sorted(numbers)), in_order, rows_sha256=known, bad_rows=reasons)

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

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = list(shard_files(self.folder).values())
        if not self.files:
            advice = "give the output_dir of a predict run"
            raise ValueError(f"{self.folder} holds no embeddings-*.parquet: {advice}.")
        self.metadata: dict[str, Any] = {}
        self.bad_rows: list[dict[str, Any]] = []
        self.batch_sizes: list[int] = []
        self._groups: list[tuple[Path, int]] = []
        for file in self.files:
            about, content = read_metadata(file), pq.read_metadata(file)
            common = {key: value for key, value in about.items() if key not in OWN_KEYS}
            common = located(common, self.folder)
            self.metadata = self.metadata or common
            if difference := _difference(common, self.metadata, common):
                found = f"{file} differs from {self.files[0].name} in {difference}"
                raise ValueError(f"{found}. Keep one run's files in a folder.")
            self.bad_rows += about["bad_rows"]
            for group in range(content.num_row_groups):
                if size := content.row_group(group).num_rows:
                    self._groups.append((file, group))
                    self.batch_sizes.append(size)
        missing = -(-self.metadata["num_rows"] // self.metadata["rows_per_shard"]) - len(self.files)
        if missing:
            raise ValueError(f"{self.folder} lacks {missing} files: run the same predict command again.")
        self.columns: tuple[str, ...] = tuple(self.metadata["columns"])
        self.ends = list(accumulate(self.batch_sizes))

    def __len__(self) -> int:
        return sum(self.batch_sizes)

    def dim(self, column: str) -> int:
        """Return the dimension D of a column."""
        return int(pq.read_schema(self.files[0]).field(column).type.list_size)

    def read(self, batch: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one row group; ``columns`` are names of any columns, None reads all."""
        file, group = self._groups[batch]
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as content:
                return content.read_row_group(group, columns=columns)
        except (OSError, pa.ArrowException) as error:
            advice = "If it is damaged, delete it and run predict again."
            raise ValueError(f"{file} cannot be read ({error}). {advice}") from error

    def vectors(self, batch: int, column: str) -> Tensor:
        """Read a column of one row group as float32 ``[rows, D]``."""
        return to_tensor(self.read(batch, [column])[column])

    def column(self, column: str) -> Tensor:
        """Read a whole column, float32 ``[len(self), D]``."""
        parts = [self.vectors(batch, column) for batch in range(len(self.batch_sizes))]
        return torch.cat([torch.empty(0, self.dim(column)), *parts])

    def source_rows(self) -> list[int]:
        """Return the row number in the source of every row of the store."""
        bad = {row["row"] for row in self.bad_rows}
        return [row for row in range(self.metadata["num_rows"]) if row not in bad]

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read ``id`` and the source's columns of some rows, in the order asked for."""
        names = [name for name in pq.read_schema(self.files[0]).names if name not in self.columns]
        found: dict[int, dict[str, Any]] = {}
        for batch in {bisect_right(self.ends, index) for index in indices}:
            first = self.ends[batch] - self.batch_sizes[batch]
            wanted = [index for index in indices if first <= index < self.ends[batch]]
            rows = self.read(batch, names).take([index - first for index in wanted])
            found |= dict(zip(wanted, rows.to_pylist(), strict=True))
        return [found[index] for index in indices]


def to_tensor(column: pa.ChunkedArray) -> Tensor:
    """Turn a column of vectors into float32 ``[rows, D]``."""
    cells = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    numbers = cells.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(numbers.reshape(-1, cells.type.list_size).astype("float32"))


def shard_files(folder: Path) -> dict[int, Path]:
    """Return the shards in a folder by their number, in order."""
    found = ((SHARD_NAME.fullmatch(file.name), file) for file in folder.glob("embeddings-*.parquet"))
    return dict(sorted((int(match[1]), file) for match, file in found if match))


def read_metadata(file: Path) -> dict[str, Any]:
    """Read what a shard says about itself; ``ValueError`` if it is damaged or another kind of file."""
    try:
        metadata = (pq.read_schema(file).metadata or {})[METADATA_KEY]
        return check_seal(json.loads(metadata), file)
    except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
        advice = "If it is damaged, delete it and run predict again."
        raise ValueError(f"{file} is not a complete file of embeddings ({error}). {advice}") from error


def chosen_columns(names: Collection[str] | None, num_paths: int) -> tuple[str, ...]:
    """Return column names in the order of a file; None stands for the aggregate and every path."""
    known = (AGGREGATE, *map(path_column, range(num_paths)))
    if names is not None and (not names or not set(known).issuperset(names)):
        raise ValueError(f"predict_columns {list(names)}: name some of this model's {', '.join(known)}.")
    return tuple(name for name in known if names is None or name in names)


def _shard_hash(rows: Source, numbers: range) -> str:
    """Identify some rows; one that cannot be used counts by the reason."""

    def content(row: int) -> RawInput:
        try:
            return rows[row]
        except ValueError as error:
            return RawInput(f"error: {error}")

    return rows_hash(content(row) for row in numbers)


def _without_folders(reason: str, rows: Source, row: int) -> str:
    """Name the pictures of a row by their last part only."""
    try:
        files = [image for image in rows[row].pictures if isinstance(image, str)]
    except ValueError:
        return reason
    for file in files:
        for place in (os.path.realpath(file), file):
            reason = reason.replace(place, Path(file).name)
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
