"""What a search must find, written in plain numpy loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel_decoupling.index.protocol import Hit


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def score(query_ND: np.ndarray, item_ND: np.ndarray, scoring: str, weights: np.ndarray) -> float:
    """Score one query against one item."""
    query, item = unit(query_ND.astype(np.float64)), unit(item_ND.astype(np.float64))
    if scoring == "aggregate":
        return float(unit(weights @ query) @ unit(weights @ item))
    if scoring == "sum":
        return float(unit(query.reshape(-1)) @ unit(item.reshape(-1)))
    if scoring == "maxsim":
        return float(np.mean([max(float(one @ other) for other in item) for one in query]))
    path = int(scoring.removeprefix("path_"))
    return float(query[path] @ item[path])


def search(
    queries: Tensor,
    items: Tensor,
    top_k: int,
    scoring: str,
    rows: list[int] | None = None,
    weights: tuple[float, ...] | None = None,
) -> list[list[tuple[int, float]]]:
    """Row numbers and scores of the best items of every query."""
    paths = items.shape[1]
    w = np.array(weights or (1 / paths,) * paths)
    chosen = range(len(items)) if rows is None else rows
    results = []
    for query in queries.numpy():
        scored = [(row, score(query, items[row].numpy(), scoring, w)) for row in chosen]
        results.append(sorted(scored, key=lambda pair: -pair[1])[:top_k])
    return results


def matching(conditions: Mapping[str, Any], fields: Mapping[str, list[Any]]) -> list[int]:
    """Rows that pass a filter."""

    def passes(value: Any, condition: Any) -> bool:
        if isinstance(condition, Mapping):
            low, high = condition.get("min"), condition.get("max")
            return value is not None and (low is None or value >= low) and (high is None or value <= high)
        return value in condition if isinstance(condition, list) else value == condition

    count = len(next(iter(fields.values())))
    return [
        row for row in range(count) if all(passes(fields[name][row], c) for name, c in conditions.items())
    ]


def embeddings(count: int, paths: int = 3, dim: int = 24, seed: int = 0) -> Tensor:
    """Vectors with a common direction, as those of real models have, and not of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, paths, dim, generator=generator) + torch.randn(dim, generator=generator)


def same_hits(found: list[list[Hit]], expected: list[list[Hit]]) -> bool:
    """Whether two searches agree up to rounding: one matrix product differs from another in the last bits."""
    for hits, others in zip(found, expected, strict=True):
        for hit, other in zip(hits, others, strict=True):
            assert (hit.id, hit.fields) == (other.id, other.fields)
            assert hit.score == pytest.approx(other.score, abs=1e-6)
            assert hit.similarities == pytest.approx(other.similarities, abs=1e-6)
    return True
