"""Several runs side by side: table, differences with intervals, ``comparison.json``, ``comparison.png``.

Here: reading runs, checking that they scored the same tasks, paired bootstrap. Deliberately elsewhere:
the means of one run (``report``) and the drawing (``plots``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from parallel_decoupling.evaluation.audit import audit_scores
from parallel_decoupling.evaluation.plots import comparison_figure
from parallel_decoupling.evaluation.report import META_TASKS, SCORES_FILE, ScoreReport, percent
from parallel_decoupling.evaluation.score_files import SCORE_SUFFIX, read_scores

INTERVAL_NOTE = "95 % by paired bootstrap over queries within tasks, one training seed"
COMPARISON_FILE = "comparison.json"
FIGURE_FILE = "comparison.png"
RESAMPLES = 10_000
_Sample = tuple[float, "np.ndarray[Any, Any] | None"]
SHORT_TITLES = {
    "overall": "all",
    "in_distribution": "IND",
    "out_of_distribution": "OOD",
    "classification": "class",
    "vqa": "vqa",
    "retrieval": "retr",
    "grounding": "ground",
    "mean_of_meta_tasks": "meta",
}
"""Means in the order of the table, with their headings."""


@dataclass(frozen=True)
class Difference:
    """A run's score minus the baseline's, in fractions.

    Attributes:
        difference: positive when the run is better.
        low: 2.5 % quantile of the paired bootstrap; None without per-row hits.
        high: 97.5 % quantile.
    """

    difference: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RunDifferences:
    """Headline scores of one run minus the baseline's, by mean and by task name."""

    means: dict[str, Difference]
    tasks: dict[str, Difference]


@dataclass(frozen=True)
class Comparison:
    """Runs that scored the same tasks; the first one is the baseline.

    Attributes:
        reports: score report by run name.
        differences: of every other run to the baseline, first columns (the aggregates).
    """

    reports: dict[str, ScoreReport]
    differences: dict[str, RunDifferences]

    @property
    def best(self) -> str:
        """The run other than the baseline with the highest overall score.

        Of three runs or more it is picked by the very scores it is then reported with, which flatters it;
        its interval does not account for that.
        """
        return max(self.differences, key=lambda name: _headline(self.reports[name], "overall"))

    @property
    def note(self) -> str:
        """What the differences are, and how the best run was picked if there was a choice."""
        first = next(iter(self.reports))
        note = f"difference: {self.best} - {first}, {INTERVAL_NOTE}"
        pair = {name: self.reports[name].tasks.values() for name in (first, self.best)}
        if without := [name for name, tasks in pair.items() if not all(task.hits for task in tasks)]:
            note = (
                f"difference: {self.best} - {first}; no interval where the hits of single queries are not "
                f"known: {', '.join(without)}"
            )
        if len(self.differences) == 1:
            return note
        return (
            f"{note}; {self.best} is the best of {len(self.differences)} runs by the same score, which "
            "flatters its difference and its interval"
        )

    @property
    def title(self) -> str:
        """The runs' names, and how far the best one is from the baseline overall."""
        overall = _format(self.differences[self.best].means["overall"])
        return f"{' vs '.join(self.reports)}: {self.best} {overall} points overall"

    def means_table(self) -> Table:
        """Means in percent, every run and below it its paths; then best minus first, with its interval."""
        table = Table(title="mean hit@1 in percent", padding=(0, 0, 0, 1), caption=Text(self.note))
        table.add_column("run", no_wrap=True)
        measures = _measures(next(iter(self.reports.values())))
        for measure in measures:
            table.add_column(SHORT_TITLES[measure], justify="right", no_wrap=True)
        for name, report in self.reports.items():
            means, (first, *paths) = report.means, report.shown_columns
            table.add_row(Text(name), *(percent(means[measure][first]) for measure in measures))
            for path in paths:
                table.add_row(f"  {path}", *(percent(means[measure][path]) for measure in measures))
            table.add_section()
        found = [self.differences[self.best].means[measure] for measure in measures]
        for title, values in (
            ("difference", [each.difference for each in found]),
            ("  2.5 %", [each.low for each in found]),
            ("  97.5 %", [each.high for each in found]),
        ):
            table.add_row(title, *("" if value is None else f"{100 * value:+.1f}" for value in values))
        return table

    def task_table(self) -> Table:
        """First column (the aggregate) of every run in percent by task; the last is best minus first."""
        first = next(iter(self.reports))
        table = Table(title="hit@1 in percent by task", caption=Text(self.note))
        table.add_column("task", no_wrap=True)
        for name in self.reports:
            table.add_column(escape(name), justify="right", overflow="fold")
        table.add_column("difference [95 %]", justify="right", no_wrap=True)
        for task in self.reports[first].tasks:
            values = [
                percent(next(iter(each.tasks[task].hit_at_1.values()))) for each in self.reports.values()
            ]
            table.add_row(Text(task), *values, _format(self.differences[self.best].tasks[task]))
        return table

    def to_json_file(self, json_file: str | Path) -> None:
        """Write means, task scores and differences, fractions unrounded."""
        content: dict[str, Any] = {
            "metric": "hit@1",
            "baseline": next(iter(self.reports)),
            "best": self.best,
            "interval": INTERVAL_NOTE,
            "runs": {
                name: {
                    "means": report.means,
                    "tasks": {task: result.hit_at_1 for task, result in report.tasks.items()},
                    "run": report.run,
                }
                for name, report in self.reports.items()
            },
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
        }
        Path(json_file).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def compare(run_dirs: Sequence[str], output_dir: str | None = None) -> Comparison:
    """Compare the score reports of finished runs.

    Args:
        run_dirs: at least two folders that hold a ``scores.json``, or such files, or anything else that
            ``score_files.read_scores`` reads, which has no hits and so gives no intervals; the first is the
            baseline.
        output_dir: gets ``comparison.json`` and ``comparison.png``; None writes nothing.

    Returns:
        Reports and differences.

    Raises:
        ValueError: fewer than two runs, a run without scores, or runs that scored different tasks.
    """
    if isinstance(run_dirs, str) or len(run_dirs) < 2:
        raise ValueError(f"compare needs a list of at least two runs, got {run_dirs!r}")
    reports = {
        name: _read_report(run_dir) for name, run_dir in zip(_run_names(run_dirs), run_dirs, strict=True)
    }
    first, *others = reports
    for name in others:
        check_same_tasks(first, reports[first], name, reports[name])
    comparison = Comparison(reports, {name: differences(reports[first], reports[name]) for name in others})
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        comparison.to_json_file(folder / COMPARISON_FILE)
        comparison_figure(reports, comparison.title).savefig(folder / FIGURE_FILE)
    return comparison


def differences(baseline: ScoreReport, other: ScoreReport, seed: int = 0) -> RunDifferences:
    """Headline score of ``other`` minus that of ``baseline``, with paired bootstrap intervals.

    Rows are resampled within each task and both runs keep their pairing. A row's difference is -1, 0
    or 1, so a resample of a task is a draw of three multinomial counts. The interval covers the
    choice of test queries; it says nothing about the training seed.

    Args:
        baseline: the run subtracted.
        other: a run over the same tasks.
        seed: of the resampling.

    Returns:
        By mean and by task; without an interval where per-row hits are not stored.
    """
    generator = np.random.default_rng(seed)
    tasks: dict[str, _Sample] = {}
    for name, theirs in baseline.tasks.items():
        ours = other.tasks[name]
        point = next(iter(ours.hit_at_1.values())) - next(iter(theirs.hit_at_1.values()))
        resampled = None
        if ours.hits and theirs.hits:
            row_difference = _first_hits(ours.hits) - _first_hits(theirs.hits)
            share = [float((row_difference == value).mean()) for value in (-1, 0, 1)]
            counts = generator.multinomial(len(row_difference), share, size=RESAMPLES)
            resampled = (counts[:, 2] - counts[:, 0]) / len(row_difference)
        tasks[name] = point, resampled
    means = {group: _mean([tasks[name] for name in names]) for group, names in baseline.groups.items()}
    means["mean_of_meta_tasks"] = _mean([means[meta_task] for meta_task in META_TASKS if meta_task in means])
    return RunDifferences(
        {name: _difference(sample) for name, sample in means.items()},
        {name: _difference(sample) for name, sample in tasks.items()},
    )


def _mean(samples: Sequence[_Sample]) -> _Sample:
    """Mean of the point values and, if all are there, of the resampled values."""
    resampled = [values for _, values in samples if values is not None]
    point = fmean(point for point, _ in samples)
    return point, np.mean(resampled, axis=0) if len(resampled) == len(samples) else None


def _difference(sample: _Sample) -> Difference:
    point, resampled = sample
    if resampled is None:
        return Difference(point)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Difference(point, float(low), float(high))


def scores_file(run_dir: str) -> Path:
    """The scores of a tested run.

    Args:
        run_dir: its folder, or the file itself.

    Raises:
        ValueError: there are none.
    """
    file = Path(run_dir)
    if not file.is_file():
        file = file / SCORES_FILE
    if not file.is_file():
        raise ValueError(f"no {SCORES_FILE} in {run_dir}; test that run first")
    return file


def scores_source(run_dir: str) -> Path:
    """What ``read_scores`` reads: the ``scores.json`` of a run, a file, or a folder of VLM2Vec's files.

    Raises:
        ValueError: there is none of them.
    """
    path = Path(run_dir)
    foreign = path.is_dir() and not (path / SCORES_FILE).is_file() and any(path.glob(f"*{SCORE_SUFFIX}"))
    return path if foreign else scores_file(run_dir)


def _read_report(run_dir: str) -> ScoreReport:
    """Of a run with its hits; of other formats a report of the headline scores of tasks that are known."""
    source = scores_source(run_dir)
    scores = read_scores(source)
    if scores.format == SCORES_FILE:
        return ScoreReport.from_json_file(source)
    report = audit_scores(scores).report
    if report is None:
        raise ValueError(f"{source} has no task of MMEB, and only a {SCORES_FILE} says what another one is")
    return report


def run_name(folder: Path) -> str:
    """Name of a run's folder; of one that only counts steps, as studies have them, with its parent's."""
    folder = folder.resolve()
    return f"{folder.parent.name} {folder.name}" if re.fullmatch(r"step_\d+", folder.name) else folder.name


def _run_names(run_dirs: Sequence[str]) -> list[str]:
    """Folder names, or what was typed where two folders have the same name."""
    files = [scores_source(run_dir).resolve() for run_dir in run_dirs]
    if len(set(files)) != len(files):
        raise ValueError(f"a run is compared with itself: {list(run_dirs)}")
    names = [
        run_name(file.parent) if file.name == SCORES_FILE else file.name if file.is_dir() else file.stem
        for file in files
    ]
    return [
        name if names.count(name) == 1 else str(typed) for name, typed in zip(names, run_dirs, strict=True)
    ]


def check_same_tasks(first: str, baseline: ScoreReport, name: str, other: ScoreReport) -> None:
    """Two runs can be compared only over the same rows; 0 queries and chance 0 are not known.

    Raises:
        ValueError: names the tasks that one of them lacks, or what differs.
    """
    for run, missing in (
        (first, [task for task in other.tasks if task not in baseline.tasks]),
        (name, [task for task in baseline.tasks if task not in other.tasks]),
    ):
        if missing:
            raise ValueError(f"{first} and {name} scored different tasks: {run} lacks {', '.join(missing)}")
    for task, result in baseline.tasks.items():
        ours = other.tasks[task]
        for what, left, right in (
            ("meta-task", result.task.meta_task, ours.task.meta_task),
            ("in_distribution", result.task.in_distribution, ours.task.in_distribution),
            ("number of queries", result.num_queries or None, ours.num_queries or None),
            ("chance level", result.chance or None, ours.chance or None),
            ("hash of the rows", result.rows_sha256 or None, ours.rows_sha256 or None),
        ):
            if left != right and None not in (left, right):
                raise ValueError(
                    f"{task}: {what} is {left} in {first} but {right} in {name}; score both on the same data"
                )


def _first_hits(hits: dict[str, str]) -> Any:
    """The headline column's hits as an int8 array."""
    return np.frombuffer(next(iter(hits.values())).encode("ascii"), dtype=np.int8) - ord("0")


def _headline(report: ScoreReport, measure: str) -> float:
    return report.means[measure][report.columns[0]]


def _measures(report: ScoreReport) -> list[str]:
    means = report.means
    return [measure for measure in SHORT_TITLES if measure in means]


def _format(difference: Difference) -> str:
    point = f"{100 * difference.difference:+.1f}"
    if difference.low is None or difference.high is None:
        return point
    return f"{point} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def progress(run: Mapping[str, Any]) -> dict[str, Any]:
    """What tells weights from other weights of the same model, as far as a run says it."""
    return {key: run.get(key) for key in ("global_step", "seed", "token_passes")}
