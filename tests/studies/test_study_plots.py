"""What the pictures show, read from their axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies import study_plots
from studies.paired_statistics import interval
from studies.results import Result
from studies.study import Study
from tests.support.study import made_up_result, toy_study

SEEDS = {0: 60.0, 1: 61.0, 2: 65.0}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A curve over three seeds, a curve over two, a cell with one point, and one that is not trained."""
    cells = {
        "a": {"label": "cell A", "curve": ["0.5x", "1x"]},
        "b": {"curve": ["0.5x", "1x"]},
        "plain": None,
        "untrained": {"steps": 0},
    }
    differences = [
        {"name": "A over B", "of": "a", "over": "b"},
        {"name": "A over plain", "of": "a", "over": "plain"},
    ]
    return toy_study(tmp_path, seeds=list(SEEDS), cells=cells, differences=differences)


@pytest.fixture
def results(study: Study) -> list[Result]:
    """Three seeds, two seeds, three seeds and one."""
    lines = []
    for seed, score in SEEDS.items():
        lines += [made_up_result(study.cells["a"], seed, step, score + step / 50) for step in (50, 100)]
        lines.append(made_up_result(study.cells["plain"], seed, 100, 64.0 - 2 * seed))
        if seed < 2:
            lines += [made_up_result(study.cells["b"], seed, step, 70.0 + seed) for step in (50, 100)]
    lines.append(made_up_result(study.cells["untrained"], 0, 0, 10.0))
    return lines


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def points(axes: Axes, label: str) -> list[list[tuple[float, float]]]:
    """Of every line with the label."""
    lines = [line for line in axes.get_lines() if line.get_label() == label]
    return [[(float(x), float(y)) for x, y in np.column_stack(line.get_data())] for line in lines]


def test_cells_are_a_mean_an_interval_and_seeds_below_it(study: Study, results: list[Result]) -> None:
    (axes,) = drawn(study_plots.cells_figure(study, results)).axes
    a = interval([62.0, 63.0, 67.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cell A", "b", "plain", "untrained"]
    assert points(axes, "mean over seeds")[0] == [pytest.approx((64.0, 0))]
    (low, high), *others = points(axes, "95 % interval")
    assert (low[0], high[0]) == pytest.approx((64 - a.half_width, 64 + a.half_width))
    assert len(others) == 1  # of the cell "plain"; two seeds and one seed have none
    assert [x for x, _ in points(axes, "seed")[0]] == pytest.approx([62.0, 63.0, 67.0])
    assert points(axes, "mean single path")[0] == [pytest.approx((62.0, 0))]  # 1 and 3 points below
    assert "cut" not in axes.get_xlabel()


def test_differences_have_the_sign_of_the_first_side(study: Study, results: list[Result]) -> None:
    (axes,) = drawn(study_plots.differences_figure(study, results)).axes
    assert points(axes, "mean over seeds") == [[pytest.approx((-8.0, 0))], [pytest.approx((2.0, 1))]]
    seeds = [[x for x, _ in row] for row in points(axes, "seed")]
    assert seeds == [pytest.approx([-8.0, -8.0]), pytest.approx([-2.0, 1.0, 7.0])]
    (low, high) = points(axes, "95 % interval")[0]
    half_width = interval([-2.0, 1.0, 7.0]).half_width
    assert (low[0], high[0]) == pytest.approx((2 - half_width, 2 + half_width))


def test_all_pictures_are_drawn(study: Study, results: list[Result]) -> None:
    figures = study_plots.study_figures(study, results)
    assert {"cells", "differences", "curves", "groups", "group_curves"} <= set(figures)
    for figure in figures.values():
        figure.draw_without_rendering()
