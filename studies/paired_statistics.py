"""Means over seeds, 95 % t intervals and differences paired by seed, from the results of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student_t

from studies.results import Result
from studies.study import Cell, Difference, Study

GROUPS = (
    "overall",
    "classification",
    "vqa",
    "retrieval",
    "grounding",
    "in_distribution",
    "out_of_distribution",
    "mean_of_meta_tasks",
)
"""Means that a score report has, in the order of the tables."""
ONE_PATH = "one_path"
"""A column that no result has: the mean over the columns of its single paths."""
LEAST_SEEDS = 3
"""With two seeds the t interval is 12.7 standard errors wide: no more than the two values themselves say."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t interval, which is infinite below ``LEAST_SEEDS`` seeds.

    Attributes:
        mean: of the values.
        half_width: mean minus and plus this is the interval.
        values: one per seed.
    """

    mean: float
    half_width: float
    values: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        """Tell whether the whole interval is on one side of 0."""
        return abs(self.mean) > self.half_width


def interval(values: Sequence[float]) -> Interval:
    """Return mean and t interval of one value per seed.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    count = len(values)
    half_width = math.inf
    if count >= LEAST_SEEDS:
        half_width = float(student_t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(fmean(values), half_width, tuple(values))


def at_point(results: Sequence[Result], cell: str, step: int) -> list[Result]:
    """Return the results of a cell at a step, one per seed."""
    return [result for result in results if (result["cell"], result["step"]) == (cell, step)]


def last_points(study: Study, results: Sequence[Result]) -> list[tuple[Cell, list[Result]]]:
    """Return the cells that have results at their last step, with these results."""
    found = [(cell, at_point(results, cell.name, cell.points[-1])) for cell in study.cells.values()]
    return [(cell, lines) for cell, lines in found if lines]


def group_score(study: Study, result: Result, group: str, column: str = "aggregate") -> float | None:
    """Return the mean score of a group of tasks in percent.

    Args:
        study: has the groups of its own.
        result: a line of the results.
        group: one of ``GROUPS`` or of the study's.
        column: ``aggregate``, ``path_0``, ..., or ``one_path``: the mean score of the single paths.

    Returns:
        The score; ``None`` if the result lacks the column or a task of the group.
    """
    if column == ONE_PATH:
        paths = [group_score(study, result, group, name) for name in path_columns(result)]
        present = [score for score in paths if score is not None]
        return fmean(present) if present else None
    if group in study.groups:
        scores = [result["tasks"].get(task, {}).get(column) for task in study.groups[group]]
        return None if None in scores else 100 * fmean(scores)
    score = result["means"].get(group, {}).get(column)
    return None if score is None else 100 * float(score)


def groups_of(study: Study) -> list[str]:
    """Return all groups that a table of the study shows."""
    return [*GROUPS, *study.groups]


def path_scores(result: Result) -> list[float]:
    """Return the overall score of every single path in percent."""
    return [100 * float(result["means"]["overall"][column]) for column in path_columns(result)]


def path_columns(result: Result) -> list[str]:
    """Return the columns of the single paths."""
    return [column for column in result["columns"] if column.startswith("path_")]


def paired_difference(
    study: Study, results: Sequence[Result], difference: Difference, group: str = "overall"
) -> Interval | None:
    """Return the difference in points over the seeds that both sides have; ``None`` if they share none.

    Relations:
        Swapping the sides changes the sign and nothing else.
    """
    pairs = paired_scores(study, results, difference, group).values()
    return interval([of - over for of, over in pairs]) if pairs else None


@dataclass(frozen=True)
class Compared:
    """A difference of a study, measured.

    Attributes:
        difference: what is compared.
        pair: in points, over the seeds that both sides have.
        holm_p: ``p_value`` corrected for all differences that have an interval; ``None`` without one.
    """

    difference: Difference
    pair: Interval
    holm_p: float | None


def compared(study: Study, results: Sequence[Result]) -> list[Compared]:
    """Return every difference of the study that has a seed on both sides, in the order of the file."""
    found = [
        (difference, pair)
        for difference in study.differences
        if (pair := paired_difference(study, results, difference)) is not None
    ]
    tested = [math.isfinite(pair.half_width) for _, pair in found]
    corrected = iter(holm([p_value(pair) for (_, pair), has in zip(found, tested, strict=True) if has]))
    return [
        Compared(difference, pair, next(corrected) if has else None)
        for (difference, pair), has in zip(found, tested, strict=True)
    ]


def paired_scores(
    study: Study, results: Sequence[Result], difference: Difference, group: str = "overall"
) -> dict[int, tuple[float, float]]:
    """Return the scores of both sides by seed, for those seeds of the difference that both have."""
    columns = difference.of_column, difference.over_column
    of, over = (
        {
            line["seed"]: score
            for line in at_point(results, cell, step)
            if (score := group_score(study, line, group, column)) is not None
        }
        for (cell, step), column in zip(sides_of(study, difference), columns, strict=True)
    )
    seeds = of.keys() & over.keys() & set(difference.seeds or of)
    return {seed: (of[seed], over[seed]) for seed in sorted(seeds)}


def p_value(found: Interval) -> float:
    """Return p of the two-sided t test of the mean against 0; below 0.05 the interval excludes 0.

    Raises:
        ValueError: if there are fewer than ``LEAST_SEEDS`` values.
    """
    count = len(found.values)
    if count < LEAST_SEEDS:
        raise ValueError(f"a p value needs at least {LEAST_SEEDS} seeds, got {count}")
    error = stdev(found.values) / math.sqrt(count)
    if error == 0:
        return 0.0 if found.mean else 1.0
    return float(2 * student_t.sf(abs(found.mean) / error, count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values by Holm's method: multiply the i-th smallest of m by m - i + 1, never descending."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def sides_of(study: Study, difference: Difference) -> list[tuple[str, int]]:
    """Return cell and step of both sides: a cell's last step where the difference does not name one."""
    pairs = ((difference.of, difference.of_step), (difference.over, difference.over_step))
    return [(cell, study.cells[cell].points[-1] if step is None else step) for cell, step in pairs]
