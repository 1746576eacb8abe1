"""Markdown tables of a study's results: cells, groups of tasks, paths, curves, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from studies.paired_statistics import (
    Interval,
    at_point,
    compared,
    group_score,
    groups_of,
    interval,
    last_points,
    paired_difference,
    paired_scores,
    path_scores,
    sides_of,
)
from studies.results import Result
from studies.study import Study

NOTHING = "–"
TITLES = {
    "vqa": "VQA",
    "in_distribution": "IND",
    "out_of_distribution": "OOD",
    "mean_of_meta_tasks": "mean of meta-tasks",
}


def study_tables(study: Study, results: Sequence[Result]) -> str:
    """Return all tables that have rows, as Markdown; scores are hit@1 in percent."""
    parts = [
        "hit@1 in percent, mean over seeds ± half of the 95 % t interval, from three seeds on. Token passes: "
        "tokens times paths through the language model in training, in millions. Minutes: wall time of the "
        "training on one thread, on a machine with other work.",
        "### Cells\n\n" + cell_table(study, results),
    ]
    if study.differences:
        parts.append(
            "### Differences in points, paired by seed\n\nHolm p: two-sided t test of the paired differences "
            "against 0, corrected by Holm's method for all differences here that have an interval.\n\n"
            + difference_table(study, results)
        )
        parts.append("### The same by group of tasks\n\n" + group_difference_table(study, results))
    parts.append("### Groups of tasks\n\n" + group_table(study, results))
    parts.append("### Every scored column, overall\n\n" + column_table(study, results))
    parts.append(
        "### Paths, the term between them and q at the end of training\n\n" + path_table(study, results)
    )
    if any(len(cell.points) > 1 for cell in study.cells.values()):
        parts.append("### Curves\n\n" + curve_table(study, results))
    return "\n\n".join(parts) + "\n"


def cell_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per cell at its last step: cost, aggregate, and what aggregation gains."""
    heading = ["cell", "steps", "seeds", "token passes", "minutes", "overall", "IND", "OOD"]
    heading += ["best path", "gain over best path", "gain over mean path"]
    rows = []
    for cell, lines in last_points(study, results):
        joined = [line for line in lines if len(path_scores(line)) > 1]
        best = [max(path_scores(line)) for line in joined]
        mean = [fmean(path_scores(line)) for line in joined]
        overall = [100 * line["means"]["overall"]["aggregate"] for line in joined]
        rows.append(
            [
                cell.label,
                str(cell.max_steps),
                str(len(lines)),
                _mean([line["token_passes"] / 1e6 for line in lines], "{:.2f}"),
                _mean([line["fit_seconds"] / 60 for line in lines if _is_whole(line)]),
                *(
                    _group_cell(study, lines, group)
                    for group in ("overall", "in_distribution", "out_of_distribution")
                ),
                _mean(best),
                _mean([a - b for a, b in zip(overall, best, strict=True)], "{:+.1f}"),
                _mean([a - b for a, b in zip(overall, mean, strict=True)], "{:+.1f}"),
            ]
        )
    return _markdown(heading, rows)


def _is_whole(line: Result) -> bool:
    """Tell whether the seconds are those of the whole training; some lines have only the last part."""
    return not line.get("resumed") and "unknown" not in line.get("fit_commits", ())


def group_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per cell at its last step, and one column per group of tasks."""
    groups = groups_of(study)
    rows = [
        [cell.label, *(_group_cell(study, lines, group) for group in groups)]
        for cell, lines in last_points(study, results)
    ]
    return _markdown(["cell", *map(group_title, groups)], rows)


def column_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per cell at its last step, and one column per scored kind of embedding.

    A column that only some seeds of the cell have says how many, as their mean is not comparable.
    """
    found = last_points(study, results)
    all_lines = [line for _, lines in found for line in lines]
    names = list(dict.fromkeys(column for line in all_lines for column in line["columns"]))
    paths = [f"path_{number}" for number in range(len(names)) if f"path_{number}" in names]
    columns = ["aggregate", *paths, *(name for name in names if name not in ("aggregate", *paths))]
    rows = []
    for cell, lines in found:
        overall = [line["means"]["overall"] for line in lines]
        scores = [[100 * means[column] for means in overall if column in means] for column in columns]
        rows.append([cell.label, *(_mean_of(each, len(lines)) for each in scores)])
    return _markdown(["cell", *columns], rows)


def _mean_of(scores: Sequence[float], wanted: int) -> str:
    some = f" ({len(scores)} of {wanted} seeds)" if 0 < len(scores) < wanted else ""
    return _mean(scores) + some


def path_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per cell at its last step: what training logged of the paths and of q."""
    names = {
        "path_cosine_first": "path cosine, first logged",
        "path_cosine": "path cosine, last",
        "mi": "term between paths",
        "mi_weight": "its weight",
        "estimator_nll_held_out": "NLL of q before its fit to the batch",
        "estimator_nll": "after its fit",
        "effective_rank": "effective rank of path 0 in a batch",
        "loss": "loss",
    }
    rows = []
    for cell, lines in last_points(study, results):
        if cell.max_steps > 0:
            values = [[line["monitored"].get(name) for line in lines] for name in names]
            present = [[value for value in each if value is not None] for each in values]
            rows.append([cell.label, *(_mean(each, "{:.3g}") for each in present)])
    return _markdown(["cell", *names.values()], rows)


def curve_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per cell and scored step, for cells with several steps."""
    rows = []
    for cell in study.cells.values():
        for step in cell.points if len(cell.points) > 1 else ():
            lines = at_point(results, cell.name, step)
            if lines:
                passes = _mean([line["token_passes"] / 1e6 for line in lines], "{:.2f}")
                scores = [_group_cell(study, lines, group) for group in _CURVE_GROUPS]
                rows.append([cell.label, f"{step} of {cell.max_steps}", str(len(lines)), passes, *scores])
    heading = ["cell", "step", "seeds", "token passes", *map(group_title, _CURVE_GROUPS)]
    return _markdown(heading, rows)


_CURVE_GROUPS = ("overall", "in_distribution", "out_of_distribution")


def difference_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per difference of the study, overall."""
    heading = ["comparison", "of", "over", "steps", "token passes", "seeds", "difference", "95 % interval"]
    rows = []
    for each in compared(study, results):
        difference, pair = each.difference, each.pair
        seeds, sides = paired_scores(study, results, difference), sides_of(study, difference)
        passes = [
            fmean(line["token_passes"] for line in at_point(results, *side) if line["seed"] in seeds)
            for side in sides
        ]
        rows.append(
            [
                difference.name,
                _side_label(study, difference.of, difference.of_column),
                _side_label(study, difference.over, difference.over_column),
                " : ".join(str(step) for _, step in sides),
                f"{passes[0] / passes[1]:.2f} : 1" if min(passes) > 0 else NOTHING,
                str(len(pair.values)),
                f"{pair.mean:+.1f}" + (" (excludes 0)" if pair.excludes_zero else ""),
                _range(pair),
                NOTHING if each.holm_p is None else f"{each.holm_p:.3f}",
            ]
        )
    return _markdown([*heading, "Holm p"], rows)


def _side_label(study: Study, cell: str, column: str) -> str:
    label = study.cells[cell].label
    return label if column == "aggregate" else f"{label}: {column.replace('_', ' ')}"


def group_difference_table(study: Study, results: Sequence[Result]) -> str:
    """Return one row per difference and one column per group; intervals that exclude 0 are bold."""
    groups = groups_of(study)
    rows = []
    for difference in study.differences:
        found = [paired_difference(study, results, difference, group) for group in groups]
        if any(found):
            rows.append([difference.name, *map(_difference_cell, found)])
    return _markdown(["comparison", *map(group_title, groups)], rows)


def group_title(group: str) -> str:
    """Return the short heading of a group of tasks."""
    return TITLES.get(group, group)


def _group_cell(study: Study, lines: Sequence[Result], group: str) -> str:
    scores = [group_score(study, line, group) for line in lines]
    present = [score for score in scores if score is not None]
    if not present:
        return NOTHING
    found = interval(present)
    return f"{found.mean:.1f}" + ("" if math.isinf(found.half_width) else f" ± {found.half_width:.1f}")


def _difference_cell(found: Interval | None) -> str:
    if found is None:
        return NOTHING
    if math.isinf(found.half_width):
        return f"{found.mean:+.1f}"
    text = f"{found.mean:+.1f} ± {found.half_width:.1f}"
    return f"**{text}**" if found.excludes_zero else text


def _range(found: Interval) -> str:
    if math.isinf(found.half_width):
        return f"{len(found.values)} seed{'s' if len(found.values) > 1 else ''}: no interval"
    return f"{found.mean - found.half_width:+.1f} to {found.mean + found.half_width:+.1f}"


def _mean(values: Sequence[float], form: str = "{:.1f}") -> str:
    return form.format(fmean(values)) if values else NOTHING


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
