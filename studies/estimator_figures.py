"""Table and pictures of ``studies.estimators``, from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from parallel_decoupling.evaluation.plots import COLOURS, INK, clean_axes, new_figure
from studies.study_plots import DPI, shared_legend

Row = dict[str, Any]
WITH_Q, WITHOUT_Q = ("vclub",), ("hsic", "crosscov", "orthogonal")
"""Kinds that estimate nats by way of q, and kinds in no unit of information."""
KIND_COLOURS = dict(zip((*WITH_Q, *WITHOUT_Q), COLOURS[1:], strict=False))
SETTINGS = {
    "Gaussians, true q": {"cubed": False, "perfect_q": True},
    "Gaussians, fitted q": {"cubed": False, "perfect_q": False},
    "cubes, fitted q": {"cubed": True, "perfect_q": False},
}


def chosen(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Return the rows with these values, ordered by batch size."""
    found = [row for row in rows if all(row[key] == value for key, value in values.items())]
    return sorted(found, key=lambda row: int(row["batch_size"]))


def write_figures(rows: Sequence[Row], folder: Path) -> None:
    """Write ``estimates.png``, ``gradient_cosine.png`` and ``gradient_noise.png``."""
    rho = max(row["rho"] for row in rows)
    in_nats = [row for row in rows if row["kind"] in WITH_Q]
    _grid(
        in_nats,
        rho,
        _estimate,
        f"estimates at correlation {rho}, nats per dimension: mean ± one standard deviation over batches",
        log=True,
    ).savefig(folder / "estimates.png", dpi=DPI)
    _grid(
        rows,
        rho,
        _line("gradient_cosine"),
        f"cosine between one batch's gradient and that of the exact mutual information, correlation {rho}",
    ).savefig(folder / "gradient_cosine.png", dpi=DPI)
    _grid(
        rows,
        rho,
        _line("gradient_noise"),
        f"noise of one batch's gradient over its mean's norm, correlation {rho}",
        log=True,
    ).savefig(folder / "gradient_noise.png", dpi=DPI)


def _grid(
    rows: Sequence[Row],
    rho: float,
    draw: Callable[[Axes, list[Row], int, int], None],
    title: str,
    *,
    log: bool = False,
) -> Figure:
    """Draw a grid with a column per dimension and a row per setting; batch size runs along x."""
    dims = sorted({row["embed_dim"] for row in rows})
    kinds = [kind for kind in KIND_COLOURS if any(row["kind"] == kind for row in rows)]
    figure = new_figure(3.5 * len(dims) + 0.6, 8.4)
    grid = figure.subplots(len(SETTINGS), len(dims), squeeze=False, sharex=True, sharey=True)
    for line, (setting, values) in zip(grid, SETTINGS.items(), strict=True):
        for axes, dim in zip(line, dims, strict=True):
            for number, kind in enumerate(kinds):
                draw(axes, chosen(rows, rho=rho, embed_dim=dim, kind=kind, **values), number, len(kinds))
            axes.set_xscale("log", base=2)
            sizes = sorted({row["batch_size"] for row in rows})
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.set_title(f"{setting}, D = {dim}", fontsize=10.5, color=INK, loc="left")
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter("{x:g}")
            clean_axes(axes, "y")
    for axes in grid[-1]:
        axes.set_xlabel("rows per batch", color=INK)
    shared_legend(figure, 8)
    figure.suptitle(title, fontsize=12.5, color=INK)
    return figure


def _estimate(axes: Axes, rows: list[Row], number: int, count: int) -> None:
    if not rows:
        return
    if number == 0:
        axes.axhline(rows[0]["exact"], color=INK, linewidth=1, label="exact mutual information")
        if not rows[0]["cubed"]:
            limit = rows[0]["limit"]
            axes.axhline(limit, color=INK, linewidth=1, linestyle=":", label="limit of vCLUB with a true q")
    kind = rows[0]["kind"]
    shift = 1.13 ** (number - (count - 1) / 2)
    axes.errorbar(
        [row["batch_size"] * shift for row in rows],
        [row["mean"] for row in rows],
        [row["std"] for row in rows],
        fmt="o",
        color=KIND_COLOURS[kind],
        markersize=5,
        capsize=3,
        label=kind,
    )


def _line(key: str) -> Callable[[Axes, list[Row], int, int], None]:
    def draw(axes: Axes, rows: list[Row], number: int, count: int) -> None:
        known = [row for row in rows if row[key] is not None]
        if known:
            kind = known[0]["kind"]
            sizes, values = [row["batch_size"] for row in known], [row[key] for row in known]
            axes.plot(sizes, values, "o-", color=KIND_COLOURS[kind], markersize=4, label=kind)

    return draw


def write_table(results: dict[str, Any], table_file: Path) -> None:
    """Write every row of the grid as Markdown, one table per setting and dimension."""
    rows, settings = results["rows"], results["settings"]
    lines = [
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, {results['seconds']} s; "
        f"{settings['draws']} batches per cell, q fitted on {settings['fit_steps']} batches. "
        "Nats per dimension; hsic, crosscov and orthogonal have no q and no unit of information, so no bias. "
        "Gradient: "
        "cosine of one batch's gradient, and of the mean gradient, to the exact one; noise is the root of "
        "the summed variance over the norm of the mean gradient.",
    ]
    for setting, values in SETTINGS.items():
        for dim in sorted({row["embed_dim"] for row in rows}):
            heading = [
                "rho",
                "B",
                "kind",
                "exact",
                "mean",
                "bias",
                "std",
                "gradient cosine",
                "of the mean",
                "noise",
            ]
            lines += ["", f"### {setting}, D = {dim}", "", "| " + " | ".join(heading) + " |"]
            lines.append("|" + "---:|" * len(heading))
            for row in sorted(chosen(rows, embed_dim=dim, **values), key=lambda row: row["rho"]):
                lines.append("| " + " | ".join(_table_cells(row)) + " |")
    table_file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table_cells(row: Row) -> list[str]:
    independent = row["rho"] == 0
    noise = row["gradient_noise"]
    return [
        f"{row['rho']}",
        str(row["batch_size"]),
        row["kind"],
        f"{row['exact']:.3f}",
        f"{round(row['mean'], 4) + 0:.4f}",  # no minus before a zero
        "" if row["bias"] is None else f"{round(row['bias'], 3) + 0:+.3f}",
        f"{row['std']:.4f}",
        "" if independent else f"{row['gradient_cosine']:.2f}",
        "" if independent else f"{row['mean_gradient_cosine']:.2f}",
        "" if noise is None else f"{noise:.2f}",
    ]
