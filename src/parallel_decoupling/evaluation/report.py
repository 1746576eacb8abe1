"""The score report of one run: its tasks, MMEB's means, the files of a test, and tables of all of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from parallel_decoupling.data.names import printable
from parallel_decoupling.data.tasks import MMEB_TASKS, OVERALL, TASK_KEYS, V2_TASKS, Task
from parallel_decoupling.evaluation import leaderboard
from parallel_decoupling.evaluation.score import NOT_KEPT, TaskResult
from parallel_decoupling.files import write_json
from parallel_decoupling.model.identity import check_seal, sealed
from parallel_decoupling.model.run_checkpoint import run_dir_of

T = TypeVar("T")
SCORES_FILE = "scores.json"
OTHER_PARTS = ("modes", "path_cosine", "warnings", "run")  # of a report, which its file holds as they are
META_TASKS = ("classification", "vqa", "retrieval", "grounding")
CUSTOM = "custom"  # meta-task of tasks in no table: a mean of their own, after all others
MEAN_TITLES = {
    **{meta_task: f"mean of {meta_task}" for meta_task in META_TASKS},
    "in_distribution": "mean IND",
    "out_of_distribution": "mean OOD",
    "overall": "overall (mean of tasks)",
    "mean_of_meta_tasks": "mean of meta-tasks",
    CUSTOM: "mean of custom tasks",
    "mmeb_v2": "MMEB-V2 (mean of tasks)",
}
V2 = {**MMEB_TASKS, **V2_TASKS}
MMEB_COUNTS = dict(zip(MEAN_TITLES, (10, 10, 12, 4, 20, 16, 36), strict=False))  # tasks behind each mean
MMEB_COUNTS |= {"video": 18, "visdoc": 24, "mmeb_v2": 78}


@dataclass(frozen=True)
class ScoreReport:
    """All scores of one run."""

    tasks: dict[str, TaskResult]
    run: dict[str, Any] = field(default_factory=dict)  # what produced them, as plain values
    modes: dict[str, dict[str, int]] = field(default_factory=dict)  # score.mode_costs by column
    path_cosine: list[list[float]] | None = None  # [N][N], mean between the paths' queries
    warnings: list[dict[str, Any]] = field(default_factory=list)  # of checks.Finding, with advice

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("a score report needs at least one task")
        for name, result in self.tasks.items():
            if result.task.meta_task not in (known := (*META_TASKS, CUSTOM)):
                raise ValueError(f"{name} has meta-task {result.task.meta_task!r}; use one of {known}")

    @property
    def columns(self) -> list[str]:
        """Names of the scored kinds of embeddings; the first one is the headline."""
        return list(next(iter(self.tasks.values())).hit_at_1)

    @property
    def path_columns(self) -> list[str]:
        """Columns of single paths."""
        return [column for column in self.columns if column.startswith("path_")]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Task names by mean: meta-tasks, in- and out-of-distribution, overall, custom, groups; none empty.

        Custom tasks make the overall mean only in a report that has no other tasks.
        """
        of_group: dict[str, dict[str, Task]] = {OVERALL: {}}
        for name, result in self.tasks.items():
            of_group.setdefault(result.task.group, {})[name] = result.task
        tasks = of_group.pop(OVERALL)
        groups = {name: [each for each in tasks if tasks[each].meta_task == name] for name in META_TASKS}
        custom = [name for name, task in tasks.items() if task.meta_task == CUSTOM]
        listed = {name: task for name, task in tasks.items() if name not in custom}
        groups["in_distribution"] = [name for name, task in listed.items() if task.in_distribution]
        groups["out_of_distribution"] = [name for name, task in listed.items() if not task.in_distribution]
        groups |= {OVERALL: list(listed or tasks), CUSTOM: custom}
        groups |= {group: list(names) for group, names in of_group.items()}
        if not self.tasks.keys().isdisjoint(V2_TASKS):
            groups["mmeb_v2"] = [name for name in self.tasks if name in V2]
        return {group: names for group, names in groups.items() if names}

    @property
    def headline(self) -> str:
        """The mean that counts: ``overall``, or the first group if no task counts there."""
        return OVERALL if OVERALL in self.groups else next(iter(self.groups))

    @property
    def partial_means(self) -> dict[str, int]:
        """Means over some of MMEB's tasks but not all of ``MMEB_COUNTS``: how many of them there are."""
        groups = self.groups
        counts = {name: sum(task in V2 for task in groups.get(name, ())) for name in MMEB_COUNTS}
        return {group: count for group, count in counts.items() if 0 < count < MMEB_COUNTS[group]}

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """Means by column: those of ``groups``, every task counting once, and ``mean_of_meta_tasks``."""
        return self.over_groups({name: each.score for name, each in self.tasks.items()}, _mean)

    def over_groups(self, of_task: Mapping[str, T], mean: Callable[[Sequence[T]], T]) -> dict[str, T]:
        """Average what tasks have over each of ``groups``, and the means of the meta-tasks."""
        means = {group: mean([of_task[name] for name in names]) for group, names in self.groups.items()}
        if meta_tasks := [means[name] for name in META_TASKS if name in means]:
            means["mean_of_meta_tasks"] = mean(meta_tasks)
        return means

    @property
    def metric_means(self) -> dict[str, dict[str, float]]:
        """Means over the tasks of ``headline`` of every metric by column; empty if only hit@1 is known."""
        metrics = [self.tasks[name].metrics for name in self.groups[self.headline]]
        return {name: _mean([each[name] for each in metrics]) for name in self.columns if all(metrics)}

    @property
    def gaps(self) -> list[str]:
        """What the means leave out, a sentence each: tasks of MMEB, rows without a readable image."""
        found = []
        if count := self.partial_means.get("overall"):
            found.append(f"means over {count} of MMEB's {len(MMEB_TASKS)} tasks: not MMEB's means")
        if count := self.partial_means.get("mmeb_v2"):
            found.append(f"mmeb_v2 over {count} of {len(V2)} tasks: not MMEB-V2's mean")
        skipped = [f"{name} {each.num_skipped}" for name, each in self.tasks.items() if each.num_skipped]
        return found + (["rows that could not be embedded: " + ", ".join(skipped)] if skipped else [])

    @property
    def content(self) -> dict[str, Any]:
        """What ``scores.json`` holds, fractions unrounded, the hits of the rows as strings of 0 and 1."""
        tasks = {name: {**each.task.entry, **vars(each)} for name, each in self.tasks.items()}
        for row, key in product(tasks.values(), ("task", *NOT_KEPT)):
            del row[key]
        counts = self.partial_means.items()
        partial = {name: f"of {count} of MMEB's {MMEB_COUNTS[name]} tasks" for name, count in counts}
        content = {"metric": "hit@1", "means": self.means, "partial_means": partial}
        content |= {"metric_means": self.metric_means, **{key: getattr(self, key) for key in OTHER_PARTS}}
        return {**content, "tasks": tasks}

    def to_json_file(self, json_file: str | Path) -> None:
        """Write ``content`` with a hash of it."""
        write_json(json_file, sealed(json.loads(json.dumps(self.content, default=str))))

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> "ScoreReport":
        """Read what ``to_json_file`` wrote; what the rows scored is what counts. Other files are refused."""
        try:
            found, tasks = json.loads(Path(json_file).read_text(encoding="utf-8")), {}
            content = check_seal(found, "it")
            for name, row in content["tasks"].items():
                task = Task(name, **{key: row.pop(key) for key in TASK_KEYS if key in row})
                row["hit_at_1"] = {key: hits.count("1") / len(hits) for key, hits in row["hits"].items()}
                for column, values in row["values"].items():
                    row["metrics"][column][task.metric] = fmean(values)
                tasks[name] = TaskResult(task, **row)
            return cls(tasks, **{key: content[key] for key in OTHER_PARTS})
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
            problem = f"{json_file} is not a score file as a test wrote it ({error!r:.200})"
            raise ValueError(f"{problem}; run the test again") from error

    def task_table(self) -> Table:
        """Tabulate tasks by meta-task, then means, of aggregate and paths; tasks at chance are marked."""
        shown = [self.columns[0], *self.path_columns]
        rows: list[list[str]] = []
        styles: list[str] = []
        for mean, title in self.mean_titles.items():
            is_listed = mean in (*META_TASKS, CUSTOM) or mean not in MEAN_TITLES  # else its tasks already are
            for name in self.groups.get(mean, ()) if is_listed else ():
                result = self.tasks[name]
                bad = result.hit_at_1[self.columns[0]] <= result.chance
                split = "" if mean == CUSTOM else "IND" if result.task.in_distribution else "OOD"
                chance = percent(result.chance) if result.task.metric == "hit@1" else ""
                about = [f"{result.title} !" if bad else result.title, split, str(result.num_queries), chance]
                rows.append([*about, *(percent(result.score[column]) for column in shown)])
                styles.append("red" if bad else "")
            if mean in self.means:
                count = self.partial_means.get(mean)
                part = "" if count is None else f", {count}/{MMEB_COUNTS[mean]}"
                scores = [percent(self.means[mean][column]) for column in shown]
                rows.append([title + part, "", "", "", *scores])
                styles.append("bold")
        notes = ["! at or below chance"] if "red" in styles else []
        headings = ("task", "split", "queries", "chance", *(column.replace("_", " ") for column in shown))
        return text_table("hit@1 in percent", headings, rows, styles, "; ".join([*notes, *self.gaps]))

    @property
    def mean_titles(self) -> dict[str, str]:
        """How the means are called in tables, in their order; those of groups come last."""
        return MEAN_TITLES | {name: f"mean of {name}" for name in self.groups if name not in MEAN_TITLES}

    def mode_table(self) -> Table:
        """Tabulate every inference mode: its means in percent, and what it costs."""
        titles = {"overall": "hit@1", "in_distribution": "IND", "out_of_distribution": "OOD"}
        titles |= {name: name for name in self.groups if name not in MEAN_TITLES}
        splits = [name for name in titles if name in self.means]
        metrics = [name for name in ("hit@5", "hit@10", "mrr", "ndcg@10") if self.metric_means]
        rows = []
        # a single path is its own aggregate
        for column in self.columns if len(self.path_columns) > 1 else self.columns[:1]:
            scores = [percent(self.means[split][column]) for split in splits]
            scores += [percent(self.metric_means[column][metric]) for metric in metrics]
            costs = self.modes.get(column, {})
            sizes = [f"{costs[name]:,}" if costs else "" for name in ("bytes_per_item", "paths_per_item")]
            rows.append([column, *scores, *sizes])
        headings = ("mode", *(titles[split] for split in splits), *metrics, "bytes/item", "paths/item")
        caption = "means over tasks in percent; what an item takes to keep, and the paths to encode for it"
        return text_table("inference modes", headings, rows, caption=caption)

    def warning_panels(self) -> list[Panel]:
        """Show what makes the scores doubtful, each with what was seen and what to do."""
        texts = [_text(f"{each['detail']}\n{each['advice']}") for each in self.warnings]
        titles = [f"WARNING: {each['check'].replace('_', ' ')}" for each in self.warnings]
        return [Panel(text, title=title) for text, title in zip(texts, titles, strict=True)]


def find_scores(path: str | Path, run: Mapping[str, Any]) -> ScoreReport | None:
    """Find the scores of exactly the weights of ``run``, in its folder or one inside it; else None."""
    folder = run_dir_of(path)
    for file in (*folder.glob(SCORES_FILE), *folder.glob(f"*/{SCORES_FILE}")):
        report = ScoreReport.from_json_file(file)
        if all(report.run.get(key) == run.get(key) for key in ("global_step", "seed", "token_passes")):
            return report
    return None


def write_report(report: ScoreReport, folder: Path) -> None:
    """Write ``scores.json``, VLM2Vec's score files and the leaderboard's into ``folder``."""
    report.to_json_file(folder / SCORES_FILE)
    column, backbone = report.columns[0], report.run.get("model", {}).get("backbone")
    leaderboard.write_score_files(report.tasks, column, folder / leaderboard.SCORE_FILES_DIR)
    metadata = {"model_name": folder.resolve().name, "model_backbone": backbone}
    if column in report.modes:
        metadata["embedding_dimension"] = report.modes[column]["bytes_per_item"] // 4
    leaderboard.write_leaderboard(report.tasks, column, folder / leaderboard.LEADERBOARD_FILE, metadata)


def console(columns: int = 120) -> Console:
    """Return the terminal, or a file of so many columns."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=columns)


def text_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] = (),
    caption: str = "",
) -> Table:
    """Make a table of texts, whatever markup they hold; ``styles`` are rich's by row."""
    table = Table(title=_text(title), caption=_text(caption) if caption else None)
    for number, heading in enumerate(headings):
        table.add_column(
            _text(heading), justify="right" if number else "left", no_wrap=not number, overflow="fold"
        )
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*map(_text, row), style=style)
    return table


def _text(text: str) -> Text:
    return Text(printable(text))


def _mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: fmean(each[key] for each in values) for key in values[0]}


def percent(fraction: float) -> str:
    """Format a fraction as percent with one decimal."""
    return f"{100 * fraction:.1f}"
