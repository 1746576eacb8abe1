"""Recompute the means of published MMEB rows and of score files, and name what does not fit.

``python -m studies.published.audit [PATH]`` takes a CSV of published rows, a leaderboard JSON, a
``scores.json``, a ``<task>_score.json`` of VLM2Vec's first or second version, or a folder of these; without a
path the table beside this file. It ends with exit code 1 when something does not fit.

Sources in that table: L the leaderboard's ``results.csv`` and its pull requests 29, 30 and 33 (self: sent in
by the authors); R the VLM2Vec repository's score files, averaged; Q the README of Qwen3-VL-Embedding; O the
model cards of Ops-MM-embedding; P VLM2Vec's pull request 213.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from parallel_decoupling.data.tasks import MMEB_TASKS, OVERALL, V2_GROUPS, V2_TASKS, Task
from parallel_decoupling.evaluation.leaderboard import FIXED, SCORE_SUFFIX
from parallel_decoupling.evaluation.report import (
    META_TASKS,
    MMEB_COUNTS,
    SCORES_FILE,
    ScoreReport,
    TaskResult,
    text_table,
)
from parallel_decoupling.model.identity import SEAL

TABLE = Path(__file__).with_name("published_mmeb.csv")
SPLITS = ("in_distribution", "out_of_distribution")
MEANS = (*META_TASKS, *SPLITS, "overall")
HEADINGS = {
    **{name: name for name in MEANS},
    "ind": "in_distribution",
    "ood": "out_of_distribution",
    "cls": "classification",
    "ret": "retrieval",
    "vg": "grounding",
    "all": "overall",
    "model": "model",
    "models": "model",
    "source": "source",
    "data source": "source",
}
"""Headings in lower case, of the table beside this file and of the leaderboard's."""
ROUNDING = 0.1
"""Points: parts and whole printed with one decimal differ by at most this much."""
SLACK = 1e-6
V2 = MMEB_TASKS | V2_TASKS
NAMES = {fixed: name for name, fixed in FIXED.items()}
SCORE = "score"  # the column of a report


@dataclass(frozen=True)
class PublishedRow:
    """One row of a results table.

    Attributes:
        model: as printed.
        means: some of ``MEANS``, in percent as printed.
        source: where it was printed; "" if the table does not say.
    """

    model: str
    means: dict[str, float]
    source: str = ""


@dataclass(frozen=True)
class RowAudit:
    """One published row against its own parts, in percent.

    Attributes:
        row: as printed.
        from_meta_tasks: the task mean that its four meta-tasks give; None if one is missing.
        from_splits: the task mean that IND and OOD give; None if one is missing.
        problems: what does not fit; empty for a consistent row.
    """

    row: PublishedRow
    from_meta_tasks: float | None
    from_splits: float | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TaskScores:
    """Metrics by task as a score file has them.

    Attributes:
        tasks: task name to metric name to value; ``hit@1`` is always there, nDCG is the linear one.
        known: meta-task and distribution of tasks that are not MMEB's, where the file says them.
        notes: what was passed over.
    """

    tasks: dict[str, dict[str, float]]
    known: dict[str, Task] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ScoresAudit:
    """A score file against its own parts.

    Attributes:
        report: the means of its tasks, recomputed; None if the meta-task of no task is known.
        problems: what does not fit; empty for a consistent file of all of MMEB's tasks or of own ones.
    """

    report: ScoreReport | None
    problems: tuple[str, ...]


def read_table(csv_file: str | Path = TABLE) -> list[PublishedRow]:
    """Read a CSV with a heading per mean, such as the leaderboard's; cells are in percent, or empty.

    Raises:
        ValueError: if the columns are missing, a line has another length, or a cell is not a percentage.
    """
    with open(csv_file, newline="", encoding="utf-8-sig") as stream:
        lines = list(csv.reader(stream))
    headings = [HEADINGS.get(cell.strip().lower(), "") for cell in lines[0]] if lines else []
    if headings.count("model") != 1 or headings.count("overall") != 1:
        raise ValueError(
            f"{csv_file} needs one column model (or Models) and one column overall, beside "
            f"{', '.join(META_TASKS)}, IND, OOD; found {lines[:1]}"
        )
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        where = f"{csv_file}, line {number}"
        if any(cells) and len(cells) != len(headings):
            raise ValueError(f"{where}: {len(cells)} cells under {len(headings)} headings")
        row, means = dict(zip(headings, cells, strict=False)), {}
        for name in MEANS:
            text = row.get(name, "").strip().removesuffix("%")
            if text in ("", "-"):
                continue
            try:
                means[name] = float(text)
            except ValueError as error:
                raise ValueError(f"{where}, column {name}: {text!r} is not a number") from error
            if not 0 <= means[name] <= 100:
                raise ValueError(f"{where}, column {name}: {text} is not a percentage between 0 and 100")
        if row:
            rows.append(PublishedRow(row["model"].strip(), means, row.get("source", "").strip()))
    return rows


def audit_row(row: PublishedRow) -> RowAudit:
    """Recompute a row's task mean in every way that its cells allow.

    Cells have one decimal, so a mean may be off by 0.05 and what it is compared with by another 0.05.
    """
    means = row.means
    meta_tasks, splits, overall = _weighted(means, META_TASKS), _weighted(means, SPLITS), means.get("overall")
    off = {
        name: value
        for name, value in {"meta-tasks": meta_tasks, "IND and OOD": splits}.items()
        if value is not None and overall is not None and _differ(value, overall)
    }
    problems = []
    if meta_tasks is not None and splits is not None and _differ(meta_tasks, splits):
        odd = (
            "a meta-task" if "IND and OOD" not in off else "IND or OOD" if "meta-tasks" not in off else "one"
        )
        problems.append(
            f"the meta-tasks give {meta_tasks:.1f} but IND and OOD give {splits:.1f}: "
            f"{odd} cell must be wrong"
        )
    elif off and overall is not None:
        given = ", ".join(f"{name} give {value:.1f}" for name, value in off.items())
        problem = f"printed overall {overall:.1f}, but its {given}"
        if meta_tasks is not None:
            unweighted = fmean(means[name] for name in META_TASKS)
            if not _differ(unweighted, overall):
                problem += f"; {overall:.1f} is the mean of the four meta-tasks ({unweighted:.1f})"
        problems.append(problem)
    return RowAudit(row, meta_tasks, splits, tuple(problems))


def read_scores(path: str | Path) -> TaskScores:
    """Read a score file, or a folder of them, in any of the formats.

    Raises:
        ValueError: if the file has none of the formats, or a value is not a number; the message says where.
    """
    path = Path(path)
    if (path / SCORES_FILE).is_file():
        path = path / SCORES_FILE
    files = sorted(path.rglob(f"*{SCORE_SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds neither {SCORES_FILE} nor files *{SCORE_SUFFIX}")
    tasks: dict[str, dict[str, float]] = {}
    versions = set()
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "tasks" in content and SEAL in content:
            return _from_report(ScoreReport.from_json_file(file))
        if isinstance(content.get("metrics"), dict):
            return _from_leaderboard(content["metrics"], file)
        if not {"acc", "hit@1"} & content.keys() or not file.name.endswith(SCORE_SUFFIX):
            raise ValueError(
                f"{file} is not a score file: expected a leaderboard JSON (metadata, metrics), a "
                f"{SCORES_FILE}, or <task>{SCORE_SUFFIX} with acc or hit@1"
            )
        versions.add("hit@1" in content)
        name = file.name.removesuffix(SCORE_SUFFIX)
        name = NAMES.get(name, name)
        if len(versions) > 1 or name in tasks:
            raise ValueError(f"{path} mixes score files of VLM2Vec v1 and v2, or of two tests; keep one")
        tasks[name] = _numbers({"hit@1": content.get("acc"), **content}, f"{file}, {name}")
    return TaskScores(tasks)


def audit_scores(scores: TaskScores) -> ScoresAudit:
    """Recompute the means of a score file's tasks, and list what is odd about it.

    Tasks whose meta-task or own metric is not known are left out of the means and named. A median of hit@1
    above 1 means that all rates are in percent. Tasks of MMEB's images, videos or documents count as missing
    only if the file has at least one of them.
    """
    known = {**scores.known, **V2}
    tasks, problems = scores.tasks, []
    if median(values["hit@1"] for values in tasks.values()) > 1:
        problems.append("hit@1 is in percent; the formats have fractions")
        tasks = {
            name: {key: value / 100 if _is_rate(key) else value for key, value in values.items()}
            for name, values in tasks.items()
        }
    for name, values in tasks.items():
        problems += [f"{name}: {problem}" for problem in _value_problems(values)]
    problems += [
        f"{name} counts as {task.meta_task}, MMEB has it in {known[name].meta_task}, or in the other split"
        for name, task in scores.known.items()
        if task != known[name]
    ]
    if unknown := [name for name in tasks if name not in known]:
        problems.append(f"not tasks of MMEB, left out of the means: {', '.join(unknown)}")
    if lacking := [name for name in tasks if name in known and known[name].metric not in tasks[name]]:
        problems.append(f"without their own metric, left out of the means: {', '.join(lacking)}")
    for group in (OVERALL, *V2_GROUPS):
        names = [name for name, task in V2.items() if task.group == group]
        missing = [name for name in names if name not in tasks]
        if 0 < len(missing) < len(names):
            problems.append(
                f"{len(missing)} of MMEB's {len(names)} tasks of {group} are missing, so the means are not "
                f"MMEB's: {', '.join(missing)}"
            )
    results = {}
    for name in (name for name in tasks if name in known and name not in lacking):
        count, values = int(tasks[name].get("num_pred", 0)), {SCORE: tasks[name]}
        hits = {SCORE: tasks[name]["hit@1"]}
        results[name] = TaskResult(known[name], count, 0.0, hits, metrics=values)
    return ScoresAudit(ScoreReport(results) if results else None, tuple(problems))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the recomputed means and what does not fit, and return the exit code."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    path = Path(typed[0]) if typed else TABLE
    console, notes = Console(width=None if sys.stdout.isatty() else 120), []
    if path.suffix == ".csv":
        audits = [audit_row(row) for row in read_table(path)]
        console.print(_row_table(audits))
        problems = [f"{each.row.model}: {problem}" for each in audits for problem in each.problems]
    else:
        scores = read_scores(path)
        found = audit_scores(scores)
        problems, notes = list(found.problems), scores.notes
        if found.report is not None:
            console.print(_means_table(found.report))
    for line in (*(f"note: {note}" for note in notes), *(f"problem: {problem}" for problem in problems)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def _row_table(audits: Sequence[RowAudit]) -> Table:
    rows = []
    for audit in audits:
        values = (audit.row.means.get("overall"), audit.from_meta_tasks, audit.from_splits)
        cells = ("" if value is None else f"{value:.1f}" for value in values)
        rows.append([audit.row.model, *cells, audit.row.source])
    styles = ["red" if audit.problems else "" for audit in audits]
    headings = ("model", "printed", "from meta-tasks", "from IND, OOD", "source")
    return text_table("published rows against their own parts, in percent", headings, rows, styles)


def _means_table(report: ScoreReport) -> Table:
    rows = [
        [
            report.mean_titles[name],
            str(len(report.groups.get(name, ()))),
            f"{100 * mean[report.columns[0]]:.1f}",
        ]
        for name, mean in report.means.items()
    ]
    return text_table("means recomputed from the tasks, in percent", ("mean", "tasks", SCORE), rows)


def _from_leaderboard(metrics: Mapping[str, Any], file: Path) -> TaskScores:
    """Read the tasks; a text in place of values is upstream's FILE_N/A, DIR_N/A or READ_ERROR."""
    tasks, notes = {}, []
    kinds = (metrics.get(kind) or {} for kind in ("image", *V2_GROUPS))
    for name, values in (item for kind in kinds for item in kind.items()):
        if isinstance(values, str):
            notes.append(f"{name} is {values}: it was not run")
            continue
        named = values if isinstance(values, dict) else {"hit@1": values}
        tasks[NAMES.get(name, name)] = _numbers(named, f"{file}, {name}")
    if not tasks:
        raise ValueError(f"{file}: metrics has no tasks; they belong in image, video or visdoc")
    return TaskScores(tasks, notes=notes)


def _from_report(report: ScoreReport) -> TaskScores:
    column = report.columns[0]
    tasks = {
        name: {
            **result.metrics.get(column, {}),
            "hit@1": result.hit_at_1[column],
            "num_pred": float(result.num_queries),
        }
        for name, result in report.tasks.items()
    }
    return TaskScores(tasks, {name: result.task for name, result in report.tasks.items()})


def _numbers(values: Mapping[str, Any], where: str) -> dict[str, float]:
    """Return the numbers among the values; what a check needs must be one."""
    numbers = {
        name.replace("ndcg_linear", "ndcg"): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
    for name in ("hit@1", *({"acc", "num_correct", "num_pred", "num_data"} & values.keys())):
        if name not in numbers:
            raise ValueError(f"{where}: {name} is {values.get(name)!r}, not a number")
    return numbers


def _weighted(means: Mapping[str, float], parts: Collection[str]) -> float | None:
    if not all(part in means for part in parts):
        return None
    return sum(MMEB_COUNTS[part] * means[part] for part in parts) / sum(MMEB_COUNTS[part] for part in parts)


def _differ(first: float, second: float) -> bool:
    return abs(first - second) > ROUNDING + SLACK


def _is_rate(name: str) -> bool:
    return "@" in name or name in ("acc", "mrr", "map")


def _value_problems(values: Mapping[str, float]) -> list[str]:
    """Name values of one task that contradict each other or are not fractions."""
    problems = []
    if out := [
        f"{name} {values[name]:g}" for name in values if _is_rate(name) and not 0 <= values[name] <= 1
    ]:
        problems.append(f"not a fraction between 0 and 1: {', '.join(out)}")
    correct, total = values.get("num_correct"), values.get("num_pred")
    if correct is not None and total and abs(correct / total - values["hit@1"]) > 1 / (2 * total) + SLACK:
        problems.append(f"{correct:g} of {total:g} is {correct / total:.4f}, not {values['hit@1']:.4f}")
    if total is not None and values.get("num_data", total) != total:
        problems.append(f"{total:g} of {values['num_data']:g} rows were scored")
    depths = [values[f"hit@{depth}"] for depth in (1, 5, 10) if f"hit@{depth}" in values]
    if depths != sorted(depths):
        problems.append(f"hit@k falls with k: {', '.join(f'{value:g}' for value in depths)}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
