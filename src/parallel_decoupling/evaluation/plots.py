"""Figures of paths, of retrieved examples and of runs, without pyplot and its global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.evaluation.report import META_TASKS, ScoreReport
from parallel_decoupling.evaluation.score import TaskScore

COLOURS = ("#8c8c8c", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Grey for the baseline, then Okabe and Ito's palette, safe for colour-blind readers."""
RIGHT, WRONG, NEUTRAL, INK = "#009e73", "#d55e00", "#c8c8c8", "#333333"
GROUPS = ("overall", *META_TASKS, "in_distribution", "out_of_distribution")
GROUP_LABELS = ("overall", "classi-\nfication", "VQA", "retrieval", "grounding", "IND", "OOD")
THUMBNAIL = 224


def path_similarity_figure(cosine_NN: Tensor) -> Figure:
    """Draw the mean cosine between paths, ``[N, N]`` in [-1, 1]."""
    return path_matrices_figure({"mean cosine between paths": cosine_NN})


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
    """Draw queries with their best candidates and the truth; misses first.

    Green frames the truth, orange-red what was ranked above it, grey what came after it.

    Args:
        task: the inputs.
        score: of that task; its ranking and the hits of its first column are drawn.
        k: candidates per query, 1 to 10.
        rows: queries; half of them misses while both kinds last.
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
    """Draw means (left) and tasks (right) of several runs over the same tasks.

    A run with several paths shows its aggregate, and the mean of its single paths with whiskers from
    the worst to the best path. Ticks on the right mark the level of chance. The baseline comes first.
    """
    tasks = len(next(iter(reports.values())).tasks)
    figure = new_figure(16, max(7.0, 2.4 + 0.36 * tasks))
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _draw_means(left, reports)
    _draw_tasks(right, reports)
    figure.suptitle(title, fontsize=15, color=INK, parse_math=False)
    handles, labels = left.get_legend_handles_labels()
    chance_handles, chance_labels = right.get_legend_handles_labels()
    handles, labels = [*handles, *chance_handles], [*labels, *chance_labels]
    columns = 4 if len(labels) < 5 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    return figure


def _draw_means(axes: Axes, reports: Mapping[str, ScoreReport]) -> None:
    means = {name: report.means for name, report in reports.items()}
    groups = [group for group in GROUPS if group in next(iter(means.values()))]
    labels = dict(zip(GROUPS, GROUP_LABELS, strict=True))
    width = 0.84 / sum(2 if len(report.path_columns) > 1 else 1 for report in reports.values())
    places = np.arange(len(groups)) - 0.42 + width / 2
    for number, (name, report) in enumerate(reports.items()):
        colour, several = COLOURS[number % len(COLOURS)], len(report.path_columns) > 1
        headline = [100 * means[name][group][report.columns[0]] for group in groups]
        label = f"{name}, aggregate" if several else name
        bars = axes.bar(places, headline, width * 0.92, color=colour, label=label)
        turned, size = (0, 9) if width > 0.2 else (90, 8)
        axes.bar_label(bars, fmt="%.1f", padding=2, rotation=turned, fontsize=size, color=INK)
        places = places + width
        if several:
            spread = [[100 * means[name][group][path] for path in report.path_columns] for group in groups]
            centre = np.mean(spread, axis=1)
            reach = [centre - np.min(spread, axis=1), np.max(spread, axis=1) - centre]
            whiskers = {"ecolor": INK, "elinewidth": 1.2, "capsize": 2.5}
            label = f"{name}, one path (mean, worst to best)"
            pale = _pale(colour)
            axes.bar(places, centre, width * 0.92, yerr=reach, color=pale, error_kw=whiskers, label=label)
            places = places + width
    axes.set_xticks(range(len(groups)), [labels[group] for group in groups], fontsize=11)
    axes.set_title("means over tasks, hit@1 in %", fontsize=12, color=INK, loc="left")
    axes.set_xlim(-0.5, len(groups) - 0.5)
    clean_axes(axes, "y")
    axes.tick_params(axis="x", length=0)


def _draw_tasks(axes: Axes, reports: Mapping[str, ScoreReport]) -> None:
    baseline = next(iter(reports.values()))
    order = [task for meta_task in META_TASKS for task in baseline.groups.get(meta_task, ())]
    heights = list(range(len(order) - 1, -1, -1))
    chance = [100 * baseline.tasks[task].chance for task in order]
    axes.plot(chance, heights, "|", color=INK, label="chance", markersize=9, markeredgewidth=1.4, zorder=4)
    step = 0.56 / max(len(reports) - 1, 2)
    for number, report in enumerate(reports.values()):
        colour = COLOURS[number % len(COLOURS)]
        shift = step * ((len(reports) - 1) / 2 - number)
        for task, height in zip(order, heights, strict=True):
            scores = report.tasks[task].hit_at_1
            paths, level = [100 * scores[path] for path in report.path_columns], height + shift
            if len(paths) > 1:
                ends = [min(paths), max(paths)]
                axes.plot(ends, [level] * 2, color=_pale(colour), linewidth=4, solid_capstyle="butt")
            axes.plot(100 * scores[report.columns[0]], level, "o", color=colour, markersize=6.5)
    labels = [f"{task}{'' if baseline.tasks[task].task.in_distribution else ' (OOD)'}" for task in order]
    axes.set_yticks(heights, labels, fontsize=10, parse_math=False)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlim(left=0)
    title = "tasks, hit@1 in %: aggregate, and range of single paths"
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    clean_axes(axes, "x")
    axes.tick_params(axis="y", length=0)


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
    shown = "\n".join(
        lines if len(lines) <= most else ["...", *lines[1 - most :]]
    )  # prompts differ at the end
    size = 11 if len(text) < 16 and not item.images else 7.5
    height = 0.15 if item.images else 0.5
    axes.text(0.5, height, shown, ha="center", va="center", fontsize=size, color=INK, parse_math=False)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of its own, in inches, that keeps its parts apart."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=100, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _pale(colour: str) -> tuple[float, ...]:
    """Mix the colour with white; unlike transparency this hides the grid."""
    return tuple(0.4 * channel + 0.6 for channel in to_rgb(colour))


def clean_axes(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Leave only data, labels and a pale grid."""
    axes.spines[:].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
