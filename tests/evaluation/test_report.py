"""Reports of scores, and the files that leaderboards read."""

import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.tasks import MMEB_TASKS, V2_TASKS, EvalTask, Task
from parallel_decoupling.evaluation.compare import compare
from parallel_decoupling.evaluation.leaderboard import METADATA, write_predictions, write_score_files
from parallel_decoupling.evaluation.report import ScoreReport, text_table, write_report
from parallel_decoupling.evaluation.score import TaskResult, score_task
from tests.support.stores import table_rows, values_of_ranks

# hit@1 in percent of VLM2Vec (first version) on Qwen2-VL 2B / 7B, as its authors' score files have it.
PUBLISHED_TEXT = """
ImageNet-1K 77.5/80.2 N24News 73.8/79.5 HatefulMemes 57.9/70.3 VOC2007 74.3/80.6 SUN397 73.7/77.3
Place365 35.0/37.2 ImageNet-A 50.6/57.6 ImageNet-R 84.7/74.2 ObjectNet 36.9/40.5 Country211 21.7/30.2
OK-VQA 48.2/56.8 A-OKVQA 39.7/47.5 DocVQA 82.7/88.8 InfographicsVQA 47.3/59.0 ChartQA 42.2/56.6
Visual7W 50.9/52.7 ScienceQA 30.5/38.2 VizWiz 38.8/39.6 GQA 48.1/54.4 TextVQA 63.2/71.6 VisDial 75.1/81.6
CIRR 46.8/51.4 VisualNews_t2i 73.4/80.3 VisualNews_i2t 73.8/81.2 MSCOCO_t2i 73.1/77.5 MSCOCO_i2t 68.3/73.6
NIGHTS 65.8/67.5 WebQA 85.8/88.3 FashionIQ 13.8/16.8 Wiki-SS-NQ 54.6/62.1 OVEN 68.4/66.6 EDIS 81.4/85.9
MSCOCO 65.7/75.4 RefCOCO 80.8/87.1 RefCOCO-Matching 76.6/84.4 Visual7W-Pointing 69.1/80.7
"""
PUBLISHED = PUBLISHED_TEXT.split()


def task_score(
    name: str, meta_task: str, in_distribution: bool, hits: dict[str, str], chance: float
) -> TaskResult:
    ranks = {column: torch.tensor([4 - 3 * int(hit) for hit in string]) for column, string in hits.items()}
    task = Task(name, meta_task, in_distribution)  # type: ignore[arg-type]
    values = {column: values_of_ranks(rank_R) for column, rank_R in ranks.items()}
    return TaskResult.of(task, values, torch.zeros(len(next(iter(ranks.values()))), 10), chance)


def report_of(results: list[TaskResult], run: dict[str, Any] | None = None) -> ScoreReport:
    return ScoreReport({result.task.name: result for result in results}, run or {})


@pytest.fixture
def report() -> ScoreReport:
    """Two classification tasks and one VQA task: the two overall means differ."""
    return report_of(
        [
            task_score("shape", "classification", True, {"aggregate": "1110", "path_0": "1100"}, 0.1),
            task_score("digit", "classification", False, {"aggregate": "10", "path_0": "00"}, 0.5),
            task_score("colour", "vqa", True, {"aggregate": "001", "path_0": "111"}, 0.25),
        ],
        {"seed": 3, "steps": 1500, "config": {"model": {"num_paths": 2}}},
    )


def rendered(report: ScoreReport) -> str:
    stream = io.StringIO()
    Console(file=stream, width=150).print(
        report.task_table(), report.mode_table(), *report.warning_panels(), sep="\n"
    )
    return stream.getvalue()


def test_means_equal_hand_computation(report: ScoreReport) -> None:
    means = {name: mean["aggregate"] for name, mean in report.means.items()}
    assert means == pytest.approx(
        {
            "classification": (0.75 + 0.5) / 2,
            "vqa": 1 / 3,
            "in_distribution": (0.75 + 1 / 3) / 2,
            "out_of_distribution": 0.5,
            "overall": (0.75 + 0.5 + 1 / 3) / 3,
            "mean_of_meta_tasks": (0.625 + 1 / 3) / 2,
        }
    )
    assert report.means["overall"]["path_0"] == pytest.approx(0.5)
    assert means["overall"] != pytest.approx(means["mean_of_meta_tasks"], abs=0.01)


@pytest.mark.parametrize(
    ("place", "overall", "in_distribution", "out_of_distribution"),
    [(0, 59.7, 64.8, 53.4), (1, 65.4, 71.3, 57.9)],
)
def test_means_of_published_task_scores_are_the_published_means(
    place: int, overall: float, in_distribution: float, out_of_distribution: float
) -> None:
    names, scores = PUBLISHED[::2], [pair.split("/")[place] for pair in PUBLISHED[1::2]]
    assert set(names) == set(MMEB_TASKS)
    report = ScoreReport(
        {
            name: TaskResult(MMEB_TASKS[name], 1000, 0.001, {"aggregate": float(score) / 100})
            for name, score in zip(names, scores, strict=True)
        }
    )
    means = report.means
    assert 100 * means["overall"]["aggregate"] == pytest.approx(overall, abs=0.05)
    assert 100 * means["in_distribution"]["aggregate"] == pytest.approx(in_distribution, abs=0.05)
    assert 100 * means["out_of_distribution"]["aggregate"] == pytest.approx(out_of_distribution, abs=0.05)


def test_custom_tasks_have_a_mean_of_their_own_and_change_no_other(
    report: ScoreReport, tmp_path: Path
) -> None:
    hits = {"aggregate": "1111", "path_0": "0000"}
    scores = [task_score(name, "custom", False, hits, 0.25) for name in ("mine", "yours")]
    custom = report_of(scores)
    both = ScoreReport({**report.tasks, **custom.tasks})
    assert both.means == {**report.means, "custom": {"aggregate": 1.0, "path_0": 0.0}}
    assert (both.metric_means, both.partial_means) == (report.metric_means, report.partial_means)
    rows = table_rows(both.task_table())
    assert rows[:-3] == table_rows(report.task_table())
    assert rows[-3:] == [
        *([name, "", "4", "25.0", "100.0", "0.0"] for name in ("mine", "yours")),
        ["mean of custom tasks", "", "", "", "100.0", "0.0"],
    ]
    both.to_json_file(tmp_path / "scores.json")
    assert ScoreReport.from_json_file(tmp_path / "scores.json") == both
    assert json.loads((tmp_path / "scores.json").read_text())["tasks"]["mine"]["meta_task"] == "custom"
    assert custom.means == dict.fromkeys(("overall", "custom"), {"aggregate": 1.0, "path_0": 0.0})
    for each in (both, custom):
        (tmp_path / "a").mkdir(exist_ok=True)
        each.to_json_file(tmp_path / "a" / "scores.json")
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        found = compare([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
        assert found.differences["b"].means.keys() == each.means.keys()
        page = (tmp_path / "out" / "comparison.html").read_text()
        assert "mean of custom tasks" in page
        assert "mine" in page


def test_names_cannot_command_the_terminal() -> None:
    stream = io.StringIO()
    Console(file=stream).print(text_table("", ["\x1b[2Jtask"], [["\x1b[31mred"]]))
    assert "\x1b" not in stream.getvalue()
    assert "\\x1b[31mred" in stream.getvalue()


def test_json_round_trip_keeps_everything(report: ScoreReport, tmp_path: Path) -> None:
    report = replace(report, path_cosine=[[1.0, 0.5], [0.5, 1.0]], modes={"path_0": {"bytes_per_item": 4}})
    report.to_json_file(tmp_path / "scores.json")
    assert ScoreReport.from_json_file(tmp_path / "scores.json") == report
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["metric"] == "hit@1"
    assert content["means"] == report.means
    assert content["tasks"]["colour"]["hit_at_1"]["aggregate"] == 1 / 3, "fractions are not rounded"
    assert content["tasks"]["digit"]["hits"] == {"aggregate": "10", "path_0": "00"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("tasks",), {}),
        (("tasks", "digit", "meta_task"), "vqa"),
        (("tasks", "digit", "hits", "aggregate"), "01"),
        (("tasks", "digit", "hits"), {"path_0": "00"}),
        (("warnings",), None),
        (("content_sha256",), "a"),
    ],
)
def test_a_changed_file_is_refused(
    place: tuple[str, ...], value: Any, report: ScoreReport, tmp_path: Path
) -> None:
    file = tmp_path / "scores.json"
    report.to_json_file(file)
    content = part = json.loads(file.read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"scores\.json is not a score file .*its hash does not fit"):
        ScoreReport.from_json_file(file)


def test_a_binary_file_is_not_a_score_file(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"PK\xff" * 10_000)
    with pytest.raises(ValueError, match=r"last\.ckpt is not a score file as a test wrote it") as error:
        ScoreReport.from_json_file(tmp_path / "last.ckpt")
    assert len(str(error.value)) < 500


def test_means_over_some_of_mmebs_tasks_are_marked(report: ScoreReport, tmp_path: Path) -> None:
    results = {name: TaskResult(MMEB_TASKS[name], 9, 0.1, {"aggregate": 0.5}) for name in MMEB_TASKS}
    some = ScoreReport({name: results[name] for name in ("GQA", "MSCOCO", "EDIS")})
    some.to_json_file(tmp_path / "scores.json")
    marks = json.loads((tmp_path / "scores.json").read_text())["partial_means"]
    assert marks["overall"] == "of 3 of MMEB's 36 tasks"
    assert marks["grounding"] == "of 1 of MMEB's 4 tasks"
    assert "overall (mean of tasks), 3/36" in rendered(some)
    assert "means over 3 of MMEB's 36 tasks: not MMEB's means" in rendered(some)
    for whole in (report, ScoreReport(results)):
        assert whole.partial_means == {}
        assert "/36" not in rendered(whole)


def test_table_shows_percent_and_flags_tasks_at_chance(report: ScoreReport) -> None:
    table = report.task_table()
    rows = {name: cells for name, *cells in table_rows(table)}
    assert rows["shape"] == ["IND", "4", "10.0", "75.0", "50.0"]
    assert rows["digit !"] == ["OOD", "2", "50.0", "50.0", "0.0"]
    assert rows["overall (mean of tasks)"][3] == "52.8"
    assert rows["mean of meta-tasks"][3] == "47.9"
    assert [row.style for row in table.rows].count("red") == 1
    assert "at or below chance" in str(table.caption)


def scored(name: str, seed: int) -> tuple[EvalTask, TaskResult]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    candidates = [RawInput(f"answer {number}") for number in range(12)]
    rows = [rng.sample(range(12), 11) for _ in range(20)]
    queries = [RawInput(f"q{number}") for number in range(20)]
    task = EvalTask(Task(name, "vqa", True, identity="text"), queries, candidates, list(range(20)), rows)
    query, candidate = (torch.randn(size, 5, generator=generator) for size in (20, 12))
    return task, score_task(task, {"aggregate": (query, candidate)})


@pytest.fixture
def two_tasks() -> ScoreReport:
    return report_of([scored("GQA", 0)[1], scored("DocVQA", 1)[1]])


def test_score_files_have_the_keys_and_values_of_two_versions(two_tasks: ScoreReport, tmp_path: Path) -> None:
    write_score_files(two_tasks.tasks, "aggregate", tmp_path)
    score = two_tasks.tasks["GQA"].hit_at_1["aggregate"]
    v1 = json.loads((tmp_path / "v1" / "GQA_score.json").read_text())
    assert v1 == {"acc": score, "num_correct": round(20 * score), "num_pred": 20}
    v2 = json.loads((tmp_path / "v2" / "image" / "GQA_score.json").read_text())
    assert v2["precision@5"] == pytest.approx(v2["hit@5"] / 5)
    assert v2["f1@10"] == pytest.approx(
        2 * v2["precision@10"] * v2["recall@10"] / (v2["precision@10"] + v2["recall@10"])
    )
    kinds = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
    keys = {f"{kind}@{depth}" for kind in kinds for depth in (1, 5, 10)}
    assert v2.keys() == keys | {"num_pred", "num_data"}, "VLM2Vec's keys"
    reciprocal = scored("GQA", 0)[1].rows["aggregate"]["mrr"]
    assert v2["mrr@5"] == v2["map@5"] == pytest.approx(float(reciprocal[reciprocal >= 0.2].sum()) / 20)
    assert v2["mrr@1"] == v2["hit@1"]


def test_write_report_leaves_every_file_of_a_test(two_tasks: ScoreReport, tmp_path: Path) -> None:
    run = {"model": {"backbone": "tiny"}}
    modes = {"aggregate": {"bytes_per_item": 128, "paths_per_item": 1}}
    (page,) = report_of([scored("ViDoSeek-page", 2)[1]]).tasks.values()
    page = replace(page, task=V2_TASKS["ViDoSeek-page"], values={"aggregate": [0.25] * 20})
    page.metrics["aggregate"]["ndcg@5"] = 0.25
    write_report(
        replace(two_tasks, tasks=two_tasks.tasks | {"ViDoSeek-page": page}, run=run, modes=modes),
        tmp_path / "run",
    )
    of_kind = ("image/GQA", "image/DocVQA", "visdoc/ViDoSeek-page")
    assert {file.relative_to(tmp_path / "run").as_posix() for file in (tmp_path / "run").rglob("*.*")} == {
        "scores.json",
        "leaderboard.json",
        *(f"score_files/v1/{Path(name).name}_score.json" for name in of_kind),
        *(f"score_files/v2/{name}_score.json" for name in of_kind),
    }
    content = json.loads((tmp_path / "run" / "leaderboard.json").read_text())
    known = {"model_name": "run", "model_backbone": "tiny", "embedding_dimension": 32}
    assert tuple(content["metadata"]) == METADATA
    assert known.items() <= content["metadata"].items()
    assert content["metrics"]["video"] == {}
    assert content["metrics"]["visdoc"]["ViDoSeek-page-fixed"]["ndcg_linear@5"] == 0.25
    file = tmp_path / "run/score_files/v2/visdoc/ViDoSeek-page_score.json"
    assert json.loads(file.read_text()) == content["metrics"]["visdoc"]["ViDoSeek-page-fixed"]
    assert {name: values["hit@1"] for name, values in content["metrics"]["image"].items()} == {
        name: result.hit_at_1["aggregate"] for name, result in two_tasks.tasks.items()
    }


def test_predictions_give_the_scores_back(tmp_path: Path) -> None:
    task, score = scored("GQA", 3)
    write_predictions(tmp_path, task, score)
    file = tmp_path / "v2" / "image" / "GQA_pred.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    hits = [line["prediction"][0] == line["label"][0] for line in lines]
    assert "".join("01"[hit] for hit in hits) == score.hits["aggregate"]
    within_ten = sum(line["label"][0] in line["prediction"] for line in lines)
    assert within_ten == int(score.rows["aggregate"]["hit@10"].sum())
    assert (tmp_path / "v1" / "GQA_pred.txt").read_text().splitlines() == [x["prediction"][0] for x in lines]


def test_files_of_an_earlier_test_do_not_stay(two_tasks: ScoreReport, tmp_path: Path) -> None:
    for name, seed in (("GQA", 0), ("DocVQA", 1)):
        write_predictions(tmp_path, *scored(name, seed))
    write_score_files(two_tasks.tasks, "aggregate", tmp_path)
    mine = tmp_path / "v1" / "notes_about_pred.md"
    mine.write_text("mine")
    write_predictions(tmp_path, *scored("GQA", 2))
    write_score_files(report_of([scored("GQA", 2)[1]]).tasks, "aggregate", tmp_path)
    assert {file.name for file in tmp_path.rglob("*.*")} == {
        "GQA_score.json",
        "GQA_pred.txt",
        "GQA_pred.jsonl",
        mine.name,
    }
