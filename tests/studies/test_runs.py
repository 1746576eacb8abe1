"""Runs of a study: what is started, skipped, stopped, resumed and scored, with where it comes from."""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import studies.__main__ as command_line
from parallel_decoupling.training.module import PDFEmbedder
from studies import runner, worker
from studies.results import append_result, read_results
from studies.study import Run, Study, load_study
from studies.training_log import last_logged_step
from studies.worker import ensure_scored, execute, saved_steps
from tests.support.fit import small_config
from tests.support.mmeb import save_tiny_mmeb
from tests.support.study import made_up_result, save_study, toy_study


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


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_stopped_study_ends_its_runs_and_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    reaction = "lambda *_: None" if stubborn else "lambda *_: sys.exit(open('ended', 'w').close())"
    code = (
        f"import os, signal, sys, time; signal.signal(signal.SIGTERM, {reaction}); "
        "open('pid.part', 'w').write(str(os.getpid())); os.rename('pid.part', 'pid')\n"
        "while True: time.sleep(0.05)"
    )
    monkeypatch.setattr(runner, "command", lambda run, source: [sys.executable, "-c", code])
    monkeypatch.setattr(runner, "STOP_SECONDS", 0.5 if stubborn else 20)

    def stop(self: runner.Progress, running: list[runner.Started]) -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Progress, "running", stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run_study(toy_study(tmp_path, cells={"a": None}), "toy")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert (tmp_path / "ended").exists() != stubborn


@pytest.fixture
def small_study(tiny_backbone_dir: str, tmp_path: Path) -> Study:
    """Real runs of four steps."""
    data_dir = save_tiny_mmeb(tmp_path / "data")
    base = small_config(tiny_backbone_dir, data_dir, max_steps=4, devices=1, log_every_n_steps=1)
    base["model"]["optimizer"] = {"learning_rate": 1e-2, "schedule": "constant"}
    cells = {"curve": {"curve": [2, 4]}, "plain": {"steps": 4}, "untrained": {"steps": 0}}
    cells["side_by_side"] = {"steps": 2, "overrides": {"model.aggregation": "concat"}}
    one_path = {"model.num_paths": 1, "model.aggregate_weight": 0.0, "model.mi.kind": "none"}
    cells["one_path"] = {"steps": 2, "overrides": {"model.aggregation": "concat", **one_path}}
    return load_study(save_study(tmp_path, {"cells": cells}, base))


def test_a_curve_is_one_training_scored_at_its_points(small_study: Study) -> None:
    run = Run("toy", small_study.cells["curve"], 0)
    execute(run, small_study.results_file)
    lines = read_results(small_study.results_file)
    assert [line["step"] for line in lines] == [2, 4]
    assert 0 < lines[0]["token_passes"] < lines[1]["token_passes"]
    assert list(lines[0]["means"]["overall"]) == [
        *("aggregate", "path_0", "path_1"),
        *("mean", "concat", "maxsim"),
    ]
    assert set(lines[0]["tasks"]) == {"colours_i2t", "colours_t2i"}
    assert {"path_cosine", "path_cosine_first", "mi", "estimator_nll_held_out"} <= set(lines[1]["monitored"])
    assert lines[0]["monitored"]["loss"] != lines[1]["monitored"]["loss"]
    assert lines[0]["logged"] == {}
    cosines = lines[1]["logged"]["path_cosine"]
    assert len(cosines) == 4
    assert cosines[-1][1] == pytest.approx(lines[1]["monitored"]["path_cosine"], rel=1e-3)
    assert last_logged_step(run.folder) == 3
    assert saved_steps(run.folder / "checkpoints") == [2, 4]
    execute(run, small_study.results_file)
    assert read_results(small_study.results_file) == lines


def test_paths_that_are_trained_side_by_side_are_scored_in_the_bytes_of_one_as_well(
    small_study: Study,
) -> None:
    run = Run("toy", small_study.cells["side_by_side"], 0)
    execute(run, small_study.results_file)
    [line] = read_results(small_study.results_file)
    file = run.folder / "step_2_compressed" / "compressed.ckpt"
    assert PDFEmbedder.load_from_checkpoint(file).hparams["aggregation"] == "linear"
    scores = json.loads((file.parent / "scores.json").read_text())
    assert line["columns"][-1] == "compressed"
    assert line["means"]["overall"]["compressed"] == scores["means"]["overall"]["aggregate"]
    of_task = scores["tasks"]["colours_t2i"]["hit_at_1"]["aggregate"]
    assert line["tasks"]["colours_t2i"]["compressed"] == of_task
    execute(Run("toy", small_study.cells["one_path"], 0), small_study.results_file)
    assert read_results(small_study.results_file)[1]["columns"] == ["aggregate", "path_0"]


@pytest.mark.parametrize("cell", ["plain", "curve"])
def test_a_stopped_run_goes_on_and_ends_where_an_uninterrupted_one_does(
    small_study: Study, monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    """One scored point or several."""
    monkeypatch.setattr(worker, "SAVE_EVERY", 2)
    versions = iter([("a" * 40, True)] * 2 + [("b" * 40, False)] * 2)
    monkeypatch.setattr(worker, "code_version", lambda: next(versions))
    run, whole = Run("toy", small_study.cells[cell], 0), Run("whole", small_study.cells["plain"], 0)
    training_step, batches = PDFEmbedder.training_step, []

    def stopping(self: PDFEmbedder, batch: Any, batch_idx: int) -> dict[str, Any]:
        batches.append(batch_idx)
        if len(batches) == 4:
            raise InterruptedError("stopped in the fourth batch")
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(PDFEmbedder, "training_step", stopping)
    with pytest.raises(InterruptedError):
        execute(run, small_study.results_file)
    execute(run, small_study.results_file)
    assert len(batches) == 4 + 2  # 3 whole ones, of which 2 are kept
    line = read_results(small_study.results_file)[-1]
    assert (line["commit"], line["dirty"]) == ("b" * 40, False)
    assert line["fit_commits"] == ["a" * 40 + " with changes", "b" * 40]
    parts = [fit["seconds"] for fit in json.loads((run.folder / "fits.json").read_text())]
    assert min(parts) > 0
    assert line["fit_seconds"] == pytest.approx(sum(parts), abs=0.06)
    assert [step for step, _ in line["logged"]["path_cosine"]] == [0, 1, 2, 3]
    monkeypatch.setattr(worker, "code_version", lambda: ("c" * 40, False))
    ensure_scored(whole)
    resumed, uninterrupted = (
        torch.load(each.folder / "checkpoints" / name, weights_only=True)["state_dict"]
        for each, name in ((run, "step=4.ckpt"), (whole, "last.ckpt"))
    )
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_a_folder_of_another_configuration_is_emptied(small_study: Study) -> None:
    run = Run("toy", small_study.cells["untrained"], 0)
    run.folder.mkdir(parents=True)
    for name in ("config_hash.txt", "left_over"):
        (run.folder / name).write_text("an earlier one\n", encoding="utf-8")
    execute(run, small_study.results_file)
    assert not (run.folder / "left_over").exists()
    (run.folder / "mine").touch()
    small_study.results_file.unlink()
    execute(run, small_study.results_file)
    assert (run.folder / "mine").exists()


def test_a_run_has_one_process(small_study: Study, tmp_path: Path) -> None:
    run = Run("toy", small_study.cells["untrained"], 0)
    lock_file = tmp_path / "runs/studies/toy/untrained_seed0.lock"
    lock_file.parent.mkdir(parents=True)
    with open(lock_file, "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process executes this run and holds .*lock; wait"):
            worker.main([str(tmp_path / "toy.yaml"), "untrained", "0"])
        for action in (lambda: execute(run, small_study.results_file), lambda: ensure_scored(run)):
            with pytest.raises(worker.BusyError):
                action()
    assert not run.folder.exists()
    with worker._only_process(run), pytest.raises(worker.BusyError):
        execute(run, small_study.results_file)


@pytest.mark.slow
def test_a_study_in_processes(small_study: Study, tmp_path: Path) -> None:
    assert command_line.main([str(tmp_path / "toy.yaml"), "--jobs", "2"]) == 0
    lines = read_results(small_study.results_file)
    assert {(line["cell"], line["step"]) for line in lines} >= {("curve", 2), ("curve", 4), ("plain", 4)}
    assert (tmp_path / "docs/studies/toy/README.md").is_file()
    assert (tmp_path / "runs/studies/toy/curve_seed0.log").stat().st_size > 0
