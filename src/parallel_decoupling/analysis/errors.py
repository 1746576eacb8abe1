"""Do the paths make the same mistakes? From the hits of a score report.

Here: overlap of misses between paths, and what choosing the best path per query would reach. Elsewhere:
the hits (``retrieval.score``), several runs side by side (``retrieval.compare``).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from parallel_decoupling.retrieval.report import ScoreReport

Misses = NDArray[np.bool_]


@dataclass(frozen=True)
class ErrorOverlap:
    """How the errors of a run's paths relate, over all tasks.

    Attributes:
        jaccard: ``[N, N]``, queries that both paths miss over queries that either misses, all tasks
            pooled; nan where neither misses any.
        kappa: ``[N, N]``, Cohen's kappa of right or wrong, pooled: 0 what chance gives at these scores, 1
            the same.
        headline: name of the report's first column.
        scores: hit@1, mean over tasks: the headline, ``best_path`` (the one path with the best mean),
            ``mean_path``, ``oracle`` (a query counts if any path is right).
        tasks: the same four by task.
        num_queries: rows of all tasks.
    """

    jaccard: NDArray[np.float64]
    kappa: NDArray[np.float64]
    headline: str
    scores: dict[str, float]
    tasks: dict[str, dict[str, float]]
    num_queries: int


def error_overlap(report: ScoreReport) -> ErrorOverlap:
    """Compare the paths' hits row by row.

    Raises:
        ValueError: the report has no single paths, or a task has no hits per row.
    """
    paths, headline = report.path_columns, report.columns[0]
    if not paths:
        raise ValueError("the score report has no columns of single paths; run the test again")
    for name, result in report.tasks.items():
        if not result.hits:
            raise ValueError(f"task {name} has no hits per row; run the test again to write them")
    hits = {
        name: np.array([[hit == "1" for hit in result.hits[path]] for path in paths])
        for name, result in report.tasks.items()
    }
    best = max(range(len(paths)), key=lambda path: report.means["overall"][paths[path]])
    tasks = {}
    for name, result in report.tasks.items():
        rates = hits[name].mean(axis=1)
        tasks[name] = {
            headline: result.hit_at_1[headline],
            "best_path": float(rates[best]),
            "mean_path": float(rates.mean()),
            "oracle": float(hits[name].any(axis=0).mean()),
        }
    misses = ~np.concatenate(list(hits.values()), axis=1)
    numbers = range(len(paths))
    return ErrorOverlap(
        jaccard=np.array([[jaccard(misses[i], misses[j]) for j in numbers] for i in numbers]),
        kappa=np.array([[kappa(misses[i], misses[j]) for j in numbers] for i in numbers]),
        headline=headline,
        scores={key: fmean(task[key] for task in tasks.values()) for key in next(iter(tasks.values()))},
        tasks=tasks,
        num_queries=misses.shape[1],
    )


def jaccard(first: Misses, second: Misses) -> float:
    """Misses that two paths share over misses of either, in [0, 1]; nan without any miss."""
    either = (first | second).sum()
    return float((first & second).sum() / either) if either else float("nan")


def kappa(first: Misses, second: Misses) -> float:
    """Cohen's kappa; 1 for equal columns, also where both are constant and the formula has no value."""
    return 1.0 if bool((first == second).all()) else float(cohen_kappa_score(first, second))
