"""Pictures of a study's results: cells and groups of tasks as points, differences, curves, training.

Every function returns a Figure of its own, or ``None`` if there is nothing to draw.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parallel_decoupling.evaluation.plots import COLOURS, INK, clean_axes, new_figure
from studies.paired_statistics import (
    Interval,
    at_point,
    compared,
    group_score,
    groups_of,
    interval,
    last_points,
    path_scores,
)
from studies.results import Result
from studies.study import Cell, Study
from studies.study_tables import group_title

DPI = 150
"""Of every saved picture."""
NEUTRAL, ACCENT = COLOURS[:2]
STROKES = (("-", "o"), ("--", "s"), (":", "^"))
"""Line style and marker of the first seven lines, of the next seven, and of those after them."""
LABEL_LENGTH = 42
SIGNIFICANCE = 0.05
HOLM = "Holm p below 0.05"
TRAINING_PANELS = {
    "path_cosine": "cosine between paths",
    "estimator_nll_held_out": "NLL of q before its fit to the batch",
    "mi": "term between paths (its own unit),\nbefore its weight",
}
"""Logged series and their titles in the picture of training."""


def study_figures(study: Study, results: Sequence[Result]) -> dict[str, Figure]:
    """Draw all pictures of a study, by file stem and in the order of the report."""
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
    """Draw the overall score per cell: mean, 95 % interval, dots for seeds, a tick for the mean path."""
    scored = last_points(study, results)
    if not scored:
        return None
    figure = new_figure(8.4, 1.5 + 0.36 * len(scored))
    axes = figure.add_subplot()
    _cell_points(study, axes, scored, "overall")
    for row, (_, lines) in enumerate(scored):
        if len(path_scores(lines[0])) > 1:
            single = fmean(fmean(path_scores(line)) for line in lines)
            axes.plot(single, row, "|", color=INK, markersize=13, label="mean single path")
    axes.set_yticks(range(len(scored)), [_wrapped(cell.label) for cell, _ in scored], fontsize=9)
    axes.set_xlabel("hit@1 overall, percent")
    shared_legend(figure, 4)
    return figure


def groups_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Draw the points of ``cells_figure`` for every group of tasks."""
    scored = last_points(study, results)
    if not scored:
        return None
    groups = _panel_groups(study)
    columns = 3
    rows = math.ceil(len(groups) / columns)
    figure = new_figure(12.0, 0.5 + rows * (0.9 + 0.3 * len(scored)))
    for number, group in enumerate(groups):
        axes = figure.add_subplot(rows, columns, number + 1)
        _cell_points(study, axes, scored, group)
        labels = [_wrapped(cell.label) for cell, _ in scored] if number % columns == 0 else [""] * len(scored)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_title(group_title(group), fontsize=10)
        if number >= len(groups) - columns:
            axes.set_xlabel("hit@1, percent")
    shared_legend(figure, 3)
    return figure


def curves_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Draw the overall score against steps and against token passes.

    Three seeds or more give a 95 % band, fewer a dot per seed. Markers before a run's last scored step
    are hollow: the learning rate is still high there.
    """
    curved = _curved(study, results)
    if not curved:
        return None
    figure = new_figure(11.0, 5.2)
    by_step, by_passes = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for cell in curved:
        _curve(study, by_step, results, cell, "step", "overall")
        _curve(study, by_passes, results, cell, "token_passes", "overall")
    by_step.set_xlabel("main steps (hollow: on the way, at a higher learning rate than at the end)")
    by_step.set_ylabel("hit@1 overall, percent")
    by_passes.set_xlabel("language-model token passes, millions")
    shared_legend(figure, 3)
    return figure


def group_curves_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Draw the score against token passes for every meta-task, IND and OOD."""
    curved = _curved(study, results)
    if not curved:
        return None
    groups = _panel_groups(study)
    rows = math.ceil(len(groups) / 3)
    figure = new_figure(12.0, 0.6 + 3.2 * rows)
    for place, group in enumerate(groups):
        axes = figure.add_subplot(rows, 3, place + 1)
        for cell in curved:
            _curve(study, axes, results, cell, "token_passes", group)
        axes.set_title(group_title(group), fontsize=10)
        if place % 3 == 0:
            axes.set_ylabel("hit@1, percent")
        if place >= len(groups) - 3:
            axes.set_xlabel("token passes, millions")
    shared_legend(figure, 3)
    return figure


def training_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Draw what training logged of paths and q against steps: a line per cell, the mean over seeds."""
    drawn = [
        (cell, runs)
        for cell, lines in last_points(study, results)
        if (runs := [line["logged"] for line in lines if line.get("logged", {}).get("path_cosine")])
    ]
    if not drawn:
        return None
    figure = new_figure(12.0, 3.9 + 0.22 * math.ceil(len(drawn) / 3))
    for place, (name, title) in enumerate(TRAINING_PANELS.items()):
        axes = figure.add_subplot(1, len(TRAINING_PANELS), place + 1)
        for cell, runs in drawn:
            means = _mean_series([run[name] for run in runs if name in run])
            if any(means.values()):  # a term that a cell has not is logged as 0
                style = {**_style(study, cell), "marker": ""}
                axes.plot(list(means), list(means.values()), label=_line_label(cell, len(runs)), **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("main steps")
        clean_axes(axes, "y")
    shared_legend(figure, 3)
    return figure


def _mean_series(runs: Sequence[Sequence[tuple[int, float]]]) -> dict[int, float]:
    """Return the mean over runs at the steps that all of them have."""
    values = [dict(run) for run in runs]
    common = set.intersection(*map(set, values)) if values else set()
    return {step: fmean(run[step] for run in values) for step in sorted(common)}


def differences_figure(study: Study, results: Sequence[Result]) -> Figure | None:
    """Draw paired differences overall: a dot per seed, the mean, and from three seeds on the interval."""
    found = compared(study, results)
    if not found:
        return None
    figure = new_figure(8.4, 1.5 + 0.4 * len(found))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=0.8)
    for row, each in enumerate(found):
        _interval_points(axes, each.pair, row, ACCENT if each.pair.excludes_zero else NEUTRAL)
        if each.holm_p is not None and each.holm_p < SIGNIFICANCE:
            axes.plot(
                each.pair.mean, row, "o", markersize=13, markerfacecolor="none", color=ACCENT, label=HOLM
            )
    axes.set_yticks(range(len(found)), [_wrapped(each.difference.name) for each in found], fontsize=9)
    axes.set_xlabel("difference in points (blue: its own interval excludes 0)")
    _clean_rows(axes, len(found))
    shared_legend(figure, 4)
    return figure


def _cell_points(study: Study, axes: Axes, scored: Sequence[tuple[Cell, list[Result]]], group: str) -> None:
    """Draw one row per cell that has a score of the group."""
    for row, (_, lines) in enumerate(scored):
        values = [score for line in lines if (score := group_score(study, line, group)) is not None]
        if values:
            _interval_points(axes, interval(values), row, ACCENT)
    _clean_rows(axes, len(scored))


def _clean_rows(axes: Axes, count: int) -> None:
    """Put the first row on top, and draw a pale line from every row to its label."""
    axes.set_ylim(count - 0.4, -0.6)
    clean_axes(axes, "x")
    axes.grid(axis="y", color="#f2f2f2", linewidth=0.8)
    axes.tick_params(axis="y", length=0)


def _interval_points(axes: Axes, found: Interval, row: int, colour: str) -> None:
    """Draw seeds as small dots below the line of the interval and the mean."""
    low, high = found.mean - found.half_width, found.mean + found.half_width
    if math.isfinite(found.half_width):
        axes.plot([low, high], [row, row], color=colour, linewidth=1.6, label="95 % interval")
    axes.plot(found.mean, row, "o", color=colour, markersize=8, label="mean over seeds")
    below = [row + 0.27] * len(found.values)
    axes.plot(found.values, below, "o", color=INK, markersize=3, alpha=0.6, label="seed")


def _curve(study: Study, axes: Axes, results: Sequence[Result], cell: Cell, x: str, group: str) -> None:
    xs, means, lows, highs, count = [], [], [], [], 0
    style = _style(study, cell)
    for step in cell.points:
        seeds = [
            (_place(line, x), score)
            for line in at_point(results, cell.name, step)
            if (score := group_score(study, line, group)) is not None
        ]
        if not seeds:
            continue
        found, count = interval([score for _, score in seeds]), max(count, len(seeds))
        half_width = found.half_width
        if math.isinf(half_width):
            half_width = 0.0
            axes.plot(*zip(*seeds, strict=True), ".", color=style["color"], markersize=5, alpha=0.7)
        xs.append(fmean(place for place, _ in seeds))
        means.append(found.mean)
        lows.append(found.mean - half_width)
        highs.append(found.mean + half_width)
    if xs:
        axes.plot(xs, means, label=_line_label(cell, count), markersize=5, markerfacecolor="white", **style)
        axes.plot(xs[-1], means[-1], color=style["color"], marker=style["marker"], markersize=6)
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
    clean_axes(axes, "y")


def _line_label(cell: Cell, seeds: int) -> str:
    return f"{cell.label} ({seeds} seed{'s' if seeds > 1 else ''})"


def _place(line: Result, x: str) -> float:
    """Return where a line of the results is on the x axis."""
    return float(line["step"]) if x == "step" else line["token_passes"] / 1e6


def _curved(study: Study, results: Sequence[Result]) -> list[Cell]:
    """Return cells with results that are scored at several steps."""
    return [cell for cell, _ in last_points(study, results) if len(cell.points) > 1]


def _panel_groups(study: Study) -> list[str]:
    """Return the groups that have a panel of their own: all but the whole."""
    return [group for group in groups_of(study) if group not in ("overall", "mean_of_meta_tasks")]


def _style(study: Study, cell: Cell) -> dict[str, Any]:
    """Return styles that are the same in every picture, for all cells that are a line in one of them."""
    lines = [
        each.name
        for each in study.cells.values()
        if len(each.points) > 1 or (each.max_steps and each.config.get("model", {}).get("num_paths") != 1)
    ]
    stroke, colour = divmod(lines.index(cell.name), len(COLOURS))
    linestyle, marker = STROKES[stroke % len(STROKES)]
    return {"color": COLOURS[colour], "linestyle": linestyle, "marker": marker}


def _wrapped(label: str) -> str:
    """Break a text into lines of about the same length."""
    lines = math.ceil(len(label) / LABEL_LENGTH)
    return textwrap.fill(label, LABEL_LENGTH if lines == 1 else len(label) // lines + 5)


def shared_legend(figure: Figure, columns: int) -> None:
    """Draw one legend for all panels, below them, with every label once."""
    found = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
