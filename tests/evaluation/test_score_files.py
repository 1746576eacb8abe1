from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import TaskScore, score_task
from parallel_decoupling.evaluation.score_files import (
    METADATA,
    candidate_name,
    read_scores,
    write_leaderboard,
    write_predictions,
    write_score_files,
)


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


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_score_files_of_both_versions_come_back(version: str, report: ScoreReport, tmp_path: Path) -> None:
    write_score_files(report, tmp_path)
    found = read_scores(tmp_path / version)
    assert found.format == f"VLM2Vec {version}"
    for name, result in report.tasks.items():
        assert found.tasks[name]["hit@1"] == result.hit_at_1["aggregate"]
        assert found.tasks[name]["num_pred"] == 20
    v1 = json.loads((tmp_path / "v1" / "GQA_score.json").read_text())
    assert v1["num_correct"] / v1["num_pred"] == v1["acc"]
    v2 = json.loads((tmp_path / "v2" / "GQA_score.json").read_text())
    assert v2["precision@5"] == pytest.approx(v2["hit@5"] / 5)
    assert v2["f1@10"] == pytest.approx(
        2 * v2["precision@10"] * v2["recall@10"] / (v2["precision@10"] + v2["recall@10"])
    )
    kinds = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
    keys = {f"{kind}@{depth}" for kind in kinds for depth in (1, 5, 10)}
    assert v2.keys() == keys | {"num_pred", "num_data"}, "VLM2Vec's keys"
    ranks = [1 / rank if rank <= 5 else 0 for rank in scored("GQA", 0)[1].ranks["aggregate"].tolist()]
    assert v2["mrr@5"] == v2["map@5"] == pytest.approx(sum(ranks) / 20)
    assert v2["mrr@1"] == v2["hit@1"]


def test_the_leaderboards_file_comes_back_with_its_metadata(report: ScoreReport, tmp_path: Path) -> None:
    file = tmp_path / "leaderboard.json"
    write_leaderboard(report, file, {"model_name": "demo"})
    content = json.loads(file.read_text())
    assert tuple(content["metadata"]) == METADATA
    assert content["metadata"]["model_name"] == "demo"
    assert content["metrics"]["video"] == content["metrics"]["visdoc"] == {}
    found = read_scores(file)
    assert found.format == "leaderboard"
    assert {name: values["hit@1"] for name, values in found.tasks.items()} == {
        name: result.hit_at_1["aggregate"] for name, result in report.tasks.items()
    }


def test_own_scores_come_back_with_their_meta_tasks(report: ScoreReport, tmp_path: Path) -> None:
    report.to_json_file(tmp_path / "scores.json")
    for path in (tmp_path, tmp_path / "scores.json"):
        found = read_scores(path)
        assert found.known["GQA"].meta_task == "vqa"
        assert found.tasks["GQA"]["mrr"] == report.tasks["GQA"].metrics["aggregate"]["mrr"]


def test_predictions_give_the_scores_back(tmp_path: Path) -> None:
    task, score = scored("GQA", 3)
    write_predictions(tmp_path, task, score)
    lines = [json.loads(line) for line in (tmp_path / "v2" / "GQA_pred.jsonl").read_text().splitlines()]
    hits = [line["prediction"][0] == line["label"][0] for line in lines]
    assert hits == score.hits["aggregate"].tolist()
    within_ten = sum(line["label"][0] in line["prediction"] for line in lines)
    assert within_ten == int((score.ranks["aggregate"] <= 10).sum())
    assert (tmp_path / "v1" / "GQA_pred.txt").read_text().splitlines() == [x["prediction"][0] for x in lines]


def test_candidates_are_named_by_their_identity() -> None:
    candidate = RawInput(f'{IMAGE_PLACEHOLDER}\n"a cup"\n', ("cups/1.png",))
    names = {
        identity: candidate_name(Task("t", "vqa", True, identity=identity), candidate)  # type: ignore[arg-type]
        for identity in ("text", "image", "image_and_text")
    }
    text = RawInput('"a  cup" \n')
    assert candidate_name(Task("t", "vqa", True, identity="text"), text) == text.text, "to the letter"
    assert names == {"text": '"a cup"', "image": "cups/1.png", "image_and_text": "cups/1.png:a cup"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ('{"x": 1}', "no score file"),
        ('{"metrics": {"image": {}}}', "has no tasks"),
        ('{"metrics": {"image": {"GQA": {"mrr": 1}}}}', "metrics.image.GQA has no hit@1"),
        ('{"metrics": {"image": {"GQA": {"hit@1": "high"}}}}', "GQA: hit@1 is 'high'"),
    ],
)
def test_other_files_are_an_error_that_says_where(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_scores(tmp_path / "x.json")
    with pytest.raises(ValueError, match="holds neither"):
        read_scores(tmp_path)


def test_files_of_an_earlier_test_do_not_stay(report: ScoreReport, tmp_path: Path) -> None:
    for name, seed in (("GQA", 0), ("DocVQA", 1)):
        write_predictions(tmp_path, *scored(name, seed))
    write_score_files(report, tmp_path)
    mine = tmp_path / "v1" / "notes_about_pred.md"
    mine.write_text("mine")
    write_predictions(tmp_path, *scored("GQA", 2))
    write_score_files(ScoreReport.from_scores([scored("GQA", 2)[1]]), tmp_path)
    assert {file.name for file in tmp_path.rglob("*.*")} == {
        "GQA_score.json",
        "GQA_pred.txt",
        "GQA_pred.jsonl",
        mine.name,
    }
    assert read_scores(tmp_path / "v2").tasks.keys() == {"GQA"}


@pytest.mark.parametrize("name", ["hit@1", "num_pred", "num_correct", "num_data"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_count_or_score_that_is_no_number_names_file_and_task(
    name: str, value: float | None, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"metrics": {"image": {"GQA": {"hit@1": 0.5, name: value}}}}))
    with pytest.raises(ValueError, match=rf"x\.json, GQA: {name} is .*, not a number"):
        read_scores(file)
