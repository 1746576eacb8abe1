from __future__ import annotations

import numpy as np
import pytest

from parallel_decoupling.analysis.errors import error_overlap
from parallel_decoupling.data.tasks import Task
from parallel_decoupling.retrieval.report import ScoreReport, TaskResult


def report(*tasks: dict[str, str]) -> ScoreReport:
    results = {}
    for number, hits in enumerate(tasks):
        scores = {column: row.count("1") / len(row) for column, row in hits.items()}
        name = f"task_{number}"
        results[name] = TaskResult(Task(name, "vqa", True), len(hits["aggregate"]), 0.1, scores, hits)
    return ScoreReport(results)


def test_identical_paths_err_alike_and_the_oracle_gains_nothing() -> None:
    found = error_overlap(report({"aggregate": "0110", "path_0": "0110", "path_1": "0110"}))
    assert (found.jaccard == 1).all()
    assert (found.kappa == 1).all()
    assert found.scores == {"aggregate": 0.5, "best_path": 0.5, "mean_path": 0.5, "oracle": 0.5}


def test_independent_errors_have_kappa_zero() -> None:
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(["0", "1"], 20_000, p=[0.4, 0.6])) for _ in range(2)]
    found = error_overlap(report({"aggregate": rows[0], "path_0": rows[0], "path_1": rows[1]}))
    assert abs(found.kappa[0, 1]) < 0.02
    assert found.jaccard[0, 1] == pytest.approx(0.16 / 0.64, abs=0.01)
    assert found.scores["oracle"] == pytest.approx(1 - 0.16, abs=0.01)


def test_opposite_errors_and_pooling_over_tasks_by_hand() -> None:
    first = {"aggregate": "11", "path_0": "10", "path_1": "01"}
    second = {"aggregate": "1000", "path_0": "1100", "path_1": "1000"}
    found = error_overlap(report(first, second))
    # misses of path 0: .x ..xx, of path 1: x. .xxx; both: 2 of 5
    assert found.jaccard[0, 1] == pytest.approx(2 / 5)
    assert found.num_queries == 6
    assert found.tasks["task_0"] == {"aggregate": 1.0, "best_path": 0.5, "mean_path": 0.5, "oracle": 1.0}
    assert found.tasks["task_1"]["oracle"] == 0.5
    assert found.scores["oracle"] == pytest.approx(0.75)  # tasks count once each, whatever their size
    assert found.scores["best_path"] == pytest.approx(0.5)


def test_no_misses_have_no_jaccard() -> None:
    found = error_overlap(report({"aggregate": "11", "path_0": "11", "path_1": "11"}))
    assert np.isnan(found.jaccard).all()
    assert (found.kappa == 1).all()


def test_reports_without_paths_or_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no columns of single paths"):
        error_overlap(report({"aggregate": "10"}))
    result = TaskResult(Task("bare", "vqa", True), 2, 0.1, {"aggregate": 0.5, "path_0": 0.5})
    with pytest.raises(ValueError, match="bare has no hits"):
        error_overlap(ScoreReport({"bare": result}))
