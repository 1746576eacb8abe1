"""Search by one path, the aggregate or all paths; exact search reads the folder that ``predict`` wrote."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.data.prompts import listed
from parallel_decoupling.evaluation.score import similarities
from parallel_decoupling.evaluation.store import AGGREGATE, Store, Vectors, path_column
from parallel_decoupling.model.identity import path_hashes

MAXSIM = "maxsim"
MEMORY_BUDGET = 4 * 2**30
ROWS_AT_ONCE = 1024  # items that are scored together
DECODING_BYTES = 14
"""What reading a number takes for a moment beside its float32; 9 in newer releases of pyarrow."""


@dataclass(frozen=True)
class Hit:
    """One item that was found."""

    id: str
    score: float  # by the scoring of the search, in [-1, 1]; higher is better
    similarities: Mapping[str, float]  # cosine of query and item on each path that both have, by column
    fields: Mapping[str, Any]  # the item's source fields


class Index(Protocol):
    """Items that can be searched: ``ExactIndex``, or ``lance_index.LanceIndex``."""

    metadata: Mapping[str, Any]  # of the store that the items come from
    columns: tuple[str, ...]  # names of the vectors of every item
    scorings: tuple[str, ...]  # what ``search`` may score by

    def __len__(self) -> int: ...

    def search(self, queries: Vectors, top_k: int, scoring: str, where: str | None = None) -> list[list[Hit]]:
        """Find at most ``top_k`` items for every query, best first.

        ``queries`` are ``[Q, D]`` by column: those that the scoring compares, and perhaps further paths.
        """


class ExactIndex:
    """Compares queries with every item of a store, one row group at a time.

    Args:
        store: what ``predict`` wrote, or its folder.
        memory_budget: bytes that decoded vectors may take, at least those of one row group of all paths.
            Vectors that fit stay in memory, others are read again for every search; the hits are the same.
    """

    def __init__(self, store: Store | str | Path, memory_budget: int = MEMORY_BUDGET) -> None:
        store = store if isinstance(store, Store) else Store(store)
        self.store, self.columns = store, store.columns
        self.metadata: Mapping[str, Any] = store.metadata
        self.scorings = (*self.columns, *([MAXSIM] if len(path_columns(self.columns)) > 1 else []))
        dims = [[store.dim(name) for name in compared(each, self.columns)] for each in self.scorings]
        working = max(4 * sum(each) + DECODING_BYTES * max(each) for each in dims)
        working *= max(store.batch_sizes, default=0)  # while the last column of a row group is read
        if memory_budget < working:
            needed = f"reading one row group of {store.folder} takes {working:,} bytes"
            raise ValueError(f"a memory_budget of {memory_budget:,} bytes is too small: {needed}")
        self._free_bytes = memory_budget - working
        self._cache: dict[tuple[int, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self.store)

    def search(self, queries: Vectors, top_k: int, scoring: str, where: str | None = None) -> list[list[Hit]]:
        """Find the best items of every query; see ``Index``. Of equal scores the earlier row comes first."""
        if where is not None:
            advice = f"make a LanceDB index of {self.store.folder} (lightning index) and search that"
            raise ValueError(f"where={where!r}: exact search does not take conditions; {advice}")
        query = query_vectors(queries, top_k, scoring, self)
        best_QK, rows_QK = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long)
        for batch, size in enumerate(self.store.batch_sizes):
            end = self.store.ends[batch]
            rows_QC = torch.arange(end - size, end).expand(len(query), -1)
            rows_QK = torch.cat([rows_QK, rows_QC], dim=1)
            best_QK = torch.cat([best_QK, self._scores(batch, query, scoring)], dim=1)
            best_QK, order_QK = best_QK.sort(descending=True, stable=True)
            best_QK, rows_QK = best_QK[:, :top_k], rows_QK.gather(1, order_QK[:, :top_k])
        paths = [name for name in path_columns(self.columns) if name in queries]
        by_query = [{name: queries[name][number] for name in paths} for number in range(len(query))]
        return [self._hits(*each) for each in zip(by_query, rows_QK, best_QK, strict=True)]

    def _scores(self, batch: int, query: Tensor, scoring: str) -> Tensor:
        columns = {name: self._vectors(batch, name) for name in compared(scoring, self.columns)}
        parts = zip(*(torch.split(column, ROWS_AT_ONCE) for column in columns.values()), strict=True)
        named = (dict(zip(columns, part, strict=True)) for part in parts)
        return torch.cat([similarities(query, scored_vectors(part, scoring)) for part in named], dim=1)

    def _hits(self, query: Vectors, rows_K: Tensor, scores_K: Tensor) -> list[Hit]:
        vectors = {name: torch.empty(len(rows_K), len(query_D)) for name, query_D in query.items()}
        batch_K = torch.tensor([bisect_right(self.store.ends, row) for row in rows_K.tolist()])
        for batch in sorted(set(batch_K.tolist())):
            rows = rows_K[batch_K == batch] - (self.store.ends[batch] - self.store.batch_sizes[batch])
            for name in query:
                vectors[name][batch_K == batch] = self._vectors(batch, name)[rows]
        return make_hits(query, vectors, scores_K, self.store.rows(rows_K.tolist()))

    def _vectors(self, batch: int, name: str) -> Tensor:
        """Return the unit vectors of one row group ``[rows, D]``, from memory if they fitted into it."""
        if (batch, name) in self._cache:
            return self._cache[batch, name]
        vectors = self.store.vectors(batch, name)
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        bad = ~(norms.isfinite() & (norms > 0))[:, 0]
        if bad.any():
            (row,) = self.store.rows([self.store.ends[batch] - len(vectors) + int(bad.nonzero()[0])])
            raise ValueError(f"{name} of {row['id']!r} is zero or not finite; embed that row again")
        vectors /= norms
        if vectors.nbytes <= self._free_bytes:
            self._free_bytes -= vectors.nbytes
            self._cache[batch, name] = vectors
        return vectors


class Searcher:
    """Searches an index with texts, images or both, with the weights that embedded its items.

    A model that was exported with some of the paths, in any order, searches by those. ``scorings`` are those
    that the index has and the model can embed. A model with other weights is refused.
    """

    def __init__(self, embedder: Any, index: Index) -> None:
        self.embedder, self.index = embedder, index
        encoder, items = embedder.encoder, index.metadata["identity"]["path_sha256"]
        own = path_hashes(encoder)
        self._paths = {path_column(n): own.index(item) for n, item in enumerate(items) if item in own}
        in_any_order = encoder.aggregate_dim == encoder.embed_dim  # the paths are not concatenated
        same_aggregate = own == items or (in_any_order and sorted(own) == sorted(items))
        known = {*self._paths, *([AGGREGATE] if same_aggregate else [])}
        usable = (name for name in index.scorings if known.issuperset(compared(name, index.columns)))
        self.scorings = tuple(usable)
        if not self.scorings:
            maker = f"the one that embedded the items ({index.metadata.get('model')}): it was trained further"
            why = "is another model, was exported with merged adapters, or lacks their paths"
            advice = "Give that model, or run predict with this one"
            raise ValueError(f"the model has other weights than {maker}, {why}. {advice}")

    def search(
        self,
        inputs: Any,
        top_k: int = 10,
        scoring: str = AGGREGATE,
        *,
        where: str | None = None,
        instruction: str | None = None,
    ) -> list[list[Hit]]:
        """Find at most ``top_k`` hits for every query, best first.

        Args:
            inputs: what ``Embedder.encode`` takes, one item or a list.
            top_k: hits per query.
            scoring: ``aggregate``; ``path_0`` and so on; or ``maxsim``, every query path with the item's best
                path.
            where: condition on source fields in SQL, for a LanceDB index.
            instruction: put before every text; None is the model's own for queries.
        """
        if scoring not in self.scorings:
            raise ValueError(f"scoring is {scoring!r}; this model and index have {', '.join(self.scorings)}")
        options = {} if instruction is None else {"instruction": instruction}
        embeddings_QND = self.embedder.encode_query(listed(inputs), paths="all", **options)
        shared = [name for name in path_columns(self.index.columns) if name in self._paths]
        queries = {name: embeddings_QND[:, self._paths[name]] for name in shared}
        if scoring == AGGREGATE:
            with torch.inference_mode():
                aggregate_QD = self.embedder.encoder.aggregate(embeddings_QND.to(self.embedder.device))
            queries[AGGREGATE] = aggregate_QD.float().cpu()
        return self.index.search(queries, top_k, scoring, where)


def path_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """Return those columns that hold a path."""
    return tuple(name for name in columns if name != AGGREGATE)


def compared(scoring: str, columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that a scoring needs."""
    return path_columns(columns) if scoring == MAXSIM else (scoring,)


def scored_vectors(columns: Vectors, scoring: str) -> Tensor:
    """Return what ``similarities`` takes for a scoring, ``[B, D]`` or ``[B, N, D]``, from unit vectors."""
    if scoring != MAXSIM:
        return columns[scoring]
    return torch.stack([columns[name] for name in path_columns(columns)], dim=1)


def query_vectors(queries: Vectors, top_k: int, scoring: str, index: Index) -> Tensor:
    """Return ``scored_vectors`` of queries; raise ``ValueError`` for arguments that cannot be used."""
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if scoring not in index.scorings:
        raise ValueError(f"scoring is {scoring!r}; this index has {', '.join(index.scorings)}")
    names = compared(scoring, index.columns)
    vectors = scored_vectors({name: F.normalize(queries[name].float(), dim=-1) for name in names}, scoring)
    if not (vectors.norm(dim=-1) > 0.5).all():
        raise ValueError("the embedding of a query is zero or not finite")
    return vectors


def make_hits(query: Vectors, vectors: Vectors, scores_K: Tensor, rows: list[dict[str, Any]]) -> list[Hit]:
    """Make the hits of one query from its paths ``[D]``, those of items ``[K, D]``, scores and rows."""
    cosines = {name: F.cosine_similarity(query[name], vectors[name], dim=-1).tolist() for name in query}
    return [
        Hit(str(row.pop("id")), score, {name: values[place] for name, values in cosines.items()}, row)
        for place, (row, score) in enumerate(zip(rows, scores_K.tolist(), strict=True))
    ]
