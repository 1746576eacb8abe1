"""Pictures of an analysis of paths; every function returns a Figure of its own."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from parallel_decoupling.diagnostics.patch_maps import GROUPS, AttentionMaps
from parallel_decoupling.diagnostics.probes import ProbeResult
from parallel_decoupling.diagnostics.similarity import PathSimilarity
from parallel_decoupling.evaluation.plots import COLOURS, INK, NEUTRAL, clean_axes, new_figure


def angles_figure(similarity: PathSimilarity) -> Figure:
    """Draw the principal angles of each pair of paths, and those of random subspaces."""
    figure = new_figure(7.6, 4.0)
    axes = figure.add_subplot()
    numbers = range(1, len(similarity.chance_angles) + 1)
    axes.plot(numbers, similarity.angles.T.numpy(), "-", color=NEUTRAL, linewidth=0.8)
    mean, label = similarity.angles.mean(dim=0), f"mean of {len(similarity.pairs)} pairs of paths"
    axes.plot(numbers, mean.numpy(), "o-", color=COLOURS[1], markersize=4, label=label)
    axes.plot(numbers, similarity.chance_angles.numpy(), "--", color=COLOURS[0], label="random subspaces")
    axes.set(ylim=(0, 92), yticks=range(0, 91, 15), ylabel="degrees", xticks=list(numbers))
    axes.set_xlabel("principal angle, smallest first")
    clean_axes(axes, "y")
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    return figure


def probes_figure(probes: Mapping[str, ProbeResult]) -> Figure:
    """Draw accuracies of factors (rows) read from every column, with the majority baseline first."""
    columns = ["majority", *next(iter(probes.values())).accuracy]
    values = np.array([[result.majority, *result.accuracy.values()] for result in probes.values()])
    figure = new_figure(1.6 + 0.95 * len(columns), 1.5 + 0.46 * len(probes))
    axes = figure.add_subplot()
    picture = axes.imshow(100 * values, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for row, (result, line) in enumerate(zip(probes.values(), values, strict=True)):
        for column, (value, spread) in enumerate(zip(line, [0, *result.spread.values()], strict=True)):
            text = f"{100 * value:.0f} ±{100 * spread:.0f}" if column else f"{100 * value:.0f}"
            colour = "white" if value > 0.6 else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9.5)
    axes.set_xticks(range(len(columns)), [column.replace("_", " ") for column in columns])
    axes.set_yticks(range(len(probes)), list(probes))
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_title("linear probes: accuracy in %, ± over folds", fontsize=11, color=INK, loc="left")
    figure.colorbar(picture, ax=axes, ticks=[0, 50, 100], shrink=0.8).outline.set_visible(False)
    return figure


def attention_mass_figure(attention: AttentionMaps) -> Figure:
    """Draw how each path shares its attention among prefix, image and text, layer by layer."""
    num_paths, num_layers, _ = attention.mass.shape
    figure = new_figure(1.6 + 2.6 * num_paths, 3.4)
    grid = figure.subplots(1, num_paths, squeeze=False, sharey=True)[0]
    for path, axes in enumerate(grid):
        bottom = np.zeros(num_layers)
        for group, colour, share_Y in zip(GROUPS, COLOURS[1:], attention.mass[path].T, strict=False):
            share = 100 * share_Y.numpy()
            axes.bar(range(num_layers), share, 0.82, bottom=bottom, color=colour, label=group)
            bottom = bottom + share
        axes.set(title=f"path {path}", xlabel="layer", ylim=(0, 100))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        clean_axes(axes, "y")
    grid[0].set_ylabel("% of the pooled token's attention", color=INK)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def maps_figure(pictures: Sequence[Image.Image], maps: Sequence[Tensor], title: str) -> Figure:
    """Draw pictures (rows) and each path's map ``[N, height, width]``; a row has one colour scale."""
    width = 2.2 * (len(maps[0]) + 1) + 1.0
    figure = new_figure(width, 2.15 * len(pictures) + 0.8)
    grid = figure.subplots(len(pictures), len(maps[0]) + 1, squeeze=False)
    for cells, picture, map_NHW in zip(grid, pictures, maps, strict=False):
        cells[0].imshow(picture)
        limit = float(map_NHW.max())
        options = {"vmin": 0, "vmax": limit, "cmap": "YlOrRd", "alpha": 0.65}
        options["extent"] = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
        for axes, map_HW in zip(cells[1:], map_NHW, strict=True):
            axes.imshow(picture.convert("L"), cmap="gray", vmin=-160, vmax=255)
            drawn = axes.imshow(map_HW.numpy(), **options)
        bar = figure.colorbar(drawn, ax=cells[-1], shrink=0.85, ticks=[0, limit])
        bar.ax.yaxis.set_major_formatter("{x:.2g}")
        bar.outline.set_visible(False)
        for axes in cells:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, name in zip(
        grid[0], ("picture", *(f"path {path}" for path in range(len(maps[0])))), strict=True
    ):
        axes.set_title(name, fontsize=11, color=INK)
    figure.suptitle(textwrap.fill(title, int(10 * width)), fontsize=12, color=INK)
    return figure
