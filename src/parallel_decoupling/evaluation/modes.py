"""Inference modes: what can be made of N paths, and what each costs in an index.

Here: the embeddings of every mode from one encoding pass, time to encode an item, bytes per item, time per
search. Deliberately elsewhere: the aggregate itself (``model.encoder``), how modes are scored (``score``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

Columns = dict[str, tuple[Tensor, Tensor]]

LATENCY_CANDIDATES = 1000
LATENCY_QUERIES = 30
ENCODINGS = 3


def path_columns(query: Tensor, candidate: Tensor, aggregate: Callable[[Tensor], Tensor]) -> Columns:
    """Name what is scored: the aggregate, every path on its own, and the other ways to use all paths.

    ``aggregate`` is whatever the encoder was trained with (``learned`` among them). With several paths there
    are also ``mean`` (of the paths), ``concat`` (all paths side by side) and ``maxsim`` (every query path
    takes its best candidate path).

    Args:
        query: ``[Uq, N, D]``, all paths.
        candidate: ``[Uc, N, D]``.
        aggregate: combines paths; ``ParallelEncoder.aggregate``.

    Returns:
        Column name to queries and candidates, ``[U, D]`` each (``D`` differs between columns), or
        ``[U, N, D]`` for ``maxsim``.

    Relations:
        The cosine of ``concat`` is the mean cosine of aligned paths. ``maxsim`` is never below it.
    """
    num_paths = query.shape[1]
    columns = {"aggregate": (aggregate(query), aggregate(candidate))}
    columns |= {f"path_{path}": (query[:, path], candidate[:, path]) for path in range(num_paths)}
    if num_paths == 1:
        return columns
    query, candidate = (F.normalize(side.float(), dim=-1) for side in (query, candidate))
    columns["mean"] = query.mean(dim=1), candidate.mean(dim=1)
    columns["concat"] = query.flatten(1), candidate.flatten(1)
    columns["maxsim"] = query, candidate
    return columns


def similarities(query: Tensor, candidate: Tensor) -> Tensor:
    """Score all pairs of one column.

    Args:
        query: ``[Q, D]`` or ``[Q, N, D]``, unit norm.
        candidate: ``[C, D]`` or ``[C, N, D]``, unit norm.

    Returns:
        ``[Q, C]``: cosines, or for several vectors MaxSim (ColBERT's) divided by N.
    """
    if query.ndim == 2:
        return query @ candidate.T
    flat, best = query.flatten(0, 1), None
    for path in range(candidate.shape[1]):
        cosine_QNC = (flat @ candidate[:, path].T).view(*query.shape[:2], -1)
        best = cosine_QNC if best is None else torch.maximum(best, cosine_QNC)
    assert best is not None, "an encoder has at least one path"
    return best.mean(dim=1)


@dataclass(frozen=True)
class EncodingTimes:
    """Milliseconds per item to encode one batch: medians of ``ENCODINGS`` after a warm-up each.

    Attributes:
        one_path: with a single path.
        all_paths: with all of them.
    """

    one_path: float
    all_paths: float


def encoding_times(encode: Callable[[Sequence[int] | None], Tensor], num_items: int) -> EncodingTimes:
    """Time a batch with one path and with all paths, on the device and in the precision at hand.

    Args:
        encode: embeds the batch with some paths, None is all.
        num_items: in the batch.
    """
    milliseconds = []
    for paths in ((0,), None):
        encode(paths).cpu()  # the first call of a shape pays for memory and kernels
        times = []
        for _ in range(ENCODINGS):
            start = time.perf_counter()
            encode(paths).cpu()  # a copy waits for the device
            times.append(time.perf_counter() - start)
        milliseconds.append(1e3 * median(times) / num_items)
    return EncodingTimes(*milliseconds)


def mode_costs(
    shapes: Mapping[str, torch.Size], encoding: EncodingTimes | None = None
) -> dict[str, dict[str, float]]:
    """What each column costs: encoding, and an exact float32 search on this machine's CPU.

    Args:
        shapes: by column, that of one item: ``[D]`` or ``[N, D]``.
        encoding: measured times; None if nothing was encoded.

    Returns:
        By column ``bytes_per_item``, ``microseconds_per_query`` (the median time to score one query against
        1,000 items) and, if it was measured, ``encoding_milliseconds_per_item``: of one path for ``path_n``,
        of all paths for the others.
    """
    costs: dict[str, dict[str, float]] = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(0)
        items = torch.randn(LATENCY_CANDIDATES, *shape, generator=generator)
        queries = torch.randn(LATENCY_QUERIES, 1, *shape, generator=generator)
        similarities(queries[0], items)  # the first call pays for threads and caches
        times = []
        for query in queries:
            start = time.perf_counter()
            similarities(query, items)
            times.append(time.perf_counter() - start)
        costs[name] = {"bytes_per_item": 4 * shape.numel(), "microseconds_per_query": 1e6 * median(times)}
        if encoding is not None:
            single = name.startswith("path_")
            costs[name]["encoding_milliseconds_per_item"] = (
                encoding.one_path if single else encoding.all_paths
            )
    return costs
