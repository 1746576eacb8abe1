"""Search by one path, the aggregate or all paths; exact search reads the folder that ``predict`` wrote."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.data.prompts import listed
from parallel_decoupling.evaluation.score import similarities
from parallel_decoupling.evaluation.store import AGGREGATE, Store, Vectors, path_column, python_rows
from parallel_decoupling.model.identity import path_hashes
from parallel_decoupling.option_types import NonNegativeInt, PositiveInt, checked

MAXSIM = "maxsim"
MEMORY_BUDGET = 4 * 2**30
QUERIES_AT_ONCE = 256  # that are compared by all paths with a row group
PADDED = 64
"""Row groups are padded to a multiple: a product treats the last few rows apart, in other last bits."""


@dataclass(frozen=True)
class Hit:
    """One item that was found."""

    id: str
    score: float  # by the scoring of the search, in [-1, 1]; higher is better
    similarities: Mapping[str, float]  # cosine of query and item on each path that both have, by column
    fields: Mapping[str, Any]  # the item's source fields


@runtime_checkable
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
        memory_budget: bytes of vectors and fields that may stay in memory between searches. Row groups
            beyond it are read again for every search; the hits are the same.
    """

    @checked()
    def __init__(self, store: Store | str | Path, memory_budget: NonNegativeInt = MEMORY_BUDGET) -> None:
        store = store if isinstance(store, Store) else Store(store)
        self.store, self.columns = store, store.columns
        self.metadata: Mapping[str, Any] = store.metadata
        self.scorings = (*self.columns, *([MAXSIM] if len(path_columns(self.columns)) > 1 else []))
        self._free_bytes = memory_budget
        self._cache: dict[tuple[int, str], Any] = {}

    def __len__(self) -> int:
        return len(self.store)

    @checked()
    def search(
        self, queries: Vectors, top_k: PositiveInt, scoring: str, where: str | None = None
    ) -> list[list[Hit]]:
        """Find the best items of every query; see ``Index``. Of equal scores the earlier row comes first."""
        if where is not None:
            advice = f"make a LanceDB index of {self.store.folder} (lightning index) and search that"
            raise ValueError(f"where={where!r}: exact search does not take conditions; {advice}")
        query_QND = query_vectors(queries, scoring, self)
        best_QK = torch.empty(len(query_QND), 0, device="cpu")
        rows_QK = best_QK.long()
        for batch, first in enumerate(self.store.starts):
            scores_QC = self._scores(batch, query_QND, scoring)
            if best_QK.shape[1] == top_k:
                better_QC = scores_QC > best_QK[:, -1:]
            else:
                better_QC = scores_QC >= scores_QC.topk(min(top_k, scores_QC.shape[1])).values[:, -1:]
            kept_C = better_QC.any(dim=0).nonzero()[:, 0]  # few; only these are sorted
            rows_QK = torch.cat([rows_QK, (first + kept_C).expand(len(query_QND), -1)], dim=1)
            best_QK = torch.cat([best_QK, scores_QC[:, kept_C]], dim=1)
            best_QK, order_QK = best_QK.sort(descending=True, stable=True)
            best_QK, rows_QK = best_QK[:, :top_k], rows_QK.gather(1, order_QK[:, :top_k])
        rows_U, place_QK = torch.unique(rows_QK, return_inverse=True)
        paths = [name for name in path_columns(self.columns) if name in queries]
        fields, vectors = self._items(rows_U, paths)
        hits = []
        for number, place_K in enumerate(place_QK):
            query = {name: queries[name][number] for name in paths}
            items = {name: vectors_UD[place_K] for name, vectors_UD in vectors.items()}
            rows = [dict(fields[place]) for place in place_K.tolist()]
            hits.append(make_hits(query, items, best_QK[number], rows))
        return hits

    def _scores(self, batch: int, query_QND: Tensor, scoring: str) -> Tensor:
        columns = [self._vectors(batch, name) for name in compared(scoring, self.columns)]
        if len(columns) == 1:
            scores_QC = similarities(query_QND[:, 0], columns[0])
        else:
            parts = torch.split(query_QND, QUERIES_AT_ONCE)
            scores_QC = torch.cat([similarities(part_QND, columns) for part_QND in parts])
        return scores_QC[:, : self.store.batch_sizes[batch]]

    def _items(self, rows_U: Tensor, names: list[str]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return fields and vectors of items by their row numbers, which ascend; read each group once."""
        fields: list[dict[str, Any]] = []
        vectors: dict[str, list[Tensor]] = {name: [] for name in names}
        batch_U = torch.bucketize(rows_U, torch.tensor(self.store.ends, device="cpu"), right=True)
        for batch in sorted({*batch_U.tolist()}):
            rows = rows_U[batch_U == batch] - self.store.starts[batch]
            found = self._kept(batch, "", self.store.fields).take(rows.numpy())
            fields += python_rows(found, self.store.folder)
            for name in names:
                vectors[name].append(self._vectors(batch, name)[rows])
        return fields, {name: torch.cat(parts) for name, parts in vectors.items() if parts}

    def _vectors(self, batch: int, name: str) -> Tensor:
        """Return the unit vectors of one row group, and zeros up to a multiple of ``PADDED`` rows."""
        vectors: Tensor = self._kept(batch, name, lambda batch: self._unit_vectors(batch, name))
        return vectors

    def _unit_vectors(self, batch: int, name: str) -> Tensor:
        vectors = self.store.vectors(batch, name)
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        bad = ~(norms.isfinite() & (norms > 0))[:, 0]
        if bad.any():
            (row,) = self.store.rows([self.store.starts[batch] + int(bad.nonzero()[0])])
            raise ValueError(f"{name} of {row['id']!r} is zero or not finite; embed that row again")
        vectors /= norms
        return F.pad(vectors, (0, 0, 0, -len(vectors) % PADDED)) if len(vectors) % PADDED else vectors

    def _kept(self, batch: int, name: str, read: Callable[[int], Any]) -> Any:
        """Read part of a row group, or take it from memory if it fitted."""
        if (batch, name) in self._cache:
            return self._cache[batch, name]
        part = read(batch)
        if part.nbytes <= self._free_bytes:
            self._free_bytes -= part.nbytes
            self._cache[batch, name] = part
        return part


class Searcher:
    """Searches an index with texts, images or both, with the weights that embedded its items.

    A model that was exported with some of the paths, in any order, searches by those. ``scorings`` are those
    that the index has and the model can embed. A model with other weights is refused.
    """

    @checked()
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

    @checked()
    def search(
        self,
        inputs: Any,
        top_k: PositiveInt = 10,
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


def query_vectors(queries: Vectors, scoring: str, index: Index) -> Tensor:
    """Return what ``similarities`` compares, ``[Q, N, D]``; ``ValueError`` for what cannot be used."""
    if scoring not in index.scorings:
        raise ValueError(f"scoring is {scoring!r}; this index has {', '.join(index.scorings)}")
    shapes = {name: [*queries[name].shape] for name in index.columns if name in queries}
    count = max((shape[0] for shape in shapes.values() if shape), default=0)
    for name in (*compared(scoring, index.columns), *shapes):
        if shapes.get(name) != (wanted := [count, index.metadata["dims"][name]]):
            raise ValueError(f"queries[{name!r}] must be a tensor {wanted}, got {shapes.get(name)}")
    columns = [queries[name].float() for name in compared(scoring, index.columns)]
    query_QND = F.normalize(torch.stack(columns, dim=1), dim=-1)
    if not (query_QND.norm(dim=-1) > 0.5).all():
        raise ValueError("the embedding of a query is zero or not finite")
    return query_QND


def make_hits(query: Vectors, vectors: Vectors, scores_K: Tensor, rows: list[dict[str, Any]]) -> list[Hit]:
    """Make the hits of one query from its paths ``[D]``, those of items ``[K, D]``, scores and rows."""
    cosines = {name: F.cosine_similarity(query[name], vectors[name], dim=-1).tolist() for name in query}
    return [
        Hit(str(row.pop("id")), score, {name: values[place] for name, values in cosines.items()}, row)
        for place, (row, score) in enumerate(zip(rows, scores_K.tolist(), strict=True))
    ]
