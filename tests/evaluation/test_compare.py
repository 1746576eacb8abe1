from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from parallel_decoupling import cli
from parallel_decoupling.data.tasks import MMEB_TASKS, Task
from parallel_decoupling.evaluation.compare import compare, differences
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


def test_equal_runs_differ_by_exactly_zero() -> None:
    report = make_report(0, 0.5, 2)
    found = differences(report, report)
    assert {(d.difference, d.low, d.high) for d in found.means.values()} == {(0.0, 0.0, 0.0)}


def test_pairing_narrows_the_interval() -> None:
    baseline = make_report(0, 0.5, 1, queries=200)
    paired = replace(baseline, tasks=dict(baseline.tasks))
    for name, result in baseline.tasks.items():
        better = {c: "1111111111" + hits[10:] for c, hits in result.hits.items()}
        paired.tasks[name] = replace(
            result, hits=better, hit_at_1={c: hits.count("1") / 200 for c, hits in better.items()}
        )
    narrow = differences(baseline, paired).means["overall"]
    wide = differences(baseline, make_report(1, 0.5, 1, queries=200)).means["overall"]
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low is not None
    assert wide.high is not None
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_without_stored_hits_there_is_no_interval() -> None:
    baseline = make_report(0, 0.4, 1)
    bare = ScoreReport({name: replace(result, hits={}) for name, result in baseline.tasks.items()})
    found = differences(bare, baseline)
    assert found.means["overall"].low is None
    assert found.means["overall"].difference == 0
    partly = ScoreReport({**baseline.tasks, "shape": bare.tasks["shape"]})
    found = differences(partly, baseline)
    assert found.tasks["shape"].low is found.means["classification"].low is found.means["overall"].low is None
    assert found.means["vqa"].low == 0


@pytest.mark.parametrize("runs", [2, 3])
def test_compare_writes_both_files_and_a_table(runs: int, tmp_path: Path) -> None:
    folders = [
        save(make_report(number, 0.4 + 0.1 * number, (1, 4, 2)[number]), tmp_path / f"run_{number}")
        for number in range(runs)
    ]
    comparison = compare(folders, str(tmp_path / "out"))
    assert comparison.best == f"run_{runs - 1}"
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["baseline"] == "run_0"
    assert list(content["runs"]) == [f"run_{number}" for number in range(runs)]
    assert content["runs"]["run_1"]["means"] == comparison.reports["run_1"].means
    overall = content["differences"]["run_1"]["means"]["overall"]
    assert overall["low"] < overall["difference"] < overall["high"]
    picture = Image.open(tmp_path / "out" / "comparison.png")
    assert picture.width == 1600
    stream = io.StringIO()
    Console(file=stream, width=80).print(comparison.means_table(), comparison.task_table())
    lines = stream.getvalue().splitlines()
    assert "…" not in stream.getvalue(), "nothing is cut on a terminal of 80 columns"
    assert sum(line.count("path_0") for line in lines) == runs - 1, "a single path is shown once"
    row = next(line for line in lines if line.startswith("│ run_0"))
    means = comparison.reports["run_0"].means["overall"]["aggregate"]
    assert row.split("│")[2].strip() == f"{100 * means:.1f}"
    row = next(line for line in lines if line.startswith("│ shape"))
    scores = [
        comparison.reports[f"run_{number}"].tasks["shape"].hit_at_1["aggregate"] for number in range(runs)
    ]
    assert [cell.strip() for cell in row.split("│")[2 : 2 + runs]] == [
        f"{100 * score:.1f}" for score in scores
    ]


def test_compare_without_output_dir_writes_nothing(tmp_path: Path) -> None:
    folders = [save(make_report(n, 0.5, 1), tmp_path / "runs" / str(n)) for n in range(2)]
    compare(folders)
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["scores.json"] * 2


def test_runs_in_folders_of_the_same_name_keep_apart(tmp_path: Path) -> None:
    folders = [save(make_report(n, 0.5, 1), tmp_path / str(n) / "demo") for n in range(2)]
    assert list(compare(folders).reports) == folders
    with pytest.raises(ValueError, match="compared with itself"):
        compare([folders[0], folders[0]])


def test_runs_over_different_tasks_are_an_error_that_names_the_difference(tmp_path: Path) -> None:
    whole = make_report(0, 0.5, 1)
    first = save(whole, tmp_path / "whole")
    part = ScoreReport({name: result for name, result in whole.tasks.items() if name != "colour"})
    with pytest.raises(ValueError, match="different tasks: part lacks colour"):
        compare([first, save(part, tmp_path / "part")])
    with pytest.raises(ValueError, match="shape: number of queries is 60 in whole but 40 in short"):
        compare([first, save(make_report(0, 0.5, 1, queries=40), tmp_path / "short")])
    moved = ScoreReport(dict(whole.tasks))
    moved.tasks["find"] = replace(whole.tasks["find"], task=Task("find", "retrieval", True))
    with pytest.raises(ValueError, match="find: in_distribution is False in whole but True in moved"):
        compare([first, save(moved, tmp_path / "moved")])


def test_other_rows_under_the_same_name_are_an_error_and_unknown_ones_are_not(tmp_path: Path) -> None:
    whole = make_report(0, 0.5, 1)
    asked = {
        name: ScoreReport({**whole.tasks, "find": replace(whole.tasks["find"], rows_sha256=name)})
        for name in ("one", "other")
    }
    folders = {name: save(report, tmp_path / name) for name, report in asked.items()}
    with pytest.raises(ValueError, match="find: hash of the rows is one in one but other in other"):
        compare(list(folders.values()))
    compare([folders["one"], save(whole, tmp_path / "older")])


def test_a_score_file_stands_for_its_run(tmp_path: Path) -> None:
    folders = [save(make_report(number, 0.5, 1), tmp_path / name) for number, name in enumerate("ab")]
    assert list(compare([folders[0], f"{folders[1]}/scores.json"]).reports) == ["a", "b"]
    with pytest.raises(ValueError, match="compared with itself"):
        compare([folders[0], f"{folders[0]}/scores.json"])


def test_hits_that_do_not_fit_the_scores_are_an_error_with_run_and_task(tmp_path: Path) -> None:
    folders = [save(make_report(number, 0.5, 1), tmp_path / str(number)) for number in range(2)]
    file = tmp_path / "1" / "scores.json"
    content = json.loads(file.read_text())
    whole = content["hits"]["find"]["path_0"]
    score = content["tasks"]["find"]["hit_at_1"]["path_0"]
    for hits, message in (
        (whole[:-1], "59 hits of 60 queries"),
        ("2" + whole[1:], "hits other than 0 and 1"),
        ("01"[whole[0] == "0"] + whole[1:], f"mean of the hits is .*, but hit_at_1 is {score:.6g}"),
    ):
        content["hits"]["find"]["path_0"] = hits
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"1.scores\.json, task find, column path_0: (the )?{message}"):
            compare(folders)
    del content["hits"]["find"]["aggregate"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"task find: hits of \['path_0'\], but scores of"):
        compare(folders)


@pytest.mark.parametrize("runs", [2, 3])
def test_the_best_of_several_runs_is_said_to_be_picked_by_its_score(runs: int, tmp_path: Path) -> None:
    folders = [save(make_report(number, 0.5, 1), tmp_path / str(number)) for number in range(runs)]
    comparison = compare(folders)
    for table in (comparison.means_table(), comparison.task_table()):
        assert ("is the best of 2 runs by the same score" in str(table.caption)) == (runs == 3)


def test_run_and_task_names_with_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    whole = make_report(0, 0.5, 1)
    task = replace(whole.tasks["find"], task=Task("[red]find[/red]", "retrieval", False))
    report = ScoreReport({**whole.tasks, "[red]find[/red]": task})
    folders = [save(report, tmp_path / name) for name in ("[bold]a", "[b")]
    comparison = compare(folders)
    stream = io.StringIO()
    Console(file=stream, width=120).print(comparison.means_table(), comparison.task_table())
    for name in ("[bold]a", "[red]find[/red]"):
        assert stream.getvalue().count(name) >= 1, name


def test_missing_runs_are_an_error(tmp_path: Path) -> None:
    folder = save(make_report(0, 0.5, 1), tmp_path / "run")
    with pytest.raises(ValueError, match="no scores.json in .*nowhere"):
        compare([folder, str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="at least two runs"):
        compare([folder])
    with pytest.raises(ValueError, match="at least two runs"):
        compare(folder)


PUBLISHED_RUN = {"GQA": 0.4, "DocVQA": 0.6, "CIRR": 0.2}


def mmeb_report() -> ScoreReport:
    hits = {"aggregate": "1" * 30 + "0" * 30}
    tasks = {name: TaskResult(MMEB_TASKS[name], 60, 0.05, {"aggregate": 0.5}, hits) for name in PUBLISHED_RUN}
    return ScoreReport(tasks)


def published(kind: str, folder: Path) -> str:
    """The published scores in another format than this package's."""
    folder.mkdir()
    if kind == "leaderboard":
        file = folder / "theirs.json"
        image = {name: {"hit@1": score} for name, score in PUBLISHED_RUN.items()}
        file.write_text(json.dumps({"metadata": {}, "metrics": {"image": image}}))
        return str(file)
    for name, score in PUBLISHED_RUN.items():
        content = {"acc": score, "num_pred": 60} if kind == "v1" else {"hit@1": score, "num_pred": 60}
        (folder / f"{name}_score.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("kind", ["v1", "v2", "leaderboard"])
@pytest.mark.parametrize("order", [1, -1])
def test_scores_of_others_are_compared_without_an_interval(kind: str, order: int, tmp_path: Path) -> None:
    typed = [published(kind, tmp_path / "theirs"), save(mmeb_report(), tmp_path / "ours")][::order]
    comparison = compare(typed, str(tmp_path / "out"))
    assert list(comparison.reports) == ["theirs", "ours"][::order]
    found = next(iter(comparison.differences.values())).means["overall"]
    assert found.difference == pytest.approx(0.1 * order)
    assert (found.low, found.high) == (None, None)
    for table in (comparison.means_table(), comparison.task_table()):
        assert "no interval where the hits of single queries are not known: theirs" in str(table.caption)
        assert "bootstrap" not in str(table.caption)
    cli.main(["compare", *typed, "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "no interval: the hits of single queries" in page
    assert "95 % interval over test queries" not in page


def test_scores_of_others_need_known_tasks_of_as_many_rows(tmp_path: Path) -> None:
    ours, theirs = save(mmeb_report(), tmp_path / "ours"), published("v1", tmp_path / "theirs")
    (tmp_path / "theirs" / "GQA_score.json").write_text(json.dumps({"acc": 0.4, "num_pred": 59}))
    with pytest.raises(ValueError, match="GQA: number of queries is 60 in ours but 59 in theirs"):
        compare([ours, theirs])
    (tmp_path / "x.json").write_text(json.dumps({"metrics": {"image": {"mine": 0.5}}}))
    with pytest.raises(ValueError, match=r"x\.json has no task of MMEB"):
        compare([ours, str(tmp_path / "x.json")])


def test_a_folder_that_counts_steps_is_named_with_its_parent(tmp_path: Path) -> None:
    folders = [save(make_report(n, 0.5, 1), tmp_path / name / "step_480") for n, name in enumerate("ab")]
    assert list(compare(folders).reports) == ["a step_480", "b step_480"]
