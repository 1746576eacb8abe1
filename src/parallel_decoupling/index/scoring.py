"""What a scoring means: one path, the aggregate, the aligned sum, or MaxSim over paths.

All are built from cosines between a query's vector and one stored column of vectors, so that one
definition serves float32, int8 and binary columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.index.settings import AGGREGATE, SUM, IndexSettings

ColumnSimilarity = Callable[[str, Tensor], Tensor]
"""From a column's name and ``[Q, D]`` queries to cosines ``[Q, C]``."""


def aggregate(embeddings_BND: Tensor, path_weights: Sequence[float]) -> Tensor:
    """Weighted mean over paths, brought to unit norm: ``[B, D]``.

    Relations:
        With equal weights the encoder's aggregation ``mean``.
    """
    weights_N1 = torch.tensor(path_weights).unsqueeze(1)
    return F.normalize((embeddings_BND * weights_N1).sum(dim=-2), dim=-1)


def scores(
    queries_QND: Tensor, scoring: str, settings: IndexSettings, similarity: ColumnSimilarity
) -> Tensor:
    """Score every query against every item of some columns.

    Args:
        queries_QND: unit norm; ``[Q, 1, D]`` is the searched path alone.
        scoring: ``aggregate``: cosine of the aggregates. A path's name: cosine on that path. ``sum``: mean
            cosine over aligned paths. ``maxsim``: every query path takes its best item path; their mean.
        settings: of the index.
        similarity: compares with a column.

    Returns:
        ``[Q, C]`` float32.

    Relations:
        ``sum`` orders items as the cosine of concatenated paths does. ``maxsim`` is ColBERT's, divided by N;
        it is never below ``sum``. With one path all scorings are equal.
    """
    if scoring in settings.path_names:
        return similarity(scoring, _path(queries_QND, settings.path_names.index(scoring)))
    if scoring == AGGREGATE:
        return similarity(AGGREGATE, aggregate(queries_QND, settings.path_weights))
    if scoring == SUM:
        columns = [similarity(name, queries_QND[:, n]) for n, name in enumerate(settings.path_names)]
        return torch.stack(columns).mean(dim=0)
    best: Tensor | None = None
    for name in settings.path_names:
        column_QNC = similarity(name, queries_QND.flatten(0, 1)).view(*queries_QND.shape[:2], -1)
        best = column_QNC if best is None else torch.maximum(best, column_QNC)
    assert best is not None, "an index has at least one path"
    return best.mean(dim=1)


def exact_scores(
    query_ND: Tensor, items_KND: Tensor, scoring: str, settings: IndexSettings
) -> tuple[Tensor, Tensor]:
    """Score one query against some items in float32.

    Returns:
        Scores ``[K]`` and the aligned cosines ``[K, N]``; ``[K, 1]`` for a query of the searched path alone.
    """

    def similarity(column: str, query_QD: Tensor) -> Tensor:
        if column in settings.path_names:
            return query_QD @ items_KND[:, settings.path_names.index(column)].T
        return query_QD @ aggregate(items_KND, settings.path_weights).T

    scores_K = scores(query_ND[None], scoring, settings, similarity)[0]
    if len(query_ND) < settings.num_paths:
        return scores_K, scores_K.unsqueeze(1)
    return scores_K, (items_KND * query_ND).sum(dim=-1)


def prepare_queries(queries: Tensor, top_k: int, scoring: str, settings: IndexSettings) -> Tensor:
    """Check the arguments of a search; queries come back as float32 of unit norm.

    Raises:
        ValueError: the index is empty, or an argument does not fit it.
    """
    if settings.dim == 0:
        raise ValueError("the index is empty; add items before searching")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if scoring not in settings.scorings:
        raise ValueError(f"scoring is {scoring!r}; this index has {', '.join(settings.scorings)}")
    allowed = {settings.num_paths} | ({1} if scoring in settings.path_names else set())
    if queries.ndim != 3 or queries.shape[1] not in allowed or queries.shape[2] != settings.dim:
        raise ValueError(
            f"queries of shape {list(queries.shape)}; this index takes "
            f"[Q, {settings.num_paths}, {settings.dim}] ({', '.join(settings.path_names)}), "
            f"and [Q, 1, {settings.dim}] for the scoring by one path"
        )
    return unit(queries, "query")


def unit(vectors: Tensor, name: str, ids: Sequence[str] | None = None) -> Tensor:
    """Float32 on the CPU, unit norm.

    Raises:
        ValueError: a vector is zero or not finite; names the row or its id.
    """
    vectors = vectors.detach().float().cpu()
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    bad = ~(norms.isfinite() & (norms > 0)).all(dim=-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        label = f"{name} {row}" if ids is None else f"{name} {row} (id {ids[row]!r})"
        raise ValueError(
            f"{label} has an embedding that is zero or not finite; encode it again or leave it out"
        )
    return vectors / norms.unsqueeze(-1)


def _path(queries_QND: Tensor, path: int) -> Tensor:
    return queries_QND[:, path if queries_QND.shape[1] > 1 else 0]
