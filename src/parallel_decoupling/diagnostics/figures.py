"""Pictures of an analysis of paths. Drawing only: every function returns a Figure of its own.

Elsewhere: the numbers (``study``), the style that all figures share (``evaluation.plots``).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from parallel_decoupling.diagnostics.attention import GROUPS, AttentionMaps
from parallel_decoupling.diagnostics.errors import ErrorOverlap
from parallel_decoupling.diagnostics.probes import ProbeResult
from parallel_decoupling.diagnostics.similarity import PathSimilarity
from parallel_decoupling.diagnostics.study import SHOWN, PathAnalysis
from parallel_decoupling.evaluation.plots import (
    COLOURS,
    INK,
    NEUTRAL,
    clean_axes,
    new_figure,
    path_matrices_figure,
)

DPI = 150
"""For ``savefig``: the labels of maps are small."""


def figures(analysis: PathAnalysis) -> dict[str, Figure]:
    """All pictures that the analysis has numbers for, by file name without suffix."""
    drawn: dict[str, Figure] = {}
    if analysis.num_paths > 1:
        drawn["similarity"] = similarity_figure(analysis.similarity)
        drawn["principal_angles"] = angles_figure(analysis.similarity)
    if analysis.probes:
        drawn["probes"] = probes_figure(analysis.probes)
    if analysis.attention is not None:
        drawn["attention_mass"] = attention_mass_figure(analysis.attention)
    if analysis.attention is not None and analysis.attention.patches:
        maps = analysis.attention.patches[: len(analysis.pictures)]
        title = "attention of the pooled token to the image's tokens (share of the image's attention)"
        drawn["attention_maps"] = maps_figure(analysis.pictures, maps, title)
        if analysis.num_paths > 1:
            title = "attention to the image's tokens, minus the mean of the paths"
            differences = [map_NHW - map_NHW.mean(dim=0) for map_NHW in maps]
            drawn["attention_differences"] = maps_figure(analysis.pictures, differences, title)
    change, score = analysis.contributions.change, analysis.contributions.score
    shown = len(analysis.pictures)
    title = "change of the embedding without a patch (1 - cosine)"
    drawn["contributions"] = maps_figure(analysis.pictures, list(change[:shown]), title)
    if score is not None:
        title = "what the cosine to the caption loses without a patch"
        drawn["score_contributions"] = maps_figure(analysis.pictures, list(score[:shown]), title)
    if analysis.errors is not None and analysis.num_paths > 1:
        drawn["errors"] = errors_figure(analysis.errors)
    return drawn


def similarity_figure(similarity: PathSimilarity) -> Figure:
    """Draw cosine, centred cosine and linear CKA between paths."""
    return path_matrices_figure(
        {
            "mean cosine": similarity.cosine,
            "mean cosine, centred": similarity.centred_cosine,
            f"linear CKA (shuffled: {float(similarity.shuffled_cka.mean()):.2f})": similarity.cka,
        }
    )


def errors_figure(errors: ErrorOverlap) -> Figure:
    """Draw how much the misses of the paths overlap."""
    return path_matrices_figure(
        {
            "misses: Jaccard": torch.from_numpy(errors.jaccard),
            "misses: Cohen's kappa": torch.from_numpy(errors.kappa),
        }
    )


def angles_figure(similarity: PathSimilarity) -> Figure:
    """Draw the principal angles of each pair of paths, and those of random subspaces."""
    figure = new_figure(7.6, 4.0)
    axes = figure.add_subplot()
    numbers = range(1, similarity.angles.shape[1] + 1)
    pairs, colours = similarity.pairs.tolist(), COLOURS[1:]
    if len(pairs) <= len(colours):
        for (i, j), angles_S, colour in zip(pairs, similarity.angles, colours, strict=False):
            axes.plot(numbers, angles_S.numpy(), "o-", color=colour, markersize=4, label=f"paths {i} and {j}")
    else:
        axes.plot(numbers, similarity.angles.T.numpy(), "-", color=NEUTRAL, linewidth=0.8)
        mean_S, label = similarity.angles.mean(dim=0), f"mean of {len(pairs)} pairs"
        axes.plot(numbers, mean_S.numpy(), "o-", color=colours[0], markersize=4, label=label)
    axes.plot(numbers, similarity.chance_angles.numpy(), "--", color=COLOURS[0], label="random subspaces")
    axes.set(ylim=(0, 92), yticks=range(0, 91, 15))
    axes.set_xticks(list(numbers))
    axes.set_xlabel("principal angle, smallest first", color=INK)
    axes.set_ylabel("degrees", color=INK)
    directions = len(similarity.chance_angles)
    axes.set_title(
        f"angles between the {directions} leading directions of two paths", fontsize=11, loc="left", color=INK
    )
    clean_axes(axes, "y")
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    return figure


def probes_figure(probes: Mapping[str, ProbeResult]) -> Figure:
    """Draw accuracies of factors (rows) read from every column, with the majority baseline first."""
    columns = list(next(iter(probes.values())).accuracy)
    values = np.array(
        [[result.majority, *result.accuracy.values()] for result in probes.values()], dtype=np.float64
    )
    figure = new_figure(2.6 + 0.95 * len(columns), 1.5 + 0.46 * len(probes))
    axes = figure.add_subplot()
    picture = axes.imshow(100 * values, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for row, (result, line) in enumerate(zip(probes.values(), values, strict=True)):
        spreads = [0.0, *result.spread.values()]
        for column, (value, spread) in enumerate(zip(line, spreads, strict=True)):
            text = f"{100 * value:.0f}" if column == 0 else f"{100 * value:.0f} ±{100 * spread:.0f}"
            colour = "white" if value > 0.6 else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9.5)
    axes.axvline(0.5, color="white", linewidth=4)
    if len(columns) > 1:
        axes.axvline(1.5, color="white", linewidth=2)
    names = ["majority", *(column.replace("_", " ") for column in columns)]
    axes.set_xticks(range(len(names)), names, fontsize=10)
    axes.set_yticks(range(len(probes)), list(probes), fontsize=10)
    axes.tick_params(length=0, colors=INK)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.set_title("linear probes: accuracy in %, ± over folds", fontsize=11, color=INK, loc="left")
    figure.colorbar(picture, ax=axes, ticks=[0, 50, 100], shrink=0.8).outline.set_visible(False)
    return figure


def attention_mass_figure(attention: AttentionMaps) -> Figure:
    """Draw how each path shares its attention among prefix, image and text, layer by layer."""
    num_paths, num_layers, _ = attention.mass.shape
    figure = new_figure(1.6 + 2.6 * num_paths, 3.4)
    grid = figure.subplots(1, num_paths, squeeze=False, sharey=True)[0]
    colours = (COLOURS[2], COLOURS[1], NEUTRAL)
    for path, axes in enumerate(grid):
        bottom = np.zeros(num_layers)
        for group, colour, share_Y in zip(GROUPS, colours, attention.mass[path].T, strict=True):
            share = 100 * share_Y.numpy()
            axes.bar(range(num_layers), share, 0.82, bottom=bottom, color=colour, label=group)
            bottom = bottom + share
        axes.set_title(f"path {path}", fontsize=11, color=INK)
        axes.set_xlabel("layer", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_ylim(0, 100)
        clean_axes(axes, "y")
    grid[0].set_ylabel("% of the pooled token's attention", color=INK)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=10)
    return figure


def maps_figure(pictures: Sequence[Image.Image], maps: Sequence[Tensor], title: str) -> Figure:
    """Draw pictures (rows) with each path's map over a grey copy.

    Maps of one picture share their colour scale, so paths can be compared along a row; with values below
    zero, the maps of all pictures are shown from blue (negative) to red.

    Args:
        pictures: up to ``SHOWN``.
        maps: per picture ``[N, height, width]``.
        title: above all.
    """
    pictures, maps = pictures[:SHOWN], maps[:SHOWN]
    num_paths = len(maps[0])
    width = 2.2 * (num_paths + 1) + 1.0
    figure = new_figure(width, 2.15 * len(pictures) + 0.8)
    grid = figure.subplots(len(pictures), num_paths + 1, squeeze=False)
    signed = any(float(map_NHW.min()) < -0.05 * float(map_NHW.max()) for map_NHW in maps)
    grid[0, 0].set_title("picture", fontsize=11, color=INK)
    for row, (cells, picture, map_NHW) in enumerate(zip(grid, pictures, maps, strict=True)):
        cells[0].imshow(picture)
        low, high = float(map_NHW.min()), float(map_NHW.max())
        limit = max(abs(low), abs(high))
        for path, axes in enumerate(cells[1:]):
            drawn = _overlay(axes, picture, map_NHW[path], (-limit, limit) if signed else (0.0, high), signed)
            if row == 0:
                axes.set_title(f"path {path}", fontsize=11, color=INK)
        bar = figure.colorbar(
            drawn, ax=cells[-1], shrink=0.85, ticks=[-limit, 0, limit] if signed else [0, high]
        )
        bar.ax.tick_params(labelsize=8, colors=INK)
        bar.ax.yaxis.set_major_formatter("{x:.2g}")
        bar.outline.set_visible(False)
        for axes in cells:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    figure.suptitle(textwrap.fill(title, int(10 * width)), fontsize=12, color=INK)
    return figure


def _overlay(
    axes: Axes, picture: Image.Image, map_HW: Tensor, limits: tuple[float, float], signed: bool
) -> AxesImage:
    width, height = picture.size
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(picture.convert("L"), cmap="gray", vmin=-160, vmax=255)
    return axes.imshow(
        map_HW.numpy(),
        extent=extent,
        vmin=limits[0],
        vmax=limits[1],
        cmap="RdBu_r" if signed else "YlOrRd",
        alpha=0.65,
        interpolation="nearest",
    )
