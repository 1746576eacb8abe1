from __future__ import annotations

import sys

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.plots import (
    NEUTRAL,
    RIGHT,
    WRONG,
    comparison_figure,
    path_matrices_figure,
    retrieval_examples_figure,
)
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult
from parallel_decoupling.evaluation.score import TaskScore


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.fixture
def task() -> EvalTask:
    image = Image.new("RGB", (8, 12), "red")
    candidates = [RawInput(f"{IMAGE_PLACEHOLDER}\ncosts $1 or \\frac $2 {n}\n", (image,)) for n in range(6)]
    queries = [RawInput(f"query {number}") for number in range(5)]
    return EvalTask(
        Task("toy", "retrieval", False), queries, candidates, list(range(5)), [[0, 1, 2, 3, 4, 5]] * 5
    )


@pytest.fixture
def score(task: EvalTask) -> TaskScore:
    """The truth (candidate 0) is ranked 1st, 1st, 3rd, 6th, 2nd."""
    ranking = torch.full((5, 10), -1)
    for row, place in enumerate((1, 1, 3, 6, 2)):
        order = [1, 2, 3, 4, 5]
        order.insert(place - 1, 0)
        ranking[row, :6] = torch.tensor(order)
    return TaskScore(task.task, {"aggregate": torch.tensor([1, 1, 3, 6, 2])}, ranking, 1 / 6)


def test_every_cosine_is_written_in_its_cell() -> None:
    figure = path_matrices_figure({"cosine": torch.tensor([[1.0, 0.25], [0.25, 1.0]])})
    assert texts(figure) == ["1.00", "0.25", "0.25", "1.00"]


def test_examples_frame_the_truth_green_and_what_beats_it_red(task: EvalTask, score: TaskScore) -> None:
    figure = retrieval_examples_figure(task, score, k=3, rows=5)
    panels = [figure.axes[5 * row : 5 * row + 5] for row in range(5)]
    frames = {
        cells[0].texts[0].get_text(): [to_hex(cell.spines["left"].get_edgecolor()) for cell in cells[1:]]
        for cells in panels
    }
    assert frames == {
        "query 0": [RIGHT, NEUTRAL, NEUTRAL, RIGHT],
        "query 1": [RIGHT, NEUTRAL, NEUTRAL, RIGHT],
        "query 2": [WRONG, WRONG, RIGHT, RIGHT],
        "query 3": [WRONG, WRONG, WRONG, RIGHT],
        "query 4": [WRONG, RIGHT, NEUTRAL, RIGHT],
    }


def test_examples_show_misses_first_and_half_of_each(task: EvalTask, score: TaskScore) -> None:
    figure = retrieval_examples_figure(task, score, k=2, rows=4)
    assert [text for text in texts(figure) if text.startswith("query")] == [
        "query 2",
        "query 3",
        "query 0",
        "query 1",
    ]
    figure = retrieval_examples_figure(task, score, k=2, rows=50)
    assert sum(text.startswith("query") for text in texts(figure)) == 5


def test_dollar_signs_are_not_formulas(task: EvalTask, score: TaskScore) -> None:
    figure = retrieval_examples_figure(task, score)
    figure.canvas.draw()
    assert any("$1 or \\frac $2" in text for text in texts(figure))


def test_comparison_shows_each_run_once_and_paths_only_where_there_are_several() -> None:
    rows = {"shape": Task("shape", "classification", True), "find": Task("find", "retrieval", True)}
    single = {"aggregate": 0.3, "path_0": 0.3}
    several = {"aggregate": 0.5, "path_0": 0.2, "path_1": 0.4}
    reports = {
        name: ScoreReport({task: TaskResult(row, 10, 0.1, scores) for task, row in rows.items()})
        for name, scores in (("base", single), ("ours", several))
    }
    figure = comparison_figure(reports, "base vs ours")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["base", "ours, aggregate", "ours, one path (mean, worst to best)", "chance"]
    left, right = figure.axes
    heights = [
        [bar.get_height() for bar in container.patches]
        for container in left.containers
        if hasattr(container, "patches") and container.patches
    ]
    assert heights == [pytest.approx([30.0] * 4), pytest.approx([50.0] * 4), pytest.approx([30.0] * 4)]
    assert [label.get_text() for label in right.get_yticklabels()] == ["shape", "find"]
    figure.canvas.draw()


def test_figures_leave_no_global_state() -> None:
    path_matrices_figure({"cosine": torch.eye(2)})
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
