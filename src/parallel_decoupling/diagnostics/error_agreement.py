"""Whether the paths make the same mistakes, from the hits of a score report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from parallel_decoupling.evaluation.report import ScoreReport

Misses = NDArray[np.bool_]


@dataclass(frozen=True)
class ErrorAgreement:
    """How the errors of a run's paths relate, over all tasks.

    Attributes:
        kappa: ``[N, N]``, ``stratified_kappa`` of the misses: 0 what chance gives at the paths' scores in
            every task, 1 the same misses.
        tasks: hit@1 by task: the report's first column, ``best_path`` (the one path with the best mean),
            ``mean_path``, ``oracle`` (a query counts if any path is right), ``independent_oracle`` (the
            oracle that paths of these scores would reach if they missed independently within each task).
        scores: the same five, mean over tasks.
    """

    kappa: NDArray[np.float64]
    tasks: dict[str, dict[str, float]]
    scores: dict[str, float]


def error_agreement(report: ScoreReport) -> ErrorAgreement:
    """Compare the paths' hits row by row.

    Raises:
        ValueError: the report has no single paths, or a task has no hits per row.
    """
    paths, headline = report.path_columns, report.columns[0]
    if not paths or not all(result.hits for result in report.tasks.values()):
        raise ValueError("the score report has no single paths or no hits per row; run the test again")
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
            "independent_oracle": float(1 - (1 - rates).prod()),
        }
    return ErrorAgreement(
        kappa=stratified_kappa([~hits_NR for hits_NR in hits.values()]),
        tasks=tasks,
        scores={key: fmean(task[key] for task in tasks.values()) for key in next(iter(tasks.values()))},
    )


def stratified_kappa(misses: Sequence[Misses]) -> NDArray[np.float64]:
    """Compute Cohen's kappa of all pairs of paths, with chance agreement counted within each task.

    Pooled rows would call paths alike that only find the same tasks hard.

    Args:
        misses: per task ``[N, R]``, R differs.

    Returns:
        ``[N, N]``, at most 1; 1 where two paths agree throughout and chance leaves nothing to differ in.

    Relations:
        On one task it equals ``sklearn.metrics.cohen_kappa_score``.
    """
    rows = sum(miss_NR.shape[1] for miss_NR in misses)
    observed_NN, chance_NN = np.zeros((2, len(misses[0]), len(misses[0])))
    for miss_NR in misses:
        for each_NR in (miss_NR.astype(float), (~miss_NR).astype(float)):
            rate_N = each_NR.mean(axis=1)
            observed_NN += each_NR @ each_NR.T
            chance_NN += each_NR.shape[1] * np.outer(rate_N, rate_N)
    room_NN = rows - chance_NN
    kappa_NN: NDArray[np.float64] = np.ones(room_NN.shape)
    np.divide(observed_NN - chance_NN, room_NN, out=kappa_NN, where=room_NN > 1e-9 * rows)
    return kappa_NN
