"""Small stores of embeddings, and what a search of them must find, written in plain loops."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.score import row_metrics
from parallel_decoupling.evaluation.store import AGGREGATE, Store, StoreWriter, path_column
from parallel_decoupling.model.identity import path_hashes
from parallel_decoupling.search import Hit
from tests.support.tiny import noise_image


def vectors(count: int, paths: int = 3, dim: int = 24, seed: int = 0) -> Tensor:
    """Unit vectors with a common direction, as those of real models have."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(dim, generator=generator)
    return F.normalize(torch.randn(count, paths, dim, generator=generator) + common, dim=-1)


def save_store(
    folder: Path,
    embeddings_BND: Tensor,
    fields: Mapping[str, Sequence[Any]] | None = None,
    *,
    aggregate: Tensor | None = None,
    path_sha256: Sequence[str] = (),
    columns: Sequence[str] = (),
    rows_per_shard: int = 150,
    dtype: Any = "float32",
    **about: Any,
) -> Store:
    """Write a store of rows ``"0"``, ``"1"`` and so on, as ``predict`` does."""
    count, num_paths, _ = embeddings_BND.shape
    by_column = {path_column(path): embeddings_BND[:, path] for path in range(num_paths)}
    by_column[AGGREGATE] = F.normalize(embeddings_BND.mean(dim=1), dim=-1) if aggregate is None else aggregate
    known = {
        "identity": {"path_sha256": list(path_sha256)},
        "columns": list(columns) or [AGGREGATE, *map(path_column, range(num_paths))],
        "num_rows": count,
        "rows_per_shard": rows_per_shard,
    }
    rows: Any = TableRows(pa.table({"id": [str(row) for row in range(count)], **(fields or {})}))
    writer = StoreWriter(folder, rows, {**known, **about}, dtype)
    for shard in range(writer.num_shards):
        numbers = writer.rows_of(shard)
        part = {name: column[numbers.start : numbers.stop] for name, column in by_column.items()}
        writer.write(shard, numbers, part, {})
    return Store(folder)


class TableRows:
    """Rows of which only the columns count."""

    name = ""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __getitem__(self, row: int) -> RawInput:
        return RawInput(str(row))

    def columns(self, rows: Sequence[int]) -> pa.Table:
        return self._table.take(pa.array(rows, pa.int64()))


def save_pictures(folder: Path, embedder: Embedder, count: int, *others: Any, **about: Any) -> Store:
    """Write a store of the pictures ``0.png``, ``1.png`` and so on, and of other inputs after them."""
    files = [folder / f"{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        noise_image(32, 32, number).save(file)
    items = [*files, *others]
    fields = {
        "image": [*(file.name for file in files), *[None] * len(others)],
        "part": [number % 2 for number in range(len(items))],
    }
    about |= {"path_sha256": path_hashes(embedder.encoder), "image_dir": str(folder)}
    aggregate = embedder.encode_document(items, paths="aggregate")
    return save_store(
        folder, embedder.encode_document(items, paths="all"), fields, aggregate=aggregate, **about
    )


def queries_by_column(embeddings_QND: Tensor) -> dict[str, Tensor]:
    """What ``Index.search`` takes: every path, and the aggregate."""
    paths = {path_column(path): embeddings_QND[:, path] for path in range(embeddings_QND.shape[1])}
    return {AGGREGATE: F.normalize(embeddings_QND.mean(dim=1), dim=-1), **paths}


def score(query_ND: np.ndarray, item_ND: np.ndarray, scoring: str) -> float:
    """Score one query against one item in float64."""
    query, item = unit(query_ND.astype(np.float64)), unit(item_ND.astype(np.float64))
    if scoring == "aggregate":
        return float(unit(query.mean(axis=0)) @ unit(item.mean(axis=0)))
    if scoring == "concat":
        return float(np.mean([one @ other for one, other in zip(query, item, strict=True)]))
    if scoring == "maxsim":
        return float(np.mean([max(float(one @ other) for other in item) for one in query]))
    path = int(scoring.removeprefix("path_"))
    return float(query[path] @ item[path])


def check_hits(
    hits: Sequence[Sequence[Hit]],
    queries: Tensor,
    items: Tensor,
    top_k: int,
    scoring: str,
    **tolerance: float,
) -> None:
    """Check ids, scores and cosines by path of several queries."""
    assert len(hits) == len(queries)
    for found, query in zip(hits, queries.numpy(), strict=True):
        scored = [(score(query, item, scoring), str(row)) for row, item in enumerate(items.numpy())]
        expected = sorted(scored, reverse=True)[:top_k]
        assert [hit.id for hit in found] == [name for _, name in expected]
        close = {"abs": 1e-6, **tolerance}
        assert [hit.score for hit in found] == pytest.approx([value for value, _ in expected], **close)
        for hit in found:
            for name, value in hit.similarities.items():
                assert value == pytest.approx(score(query, items[int(hit.id)].numpy(), name), **close)


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def values_of_ranks(rank_R: Tensor) -> dict[str, Tensor]:
    """What ``TaskResult.rows`` has for a column."""
    found_RC = torch.nn.functional.one_hot(rank_R - 1, 20).double()
    return row_metrics(found_RC, found_RC)


def table_rows(table: Table) -> list[list[str]]:
    """Return the cells of a table as texts, row by row."""
    return [
        [str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
