"""The one format of embeddings on disk: a folder of Parquet shards, written and read in this file.

``predict`` writes it, ``test`` keeps a task's embeddings in it, ``search`` and ``app`` read it. A shard holds
consecutive rows of one source; it is complete or absent, so a killed run resumes with the shards that are
missing. The layout is described in ``docs/embedding_files.md``.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.distributed import gather_objects, rank
from parallel_decoupling.evaluation.encode import Rows
from parallel_decoupling.model.identity import rows_hash

METADATA_KEY = b"parallel_decoupling"
SHARD_NAME = re.compile(r"embeddings-(\d{5,})\.parquet")
AGGREGATE = "aggregate"
ROW_GROUP_SIZE = 16_384
"""Rows that a reader holds at once."""
OWN_KEYS = ("shard", "first_row", "rows_sha256", "bad_rows")
"""Metadata that differs between the shards of one folder."""
COMPARED = ("identity", "columns", "dtype", "instruction", "images", "num_rows", "rows_per_shard")
"""Metadata in which a shard that is kept must agree with the run that keeps it."""

VectorType = Literal["float32", "float16"]


def path_column(path: int) -> str:
    """Return the name of the column that holds one path's embeddings."""
    return f"path_{path}"


def is_vector_column(name: str) -> bool:
    """Tell whether a column of this name holds embeddings."""
    return name == AGGREGATE or re.fullmatch(r"path_\d+", name) is not None


class StoreWriter:
    """Writes shards into a folder and knows which of them are there.

    Args:
        folder: made when the first shard is written.
        about: plain values that hold for every shard: ``identity`` (what turns inputs into embeddings),
            ``columns``, ``instruction``, ``images``, ``num_rows``, ``rows_per_shard``, ``num_paths``,
            ``aggregation`` with its weights, and anything worth keeping about the source.
        dtype: type of the numbers in the files.

    Relations:
        The bytes of a shard depend on its rows and on ``about``, not on the process that wrote it.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], dtype: VectorType = "float32") -> None:
        self.folder = Path(folder)
        self.about = cast(dict[str, Any], json.loads(json.dumps({**about, "dtype": dtype})))

    @property
    def num_shards(self) -> int:
        """Number of shards of a complete folder."""
        return int(-(-self.about["num_rows"] // self.about["rows_per_shard"]))

    def rows_of(self, shard: int) -> range:
        """Return the row numbers of a shard."""
        first = shard * self.about["rows_per_shard"]
        return range(first, min(first + self.about["rows_per_shard"], self.about["num_rows"]))

    def file(self, shard: int) -> Path:
        """Return the file of a shard, whether it is there or not."""
        return self.folder / f"embeddings-{shard:05d}.parquet"

    def shards_there(self) -> list[int]:
        """Return the numbers of all shard files in the folder, in order."""
        if not self.folder.is_dir():
            return []
        found = (SHARD_NAME.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def problem(self, shard: int, rows_sha256: str) -> str | None:
        """Say why a shard that is there cannot be kept, or return None if it can.

        Args:
            shard: its number.
            rows_sha256: ``model.identity.rows_hash`` of the rows that it should hold.
        """
        file = self.file(shard)
        if shard >= self.num_shards:
            return f"{file} is beyond the {self.num_shards} files of this run"
        found = read_metadata(file)
        wanted = {**self.about, "rows_sha256": rows_sha256}
        for key in (*COMPARED, "rows_sha256"):
            if found.get(key) != wanted.get(key):
                return (
                    f"{file} was written with another {key}: {_difference(found.get(key), wanted.get(key))}"
                )
        return None

    def remove_unfinished(self) -> None:
        """Remove what a killed process left half-written."""
        for file in self.folder.glob(".embeddings-*.unfinished"):
            file.unlink(missing_ok=True)

    def write(
        self,
        shard: int,
        fields: pa.Table,
        vectors: Mapping[str, Tensor],
        *,
        rows_sha256: str,
        bad_rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write one shard, complete or not at all.

        Args:
            shard: its number.
            fields: ``id`` and the source's columns of the rows that were embedded, in row order.
            vectors: by column, ``[len(fields), D]``.
            rows_sha256: ``model.identity.rows_hash`` of all rows of the shard.
            bad_rows: ``row``, ``id`` and ``reason`` of the rows that could not be embedded; they are not in
                ``fields``.
        """
        assert len(fields) + len(bad_rows) == len(self.rows_of(shard)), "a shard accounts for all of its rows"
        table = fields
        for name in self.about["columns"]:
            numbers = vectors[name].float().numpy().astype(self.about["dtype"])
            assert len(numbers) == len(fields), f"{name} has as many rows as the fields"
            cells = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])
            table = table.append_column(name, cells)
        own = {"shard": shard, "first_row": self.rows_of(shard).start, "rows_sha256": rows_sha256}
        metadata = {**self.about, **own, "bad_rows": [dict(row) for row in bad_rows]}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".embeddings-{shard:05d}.{rank()}.unfinished"
        pq.write_table(
            table,
            unfinished,
            row_group_size=ROW_GROUP_SIZE,
            use_dictionary=fields.column_names,
            compression={
                name: "zstd" if name in fields.column_names else "none" for name in table.column_names
            },
        )
        unfinished.replace(self.file(shard))


class NamedRows(Rows, Protocol):
    """Rows that can be stored."""

    @property
    def name(self) -> str:
        """Folder of their store below the root; empty for the root itself."""

    def columns(self, rows: Sequence[int], /) -> pa.Table:
        """Return ``id`` and further columns of some rows, in ascending order."""


class Keeper:
    """The stores of one run of ``test`` or ``predict``, one per source of rows.

    The loaders ask it which shards are finished, the callback that receives embeddings asks it for writers.

    Args:
        root: folder of the stores.
        model: returns what is known of the model (``Embedder.about``); called when its weights are loaded.
        dtype: of the stored numbers.
        replace: encode again what another model or other rows have left, instead of refusing to.
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

    def finished(
        self, rows: NamedRows, about: Mapping[str, Any], *, with_bad_rows: bool = True
    ) -> frozenset[int]:
        """Open the store of some rows and return the shards that are done, the same on all processes.

        Args:
            rows: the rows.
            about: what is known of them, see ``StoreWriter``.
            with_bad_rows: whether a shard counts in which some rows could not be embedded.

        Raises:
            ValueError: a shard of another model, other rows or other settings, unless ``replace``.
        """
        writer = StoreWriter(self.root / rows.name, {**self._model(), **about}, self._dtype)
        done, problem = set[int](), None
        if rank() == 0:
            writer.remove_unfinished()
            for shard in writer.shards_there():
                problem = writer.problem(shard, shard_hash(rows, writer.rows_of(shard)))
                if problem and not self._replace:
                    break
                if not problem and (with_bad_rows or not read_metadata(writer.file(shard))["bad_rows"]):
                    done.add(shard)
        done, problem = gather_objects((done, problem))[0]
        if problem and not self._replace:
            raise ValueError(f"{problem}. Give another output_dir, or empty this one.")
        self.writers[rows.name], self.kept[rows.name] = writer, frozenset(done)
        return self.kept[rows.name]


def shard_hash(rows: Rows, numbers: Iterable[int]) -> str:
    """Identify some rows; one that cannot be used counts by the reason."""

    def content(row: int) -> RawInput:
        try:
            return rows[row]
        except ValueError as error:
            return RawInput(f"error: {error}")

    return rows_hash(content(row) for row in numbers)


class Store:
    """Reads a complete folder of shards; vectors one row group at a time.

    Args:
        folder: what ``predict`` wrote.

    Attributes:
        metadata: what all shards say about themselves.
        columns: names of the columns with embeddings.
        batch_sizes: number of rows of every row group.
        bad_rows: ``row``, ``id`` and ``reason`` of the rows that could not be embedded.

    Raises:
        ValueError: the folder holds no shards, lacks some, or mixes those of several runs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("embeddings-*.parquet")) if self.folder.is_dir() else []
        self.files = [file for file in files if SHARD_NAME.fullmatch(file.name)]
        if not self.files:
            raise ValueError(
                f"{self.folder} holds no embeddings-*.parquet: give the output_dir of a predict run."
            )
        self.metadata: dict[str, Any] = {}
        self.bad_rows: list[dict[str, Any]] = []
        for file in self.files:
            about = read_metadata(file)
            common = {key: value for key, value in about.items() if key not in OWN_KEYS}
            self.metadata = self.metadata or common
            self._check(file, common)
            self.bad_rows += about["bad_rows"]
        missing = -(-self.metadata["num_rows"] // self.metadata["rows_per_shard"]) - len(self.files)
        if missing:
            raise ValueError(f"{self.folder} lacks {missing} files: run the same predict command again.")
        self.columns: tuple[str, ...] = tuple(self.metadata["columns"])
        files_metadata = [pq.read_metadata(file) for file in self.files]
        self._sizes = [each.num_rows for each in files_metadata]
        self._ends: list[int] = list(accumulate(self._sizes))
        groups = [
            (file, group, each.row_group(group).num_rows)
            for file, each in zip(self.files, files_metadata, strict=True)
            for group in range(each.num_row_groups)
        ]
        self._groups = [(file, group) for file, group, size in groups if size]
        self.batch_sizes = [size for _, _, size in groups if size]

    def _check(self, file: Path, common: Mapping[str, Any]) -> None:
        for key, value in common.items():
            if self.metadata.get(key) != value:
                raise ValueError(
                    f"{file} differs from {self.files[0].name} in {key}: "
                    f"{_difference(value, self.metadata.get(key))}. Keep one run's files in a folder."
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def dim(self, column: str) -> int:
        """Return the dimension D of a column."""
        self._require(column)
        return int(pq.read_schema(self.files[0]).field(column).type.list_size)

    def read(self, batch: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one row group; ``columns`` are names of any columns, None reads all."""
        file, group = self._groups[batch]
        with pq.ParquetFile(file, memory_map=True) as content:
            return content.read_row_group(group, columns=columns)

    def vectors(self, batch: int, column: str) -> Tensor:
        """Read a column of one row group as float32 ``[rows, D]``."""
        self._require(column)
        return to_tensor(self.read(batch, [column])[column])

    def batches(self, column: str) -> Iterator[Tensor]:
        """Yield a column as float32 ``[rows, D]``, one row group at a time, in row order."""
        for batch in range(len(self.batch_sizes)):
            yield self.vectors(batch, column)

    def column(self, column: str) -> Tensor:
        """Read a whole column, float32 ``[len(self), D]``."""
        return torch.cat(list(self.batches(column)))

    def source_rows(self) -> list[int]:
        """Return the row number in the source of every row of the store."""
        bad = {row["row"] for row in self.bad_rows}
        return [row for row in range(self.metadata["num_rows"]) if row not in bad]

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read ``id`` and the source's columns of some rows, in the order asked for."""
        by_file: dict[int, list[int]] = {}
        for index in indices:
            by_file.setdefault(bisect_right(self._ends, index), []).append(index)
        found: dict[int, dict[str, Any]] = {}
        for number, wanted in by_file.items():
            first = self._ends[number] - self._sizes[number]
            with pq.ParquetFile(self.files[number], memory_map=True) as content:
                names = [name for name in content.schema_arrow.names if name not in self.columns]
                table = content.read(columns=names).take([index - first for index in wanted])
            found |= dict(zip(wanted, table.to_pylist(), strict=True))
        return [found[index] for index in indices]

    def fields(self) -> Iterator[pa.Table]:
        """Yield ``id`` and the source's columns, one file at a time."""
        for file in self.files:
            with pq.ParquetFile(file, memory_map=True) as content:
                yield content.read(columns=[n for n in content.schema_arrow.names if n not in self.columns])

    def _require(self, column: str) -> None:
        if column not in self.columns:
            raise ValueError(f"{self.folder} has no column {column!r}; it has {', '.join(self.columns)}.")


def to_tensor(column: pa.ChunkedArray) -> Tensor:
    """Turn a column of vectors into float32 ``[rows, D]``."""
    cells = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    numbers = cells.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(numbers.reshape(-1, cells.type.list_size).astype("float32"))


def read_metadata(file: Path) -> dict[str, Any]:
    """Read what a shard says about itself.

    Raises:
        ValueError: the file cannot be read, or is not a shard of this package.
    """
    try:
        metadata = pq.read_schema(file).metadata or {}
        return cast(dict[str, Any], json.loads(metadata[METADATA_KEY]))
    except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is not a complete file of embeddings ({error}). Delete it and run predict again."
        ) from error


def chosen_columns(names: Collection[str] | None, num_paths: int) -> tuple[str, ...]:
    """Return column names in the order of a file; None stands for the aggregate and every path.

    Raises:
        ValueError: the model does not have such a path, or no column is wanted.
    """
    known = (AGGREGATE, *map(path_column, range(num_paths)))
    unknown = sorted(set(names or ()) - set(known))
    if unknown or (names is not None and not names):
        what = f"{', '.join(unknown)} is unknown" if unknown else "the list is empty"
        raise ValueError(f"predict_columns: {what}; this model has {', '.join(known)}.")
    return tuple(name for name in known if names is None or name in names)


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        return ", ".join(keys)
    return f"{found!r} instead of {wanted!r}"
