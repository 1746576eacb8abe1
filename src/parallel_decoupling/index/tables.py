"""Reading the Parquet files that ``lightning predict`` writes, batch by batch.

Columns: ``id``, source fields, ``path_0``, ``path_1``, ... and ``aggregate`` as lists of a fixed size; the
schema's metadata has JSON under ``parallel_decoupling``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from parallel_decoupling.index.items import ID
from parallel_decoupling.index.scoring import aggregate, unit
from parallel_decoupling.index.settings import AGGREGATE

METADATA_KEY = b"parallel_decoupling"
ROWS_AT_ONCE = 8192
_SAME_IN_ALL_FILES = ("model_sha256", "source_sha256", "instruction", "num_shards")
_OF_ONE_FILE = ("shard", "first_row", "bad_rows")
_SAME_COSINE = 1 - 1e-4  # float16 tables are this near


@dataclass(frozen=True)
class EmbeddingTable:
    """Files of embeddings with one schema.

    Attributes:
        files: in order.
        path_names: columns with vectors; ``("aggregate",)`` where the paths were not kept.
        path_weights: of the aggregate; empty where the table has no weighted mean of its paths.
        metadata: of whoever wrote the files, as far as it holds for all of them.
        concatenated: whether the aggregate is the concatenated paths.
    """

    files: tuple[Path, ...]
    path_names: tuple[str, ...]
    path_weights: tuple[float, ...]
    metadata: dict[str, Any]
    concatenated: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(pq.read_metadata(file).num_rows for file in self.files)

    def batches(self) -> Iterator[tuple[list[str], Tensor, pa.Table]]:
        """Ids, embeddings ``[B, N, D]`` float32 and source fields."""
        for file in self.files:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
                table = pa.Table.from_batches([batch])
                vectors = [_vectors(table, name, file) for name in self.path_names]
                fields = table.select([name for name in table.column_names if not _is_ours(name)])
                ids = [str(value) for value in table[ID].to_pylist()]
                yield ids, torch.stack(vectors, dim=1), fields.replace_schema_metadata(None)


def open_embeddings(path: str | Path) -> EmbeddingTable:
    """Look into a Parquet file, or a folder of them in the order of their names.

    A folder must have all files of one ``lightning predict``; a single file may be one of several.

    Raises:
        ValueError: no files, files that differ or are missing, missing columns, or an aggregate that is not
            made of the paths in the table.
    """
    path = Path(path)
    files = tuple(sorted(path.glob("*.parquet"))) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no Parquet file with embeddings; write one with lightning predict")
    schemas = [_schema(file) for file in files]
    for file, schema in zip(files, schemas, strict=True):
        if schema != schemas[0]:
            raise ValueError(
                f"{file}: other columns ({_described(schema)}) than {files[0]} ({_described(schemas[0])}); "
                "keep the files of one lightning predict in a folder of their own"
            )
    names = schemas[0].names
    paths = sorted(
        (name for name in names if re.fullmatch(r"path_\d+", name)), key=lambda name: int(name[5:])
    )
    if ID not in names or not (paths or AGGREGATE in names):
        raise ValueError(
            f"{files[0]}: needs a column id and path_0, ... or aggregate; it has {', '.join(names)}"
        )
    metadata = _metadata(files, schemas, whole=path.is_dir())
    weights: tuple[float, ...] = ()
    concatenated = False
    if AGGREGATE in names and paths:
        joined_dim = sum(_dim(schemas[0], name) for name in paths)
        concatenated = len(paths) > 1 and _dim(schemas[0], AGGREGATE) == joined_dim
        weights = () if concatenated else _path_weights(files, paths)
    return EmbeddingTable(files, tuple(paths or (AGGREGATE,)), weights, metadata, concatenated)


def _metadata(files: tuple[Path, ...], schemas: list[pa.Schema], *, whole: bool) -> dict[str, Any]:
    """What the files say of all of them; checks that they belong together and, if ``whole``, are all."""
    found = [json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")) for schema in schemas]
    for file, other in zip(files, found, strict=True):
        for key in _SAME_IN_ALL_FILES:
            if other.get(key) != found[0].get(key):
                raise ValueError(
                    f"{file} was written with {key} {other.get(key)!r}, {files[0]} with "
                    f"{found[0].get(key)!r}; keep the files of one lightning predict in a folder of their own"
                )
    count = found[0].get("num_shards")
    shards = [each.get("shard") for each in found]
    if whole and count is not None and sorted(shards) != list(range(count)):
        raise ValueError(
            f"{files[0].parent}: has the files {shards} of 0 to {count - 1}, each once: run the same "
            "lightning predict again, which makes the missing ones, or name a single file"
        )
    return {key: value for key, value in found[0].items() if key not in _OF_ONE_FILE}


def _dim(schema: pa.Schema, name: str) -> int:
    """Numbers of a column of vectors; 0 where they have no fixed size."""
    return getattr(schema.field(name).type, "list_size", 0)


def _path_weights(files: tuple[Path, ...], paths: list[str]) -> tuple[float, ...]:
    """The weights with which the paths give the aggregate; equal ones, or solved for from the first rows."""
    for file in files:
        if pq.read_metadata(file).num_rows:
            break
    else:
        return ()
    table = pa.Table.from_batches([next(pq.ParquetFile(file).iter_batches(256, columns=[*paths, AGGREGATE]))])
    aggregate_BD = _vectors(table, AGGREGATE, file)
    paths_BND = torch.stack([_vectors(table, name, file) for name in paths], dim=1)
    if aggregate_BD.shape[1] == paths_BND.shape[2]:
        equal = torch.full((len(paths),), 1 / len(paths))
        solved_BN = torch.linalg.lstsq(paths_BND.mT, aggregate_BD.unsqueeze(2)).solution.squeeze(2)
        solved = (solved_BN / solved_BN.sum(dim=1, keepdim=True)).median(dim=0).values
        for weights_N in (equal, solved / solved.sum()):
            weights = tuple(weights_N.tolist())
            cosine_B = (aggregate(paths_BND, weights) * unit(aggregate_BD, "row")).sum(dim=1)
            if bool((cosine_B > _SAME_COSINE).all()):
                return weights
    raise ValueError(
        f"{file}: the column aggregate is no weighted mean of {', '.join(paths)}; "
        "keep all paths of the model, or leave the column out"
    )


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file}: cannot be read as Parquet ({error}); write it again") from error


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _is_ours(name: str) -> bool:
    return name in (ID, AGGREGATE) or re.fullmatch(r"path_\d+", name) is not None


def _vectors(table: pa.Table, name: str, file: Path) -> Tensor:
    """A column of vectors as float32 ``[B, D]``."""
    column = table[name].combine_chunks()
    if not pa.types.is_fixed_size_list(column.type) or not pa.types.is_floating(column.type.value_type):
        raise ValueError(
            f"{file}, column {name}: {column.type}; vectors are lists of a fixed number of floats"
        )
    if column.null_count:
        raise ValueError(f"{file}, column {name}: {column.null_count} rows have no vector; remove them")
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(numbers.copy()).float().view(len(column), column.type.list_size)
