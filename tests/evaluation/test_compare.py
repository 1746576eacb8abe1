from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from rich.console import Console

from parallel_decoupling.data.tasks import MMEB_TASKS, Task
from parallel_decoupling.evaluation.compare import compare, compare_runs, differences
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult

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


def test_differences_are_the_headline_scores_subtracted() -> None:
    baseline, other = make_report(0, 0.4, 1), make_report(1, 0.6, 3)
    found = differences(baseline, other)
    for name in baseline.tasks:
        expected = other.tasks[name].hit_at_1["aggregate"] - baseline.tasks[name].hit_at_1["aggregate"]
        assert found.tasks[name].difference == pytest.approx(expected)
    assert set(found.means) == set(baseline.means)
    for name, mean in baseline.means.items():
        expected = other.means[name]["aggregate"] - mean["aggregate"]
        assert found.means[name].difference == pytest.approx(expected)


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


@pytest.mark.parametrize("runs", [2, 3])
def test_compare_writes_all_files_and_a_table(runs: int, tmp_path: Path) -> None:
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
    picture = Image.open(tmp_path / "out" / "comparison.png")
    assert picture.width == 1600
    stream = io.StringIO()
    Console(file=stream, width=80).print(comparison.grid().terminal())
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
    first = save(whole, tmp_path / "whole")
    part = ScoreReport({name: result for name, result in whole.tasks.items() if name != "colour"})
    with pytest.raises(ValueError, match="different tasks: part lacks colour"):
        compare([first, save(part, tmp_path / "part")])
    with pytest.raises(ValueError, match="shape: whole scored .*, 60, .* short scored .*, 40, "):
        compare([first, save(make_report(0, 0.5, 1, queries=40), tmp_path / "short")])
    moved = ScoreReport(dict(whole.tasks))
    moved.tasks["find"] = replace(whole.tasks["find"], task=Task("find", "retrieval", True))
    with pytest.raises(
        ValueError, match="find: whole scored .*'retrieval', False.* moved scored .*'retrieval', True"
    ):
        compare([first, save(moved, tmp_path / "moved")])
    moved.tasks["find"] = replace(whole.tasks["find"], rows_sha256="other")
    with pytest.raises(ValueError, match="find: whole scored .* rows scored .*'other'"):
        compare([first, save(moved, tmp_path / "rows")])


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
    for shown in ("[bold]run", "Größe.1", "VOC2007", "0.99 of <path> 1", "[/] one", "4,096"):
        assert shown in printed
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    for shown in (
        "[bold]run",
        "Größe.1",
        "path_1",
        "0.99 of <path> 1",
        "4,096",
        "0.37",
        "[bold]run: rows that could not be embedded: VOC2007 3",
        "[bold]run: means over 1 of MMEB's 36 tasks: not MMEB's means",
    ):
        assert escape(shown) in page, shown
    assert "settings that differ" not in page
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (content["best"], content["differences"]) == ("[bold]run", {})


def test_the_page_of_two_runs_stands_alone_and_says_what_differs(tmp_path: Path) -> None:
    folders = [
        save(make_report(seed, 0.4 + 0.2 * seed, 1 + seed), tmp_path / name) for seed, name in enumerate("ab")
    ]
    comparison = compare(folders, str(tmp_path / "out"))
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert not any(part in page for part in ("http", "<script", "<link", "<iframe"))
    assert base64.b64encode((tmp_path / "out" / "comparison.png").read_bytes()).decode() in page
    assert str(comparison.differences["b"].means["overall"]) in comparison.title
    difference = str(comparison.differences["b"].tasks["find"])
    for shown in (comparison.title, comparison.note, difference, "settings that differ"):
        assert escape(shown) in page
