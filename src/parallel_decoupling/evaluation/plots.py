"""Figures of runs, without pyplot and its global state."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from parallel_decoupling.data.tasks import OVERALL
from parallel_decoupling.evaluation.report import ScoreReport

COLOURS = ("#8c8c8c", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Grey for the baseline, then Okabe and Ito's palette, safe for colour-blind readers."""
INK = "#333333"
SPLITS = ("in_distribution", "out_of_distribution", OVERALL)  # whose tasks are in other groups as well


def comparison_figure(reports: Mapping[str, ScoreReport], title: str) -> Figure:
    """Draw means (left) and tasks (right) of several runs over the same tasks; the baseline comes first."""
    baseline, last = next(iter(reports.values())), len(reports) - 1
    groups = baseline.groups
    order = [task for group, tasks in groups.items() if group not in SPLITS for task in tasks]
    heights = np.arange(len(order))[::-1]
    figure = new_figure(16, max(7.0, 2.4 + 0.36 * len(order)))
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    chance = [100 * baseline.tasks[task].chance for task in order]
    right.plot(chance, heights, "|", color=INK, label="chance", markersize=9, markeredgewidth=1.4, zorder=4)
    width, step = 0.84 / len(reports), 0.56 / max(last, 2)
    for number, (name, report) in enumerate(reports.items()):
        colour, means = COLOURS[number % len(COLOURS)], report.means
        scores, low, high = _scores_and_range(report, [means[group] for group in groups])
        places = np.arange(len(groups)) - 0.42 + width * (number + 0.5)
        bars = left.bar(places, scores, width * 0.92, color=colour, label=name)
        left.bar_label(bars, fmt="%.1f", padding=2, rotation=0 if width > 0.2 else 90, fontsize=9, color=INK)
        left.vlines(places, low, high, color=INK, linewidth=1.2)
        scores, low, high = _scores_and_range(report, [report.tasks[task].score for task in order])
        levels = heights + step * (last / 2 - number)
        right.hlines(levels, low, high, color=colour, alpha=0.4, linewidth=4)
        right.plot(scores, levels, "o", color=colour, markersize=6.5)
    left.set_xticks(range(len(groups)), [group.replace("_", "\n") for group in groups], fontsize=10)
    left.set_xlim(-0.5, len(groups) - 0.5)
    apart, titles = {*groups.get("out_of_distribution", ())}, baseline.tasks
    names = [f"{titles[task].title} (OOD)" if task in apart else titles[task].title for task in order]
    right.set_yticks(heights, names, fontsize=10, parse_math=False)
    right.set(ylim=(-0.6, len(order) - 0.4), xlim=(0, None))
    for axes, what, grid in ((left, "means over tasks", "y"), (right, "tasks", "x")):
        text = f"{what}, hit@1 in %: aggregate, and range of single paths"
        axes.set_title(text, fontsize=12, color=INK, loc="left")
        clean_axes(axes, grid)
    figure.suptitle(title, fontsize=15, color=INK, parse_math=False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    return figure


def _scores_and_range(report: ScoreReport, scores: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """Return in percent the first column, and the worst and the best path: ``[3, len(scores)]``."""
    paths = [[each[path] for path in report.path_columns or report.columns] for each in scores]
    headline = [each[report.columns[0]] for each in scores]
    return 100 * np.array([headline, np.min(paths, axis=1), np.max(paths, axis=1)])


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of its own, in inches, that keeps its parts apart."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=100, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def clean_axes(axes: Axes, grid: Any) -> None:
    """Leave only data, labels and a pale grid."""
    axes.spines[:].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
