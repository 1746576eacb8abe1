from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.leaderboard import (
    METADATA,
    write_leaderboard,
    write_predictions,
    write_score_files,
)
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import TaskScore, score_task


def scored(name: str, seed: int) -> tuple[EvalTask, TaskScore]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    candidates = [RawInput(f"answer {number}") for number in range(12)]
    rows = [rng.sample(range(12), 11) for _ in range(20)]
    queries = [RawInput(f"q{number}") for number in range(20)]
    task = EvalTask(Task(name, "vqa", True, identity="text"), queries, candidates, list(range(20)), rows)
    query, candidate = (torch.randn(size, 5, generator=generator) for size in (20, 12))
    return task, score_task(task, {"aggregate": (query, candidate)})


@pytest.fixture
def report() -> ScoreReport:
    return ScoreReport.from_scores([scored("GQA", 0)[1], scored("DocVQA", 1)[1]])


def test_score_files_have_the_keys_and_values_of_both_versions(report: ScoreReport, tmp_path: Path) -> None:
    write_score_files(report.tasks, "aggregate", tmp_path)
    score = report.tasks["GQA"].hit_at_1["aggregate"]
    v1 = json.loads((tmp_path / "v1" / "GQA_score.json").read_text())
    assert v1 == {"acc": score, "num_correct": round(20 * score), "num_pred": 20}
    v2 = json.loads((tmp_path / "v2" / "GQA_score.json").read_text())
    assert v2["precision@5"] == pytest.approx(v2["hit@5"] / 5)
    assert v2["f1@10"] == pytest.approx(
        2 * v2["precision@10"] * v2["recall@10"] / (v2["precision@10"] + v2["recall@10"])
    )
    kinds = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
    keys = {f"{kind}@{depth}" for kind in kinds for depth in (1, 5, 10)}
    assert v2.keys() == keys | {"num_pred", "num_data"}, "VLM2Vec's keys"
    reciprocal = scored("GQA", 0)[1].values["aggregate"]["mrr"]
    assert v2["mrr@5"] == v2["map@5"] == pytest.approx(float(reciprocal[reciprocal >= 0.2].sum()) / 20)
    assert v2["mrr@1"] == v2["hit@1"]


def test_the_leaderboards_file_comes_back_with_its_metadata(report: ScoreReport, tmp_path: Path) -> None:
    file = tmp_path / "leaderboard.json"
    write_leaderboard(report.tasks, "aggregate", file, {"model_name": "demo"})
    content = json.loads(file.read_text())
    assert tuple(content["metadata"]) == METADATA
    assert content["metadata"]["model_name"] == "demo"
    assert content["metrics"]["video"] == content["metrics"]["visdoc"] == {}
    assert {name: values["hit@1"] for name, values in content["metrics"]["image"].items()} == {
        name: result.hit_at_1["aggregate"] for name, result in report.tasks.items()
    }


def test_predictions_give_the_scores_back(tmp_path: Path) -> None:
    task, score = scored("GQA", 3)
    write_predictions(tmp_path, task, score)
    lines = [json.loads(line) for line in (tmp_path / "v2" / "GQA_pred.jsonl").read_text().splitlines()]
    hits = [line["prediction"][0] == line["label"][0] for line in lines]
    assert hits == score.hits["aggregate"].tolist()
    within_ten = sum(line["label"][0] in line["prediction"] for line in lines)
    assert within_ten == int(score.values["aggregate"]["hit@10"].sum())
    assert (tmp_path / "v1" / "GQA_pred.txt").read_text().splitlines() == [x["prediction"][0] for x in lines]


def test_files_of_an_earlier_test_do_not_stay(report: ScoreReport, tmp_path: Path) -> None:
    for name, seed in (("GQA", 0), ("DocVQA", 1)):
        write_predictions(tmp_path, *scored(name, seed))
    write_score_files(report.tasks, "aggregate", tmp_path)
    mine = tmp_path / "v1" / "notes_about_pred.md"
    mine.write_text("mine")
    write_predictions(tmp_path, *scored("GQA", 2))
    write_score_files(ScoreReport.from_scores([scored("GQA", 2)[1]]).tasks, "aggregate", tmp_path)
    assert {file.name for file in tmp_path.rglob("*.*")} == {
        "GQA_score.json",
        "GQA_pred.txt",
        "GQA_pred.jsonl",
        mine.name,
    }
