from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from parallel_decoupling.data.tasks import MMEB_TASKS, Task
from parallel_decoupling.evaluation.leaderboard import write_leaderboard, write_score_files
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult
from studies.published.audit import (
    TaskScores,
    audit_row,
    audit_scores,
    read_scores,
    read_table,
)
from tests.evaluation.test_report import PUBLISHED

PERCENT = {
    name: [float(value) for value in pair.split("/")]
    for name, pair in zip(PUBLISHED[::2], PUBLISHED[1::2], strict=True)
}


def scores(place: int = 0) -> dict[str, dict[str, float]]:
    return {name: {"hit@1": values[place] / 100} for name, values in PERCENT.items()}


def test_the_inconsistent_published_rows_are_found_and_no_others() -> None:
    audits = {audit.row.model: audit for audit in map(audit_row, read_table())}
    assert len(audits) == 44
    found = {model: audit.problems for model, audit in audits.items() if audit.problems}
    assert set(found) == {
        "VLM2Vec Qwen2-VL-2B HighRes",
        "UniME Phi-3.5-V",
        "UniME LLaVA-1.6 LowRes",
        "SigLIP base",
    }
    assert found["VLM2Vec Qwen2-VL-2B HighRes"] == ("printed overall 59.3, but its meta-tasks give 60.1",)
    for model, overall, weighted in (("UniME Phi-3.5-V", 64.2, 61.3), ("UniME LLaVA-1.6 LowRes", 66.6, 63.6)):
        (problem,) = found[model]
        assert f"printed overall {overall}, but its meta-tasks give {weighted}" in problem
        assert f"{overall} is the mean of the four meta-tasks" in problem
    assert found["SigLIP base"] == (
        "the meta-tasks give 30.7 but IND and OOD give 34.8: a meta-task cell must be wrong",
    )


def test_odd_task_scores_are_named() -> None:
    tasks = scores()
    del tasks["GQA"]
    tasks["CIFAR-100"] = {"hit@1": 0.5}
    tasks["DocVQA"] = {"hit@1": 0.5, "hit@5": 0.4, "num_correct": 400, "num_pred": 1000}
    tasks["EDIS"] = {"hit@1": 81.4}
    found = audit_scores(TaskScores(tasks))
    assert found.report is not None
    assert "CIFAR-100" not in found.report.tasks
    for words in ("CIFAR-100", "GQA", "DocVQA: 400 of 1000", "DocVQA: hit@k falls", "EDIS: not a fraction"):
        assert any(words in problem for problem in found.problems), words


def own_report(names: Iterable[str]) -> ScoreReport:
    hits = {"aggregate": "1100"}
    return ScoreReport(
        {
            name: TaskResult(MMEB_TASKS.get(name, Task(name, "vqa", True)), 4, 0.1, {"aggregate": 0.5}, hits)
            for name in names
        }
    )


def test_own_score_files_are_read_in_all_formats(tmp_path: Path) -> None:
    report = own_report(MMEB_TASKS)
    report.to_json_file(tmp_path / "scores.json")
    write_score_files(report.tasks, "aggregate", tmp_path / "files")
    write_leaderboard(report.tasks, "aggregate", tmp_path / "leaderboard.json", {})
    for place in (".", "scores.json", "files/v1", "files/v2", "leaderboard.json"):
        found = audit_scores(read_scores(tmp_path / place))
        assert found.problems == (), place
        assert found.report is not None
        assert found.report.means["overall"] == {"hit@1": 0.5}
    content = json.loads((tmp_path / "scores.json").read_text())
    content["tasks"]["GQA"]["meta_task"] = "grounding"
    (tmp_path / "scores.json").write_text(json.dumps(content))
    (problem,) = audit_scores(read_scores(tmp_path)).problems
    assert problem.startswith("GQA counts as grounding, MMEB has it in vqa")
