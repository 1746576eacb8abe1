"""Scores of one run: per task, means over tasks, and the files and the table that show them.

Here: collecting, averaging, ``scores.json``, CSV, the terminal table. Deliberately elsewhere: the metric
(``score``) and several runs side by side (``compare``).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from parallel_decoupling.data.tasks import MMEB_TASKS, Task
from parallel_decoupling.evaluation.metrics import METRICS, mean_metrics
from parallel_decoupling.evaluation.report_format import FORMAT, check_content, hit_problems, read_json
from parallel_decoupling.evaluation.score import TaskScore

SCORES_FILE = "scores.json"
META_TASKS = ("classification", "vqa", "retrieval", "grounding")
MEAN_TITLES = {
    **{meta_task: f"mean of {meta_task}" for meta_task in META_TASKS},
    "in_distribution": "mean in-distribution (IND)",
    "out_of_distribution": "mean out-of-distribution (OOD)",
    "overall": "overall (mean of tasks)",
    "mean_of_meta_tasks": "mean of meta-tasks",
}
_IND = sum(task.in_distribution for task in MMEB_TASKS.values())
MMEB_COUNTS = {
    **{name: sum(task.meta_task == name for task in MMEB_TASKS.values()) for name in META_TASKS},
    "in_distribution": _IND,
    "out_of_distribution": len(MMEB_TASKS) - _IND,
    "overall": len(MMEB_TASKS),
}
"""MMEB's tasks behind each mean: 10 + 10 + 12 + 4, 20 + 16, and 36."""


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task.

    Attributes:
        task: name, meta-task and distribution.
        num_queries: rows scored.
        chance: hit@1 of a random choice, in [0, 1].
        hit_at_1: by column (``"aggregate"``, ``"path_0"``, ...), in [0, 1].
        hits: by column, one ``0`` or ``1`` per row; empty when only the score is known.
        num_skipped: rows left out because their images could not be read.
        metrics: by column, means of ``metrics.METRICS``; empty when only hit@1 is known.
        rows_sha256: identifies the rows (``score.asked_hash``).
    """

    task: Task
    num_queries: int
    chance: float
    hit_at_1: dict[str, float]
    hits: dict[str, str] = field(default_factory=dict)
    num_skipped: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    rows_sha256: str = ""

    @property
    def at_chance(self) -> bool:
        """Whether the first column is no better than a random choice."""
        return next(iter(self.hit_at_1.values())) <= self.chance


@dataclass(frozen=True)
class ScoreReport:
    """All scores of one run.

    Attributes:
        tasks: results by task name.
        run: what produced them (configuration, seed, commit, steps, ...), plain values.
        modes: by column, what it costs: ``modes.mode_costs``.
        warnings: what makes the scores doubtful: ``sanity.Finding`` as plain values.
    """

    tasks: dict[str, TaskResult]
    run: dict[str, Any] = field(default_factory=dict)
    modes: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check that every task has the same columns and a meta-task that a mean counts."""
        if not self.tasks:
            raise ValueError("a score report needs at least one task")
        for name, result in self.tasks.items():
            if list(result.hit_at_1) != self.columns:
                raise ValueError(f"{name} has columns {list(result.hit_at_1)}, the first task {self.columns}")
            if result.task.meta_task not in META_TASKS:
                raise ValueError(
                    f"{name} has meta-task {result.task.meta_task!r}; use one of {list(META_TASKS)}"
                )

    @classmethod
    def from_scores(cls, scores: Sequence[TaskScore], run: Mapping[str, Any] | None = None) -> ScoreReport:
        """Collect scored tasks.

        Args:
            scores: one per task, all with the same columns.
            run: what produced them.

        Raises:
            ValueError: no task, a task twice, or columns that differ.
        """
        tasks: dict[str, TaskResult] = {}
        for score in scores:
            if score.task.name in tasks:
                raise ValueError(f"task {score.task.name} is there twice")
            tasks[score.task.name] = TaskResult(
                task=score.task,
                num_queries=len(next(iter(score.hits.values()))),
                chance=score.chance,
                hit_at_1={column: int(hits.sum()) / len(hits) for column, hits in score.hits.items()},
                hits={
                    column: "".join("01"[hit] for hit in hits.tolist()) for column, hits in score.hits.items()
                },
                num_skipped=score.num_skipped,
                metrics={column: mean_metrics(rank_R) for column, rank_R in score.ranks.items()},
                rows_sha256=score.rows_sha256,
            )
        return cls(tasks, dict(run or {}))

    @property
    def columns(self) -> list[str]:
        """Names of the scored kinds of embeddings; the first one is the headline."""
        return list(next(iter(self.tasks.values())).hit_at_1)

    @property
    def path_columns(self) -> list[str]:
        """Columns of single paths."""
        return [column for column in self.columns if column.startswith("path_")]

    @property
    def shown_columns(self) -> list[str]:
        """All columns, but of a single path, which is its own aggregate, the first only."""
        return self.columns if len(self.path_columns) > 1 else self.columns[:1]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Task names by mean: meta-tasks, in- and out-of-distribution, overall; none empty."""
        groups = {
            meta_task: [name for name, result in self.tasks.items() if result.task.meta_task == meta_task]
            for meta_task in META_TASKS
        }
        for split, inside in (("in_distribution", True), ("out_of_distribution", False)):
            groups[split] = [name for name, row in self.tasks.items() if row.task.in_distribution is inside]
        groups["overall"] = list(self.tasks)
        return {group: names for group, names in groups.items() if names}

    @property
    def partial_means(self) -> dict[str, int]:
        """Means over some of MMEB's tasks but not all of ``MMEB_COUNTS``: how many of them there are."""
        counts = {
            group: sum(name in MMEB_TASKS for name in self.groups.get(group, ())) for group in MMEB_COUNTS
        }
        return {group: count for group, count in counts.items() if 0 < count < MMEB_COUNTS[group]}

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """Means by column: those of ``groups``, every task counting once, and ``mean_of_meta_tasks``.

        MMEB's headline is ``overall``, the mean of tasks. ``mean_of_meta_tasks`` weighs four unequal
        groups equally; publications mix the two up, so both are here under their own names.
        """
        means = {
            group: {
                column: fmean(self.tasks[name].hit_at_1[column] for name in names) for column in self.columns
            }
            for group, names in self.groups.items()
        }
        present = [means[meta_task] for meta_task in META_TASKS if meta_task in means]
        means["mean_of_meta_tasks"] = {
            column: fmean(mean[column] for mean in present) for column in self.columns
        }
        return means

    @property
    def metric_means(self) -> dict[str, dict[str, dict[str, float]]]:
        """Means of the metrics that every task has, by group and column; empty if there are none."""
        results = [
            result.metrics.get(column, {}) for result in self.tasks.values() for column in self.columns
        ]
        shared = [metric for metric in METRICS if all(metric in values for values in results)]
        if not shared:
            return {}
        return {
            group: {
                column: {
                    metric: fmean(self.tasks[name].metrics[column][metric] for name in names)
                    for metric in shared
                }
                for column in self.columns
            }
            for group, names in self.groups.items()
        }

    def to_json_file(self, json_file: str | Path) -> None:
        """Write everything, fractions unrounded; per-row hits come last as strings of 0 and 1."""
        content = {
            "format": FORMAT,
            "metric": "hit@1",
            "means": self.means,
            "partial_means": {
                group: f"of {count} of MMEB's {MMEB_COUNTS[group]} tasks"
                for group, count in self.partial_means.items()
            },
            "tasks": {
                name: {
                    "meta_task": result.task.meta_task,
                    "in_distribution": result.task.in_distribution,
                    "num_queries": result.num_queries,
                    "num_skipped": result.num_skipped,
                    "chance": result.chance,
                    "hit_at_1": result.hit_at_1,
                    "metrics": result.metrics,
                    "rows_sha256": result.rows_sha256,
                }
                for name, result in self.tasks.items()
            },
            "metric_means": self.metric_means,
            "modes": self.modes,
            "warnings": self.warnings,
            "run": self.run,
            "hits": {name: result.hits for name, result in self.tasks.items() if result.hits},
        }
        Path(json_file).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> ScoreReport:
        """Read what ``to_json_file`` wrote; means are computed again from the tasks.

        Raises:
            ValueError: not a score file, of another format, or hits that do not fit the scores; names the
                file and the task.
        """
        content = read_json(json_file)
        report = cls.from_content(content, json_file)
        if problems := hit_problems(content):
            raise ValueError(f"{json_file}, {problems[0]}; the file was changed, run the test again")
        return report

    @classmethod
    def from_content(cls, content: Any, file: str | Path) -> ScoreReport:
        """The report that a ``scores.json`` holds, its hits not compared with its scores.

        Args:
            content: of the file.
            file: for the errors.

        Raises:
            ValueError: not a score file, of another format, or a value of the wrong kind.
        """
        check_content(content, file)
        tasks = {
            name: TaskResult(
                task=Task(name, row["meta_task"], row["in_distribution"]),
                num_queries=row["num_queries"],
                chance=row["chance"],
                hit_at_1=row["hit_at_1"],
                hits=content.get("hits", {}).get(name, {}),
                num_skipped=row.get("num_skipped", 0),
                metrics=row.get("metrics", {}),
                rows_sha256=row.get("rows_sha256", ""),
            )
            for name, row in content["tasks"].items()
        }
        known = {name: content[name] for name in ("run", "modes", "warnings") if name in content}
        try:
            return cls(tasks, **known)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def to_csv_file(self, csv_file: str | Path) -> None:
        """Write one line per task, then one per mean, fractions unrounded."""
        with open(csv_file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(
                ["kind", "name", "meta_task", "in_distribution", "num_queries", "chance", *self.columns]
            )
            for name, result in self.tasks.items():
                task = result.task
                about = [task.meta_task, task.in_distribution, result.num_queries, result.chance]
                writer.writerow(["task", name, *about, *result.hit_at_1.values()])
            for name, mean in self.means.items():
                writer.writerow(["mean", name, "", "", "", "", *mean.values()])

    @property
    def gaps(self) -> list[str]:
        """What the means leave out, a sentence each: tasks of MMEB, rows without a readable image."""
        found = []
        if "overall" in self.partial_means:
            found.append(
                f"means over {self.partial_means['overall']} of MMEB's {len(MMEB_TASKS)} tasks: "
                "not MMEB's means"
            )
        skipped = [f"{name} {each.num_skipped}" for name, each in self.tasks.items() if each.num_skipped]
        return found + (["rows skipped because of their images: " + ", ".join(skipped)] if skipped else [])

    def table(self) -> Table:
        """Tasks by meta-task, then means, of aggregate and paths in percent; tasks at chance are marked."""
        shown = [self.columns[0], *self.path_columns]
        flagged = [name for name, result in self.tasks.items() if result.at_chance]
        table = Table(title="hit@1 in percent")
        notes = ["! at or below chance: " + ", ".join(flagged)] if flagged else []
        if notes := [*notes, *self.gaps]:
            table.caption = Text("\n".join(notes))
        table.add_column("task", no_wrap=True)
        for heading in ("split", "queries", "chance", *shown):
            table.add_column(heading, justify="left" if heading == "split" else "right")
        means = self.means
        for meta_task in META_TASKS:
            for name in self.groups.get(meta_task, ()):
                result = self.tasks[name]
                split = "IND" if result.task.in_distribution else "OOD"
                about = [split, str(result.num_queries), percent(result.chance)]
                scores = [percent(result.hit_at_1[column]) for column in shown]
                style = "red" if result.at_chance else ""
                table.add_row(Text(f"{name} !" if result.at_chance else name), *about, *scores, style=style)
            if meta_task in means:
                _add_mean(table, self.mean_title(meta_task), means[meta_task], shown)
                table.add_section()
        for mean in ("in_distribution", "out_of_distribution", "mean_of_meta_tasks", "overall"):
            if mean in means:
                _add_mean(table, self.mean_title(mean), means[mean], shown)
        return table

    def mean_title(self, mean: str) -> str:
        """Heading of a mean; of some of MMEB's tasks with their number."""
        count = self.partial_means.get(mean)
        return MEAN_TITLES[mean] + ("" if count is None else f", {count}/{MMEB_COUNTS[mean]}")

    def metrics_table(self) -> Table:
        """Means over tasks of every metric of the headline column, in percent, by meta-task and overall."""
        column, means = self.columns[0], self.metric_means
        found = means["overall"][column] if means else {}
        hidden = ("mrr@", "ndcg_exponential")
        shown = [name for name in found if not name.startswith(hidden) and name != "ndcg_linear@1"]
        table = Table(title=Text(f"metrics of {column}, means over tasks in percent"))
        table.caption = "nDCG of linear and of exponential gain agree where one candidate is right"
        table.add_column("mean", no_wrap=True)
        for metric in shown:
            table.add_column(metric.replace("_linear", ""), justify="right")
        for group, by_column in means.items():
            values = (percent(by_column[column][metric]) for metric in shown)
            table.add_row(MEAN_TITLES[group], *values)
        return table

    def modes_table(self) -> Table:
        """Every inference mode: overall hit@1 in percent, and what it costs."""
        table = Table(title="inference modes, from one encoding pass")
        headings = ("hit@1", "IND", "OOD", "MRR", "encode\nms/item", "bytes\nper item", "search\nus/query*")
        for heading in ("mode", *headings):
            table.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True)
        means, metrics = self.means, self.metric_means.get("overall", {})
        for column in self.columns:
            scores = [
                percent(means[group][column]) if group in means else ""
                for group in ("overall", "in_distribution", "out_of_distribution")
            ]
            mrr = percent(metrics[column]["mrr"]) if metrics else ""
            costs = []
            if cost := self.modes.get(column):
                encoding = cost.get("encoding_milliseconds_per_item")
                costs = ["" if encoding is None else f"{encoding:.2f}"]
                costs += [f"{cost['bytes_per_item']:,}", f"{cost['microseconds_per_query']:.0f}"]
            table.add_row(column, *scores, mrr, *costs)
        if self.modes:
            table.caption = Text(
                "encode: one batch of this run, one path or all; * exact float32 scoring of 1,000 items on "
                "this machine's CPU"
            )
        return table

    def warning_panels(self) -> list[Panel]:
        """What makes the scores doubtful, each with what was seen and what to do."""
        panels = []
        for warning in self.warnings:
            title = f"WARNING: {str(warning['check']).replace('_', ' ')}"
            text = Text(f"{warning['detail']}\n{warning['advice']}")
            panels.append(Panel(text, title=title, border_style="bold yellow", title_align="left"))
        return panels


def percent(fraction: float) -> str:
    """Format a fraction as percent with one decimal."""
    return f"{100 * fraction:.1f}"


def _add_mean(table: Table, title: str, mean: Mapping[str, float], columns: Sequence[str]) -> None:
    table.add_row(title, "", "", "", *(percent(mean[column]) for column in columns), style="bold")
