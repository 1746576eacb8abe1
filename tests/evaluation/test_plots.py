from __future__ import annotations

import pytest

from parallel_decoupling.data.tasks import Task
from parallel_decoupling.evaluation.plots import comparison_figure
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult


def test_comparison_shows_each_run_once_and_the_range_of_its_paths() -> None:
    rows = {"shape": Task("shape", "classification", True), "$1 \\frac": Task("$1 \\frac", "retrieval", True)}
    single = {"aggregate": 0.3, "path_0": 0.3}
    several = {"aggregate": 0.5, "path_0": 0.2, "path_1": 0.4}
    reports = {
        name: ScoreReport({task: TaskResult(row, 10, 0.1, scores) for task, row in rows.items()})
        for name, scores in (("base", single), ("ours", several))
    }
    figure = comparison_figure(reports, "base vs ours")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "ours", "chance"]
    left, right = figure.axes
    heights = [[bar.get_height() for bar in bars.patches] for bars in left.containers]  # type: ignore[attr-defined]
    assert heights == [pytest.approx([30.0] * 4), pytest.approx([50.0] * 4)]
    ends = [[line[:, 1].tolist() for line in lines.get_segments()] for lines in left.collections]  # type: ignore[attr-defined]
    assert ends == [[pytest.approx([30, 30])] * 4, [pytest.approx([20, 40])] * 4]
    assert [label.get_text() for label in right.get_yticklabels()] == list(rows)
    figure.canvas.draw()
