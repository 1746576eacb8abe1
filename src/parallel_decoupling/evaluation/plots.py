"""Figures of paths, of retrieved examples and of runs, without pyplot and its global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.evaluation.report import META_TASKS, ScoreReport
from parallel_decoupling.evaluation.score import TaskScore

COLOURS = ("#8c8c8c", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Grey for the baseline, then Okabe and Ito's palette, safe for colour-blind readers."""
RIGHT, WRONG, NEUTRAL, INK = "#009e73", "#d55e00", "#c8c8c8", "#333333"
GROUP_LABELS = {
    "overall": "overall",
    **dict(zip(META_TASKS, ("classi-\nfication", "VQA", "retrieval", "grounding"), strict=True)),
    "in_distribution": "IND",
    "out_of_distribution": "OOD",
}
THUMBNAIL = 224


def path_matrices_figure(matrices: Mapping[str, Tensor]) -> Figure:
    """Draw one ``[N, N]`` matrix per title on the scale from -1 to 1; a nan stays white and says so."""
    paths = len(next(iter(matrices.values())))
    side = 2.2 + 0.55 * paths
    figure = new_figure(side * len(matrices) + 0.8, side)
    grid = figure.subplots(1, len(matrices), squeeze=False)[0]
    names = [f"path {path}" for path in range(paths)]
    for axes, (title, matrix_NN) in zip(grid, matrices.items(), strict=True):
        picture = axes.imshow(matrix_NN.detach().float().cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        for row, values in enumerate(matrix_NN.tolist()):
            for column, value in enumerate(values):
                colour = "white" if abs(value) > 0.6 else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(paths), names)
        axes.set_yticks(range(paths), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=11)
    figure.colorbar(picture, ax=grid, ticks=[-1, 0, 1], shrink=0.8).outline.set_visible(False)
    return figure


def retrieval_examples_figure(task: EvalTask, score: TaskScore, k: int = 5, rows: int = 4) -> Figure:
    """Draw queries with their best candidates and the truth; misses first, half of ``rows`` if both last.

    Green frames the truth, orange-red what was ranked above it, grey what came after it.
    """
    hits = next(iter(score.hits.values()))
    wrong, right = (~hits).nonzero()[:, 0].tolist(), hits.nonzero()[:, 0].tolist()
    wrong_count = min(len(wrong), max(rows // 2, rows - len(right)))
    chosen = [*wrong[:wrong_count], *right[: rows - wrong_count]]
    figure = new_figure(1.75 * (k + 2) + 0.4, 1.95 * len(chosen) + 0.6)
    grid = figure.subplots(len(chosen), k + 2, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    headings = ["query", *(f"rank {place + 1}" for place in range(k)), "truth"]
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=10, color=INK)
    for cells, row in zip(grid, chosen, strict=True):
        positive = task.candidates_of_row[row][0]
        ranking = [candidate for candidate in score.ranking[row, :k].tolist() if candidate >= 0]
        _draw_input(cells[0], task.queries[task.query_of_row[row]], None)
        _draw_input(cells[-1], task.candidates[positive], RIGHT)
        colour = WRONG
        for cell, candidate in zip(cells[1:-1], ranking, strict=False):
            is_truth = candidate == positive
            _draw_input(cell, task.candidates[candidate], RIGHT if is_truth else colour)
            colour = NEUTRAL if is_truth else colour
    rate = 100 * hits.float().mean().item()
    title = f"{score.task.name}: hit@1 {rate:.1f} %, chance {100 * score.chance:.1f} %"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def comparison_figure(reports: Mapping[str, ScoreReport], title: str) -> Figure:
    """Draw means (left) and tasks (right) of several runs over the same tasks; the baseline comes first.

    Bars and dots are aggregates; whiskers and pale lines go from a run's worst to its best single path.
    Ticks on the right mark the level of chance.
    """
    baseline, last = next(iter(reports.values())), len(reports) - 1
    groups = [group for group in GROUP_LABELS if group in baseline.means]
    order = [task for meta_task in META_TASKS for task in baseline.groups.get(meta_task, ())]
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
        levels = heights + step * (last / 2 - number)
        if len(report.path_columns) > 1:
            left.vlines(places, low, high, color=INK, linewidth=1.2, label=f"{name}, worst to best path")
        scores, low, high = _scores_and_range(report, [report.tasks[task].hit_at_1 for task in order])
        if len(report.path_columns) > 1:
            right.hlines(levels, low, high, color=colour, alpha=0.4, linewidth=4)
        right.plot(scores, levels, "o", color=colour, markersize=6.5)
    left.set_xticks(range(len(groups)), [GROUP_LABELS[group] for group in groups], fontsize=11)
    left.set_xlim(-0.5, len(groups) - 0.5)
    left.set_title("means over tasks, hit@1 in %", fontsize=12, color=INK, loc="left")
    labels = [f"{task}{'' if baseline.tasks[task].task.in_distribution else ' (OOD)'}" for task in order]
    right.set_yticks(heights, labels, fontsize=10, parse_math=False)
    right.set(ylim=(-0.6, len(order) - 0.4), xlim=(0, None))
    right.set_title(
        "tasks, hit@1 in %: aggregate, and range of single paths", fontsize=12, color=INK, loc="left"
    )
    clean_axes(left, "y")
    clean_axes(right, "x")
    figure.suptitle(title, fontsize=15, color=INK, parse_math=False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    return figure


def _scores_and_range(report: ScoreReport, scores: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """Return in percent the first column, and the worst and the best path: ``[3, len(scores)]``."""
    paths = [[each[path] for path in report.path_columns or report.columns] for each in scores]
    headline = [each[report.columns[0]] for each in scores]
    return 100 * np.array([headline, np.min(paths, axis=1), np.max(paths, axis=1)])


def _draw_input(axes: Axes, item: RawInput, frame: str | None) -> None:
    """Draw the image on top and the text below, inside a coloured frame."""
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    axes.spines[:].set_visible(frame is not None)
    axes.spines[:].set(color=frame or NEUTRAL, linewidth=3)
    text = " ".join(item.text.replace(IMAGE_PLACEHOLDER, " ").split())
    if item.images:
        inset = axes.inset_axes((0.04, 0.3 if text else 0.04, 0.92, 0.66 if text else 0.92))
        small = load_image(item.images[0]).copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        inset.imshow(small)
        inset.set_axis_off()
    lines, most = textwrap.wrap(text, 24), 3 if item.images else 9
    if len(lines) > most:
        lines = ["...", *lines[1 - most :]]  # prompts differ at the end
    size = 11 if len(text) < 16 and not item.images else 7.5
    place = {"x": 0.5, "y": 0.15 if item.images else 0.5, "ha": "center", "va": "center"}
    axes.text(s="\n".join(lines), **place, fontsize=size, color=INK, parse_math=False)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of its own, in inches, that keeps its parts apart."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=100, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def clean_axes(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Leave only data, labels and a pale grid."""
    axes.spines[:].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
