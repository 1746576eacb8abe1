"""Means over seeds, 95 % t intervals and differences paired by seed, from the results of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student_t

from studies.results import Result
from studies.study import Difference, Study

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
        """Whether the whole interval is on one side of 0."""
        return abs(self.mean) > self.half_width


def interval(values: Sequence[float]) -> Interval:
    """Mean and t interval of one value per seed.

    Raises:
        ValueError: without a value.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    count = len(values)
    half_width = math.inf
    if count >= LEAST_SEEDS:
        half_width = float(student_t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(fmean(values), half_width, tuple(values))


def at_point(results: Sequence[Result], cell: str, step: int) -> list[Result]:
    """Results of a cell at a step, one per seed."""
    return [result for result in results if (result["cell"], result["step"]) == (cell, step)]


def group_score(study: Study, result: Result, group: str, column: str = "aggregate") -> float | None:
    """Mean score of a group of tasks in percent.

    Args:
        study: knows the groups of its own.
        result: a line of the results.
        group: one of ``GROUPS`` or of the study's.
        column: ``aggregate``, ``path_0``, ...

    Returns:
        ``None`` if the result lacks a task of the group, or the column.
    """
    if group in study.groups:
        scores = [result["tasks"].get(task, {}).get(column) for task in study.groups[group]]
        return None if None in scores else 100 * fmean(scores)
    score = result["means"].get(group, {}).get(column)
    return None if score is None else 100 * float(score)


def groups_of(study: Study) -> list[str]:
    """All groups that a table of the study shows."""
    return [*GROUPS, *study.groups]


def path_scores(result: Result) -> list[float]:
    """Overall score of every single path in percent."""
    overall = result["means"]["overall"]
    return [100 * float(overall[column]) for column in result["columns"] if column.startswith("path_")]


def paired_difference(
    study: Study, results: Sequence[Result], difference: Difference, group: str = "overall"
) -> Interval | None:
    """Difference in points over the seeds that both sides have; ``None`` if there is none.

    Relations:
        Swapping the sides changes the sign and nothing else.
    """
    sides = []
    for cell, step in sides_of(study, difference):
        scores = {
            result["seed"]: group_score(study, result, group) for result in at_point(results, cell, step)
        }
        sides.append({seed: score for seed, score in scores.items() if score is not None})
    of, over = sides
    values = [of[seed] - over[seed] for seed in sorted(of.keys() & over.keys())]
    return interval(values) if values else None


def sides_of(study: Study, difference: Difference) -> list[tuple[str, int]]:
    """Cell and step of both sides; a cell's last step where the difference names none."""
    pairs = ((difference.of, difference.of_step), (difference.over, difference.over_step))
    return [(cell, study.cells[cell].points[-1] if step is None else step) for cell, step in pairs]
