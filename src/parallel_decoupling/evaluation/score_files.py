"""Score files of VLM2Vec's two versions and of the MMEB leaderboard: written, recognised, read.

First version: ``<task>_pred.txt`` and ``<task>_score.json`` with ``acc``, ``num_correct``, ``num_pred``.
Second version: ``<task>_pred.jsonl`` and ``<task>_score.json`` with ``hit@1``, ``ndcg_linear@5`` and others.
Leaderboard: one JSON of ``metadata`` and ``metrics``. Here: formats only. Deliberately elsewhere: means
(``report``), what is inconsistent (``audit``), tables of published rows (``published``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.metrics import DEPTHS
from parallel_decoupling.evaluation.report import SCORES_FILE, ScoreReport, TaskResult
from parallel_decoupling.evaluation.report_format import ROUNDING_ERROR, hit_problems, read_json
from parallel_decoupling.evaluation.score import TaskScore

SCORE_FILES_DIR = "score_files"
"""Folder of both versions' files in a run's folder: ``v1`` and ``v2``."""
LEADERBOARD_FILE = "leaderboard.json"
COUNTS = ("num_correct", "num_pred", "num_data")
SCORE_SUFFIX = "_score.json"
PREDICTIONS = {"v1": "_pred.txt", "v2": "_pred.jsonl"}
"""End of a file of predictions by version."""
METADATA = (
    "model_name",
    "model_backbone",
    "model_size",
    "embedding_dimension",
    "max_length_tokens",
    "model_release_date",
    "data_source",
    "url",
    "report_generated_date",
)


@dataclass(frozen=True)
class TaskScores:
    """Metrics by task as a file has them, fractions.

    Attributes:
        format: ``"VLM2Vec v1"``, ``"VLM2Vec v2"``, ``"leaderboard"`` or ``"scores.json"``.
        tasks: task name to metric name to value; ``hit@1`` is always there.
        known: meta-task and distribution by task, where the file says them.
        notes: of the reader: what it passed over.
        problems: of the reader: parts of the file that contradict each other.
    """

    format: str
    tasks: dict[str, dict[str, float]]
    known: dict[str, Task] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def candidate_name(task: Task, candidate: RawInput) -> str:
    """What VLM2Vec's second version calls a candidate: its text, its image, or ``image:text``.

    A candidate without image is its text to the letter. Prompts of the others stand in for the raw cells,
    without image placeholder and outer whitespace, and image files have their whole path.
    """
    if not candidate.images:
        return candidate.text
    text = " ".join(candidate.text.replace(IMAGE_PLACEHOLDER, " ").split())
    image = ",".join(each if isinstance(each, str) else "image" for each in candidate.images)
    if task.identity == "text":
        return text
    return image if task.identity == "image" else f"{image}:{text.strip(chr(34))}"


def write_predictions(folder: Path, task: EvalTask, score: TaskScore) -> None:
    """Write one task's ``v1/<task>_pred.txt`` and ``v2/<task>_pred.jsonl``, a line per row.

    v1 has the best candidate, v2 the ten best (``prediction``), the positive (``label``) and ``rel_scores``
    (null, as in rankings of one positive). Copies of the positive are left out.
    """
    for version in PREDICTIONS:
        (folder / version).mkdir(parents=True, exist_ok=True)
    names = [candidate_name(task.task, candidate) for candidate in task.candidates]
    best, lines = [], []
    for ranking, candidates in zip(score.ranking.tolist(), task.candidates_of_row, strict=True):
        predicted = [names[index] for index in ranking if index >= 0]
        best.append(" ".join(predicted[0].split()))  # a line each
        line = {"prediction": predicted, "label": [names[candidates[0]]], "rel_scores": None}
        lines.append(json.dumps(line, ensure_ascii=False))
    name = task.task.name
    for (version, suffix), rows in zip(PREDICTIONS.items(), (best, lines), strict=True):
        (folder / version / f"{name}{suffix}").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_score_files(report: ScoreReport, folder: Path) -> None:
    """Write ``v1/<task>_score.json`` and ``v2/<task>_score.json`` of every task, headline column.

    The folder holds one report: scores and predictions of tasks that it lacks are an earlier test's and are
    removed.
    """
    column = report.columns[0]
    for version, predictions in PREDICTIONS.items():
        for suffix in (SCORE_SUFFIX, predictions):
            for old in (folder / version).glob(f"*{suffix}"):
                if old.name.removesuffix(suffix) not in report.tasks:
                    old.unlink()
    for name, result in report.tasks.items():
        for version, content in (("v1", _v1(result, column)), ("v2", _v2(result, column))):
            _write(folder / version / f"{name}{SCORE_SUFFIX}", content)


def write_leaderboard(report: ScoreReport, json_file: Path, metadata: Mapping[str, Any]) -> None:
    """Write the one file that the MMEB leaderboard takes; metrics of the headline column.

    Args:
        report: of the run.
        json_file: where to.
        metadata: some of ``METADATA``; the others are null, the date is today's.
    """
    column = report.columns[0]
    about: dict[str, Any] = dict.fromkeys(METADATA)
    about |= {"report_generated_date": date.today().isoformat(), **metadata}
    image = {name: _v2(result, column) for name, result in report.tasks.items()}
    _write(json_file, {"metadata": about, "metrics": {"image": image, "video": {}, "visdoc": {}}})


def read_scores(path: str | Path) -> TaskScores:
    """Read a score file, or a folder of them, in any of the formats.

    Args:
        path: a leaderboard JSON, a ``scores.json``, a run's folder, or a folder of ``*_score.json``.

    Raises:
        ValueError: no such file, none of the formats, or a value that is no number; says where.
    """
    path = Path(path)
    if path.is_dir():
        if (path / SCORES_FILE).is_file():
            return read_scores(path / SCORES_FILE)
        files = sorted(path.glob(f"*{SCORE_SUFFIX}"))
        if not files:
            raise ValueError(f"{path} holds neither {SCORES_FILE} nor files *{SCORE_SUFFIX}")
        return _from_folder(files)
    content = _load(path)
    if isinstance(content, dict) and isinstance(content.get("metrics"), dict):
        return _from_leaderboard(content["metrics"], path)
    if isinstance(content, dict) and "tasks" in content and "format" in content:
        return _from_report(ScoreReport.from_content(content, path), content)
    if isinstance(content, dict) and {"acc", "hit@1"} & content.keys():
        return _from_folder([path])
    raise ValueError(
        f"{path} is no score file: expected a leaderboard JSON (metadata, metrics), a {SCORES_FILE}, or "
        "<task>_score.json with acc or hit@1"
    )


def _v1(result: TaskResult, column: str) -> dict[str, Any]:
    correct = round(result.hit_at_1[column] * result.num_queries)
    return {"acc": result.hit_at_1[column], "num_correct": correct, "num_pred": result.num_queries}


def _v2(result: TaskResult, column: str) -> dict[str, Any]:
    """With one positive precision is hit / depth, recall is hit, average precision is 1 / rank; all cut."""
    values: dict[str, Any] = {**result.metrics.get(column, {}), "hit@1": result.hit_at_1[column]}
    values.pop("mrr", None)
    for depth in DEPTHS:
        hit = values.get(f"hit@{depth}")
        if hit is not None:
            values |= {f"precision@{depth}": hit / depth, f"recall@{depth}": hit}
            values[f"f1@{depth}"] = 2 * hit / (depth + 1)
        if f"mrr@{depth}" in values:
            values[f"map@{depth}"] = values[f"mrr@{depth}"]
    return {
        **values,
        "num_pred": result.num_queries,
        "num_data": result.num_queries + result.num_skipped,
    }


def _from_folder(files: list[Path]) -> TaskScores:
    tasks, formats = {}, set()
    for file in files:
        if not file.name.endswith(SCORE_SUFFIX):
            raise ValueError(f"{file}: the task's name is the file's: <task>{SCORE_SUFFIX}")
        content = _load(file)
        if not isinstance(content, dict) or not {"acc", "hit@1"} & content.keys():
            raise ValueError(f"{file} has neither acc (VLM2Vec v1) nor hit@1 (v2)")
        formats.add("VLM2Vec v2" if "hit@1" in content else "VLM2Vec v1")
        if "hit@1" not in content:
            content = {**content, "hit@1": content["acc"]}
        tasks[file.name.removesuffix(SCORE_SUFFIX)] = _numbers(content, file)
    if len(formats) > 1:
        raise ValueError(f"{files[0].parent} mixes score files of VLM2Vec v1 and v2; keep one version")
    return TaskScores(formats.pop(), tasks)


def _from_leaderboard(metrics: dict[str, Any], file: Path) -> TaskScores:
    image = metrics.get("image")
    if not isinstance(image, dict) or not image:
        raise ValueError(f"{file}: metrics.image has no tasks; MMEB's 36 image tasks belong there")
    tasks, not_run = {}, {}
    for name, values in image.items():
        if isinstance(values, str):  # upstream's FILE_N/A, DIR_N/A, JSON_ERROR, READ_ERROR
            not_run[name] = values
            continue
        if isinstance(values, (int, float)):
            values = {"hit@1": values}
        if not isinstance(values, dict) or "hit@1" not in values:
            raise ValueError(f"{file}: metrics.image.{name} has no hit@1")
        tasks[name] = _numbers(values, file, name)
    notes = [
        f"{len(metrics[kind])} {kind} tasks are not part of the image means and were not read"
        for kind in ("video", "visdoc")
        if metrics.get(kind)
    ]
    notes += [f"{name} is {mark}: it was not run" for name, mark in not_run.items()]
    return TaskScores("leaderboard", tasks, notes=notes)


def _from_report(report: ScoreReport, content: Mapping[str, Any]) -> TaskScores:
    column = report.columns[0]
    tasks = {
        name: {
            **result.metrics.get(column, {}),
            "hit@1": result.hit_at_1[column],
            "num_pred": float(result.num_queries),
        }
        for name, result in report.tasks.items()
    }
    known = {name: result.task for name, result in report.tasks.items()}
    problems = hit_problems(content)
    for name, result in report.tasks.items():
        found = {each: values["hit@1"] for each, values in result.metrics.items() if "hit@1" in values}
        problems += _contradictions(found, result.hit_at_1, f"task {name}, metrics, hit@1", "hit_at_1")
    for stored, computed, where in (
        (content.get("means", {}), report.means, "means"),
        (content.get("metric_means", {}), report.metric_means, "metric_means"),
    ):
        problems += _contradictions(_flat(stored), _flat(computed), where, "the tasks")
    return TaskScores(SCORES_FILE, tasks, known, problems=problems)


def _flat(values: Any, place: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined with commas."""
    if not isinstance(values, dict):
        return {place: values}
    parts = [_flat(value, f"{place}, {key}" if place else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def _contradictions(
    stored: Mapping[str, Any], computed: Mapping[str, float], where: str, source: str
) -> list[str]:
    """Stored values that are not the computed ones."""
    return [
        f"{where}, {key}: {value!r:.20} is stored, {source} give {computed.get(key, 'nothing')!r:.20}"
        for key, value in stored.items()
        if key not in computed
        or not isinstance(value, (int, float))
        or not abs(value - computed[key]) <= ROUNDING_ERROR
    ]


def _numbers(values: Mapping[str, Any], file: Path, task: str = "") -> dict[str, float]:
    numbers = {}
    for name, value in values.items():
        a_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in ("hit@1", "acc", *COUNTS) and not (a_number and math.isfinite(value)):
            raise ValueError(f"{file}{f', {task}' if task else ''}: {name} is {value!r}, not a number")
        if not a_number:
            continue
        numbers[name] = float(value)
    return numbers


def _load(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"no score file {str(file)!r}")
    return read_json(file)


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
