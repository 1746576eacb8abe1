"""Metrics against slow definitions that share no code with torchmetrics."""

from __future__ import annotations

import math
import random

import pytest
import torch
from sklearn.metrics import ndcg_score

from parallel_decoupling.evaluation.metrics import METRICS, mean_metrics, metrics_of_rank, ndcg, positive_rank


def slow_rank(scores: list[float], rivals: list[bool]) -> int:
    """Walk through the row: everything that is not strictly below the positive is ahead of it."""
    if math.isnan(scores[0]):
        return len(scores) + 1
    rank = 1
    for score, rival in zip(scores[1:], rivals[1:], strict=True):
        if rival and (math.isnan(score) or score >= scores[0]):
            rank += 1
    return rank


def slow_dcg(relevance: list[int], depth: int, gain: str) -> float:
    total = 0.0
    for place, value in enumerate(relevance[:depth], start=1):
        total += (value if gain == "linear" else 2**value - 1) / math.log2(place + 1)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_rank_equals_a_walk_through_the_row(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        width = rng.randint(1, 12)
        values = [rng.choice([0.1, 0.2, 0.3, float("nan")]) for _ in range(width)]
        rivals = [False, *(rng.random() < 0.7 for _ in range(width - 1))]
        found = positive_rank(torch.tensor([values]), torch.tensor([rivals]))
        assert found.tolist() == [slow_rank(values, rivals)]


@pytest.mark.parametrize("seed", range(3))
def test_means_equal_slow_loops_over_random_ranks(seed: int) -> None:
    rng = random.Random(seed)
    ranks = [rng.choice([1, 1, 2, 3, 5, 6, 10, 11, 40, 1001]) for _ in range(60)]
    found = mean_metrics(torch.tensor(ranks))
    for depth in (1, 5, 10):
        assert found[f"hit@{depth}"] == pytest.approx(sum(rank <= depth for rank in ranks) / 60)
        assert found[f"mrr@{depth}"] == pytest.approx(sum(1 / rank for rank in ranks if rank <= depth) / 60)
        gains = [1 / math.log2(1 + rank) if rank <= depth else 0.0 for rank in ranks]
        for gain in ("linear", "exponential"):
            assert found[f"ndcg_{gain}@{depth}"] == pytest.approx(sum(gains) / 60)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 60)
    assert tuple(found) == METRICS


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_both_conventions_of_ndcg_equal_their_definitions_on_graded_relevance(depth: int) -> None:
    rng = random.Random(depth)
    for _ in range(20):
        relevance = [rng.randint(0, 3) for _ in range(8)]
        if not any(relevance):
            continue
        for gain in ("linear", "exponential"):
            best = slow_dcg(sorted(relevance, reverse=True), depth, gain)
            wanted = slow_dcg(relevance, depth, gain) / best
            assert ndcg(torch.tensor(relevance), depth, gain) == pytest.approx(wanted, abs=1e-6)  # type: ignore[arg-type]
        sklearn = ndcg_score([relevance], [list(range(8, 0, -1))], k=depth)
        assert ndcg(torch.tensor(relevance), depth, "linear") == pytest.approx(sklearn, abs=1e-6)


def test_conventions_differ_for_graded_and_agree_for_binary_relevance() -> None:
    graded, binary = torch.tensor([1, 3, 0]), torch.tensor([0, 1, 0])
    assert ndcg(graded, 3, "linear") != pytest.approx(ndcg(graded, 3, "exponential"), abs=0.01)
    assert ndcg(binary, 3, "linear") == ndcg(binary, 3, "exponential")
    assert ndcg(torch.zeros(3, dtype=torch.int64), 3, "linear") == 0


def test_a_rank_beyond_all_depths_still_has_a_reciprocal() -> None:
    values = metrics_of_rank(500)
    assert values["mrr"] == pytest.approx(1 / 500)
    assert values["hit@10"] == values["ndcg_linear@10"] == 0
