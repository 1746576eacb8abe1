from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from parallel_decoupling.data.tasks import Task
from parallel_decoupling.diagnostics.error_agreement import Misses, error_agreement, stratified_kappa
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult


def report(*tasks: dict[str, str]) -> ScoreReport:
    results = {}
    for number, hits in enumerate(tasks):
        scores = {column: row.count("1") / len(row) for column, row in hits.items()}
        name = f"task_{number}"
        results[name] = TaskResult(Task(name, "vqa", True), len(hits["aggregate"]), 0.1, scores, hits)
    return ScoreReport(results)


def report_of_misses(*tasks: Misses) -> ScoreReport:
    """Each ``[2, R]``; the aggregate is path 0."""
    rows = [["".join("10"[miss] for miss in line) for line in task.astype(int).tolist()] for task in tasks]
    return report(*({"aggregate": first, "path_0": first, "path_1": second} for first, second in rows))


def test_identical_paths_err_alike_and_the_oracle_gains_nothing() -> None:
    other = {"aggregate": "1000", "path_0": "1000", "path_1": "1000"}
    found = error_agreement(report({"aggregate": "0110", "path_0": "0110", "path_1": "0110"}, other))
    assert found.kappa == pytest.approx(np.ones((2, 2)))
    assert found.tasks["task_0"] == {
        "aggregate": 0.5,
        "best_path": 0.5,
        "mean_path": 0.5,
        "oracle": 0.5,
        "independent_oracle": 0.75,
    }
    assert found.scores["oracle"] == found.scores["best_path"]


def test_independent_paths_have_kappa_zero_however_different_the_tasks() -> None:
    """Pooled rows would give 0.6, and the oracle gains what independence gives."""
    rng = np.random.default_rng(0)
    rates = ((0.95, 4000), (0.9, 3000), (0.2, 5000), (0.1, 2000))
    misses = [rng.random((2, rows)) > rate for rate, rows in rates]
    found = error_agreement(report_of_misses(*misses))
    assert abs(found.kappa[0, 1]) < 0.03
    pooled = np.concatenate(misses, axis=1)
    assert cohen_kappa_score(*pooled) > 0.55
    assert found.scores["independent_oracle"] == pytest.approx(found.scores["oracle"], abs=0.01)
    expected = np.mean([0.9975, 0.99, 0.36, 0.19])
    assert found.scores["independent_oracle"] == pytest.approx(expected, abs=0.02)


def test_kappa_of_one_task_equals_sklearn() -> None:
    rng = np.random.default_rng(1)
    misses = rng.random((3, 50)) < 0.4
    misses[1] ^= misses[0] & (rng.random(50) < 0.5)
    expected = [[cohen_kappa_score(first, second) for second in misses] for first in misses]
    assert stratified_kappa([misses]) == pytest.approx(np.array(expected))


def test_kappa_of_several_tasks_by_hand() -> None:
    """Agreement 2 of 4 and 1 of 2, as by chance (path 0 misses all of the second), and then 8 of 8."""
    first = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=bool)
    second = np.array([[1, 1], [1, 0]], dtype=bool)
    third = np.array([[1] + [0] * 7] * 2, dtype=bool)
    chance = 2 + 1 + 8 * (1 / 64 + 49 / 64)
    found = error_agreement(report_of_misses(first, second, third)).kappa
    assert found[0, 1] == found[1, 0] == pytest.approx((11 - chance) / (14 - chance))
    assert found[0, 1] != pytest.approx((0 + 0 + 1) / 3), "a mean over tasks"


def test_the_best_path_is_the_one_with_the_best_mean_in_every_task() -> None:
    first = {"aggregate": "1110", "path_0": "1110", "path_1": "1100"}
    second = {"aggregate": "1111", "path_0": "0000", "path_1": "1111"}
    found = error_agreement(report(first, second))
    assert [found.tasks[name]["best_path"] for name in ("task_0", "task_1")] == [0.5, 1.0]
    assert found.scores["best_path"] == pytest.approx(0.75)


def test_opposite_errors_and_pooling_over_tasks_by_hand() -> None:
    first = {"aggregate": "11", "path_0": "10", "path_1": "01"}
    second = {"aggregate": "1000", "path_0": "1100", "path_1": "1000"}
    found = error_agreement(report(first, second))
    assert found.tasks["task_0"]["oracle"] == 1.0
    assert found.tasks["task_1"]["oracle"] == 0.5
    assert found.scores["oracle"] == pytest.approx(0.75)  # tasks count once each, whatever their size
    assert found.scores["best_path"] == pytest.approx(0.5)


def test_reports_without_paths_or_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no single paths"):
        error_agreement(report({"aggregate": "10"}))
    result = TaskResult(Task("bare", "vqa", True), 2, 0.1, {"aggregate": 0.5, "path_0": 0.5})
    with pytest.raises(ValueError, match="no hits per row"):
        error_agreement(ScoreReport({"bare": result}))
