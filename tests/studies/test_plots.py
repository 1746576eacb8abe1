"""What the pictures show, read from their axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies import plots
from studies.results import Result
from studies.statistics import interval
from studies.study import Study
from tests.support.study import made_up_result, toy_study

SEEDS = {0: 60.0, 1: 61.0, 2: 65.0}
PANELS = ("classification", "in_distribution")
"""Groups of the made-up results that have a panel."""


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
    """Each group has another score, so that none can pass for another."""
    lines = []
    for seed, score in SEEDS.items():
        lines += [made_up_result(study.cells["a"], seed, step, score + step / 50) for step in (50, 100)]
        lines.append(made_up_result(study.cells["plain"], seed, 100, 64.0 - 2 * seed))
        if seed < 2:
            lines += [made_up_result(study.cells["b"], seed, step, 70.0 + seed) for step in (50, 100)]
    lines.append(made_up_result(study.cells["untrained"], 0, 0, 10.0))
    for line in lines:
        line["token_passes"] = 1e6 * (3 * line["step"] + line["seed"])
        for place, group in enumerate(PANELS, start=1):
            columns = line["means"]["overall"]
            line["means"][group] = {name: score - place / 100 for name, score in columns.items()}
    return lines


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def points(axes: Axes, label: str) -> list[list[tuple[float, float]]]:
    """Of every line with the label."""
    lines = [line for line in axes.get_lines() if line.get_label() == label]
    return [[(float(x), float(y)) for x, y in np.column_stack(line.get_data())] for line in lines]


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in figure.axes}


def test_cells_are_a_mean_an_interval_and_seeds_below_it(study: Study, results: list[Result]) -> None:
    (axes,) = drawn(plots.cells_figure(study, results)).axes
    a = interval([62.0, 63.0, 67.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cell A", "b", "plain", "untrained"]
    assert points(axes, "mean over seeds")[0] == [pytest.approx((64.0, 0))]
    (low, high), *others = points(axes, "95 % interval")
    assert (low[0], high[0]) == pytest.approx((64 - a.half_width, 64 + a.half_width))
    assert len(others) == 1  # of the cell "plain"; two seeds and one seed have none
    assert [x for x, _ in points(axes, "seed")[0]] == pytest.approx([62.0, 63.0, 67.0])
    assert points(axes, "mean single path")[0] == [pytest.approx((62.0, 0))]  # 1 and 3 points below
    assert "cut" not in axes.get_xlabel()


def test_every_panel_shows_its_own_group(study: Study, results: list[Result]) -> None:
    groups = panels(drawn(plots.groups_figure(study, results)))
    curves = panels(drawn(plots.group_curves_figure(study, results)))
    for title, mean in (("classification", 63.0), ("IND", 62.0)):
        assert points(groups[title], "mean over seeds")[0] == [pytest.approx((mean, 0))]
        assert points(curves[title], "cell A (3 seeds)")[0][1] == pytest.approx((301.0, mean))
    assert not points(groups["VQA"], "mean over seeds")  # no result has it
    assert not curves["VQA"].get_lines()


def test_curves_run_over_steps_and_over_token_passes(study: Study, results: list[Result]) -> None:
    by_step, by_passes = drawn(plots.curves_figure(study, results)).axes
    assert points(by_step, "cell A (3 seeds)") == [[pytest.approx((50, 63.0)), pytest.approx((100, 64.0))]]
    assert points(by_passes, "cell A (3 seeds)") == [[pytest.approx((151, 63.0)), pytest.approx((301, 64.0))]]
    labels = [line.get_label() for line in by_step.get_lines()]
    assert {label for label in labels if not label.startswith("_")} == {"cell A (3 seeds)", "b (2 seeds)"}


def test_only_the_end_of_a_schedule_is_a_filled_marker(study: Study, results: list[Result]) -> None:
    for axes in drawn(plots.curves_figure(study, results)).axes:
        curve, end, *_ = axes.get_lines()
        assert (curve.get_label(), curve.get_markerfacecolor()) == ("cell A (3 seeds)", "white")
        assert end.get_markerfacecolor() == curve.get_color()
        assert end.get_xydata()[-1] == pytest.approx(curve.get_xydata()[-1])


def test_curves_have_a_band_from_three_seeds_on_and_a_dot_per_seed_below(
    study: Study, results: list[Result]
) -> None:
    axes = drawn(plots.curves_figure(study, results)).axes[0]
    half_width = interval([62.0, 63.0, 67.0]).half_width
    band, flat = (np.asarray(collection.get_paths()[0].vertices) for collection in axes.collections)
    heights = sorted(set(band[band[:, 0] == 100][:, 1].round(6)))
    assert heights == pytest.approx([64 - half_width, 64 + half_width], abs=1e-5)
    assert set(flat[:, 1]) == {70.5}
    dots = [line.get_data() for line in axes.get_lines() if line.get_marker() == "."]
    assert [(list(x), list(y)) for x, y in dots] == [
        ([50.0, 50.0], pytest.approx([70.0, 71.0])),
        ([100.0, 100.0], pytest.approx([70.0, 71.0])),
    ]


def test_differences_have_the_sign_of_the_first_side(study: Study, results: list[Result]) -> None:
    (axes,) = drawn(plots.differences_figure(study, results)).axes
    assert points(axes, "mean over seeds") == [[pytest.approx((-8.0, 0))], [pytest.approx((2.0, 1))]]
    seeds = [[x for x, _ in row] for row in points(axes, "seed")]
    assert seeds == [pytest.approx([-8.0, -8.0]), pytest.approx([-2.0, 1.0, 7.0])]
    (low, high) = points(axes, "95 % interval")[0]
    half_width = interval([-2.0, 1.0, 7.0]).half_width
    assert (low[0], high[0]) == pytest.approx((2 - half_width, 2 + half_width))


def test_what_survives_the_correction_is_ringed(study: Study, results: list[Result]) -> None:
    (axes,) = drawn(plots.differences_figure(study, results)).axes
    assert not points(axes, plots.HOLM)  # -2, 1 and 7 points
    for line in results:
        if line["cell"] == "plain":
            line["means"]["overall"]["aggregate"] = (
                52 + SEEDS[line["seed"]] - 60 + 0.01 * line["seed"]
            ) / 100
    (axes,) = drawn(plots.differences_figure(study, results)).axes
    assert points(axes, plots.HOLM) == [[pytest.approx((9.99, 1))]]


def test_training_is_the_mean_over_seeds_of_what_was_logged(study: Study, results: list[Result]) -> None:
    for line in results:
        if (line["cell"], line["step"]) == ("a", 100) and line["seed"] < 2:
            height = 0.2 + 0.2 * line["seed"]
            line["logged"] = {
                "path_cosine": [(9, height), (99, 2 * height)],
                "estimator_nll_held_out": [(9, height), (19, 1.0)],
                "mi": [(9, 0.0), (99, 0.0)],
            }
    figure = drawn(plots.training_figure(study, results))
    cosine, nll, term = figure.axes
    assert points(cosine, "cell A (2 seeds)") == [[pytest.approx((9, 0.3)), pytest.approx((99, 0.6))]]
    assert points(nll, "cell A (2 seeds)") == [[pytest.approx((9, 0.3)), pytest.approx((19, 1.0))]]
    assert nll.get_title() == "NLL of q before its fit to the batch"
    assert not term.get_lines()  # a term that was never on is not drawn as a line at 0


@pytest.mark.parametrize("name", ["cells", "differences", "curves", "groups", "group_curves"])
def test_legends_are_below_all_panels(study: Study, results: list[Result], name: str) -> None:
    figure = plots.study_figures(study, results)[name]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    top = legend.get_window_extent().y1
    assert all(axes.get_legend() is None and axes.get_tightbbox().y0 > top for axes in figure.axes)


def test_no_two_lines_look_the_same(tmp_path: Path) -> None:
    cells: dict[str, Any] = {f"c{number}": {"steps": 0 if number == 3 else 9} for number in range(20)}
    study = toy_study(tmp_path, cells=cells)
    drawn_cells = [cell for cell in study.cells.values() if cell.max_steps]
    styles = {tuple(plots._style(study, cell).items()) for cell in drawn_cells}
    assert len(styles) == len(drawn_cells) == 19
