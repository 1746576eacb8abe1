"""Metrics of a ranking with one right answer, as functions of its rank.

Here: the pessimistic rank, and what torchmetrics makes of it. Deliberately elsewhere: scores of candidates
(``score``), means over tasks (``report``). torchmetrics, which loads transformers, is
imported where it is used.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

DEPTHS = (1, 5, 10)
METRICS = (
    *(f"hit@{depth}" for depth in DEPTHS),
    "mrr",
    *(f"mrr@{depth}" for depth in DEPTHS),
    *(f"ndcg_{gain}@{depth}" for gain in ("linear", "exponential") for depth in DEPTHS),
)
"""Metrics of every report, in its order; names as in VLM2Vec's score files, which have no ``mrr`` uncut."""

Gain = Literal["linear", "exponential"]


def positive_rank(scores_RC: Tensor, rivals_RC: Tensor) -> Tensor:
    """Rank of the positive, column 0, after every rival that it does not beat.

    Ties are pessimistic: MMEB keeps the positive at index 0, so that breaking ties by index would call a
    collapsed model perfect. A NaN rival counts as ahead; a NaN positive is behind everything.

    Args:
        scores_RC: ``[R, C]`` scores, higher is better.
        rivals_RC: ``[R, C]`` bool; False for the positive, its copies and padding.

    Returns:
        int64 ``[R]``, 1 is best.

    Relations:
        Copies of the positive and padding never change it.
    """
    positive_R1 = scores_RC[:, :1]
    ahead_RC = ~(scores_RC < positive_R1) & rivals_RC
    behind_all = scores_RC.shape[1] + 1
    return torch.where(positive_R1[:, 0].isnan(), behind_all, 1 + ahead_RC.sum(dim=1))


def ndcg(relevance: Tensor, depth: int, gain: Gain) -> float:
    """Normalised discounted cumulative gain of the first ``depth`` places.

    Both conventions divide by ``log2(1 + place)``; a place is worth its relevance (``linear``, of Järvelin
    and Kekäläinen) or ``2 ** relevance - 1`` (``exponential``, of Burges et al.).

    Args:
        relevance: ``[C]`` non-negative integers, in the order of the ranking.
        depth: places that count, at least 1.
        gain: the convention.

    Returns:
        In [0, 1]; 0 when nothing is relevant.

    Relations:
        Both conventions agree when all relevances are 0 or 1, as in MMEB's image tasks.
    """
    from torchmetrics.functional import retrieval

    worth = relevance if gain == "linear" else 2**relevance - 1
    return float(retrieval.retrieval_normalized_dcg(_in_order(len(worth)), worth, top_k=depth))


@cache
def metrics_of_rank(rank: int) -> MappingProxyType[str, float]:
    """All of ``METRICS`` for a query whose one right answer has this rank.

    A ranking with one right answer is its rank, so each rank is computed once however many queries have it.

    Args:
        rank: 1 is best.
    """
    from torchmetrics.functional import retrieval

    relevance = torch.zeros(max(rank, *DEPTHS), dtype=torch.int64)
    relevance[rank - 1] = 1
    scores = _in_order(len(relevance))
    values = {
        f"hit@{depth}": float(retrieval.retrieval_hit_rate(scores, relevance, top_k=depth))
        for depth in DEPTHS
    }
    values["mrr"] = float(retrieval.retrieval_reciprocal_rank(scores.double(), relevance))
    values |= {f"mrr@{depth}": values["mrr"] if rank <= depth else 0.0 for depth in DEPTHS}
    for gain in ("linear", "exponential"):
        values |= {f"ndcg_{gain}@{depth}": ndcg(relevance, depth, gain) for depth in DEPTHS}
    return MappingProxyType(values)


def mean_metrics(rank_R: Tensor) -> dict[str, float]:
    """Means of all metrics over queries.

    Args:
        rank_R: int64 ``[R]``, at least one.
    """
    ranks, counts = torch.unique(rank_R, return_counts=True)
    found = [
        (metrics_of_rank(rank), count) for rank, count in zip(ranks.tolist(), counts.tolist(), strict=True)
    ]
    return {name: sum(values[name] * count for values, count in found) / len(rank_R) for name in METRICS}


def _in_order(length: int) -> Tensor:
    """Scores without ties, best first, so that no sorting can change the order."""
    return torch.arange(length, 0, -1, dtype=torch.float32)
