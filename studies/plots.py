"""Pictures of a study's results: curves, bars with a dot per seed, groups of tasks, differences.

Every function returns a Figure of its own, or ``None`` if there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from studies.results import Result
from studies.statistics import (
    at_point,
    group_score,
    groups_of,
    interval,
    paired_difference,
    path_scores,
)
from studies.study import Cell, Study
from studies.tables import group_title

COLOURS = (
    "#8c8c8c",
    "#0072b2",
    "#333333",
    "#009e73",
    "#56b4e9",
    "#d55e00",
    "#e69f00",
    "#cc79a7",
    "#5b3a8c",
    "#7a5230",
    "#f0c000",
    "#1fb5b5",
    "#a00030",
    "#88a030",
)
"""Okabe and Ito's palette, safe for colour-blind readers, and a few more."""
INK = "#333333"
DPI = 150
"""Of every saved picture."""
TRAINING_PANELS = {
    "path_cosine": "cosine between paths",
    "estimator_nll_held_out": "NLL of q on held-out rows",
    "mi": "MI term, before its weight",
}
"""Logged series and their titles in the picture of training."""


def study_figures(study: Study, results: Sequence[Result]) -> dict[str, Figure]:
    """All pictures of a study by file stem, in the order of the report."""
    figures = {
        "cells": cells_figure(study, results),
        "differences": differences_figure(study, results),
        "curves": curves_figure(study, results),
        "groups": groups_figure(study, results),
        "group_curves": group_curves_figure(study, results),
        "training": training_figure(study, results),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def cells_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Overall score per cell: a bar for the mean, a dot per seed, a tick for the mean single path."""
    scored = _scored(study, results)
    if not scored:
        return None
    figure = _figure(8.4, 1.1 + 0.36 * len(scored))
    axes = figure.add_subplot()
    _bars(study, axes, scored, "overall")
    for row, (_, lines) in enumerate(scored):
        if len(path_scores(lines[0])) > 1:
            single = fmean(fmean(path_scores(line)) for line in lines)
            axes.plot([single, single], [row - 0.38, row + 0.38], color=INK, linewidth=1.2)
    axes.set_yticks(range(len(scored)), [cell.label for cell, _ in scored])
    axes.set_xlabel("hit@1 overall, percent; the axis is cut (dots: seeds; tick: mean single path)")
    return figure


def groups_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """The bars of ``cells_figure`` for every group of tasks."""
    scored = _scored(study, results)
    groups = [group for group in groups_of(study)[1:] if group != "mean_of_meta_tasks"]
    if not scored:
        return None
    columns = 3
    rows = math.ceil(len(groups) / columns)
    figure = _figure(12.0, rows * (0.9 + 0.28 * len(scored)))
    for number, group in enumerate(groups):
        axes = figure.add_subplot(rows, columns, number + 1)
        _bars(study, axes, scored, group)
        labels = [cell.label for cell, _ in scored] if number % columns == 0 else []
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_title(group_title(group), fontsize=10)
    return figure


def curves_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Overall score against steps and against token passes, with a 95 % band from three seeds on."""
    curved = _curved(study, results)
    if not curved:
        return None
    figure = _figure(11.0, 4.6)
    panels = [figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)]
    for cell in curved:
        _curve(study, panels[0], results, cell, "step", "overall")
        _curve(study, panels[1], results, cell, "token_passes", "overall")
    panels[0].set_xlabel("main steps")
    panels[0].set_ylabel("hit@1 overall, percent")
    panels[1].set_xlabel("language-model token passes, millions")
    for axes in panels:
        _tidy(axes)
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def group_curves_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Score against token passes for every meta-task, IND and OOD."""
    curved = _curved(study, results)
    if not curved:
        return None
    groups = [group for group in groups_of(study)[1:] if group != "mean_of_meta_tasks"]
    rows = math.ceil(len(groups) / 3)
    figure = _figure(12.0, 3.2 * rows)
    for place, group in enumerate(groups):
        axes = figure.add_subplot(rows, 3, place + 1)
        for cell in curved:
            _curve(study, axes, results, cell, "token_passes", group)
        axes.set_title(group_title(group), fontsize=10)
        _tidy(axes)
        if place == 0:
            axes.legend(fontsize=7, frameon=False)
        if place >= len(groups) - 3:
            axes.set_xlabel("token passes, millions")
    return figure


def training_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """What training logged of the paths and of q against steps: a line per cell, the mean over seeds."""
    drawn = [
        (cell, runs)
        for cell, lines in _scored(study, results)
        if (runs := [line["logged"] for line in lines if line.get("logged", {}).get("path_cosine")])
    ]
    if not drawn:
        return None
    figure = _figure(12.0, 3.6)
    for place, (name, title) in enumerate(TRAINING_PANELS.items()):
        axes = figure.add_subplot(1, len(TRAINING_PANELS), place + 1)
        for cell, runs in drawn:
            means = _mean_series([run[name] for run in runs if name in run])
            if any(means.values()):  # a term that a cell has not is logged as 0
                axes.plot(list(means), list(means.values()), color=_colour(study, cell), label=cell.label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("main steps")
        _tidy(axes)
        if place == 0:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _mean_series(runs: Sequence[Sequence[tuple[int, float]]]) -> dict[int, float]:
    """Mean over runs at the steps that all of them have."""
    values = [dict(run) for run in runs]
    common = set.intersection(*map(set, values)) if values else set()
    return {step: fmean(run[step] for run in values) for step in sorted(common)}


def differences_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Paired differences overall: a dot per seed, the mean, and the 95 % interval from three seeds on."""
    found = [
        (difference, pair)
        for difference in study.differences
        if (pair := paired_difference(study, results, difference)) is not None
    ]
    if not found:
        return None
    figure = _figure(8.4, 1.1 + 0.36 * len(found))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=0.8)
    for row, (_, pair) in enumerate(found):
        colour = COLOURS[1] if pair.excludes_zero else COLOURS[0]
        if math.isfinite(pair.half_width):
            axes.errorbar(pair.mean, row, xerr=pair.half_width, color=colour, capsize=3, linewidth=1.5)
        axes.plot(pair.values, [row] * len(pair.values), "o", color=INK, markersize=3, alpha=0.6)
        axes.plot(pair.mean, row, "D", color=colour, markersize=6)
    axes.set_yticks(range(len(found)), [difference.name for difference, _ in found])
    axes.invert_yaxis()
    axes.set_xlabel("difference in points (blue: the interval excludes 0)")
    _tidy(axes)
    return figure


def _bars(study: Study, axes: Axes, scored: Sequence[tuple[Cell, list[Result]]], group: str) -> None:
    """Horizontal bars; the axis is cut below the lowest seed, so differences can be seen."""
    lowest, highest = 100.0, 0.0
    for row, (cell, lines) in enumerate(scored):
        values = [score for line in lines if (score := group_score(study, line, group)) is not None]
        if not values:
            continue
        lowest, highest = min(lowest, *values), max(highest, *values)
        colour = _colour(study, cell)
        axes.barh(row, fmean(values), color=colour, alpha=0.55, height=0.7)
        if math.isfinite((found := interval(values)).half_width):
            axes.errorbar(found.mean, row, xerr=found.half_width, color=INK, capsize=2, linewidth=0.9)
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=4, markeredgecolor="white")
    margin = max(2.0, 0.15 * (highest - lowest))
    axes.set_xlim(max(0.0, lowest - 2 * margin), min(100.0, highest + margin) if highest else 100.0)
    axes.set_ylim(len(scored) - 0.4, -0.6)
    _tidy(axes)


def _curve(study: Study, axes: Axes, results: Sequence[Result], cell: Cell, x: str, group: str) -> None:
    xs, means, lows, highs = [], [], [], []
    for step in cell.points:
        lines = at_point(results, cell.name, step)
        values = [score for line in lines if (score := group_score(study, line, group)) is not None]
        if not values:
            continue
        found = interval(values)
        half_width = found.half_width if math.isfinite(found.half_width) else 0.0
        xs.append(step if x == "step" else fmean(line["token_passes"] for line in lines) / 1e6)
        means.append(found.mean)
        lows.append(found.mean - half_width)
        highs.append(found.mean + half_width)
    colour = _colour(study, cell)
    axes.plot(xs, means, "o-", color=colour, label=cell.label, markersize=4)
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _scored(study: Study, results: Sequence[Result]) -> list[tuple[Cell, list[Result]]]:
    cells = [(cell, at_point(results, cell.name, cell.points[-1])) for cell in study.cells.values()]
    return [(cell, lines) for cell, lines in cells if lines]


def _curved(study: Study, results: Sequence[Result]) -> list[Cell]:
    """Cells with results that are scored at several steps."""
    return [cell for cell, _ in _scored(study, results) if len(cell.points) > 1]


def _colour(study: Study, cell: Cell) -> str:
    return COLOURS[list(study.cells).index(cell.name) % len(COLOURS)]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.25)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    return figure
