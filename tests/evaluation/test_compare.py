"""Warnings about embeddings, and runs compared."""

import base64
import io
import json
import random
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.tasks import MMEB_TASKS, EvalTask, Source, Task
from parallel_decoupling.evaluation.checks import Finding, check_prompts, check_task, findings
from parallel_decoupling.evaluation.compare import compare, compare_runs, differences
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import TaskResult, path_columns, score_task
from tests.support.stores import values_of_ranks

TASKS = (
    Task("shape", "classification", True),
    Task("digit", "classification", False),
    Task("colour", "vqa", True),
    Task("find", "retrieval", False),
    Task("retrieval", "grounding", True),  # named like a mean on purpose
)


def make_report(seed: int, skill: float, num_paths: int, queries: int = 60) -> ScoreReport:
    rng = random.Random(seed)
    columns = ["aggregate", *(f"path_{path}" for path in range(num_paths))]
    tasks = {}
    for task in TASKS:
        hits = {c: "".join("01"[rng.random() < skill] for _ in range(queries)) for c in columns}
        scores = {column: string.count("1") / queries for column, string in hits.items()}
        tasks[task.name] = TaskResult(task, queries, 0.05, scores, hits)
    return ScoreReport(tasks, {"seed": seed})


def save(report: ScoreReport, run_dir: Path) -> str:
    run_dir.mkdir(parents=True)
    report.to_json_file(run_dir / "scores.json")
    return str(run_dir)


def test_interval_equals_resampling_rows_in_a_loop() -> None:
    baseline, other = make_report(0, 0.4, 1), make_report(1, 0.6, 3)
    found, rng = differences(baseline, other), np.random.default_rng(1)
    pairs = {
        name: np.array([[int(x) for x in r.tasks[name].hits["aggregate"]] for r in (baseline, other)])
        for name in baseline.tasks
    }
    samples: dict[str, list[float]] = {"shape": [], "overall": [], "mean_of_meta_tasks": []}
    for _ in range(3000):
        resampled = {}
        for name, hits in pairs.items():
            rows = rng.integers(0, hits.shape[1], hits.shape[1])
            resampled[name] = hits[1, rows].mean() - hits[0, rows].mean()
        samples["shape"].append(resampled["shape"])
        samples["overall"].append(float(np.mean(list(resampled.values()))))
        classification = (resampled["shape"] + resampled["digit"]) / 2
        rest = resampled["colour"] + resampled["find"] + resampled["retrieval"]
        samples["mean_of_meta_tasks"].append((classification + rest) / 4)
    for name, values in samples.items():
        ours = found.tasks[name] if name == "shape" else found.means[name]
        low, high = np.quantile(values, (0.025, 0.975))
        assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.012)
    for name, mean in baseline.means.items():
        assert found.means[name].difference == pytest.approx(
            other.means[name]["aggregate"] - mean["aggregate"]
        )


@pytest.mark.parametrize("runs", [2, 3])
def test_compare_writes_all_files_a_page_that_stands_alone_and_a_table(runs: int, tmp_path: Path) -> None:
    folders = [
        save(make_report(number, 0.4 + 0.1 * number, (1, 4, 2)[number]), tmp_path / f"run_{number}")
        for number in range(runs)
    ]
    comparison = compare(folders, str(tmp_path / "out"))
    assert comparison.best == f"run_{runs - 1}"
    assert ("is the best of 2 runs by the same score" in comparison.note) == (runs == 3)
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["baseline"] == "run_0"
    assert list(content["runs"]) == [f"run_{number}" for number in range(runs)]
    assert content["runs"]["run_1"]["means"] == comparison.reports["run_1"].means
    overall = content["differences"]["run_1"]["means"]["overall"]
    assert overall["low"] < overall["difference"] < overall["high"]
    picture = (tmp_path / "out" / "comparison.png").read_bytes()
    assert Image.open(io.BytesIO(picture)).width == 1600
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert not any(part in page for part in ("http", "<script", "<link", "<iframe"))
    assert base64.b64encode(picture).decode() in page
    best = comparison.differences[comparison.best]
    assert str(best.means["overall"]) in comparison.title
    note = f"difference: {comparison.best} - run_0"
    for shown in (comparison.title, note, str(best.tasks["find"]), "setting that differs"):
        assert escape(shown) in page
    stream = io.StringIO()
    Console(file=stream, width=80).print(comparison.table())
    lines = stream.getvalue().splitlines()
    assert "…" not in stream.getvalue(), "nothing is cut on a terminal of 80 columns"
    row = next(line for line in lines if line.startswith("│ shape"))
    scores = [report.tasks["shape"].hit_at_1["aggregate"] for report in comparison.reports.values()]
    found = [cell.strip() for cell in row.split("│")[2 : 2 + runs]]
    assert found == [f"{100 * score:.1f}" for score in scores]


def test_runs_in_folders_of_the_same_name_keep_apart(tmp_path: Path) -> None:
    folders = [save(make_report(n, 0.5, 1), tmp_path / str(n) / "demo") for n in range(2)]
    assert list(compare(folders).reports) == folders
    with pytest.raises(ValueError, match="compared with itself"):
        compare([folders[0], f"{folders[0]}/scores.json"])


def test_runs_over_different_tasks_are_an_error_that_names_the_difference(tmp_path: Path) -> None:
    whole = make_report(0, 0.5, 1)
    first, find = save(whole, tmp_path / "whole"), whole.tasks["find"]
    moved, rows = replace(find, task=Task("find", "retrieval", True)), replace(find, rows_sha256="other")
    tasks = {
        "part": {name: result for name, result in whole.tasks.items() if name != "colour"},
        "short": make_report(0, 0.5, 1, queries=40).tasks,
        "moved": {**whole.tasks, "find": moved},
        "rows": {**whole.tasks, "find": rows},
    }
    for name, message in (
        ("part", "only one of whole and part scored colour"),
        ("short", "shape: whole scored .*, 60, .* short scored .*, 40, "),
        ("moved", "find: whole scored .*'retrieval', False.* moved scored .*'retrieval', True"),
        ("rows", "find: whole scored .* rows scored .*'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            compare([first, save(ScoreReport(tasks[name]), tmp_path / name)])


def test_a_single_run_has_a_page_and_a_table_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = {"path_1": {"bytes_per_item": 4096, "paths_per_item": 1}}
    warning = {
        "check": "collapsed_paths",
        "detail": "0.99 of <path> 1",
        "tasks": ["find"],
        "advice": "[/] one",
    }
    made = make_report(0, 0.5, 2)
    made = replace(made, modes=modes, warnings=[warning], path_cosine=[[1.0, 0.37], [0.37, 1.0]])
    renamed = replace(made.tasks["shape"], task=MMEB_TASKS["VOC2007"], num_skipped=3)
    made = replace(
        made, tasks={"VOC2007": renamed, "Größe.1": made.tasks["digit"], "find": made.tasks["find"]}
    )
    compare_runs([save(made, tmp_path / "[bold]run")], str(tmp_path / "out"))
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    for shown in ("[bold]run", "Größe.1", "VOC2007", "0.99 of <path> 1", "[/] one", "4,096"):
        assert shown in printed
        assert escape(shown) in page
    assert "path_1" in page
    assert "0.37" in page
    text = " ".join(re.sub("<[^>]+>", "", page).split())
    for gap in ("rows that could not be embedded: VOC2007 3", "means over 1 of MMEB's 36 tasks: not MMEB's"):
        assert text.count(escape(gap)) == 1, gap
    assert "setting that differs" not in printed
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (content["best"], content["differences"]) == ("[bold]run", {})


def aggregate(paths: torch.Tensor) -> torch.Tensor:
    return F.normalize(paths.mean(dim=1), dim=-1)


def found_in(query: torch.Tensor, candidate: torch.Tensor, missing: int = 0) -> list[Finding]:
    """Query n belongs to candidate n; all are candidates of each."""
    size = len(query)
    inputs = [RawInput(str(number)) for number in range(size)]
    rows = [[row, *(x for x in range(size) if x != row)] for row in range(size)]
    task = EvalTask(Task("toy", "vqa", True), inputs, inputs, list(range(size)), rows)
    score = score_task(task, path_columns(query, candidate, aggregate))
    sides = ((query, aggregate(query)), (candidate, aggregate(candidate)))
    return check_task(score, *sides, missing=(missing, 0))


def checks(query: torch.Tensor, candidate: torch.Tensor) -> list[str]:
    return [finding.check for finding in findings(found_in(query, candidate))]


def distinct(rows: int = 24, num_paths: int = 2, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, num_paths, dim), dim=-1)


def test_good_embeddings_give_no_finding() -> None:
    paths = distinct()
    assert checks(paths, paths) == []


@pytest.mark.parametrize(("hits", "found"), [(10, True), (15, True), (17, False), (50, False)])
def test_chance_has_two_standard_errors(hits: int, found: bool) -> None:
    ranks = {"aggregate": 2 - (torch.arange(100) < hits).long()}
    values = {name: values_of_ranks(rank_R) for name, rank_R in ranks.items()}
    score = TaskResult.of(Task("toy", "vqa", True), values, torch.zeros(100, 10), 0.1)  # standard error 0.03
    paths = distinct()
    seen = check_task(score, (paths, aggregate(paths)), (paths, aggregate(paths)))
    assert [finding.check for finding in seen] == ["chance"] * found


@pytest.mark.parametrize("equal", [2, 3, 4])
def test_the_two_most_similar_of_several_paths_count(equal: int) -> None:
    paths = distinct(num_paths=4)
    paths[:, 1:equal] = paths[:, :1]
    (found,) = found_in(paths, paths)
    assert found.check == "collapsed_paths"
    assert found.detail == "toy query cosine 1.000 of paths 0 and 1, candidate cosine 1.000 of paths 0 and 1"


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_equal_embeddings_of_different_inputs_are_found_on_both_sides(noise: float, side: str) -> None:
    one, good = torch.randn(1, 1, 16), distinct(num_paths=1)
    same = F.normalize(one + noise * torch.randn(24, 1, 16), dim=-1)
    found = found_in(same, good) if side == "query" else found_in(good, same)
    (collapsed,) = [each for each in found if each.check == "collapsed_embeddings"]
    assert collapsed.detail.startswith(f"toy {side} cosine")
    assert "," in collapsed.detail
    assert collapsed.detail.count("cosine") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_counted_beyond_the_missing_ones(value: float) -> None:
    paths = distinct()
    query, candidate = paths.clone(), paths.clone()
    query[:2] = torch.nan
    assert "non_finite" not in [each.check for each in found_in(query, candidate, missing=2)]
    query[5, 1, 3] = candidate[7, 0, 0] = candidate[8] = value
    (found,) = [each for each in found_in(query, candidate, missing=2) if each.check == "non_finite"]
    assert found.detail == "toy query 1 of 22 rows, candidate 2 of 24 rows"


def test_embeddings_that_are_all_nan_are_a_finding_and_not_an_error() -> None:
    paths = torch.full((24, 2, 16), torch.nan)
    assert checks(paths, paths) == ["chance", "non_finite"]


def test_instructions_are_compared_as_tasks_json_has_them(tmp_path: Path) -> None:
    entry = {
        "meta_task": "vqa",
        "in_distribution": True,
        "train_file": "own.csv",
        "query_instruction": "Find",
        "columns": {"query_text": "q", "candidate_text": "c"},
    }
    (tmp_path / "tasks.json").write_text(json.dumps({"own": entry}))
    source = Source(eval_file=tmp_path / "own.csv", query_instruction="Find it")
    both = [RawInput("a"), RawInput("b")]
    task = EvalTask(Task("own", "vqa", True, source=source), both, both, [0], [[0, 1]])
    (found,) = check_prompts(tmp_path, [task])
    assert found == Finding("other_prompts", "own query: trained 'Find', asked 'Find it'", ("own",))
    same = replace(task, task=replace(task.task, source=replace(source, query_instruction="Find")))
    unknown = replace(task, task=replace(task.task, name="other"))
    finished = replace(task, task=Task("GQA", "vqa", False))
    assert check_prompts(tmp_path, [same, unknown, finished]) == []
