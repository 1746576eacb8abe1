"""Running a study: what is started, skipped, shared, resumed and reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import studies.__main__ as command_line
from studies import runner
from studies.results import append_result, read_results
from studies.study import Run, Study, load_study
from studies.worker import execute, saved_steps
from tests.support.mmeb import save_tiny_mmeb
from tests.support.study import made_up_result, save_study, toy_study


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test in its own folder; undo what ``seed_everything`` leaves behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Runs in the order of their start; a stand-in writes their lines at once, cell ``bad`` fails."""
    names: list[str] = []

    def stand_in(run: Run, source: str) -> list[str]:
        names.append(run.name)
        if run.cell.name == "bad":
            return [sys.executable, "-c", "raise SystemExit('it broke')"]
        lines = [json.dumps(made_up_result(run.cell, run.seed, step, 50.0)) for step in run.cell.points]
        file = tmp_path / "docs/studies/toy/results.jsonl"
        code = f"open({str(file)!r}, 'a').write({''.join(line + chr(10) for line in lines)!r})"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(runner, "command", stand_in)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    (tmp_path / "docs/studies/toy").mkdir(parents=True)
    return names


def test_a_failed_run_is_reported_and_the_others_go_on(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = toy_study(
        tmp_path,
        seeds=[0, 1],
        cells={"bad": {"seeds": [0], "steps": 5}, "a": {"curve": [1, 2]}, "b": {"steps": 3}},
    )
    assert runner.run_study(study, "toy", jobs=2) == ["bad_seed0"]
    assert started == ["bad_seed0", "a_seed0", "b_seed0", "a_seed1", "b_seed1"]
    shown = capsys.readouterr().out
    assert "bad_seed0: FAILED (it broke" in shown
    assert "a_seed1: overall 50.0 at 1, 50.0 at 2" in shown
    assert "[5/5]" in shown
    assert len(read_results(study.results_file)) == 6


def test_what_is_finished_is_skipped(started: list[str], tmp_path: Path) -> None:
    study = toy_study(tmp_path, seeds=[0, 1], cells={"a": None, "b": {"steps": 3}})
    append_result(study.results_file, made_up_result(study.cells["a"], 0, 100, 40.0))
    assert runner.run_study(study, "toy", only=["a"]) == []
    assert started == ["a_seed1"]
    assert runner.run_study(study, "toy") == []
    assert started == ["a_seed1", "b_seed0", "b_seed1"]
    assert runner.run_study(study, "toy") == []
    assert len(started) == 3


def test_cells_of_one_configuration_run_once(started: list[str], tmp_path: Path) -> None:
    study = toy_study(tmp_path, cells={"a": None, "twin": {"overrides": {"model.num_paths": 2}}})
    assert runner.run_study(study, "toy", jobs=2) == []
    assert started == ["a_seed0"]
    assert [line["cell"] for line in read_results(study.results_file)] == ["a", "twin"]


def test_the_command_line_runs_lists_and_reports(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_study(tmp_path, {"cells": {"a": None, "bad": {"steps": 2}}})
    assert command_line.main([file]) == 1
    assert (tmp_path / "docs/studies/toy/README.md").is_file()
    assert command_line.main([file, "--only", "a", "--report"]) == 0
    assert command_line.main([file, "--list"]) == 0
    assert "1/1" in capsys.readouterr().out
    assert command_line.main([file, "--only", "c"]) == 2
    assert "has no cell ['c']" in capsys.readouterr().err
    assert command_line.main(["--list"]) == 0
    assert {"help", "paths", "estimators"} <= set(capsys.readouterr().out.split())


@pytest.fixture
def small_study(tiny_backbone_dir: str, tmp_path: Path) -> Study:
    """Real runs of four steps."""
    base = {
        "model": {
            "backbone": tiny_backbone_dir,
            "num_paths": 2,
            "prefix_length": 2,
            "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
            "mi": {"warmup_steps": 1},
        },
        "data": {"data_dir": save_tiny_mmeb(tmp_path / "data"), "batch_size": 8},
        "trainer": {"max_steps": 4, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
    }
    cells = {"curve": {"curve": [2, 4]}, "plain": {"steps": 4}, "untrained": {"steps": 0}}
    return load_study(save_study(tmp_path, {"cells": cells}, base))


def test_a_curve_is_one_training_scored_at_its_points(small_study: Study) -> None:
    run = Run("toy", small_study.cells["curve"], 0)
    execute(run, small_study.results_file)
    results = read_results(small_study.results_file)
    assert [line["step"] for line in results] == [2, 4]
    assert 0 < results[0]["token_passes"] < results[1]["token_passes"]
    assert list(results[0]["means"]["overall"]) == [
        *("aggregate", "path_0", "path_1"),
        *("mean", "concat", "maxsim"),
    ]
    assert set(results[0]["tasks"]) == {"colours_i2t", "colours_t2i"}
    assert {"path_cosine", "path_cosine_first", "mi", "estimator_nll_held_out"} <= set(
        results[1]["monitored"]
    )
    assert results[0]["monitored"]["loss"] != results[1]["monitored"]["loss"]
    assert results[0]["logged"] == {}
    cosines = results[1]["logged"]["path_cosine"]
    assert len(cosines) == 4
    assert cosines[-1][1] == pytest.approx(results[1]["monitored"]["path_cosine"], rel=1e-3)
    assert saved_steps(run.folder / "checkpoints") == [2, 4]
    execute(run, small_study.results_file)
    assert read_results(small_study.results_file) == results


def test_no_steps_is_the_untrained_model(small_study: Study) -> None:
    run = Run("toy", small_study.cells["untrained"], 0)
    execute(run, small_study.results_file)
    (line,) = read_results(small_study.results_file)
    assert (line["step"], line["token_passes"], line["fit_seconds"], line["monitored"]) == (0, 0.0, 0.0, {})
    assert not (run.folder / "checkpoints").exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_where_an_uninterrupted_one_does(small_study: Study) -> None:
    curve, plain = (Run("toy", small_study.cells[name], 0) for name in ("curve", "plain"))
    execute(plain, small_study.results_file)
    execute(curve, small_study.results_file)
    folder = curve.folder / "checkpoints"
    (folder / "step=4.ckpt").unlink()
    (folder / "step=2.ckpt").replace(folder / "last.ckpt")
    torch.save(torch.load(folder / "last.ckpt", weights_only=True), folder / "step=2.ckpt")
    first, *others = read_results(small_study.results_file)
    small_study.results_file.write_text(json.dumps(first) + "\n", encoding="utf-8")
    assert first["cell"] == "plain"
    assert len(others) == 2
    execute(curve, small_study.results_file)
    assert [line["resumed"] for line in read_results(small_study.results_file)] == [False, True, True]
    resumed, whole = (
        torch.load(run.folder / "checkpoints" / "step=4.ckpt", weights_only=True)["state_dict"]
        for run in (curve, plain)
    )
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_study_in_processes(small_study: Study, tmp_path: Path) -> None:
    assert command_line.main([str(tmp_path / "toy.yaml"), "--jobs", "2"]) == 0
    lines = read_results(small_study.results_file)
    assert {(line["cell"], line["step"]) for line in lines} >= {("curve", 2), ("curve", 4), ("plain", 4)}
    assert (tmp_path / "docs/studies/toy/README.md").is_file()
    assert (tmp_path / "runs/studies/toy/curve_seed0.log").stat().st_size > 0
