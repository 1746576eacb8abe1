"""Means recomputed from their parts: of published rows and of score files, and what does not fit.

Here: the arithmetic of MMEB's means and the verdicts. Deliberately elsewhere: reading (``published``,
``score_files``), the command (``commands.audit``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rich.table import Table
from rich.text import Text

from parallel_decoupling.data.tasks import MMEB_TASKS, Task
from parallel_decoupling.evaluation.published import PublishedRow
from parallel_decoupling.evaluation.report import (
    MEAN_TITLES,
    META_TASKS,
    MMEB_COUNTS,
    ScoreReport,
    TaskResult,
)
from parallel_decoupling.evaluation.score_files import TaskScores

SPLITS = ("in_distribution", "out_of_distribution")
ROUNDING = 0.1
"""Points: parts and whole printed with one decimal differ by at most this much."""
SLACK = 1e-6


@dataclass(frozen=True)
class RowAudit:
    """One published row against its own parts, in percent.

    Attributes:
        row: as printed.
        from_meta_tasks: the task mean that its four meta-tasks give; None if one is missing.
        from_splits: the task mean that IND and OOD give; None if one is missing.
        mean_of_meta_tasks: unweighted mean of the four.
        problems: what does not fit; empty for a consistent row.
    """

    row: PublishedRow
    from_meta_tasks: float | None
    from_splits: float | None
    mean_of_meta_tasks: float | None
    problems: tuple[str, ...]


def audit_row(row: PublishedRow) -> RowAudit:
    """Recompute a row's task mean in every way that its cells allow.

    Cells have one decimal, so a mean may be off by 0.05 and what it is compared with by another 0.05.
    """
    means = row.means
    from_meta_tasks, from_splits = _weighted(means, META_TASKS), _weighted(means, SPLITS)
    unweighted = fmean(means[name] for name in META_TASKS) if from_meta_tasks is not None else None
    overall, problems = means.get("overall"), []
    whole = {"meta-tasks": from_meta_tasks, "IND and OOD": from_splits}
    off = {
        name: value
        for name, value in whole.items()
        if None not in (value, overall) and _differ(value, overall)
    }
    if from_meta_tasks is not None and from_splits is not None and _differ(from_meta_tasks, from_splits):
        odd = (
            "a meta-task" if "IND and OOD" not in off else "IND or OOD" if "meta-tasks" not in off else "one"
        )
        problems.append(
            f"the meta-tasks give {from_meta_tasks:.1f} but IND and OOD give {from_splits:.1f}: "
            f"{odd} cell must be wrong"
        )
    elif off:
        given = ", ".join(f"{name} give {value:.1f}" for name, value in off.items())
        problem = f"printed overall {overall:.1f}, but its {given}"
        if unweighted is not None and overall is not None and not _differ(unweighted, overall):
            problem += f"; {overall:.1f} is the mean of the four meta-tasks ({unweighted:.1f})"
        problems.append(problem)
    return RowAudit(row, from_meta_tasks, from_splits, unweighted, tuple(problems))


@dataclass(frozen=True)
class ScoresAudit:
    """A score file against its own parts.

    Attributes:
        report: the means of its tasks, recomputed, MMEB's tasks in MMEB's groups; None without a usable task.
        problems: what does not fit; empty for a consistent file of all of MMEB's tasks or of own ones.
        notes: what is not wrong but good to know.
    """

    report: ScoreReport | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def audit_scores(scores: TaskScores) -> ScoresAudit:
    """Recompute the means of a score file's tasks, and list what is odd about it.

    Tasks of no known meta-task are left out of the means and named. A median of hit@1 above 1 means that all
    rates are in percent. Tasks of MMEB are only missing from a file that has one of them.
    """
    known = {**scores.known, **MMEB_TASKS}
    problems, notes = list(scores.problems), list(scores.notes)
    tasks = scores.tasks
    if tasks and median(values["hit@1"] for values in tasks.values()) > 1:
        problems.append("hit@1 is in percent; the formats have fractions")
        tasks = {name: _fractions(values) for name, values in tasks.items()}
    for name, values in tasks.items():
        problems += [f"{name}: {problem}" for problem in _value_problems(values)]
    for name, task in scores.known.items():
        if task != known[name]:
            problems.append(f"{name} counts as {_groups(task)}; MMEB has it in {_groups(known[name])}")
    unknown = [name for name in tasks if name not in known]
    if unknown and len(unknown) == len(tasks):
        notes.append("no task of MMEB and no meta-task of any other one, so there are no means")
    elif unknown:
        problems.append(f"not tasks of MMEB, left out of the means: {', '.join(unknown)}")
    missing = [name for name in MMEB_TASKS if name not in tasks]
    if missing and (len(missing) < len(MMEB_TASKS) or not tasks):
        problems.append(
            f"{len(missing)} of MMEB's {len(MMEB_TASKS)} tasks are missing, so the means are not MMEB's: "
            f"{', '.join(missing)}"
        )
    usable = {name: values for name, values in tasks.items() if name in known}
    return ScoresAudit(_report(usable, known) if usable else None, tuple(problems), tuple(notes))


def row_table(audits: Sequence[RowAudit]) -> Table:
    """Printed and recomputed means in percent; inconsistent rows are marked."""
    table = Table(title="published rows against their own parts, in percent")
    for heading in ("model", "printed", "from meta-tasks", "from IND, OOD", "mean of meta-tasks", "source"):
        table.add_column(heading, justify="left" if heading in ("model", "source") else "right")
    for audit in audits:
        mark = "! " if audit.problems else ""
        values = (
            audit.row.means.get("overall"),
            audit.from_meta_tasks,
            audit.from_splits,
            audit.mean_of_meta_tasks,
        )
        cells = ("" if value is None else f"{value:.1f}" for value in values)
        style = "red" if audit.problems else ""
        table.add_row(Text(mark + audit.row.model), *cells, Text(audit.row.source), style=style)
    return table


def means_table(report: ScoreReport) -> Table:
    """Means of a score file, in percent, with the number of tasks behind each."""
    table = Table(title="means recomputed from the tasks, in percent")
    for heading in ("mean", "tasks", "of MMEB's", "hit@1"):
        table.add_column(heading, justify="left" if heading == "mean" else "right")
    for name, mean in report.means.items():
        names = report.groups.get(name)
        count = "" if names is None else str(len(names))
        whole = MMEB_COUNTS.get(name) if any(task in MMEB_TASKS for task in report.tasks) else None
        value = f"{100 * mean[report.columns[0]]:.1f}"
        table.add_row(MEAN_TITLES[name], count, "" if whole is None else str(whole), value)
    return table


def _weighted(means: Mapping[str, float], parts: Collection[str]) -> float | None:
    if not all(part in means for part in parts):
        return None
    return sum(MMEB_COUNTS[part] * means[part] for part in parts) / sum(MMEB_COUNTS[part] for part in parts)


def _differ(first: float | None, second: float | None) -> bool:
    assert first is not None
    assert second is not None
    return abs(first - second) > ROUNDING + SLACK


def _is_rate(name: str) -> bool:
    return "@" in name or name in ("acc", "mrr", "map")


def _fractions(values: Mapping[str, float]) -> dict[str, float]:
    """Rates in percent as fractions, counts as they are."""
    return {name: value / 100 if _is_rate(name) else value for name, value in values.items()}


def _groups(task: Task) -> str:
    return f"{task.meta_task}, {'IND' if task.in_distribution else 'OOD'}"


def _value_problems(values: Mapping[str, float]) -> list[str]:
    """Values of one task that contradict each other or are no fractions."""
    problems = []
    rates = [name for name in values if _is_rate(name)]
    out = [f"{name} {values[name]:g}" for name in rates if not 0 <= values[name] <= 1]
    if out:
        problems.append(f"no fraction between 0 and 1: {', '.join(out)}")
    correct, total = values.get("num_correct"), values.get("num_pred")
    if correct is not None and total and abs(correct / total - values["hit@1"]) > 1 / (2 * total) + SLACK:
        problems.append(f"{correct:g} of {total:g} is {correct / total:.4f}, not {values['hit@1']:.4f}")
    data = values.get("num_data")
    if data is not None and total is not None and data != total:
        problems.append(f"{total:g} of {data:g} rows were scored")
    depths = [values[f"hit@{depth}"] for depth in (1, 5, 10) if f"hit@{depth}" in values]
    if depths != sorted(depths):
        problems.append(f"hit@k falls with k: {', '.join(f'{value:g}' for value in depths)}")
    return problems


def _report(tasks: Mapping[str, Mapping[str, float]], known: Mapping[str, Task]) -> ScoreReport:
    return ScoreReport(
        {
            name: TaskResult(known[name], int(values.get("num_pred", 0)), 0.0, {"hit@1": values["hit@1"]})
            for name, values in tasks.items()
        }
    )
