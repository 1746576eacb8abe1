"""Score files as VLM2Vec's two versions (``v1``, ``v2``) and the MMEB leaderboard write them."""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.tasks import V2_GROUPS, V2_TASKS, EvalTask, Task
from parallel_decoupling.evaluation.score import DEPTHS, TaskResult
from parallel_decoupling.files import write_json, write_text

SCORE_FILES_DIR = "score_files"  # in a run's folder; holds v1 and v2
LEADERBOARD_FILE = "leaderboard.json"
SCORE_SUFFIX = "_score.json"
PREDICTIONS = {"v1": "_pred.txt", "v2": "_pred.jsonl"}
FIXED = {name: f"{name}-fixed" for name in ("ViDoSeek-page", "MMLongBench-page")}
"""What VLM2Vec's report calls these two."""
METADATA = (
    *("model_name", "model_backbone", "model_size", "embedding_dimension", "max_length_tokens"),
    *("model_release_date", "data_source", "url", "report_generated_date"),
)


def candidate_name(task: Task, candidate: RawInput) -> str:
    """Name a candidate as VLM2Vec's second version does: its text, its image, or ``image:text``.

    Prompts stand in for the raw cells, and image files have their whole path.
    """
    if candidate.video:
        return str(Path(str(candidate.video[0])).parent)
    if not candidate.images:
        return candidate.text
    text = " ".join(candidate.text.replace(IMAGE_PLACEHOLDER, " ").split())
    image = ",".join(each if isinstance(each, str) else "image" for each in candidate.images)
    if task.identity == "text":
        return text
    return image if task.identity == "image" else f"{image}:{text.strip(chr(34))}"


def write_predictions(folder: Path, task: EvalTask, score: TaskResult) -> None:
    """Write one task's best candidates by row (v1 one, v2 ten), without copies of the positive."""
    assert score.ranking is not None
    names = [candidate_name(task.task, candidate) for candidate in task.candidates]
    best, lines = [], []
    for row, ranking in enumerate(score.ranking.tolist()):
        answers = task.answers(row)
        predicted = [names[index] for index in ranking if index >= 0]
        best.append(" ".join(predicted[0].split()))  # a line each
        grades = None if task.relevance_of_row is None else list(answers.values())
        line = {"prediction": predicted, "label": [names[each] for each in answers], "rel_scores": grades}
        lines.append(json.dumps(line, ensure_ascii=False))
    for (version, suffix), rows in zip(PREDICTIONS.items(), (best, lines), strict=True):
        write_text(_file(folder, version, task.task.name, suffix), "\n".join(rows) + "\n")


def write_score_files(tasks: Mapping[str, TaskResult], column: str, folder: Path) -> None:
    """Write ``v1/<task>_score.json`` and ``v2/<kind>/<task>_score.json``, and remove files of other tasks."""
    for version, predictions in PREDICTIONS.items():
        for suffix in (SCORE_SUFFIX, predictions):
            kept = {_file(folder, version, name, suffix) for name in tasks}
            for old in {*(folder / version).rglob(f"*{suffix}")} - kept:
                old.unlink()
    for name, result in tasks.items():
        correct = round(result.hit_at_1[column] * result.num_queries)
        v1 = {"acc": result.hit_at_1[column], "num_correct": correct, "num_pred": result.num_queries}
        for version, content in (("v1", v1), ("v2", _v2(result, column))):
            write_json(_file(folder, version, name, SCORE_SUFFIX), content)


def _kind(name: str) -> str:
    return V2_TASKS[name].group if name in V2_TASKS else "image"


def _file(folder: Path, version: str, name: str, suffix: str) -> Path:
    """Return a task's file; the second version has a folder for each kind of task."""
    return folder / version / (_kind(name) if version == "v2" else "") / f"{name}{suffix}"


def write_leaderboard(
    tasks: Mapping[str, TaskResult], column: str, json_file: Path, metadata: Mapping[str, Any]
) -> None:
    """Write the one file that the MMEB leaderboard takes; what ``metadata`` lacks of ``METADATA`` is null."""
    about: dict[str, Any] = dict.fromkeys(METADATA)
    about |= {"report_generated_date": date.today().isoformat(), **metadata}
    metrics: dict[str, dict[str, Any]] = {"image": {}, **{group: {} for group in V2_GROUPS}}
    for name, result in tasks.items():
        metrics[_kind(name)][FIXED.get(name, name)] = _v2(result, column)
    write_json(json_file, {"metadata": about, "metrics": metrics})


def _v2(result: TaskResult, column: str) -> dict[str, Any]:
    """Return what the second version keeps of a task, all metrics cut at 1, 5 and 10."""
    metrics = result.metrics.get(column, {})
    values: dict[str, float] = {}
    for k in DEPTHS if metrics else ():
        hit, mrr, ndcg = (metrics[f"{name}@{k}"] for name in ("hit", "mrr", "ndcg"))
        values |= {f"hit@{k}": hit, f"mrr@{k}": mrr, f"ndcg_linear@{k}": ndcg}
        values[f"recall@{k}"] = metrics[f"recall@{k}"]
        if result.answers == 1:  # then these are functions of those
            values |= {f"ndcg_exponential@{k}": ndcg, f"precision@{k}": hit / k}
            values |= {f"f1@{k}": 2 * hit / (k + 1), f"map@{k}": mrr}
    values["hit@1"] = result.hit_at_1[column]
    return {**values, "num_pred": result.num_queries, "num_data": result.num_queries + result.num_skipped}
