"""One run: trained, resumed, scored, with where it comes from."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import studies.__main__ as command_line
from parallel_decoupling.training.module import PDFEmbedder
from studies import worker
from studies.results import read_results
from studies.study import Run, Study, load_study
from studies.training_log import last_logged_step
from studies.worker import ensure_scored, execute, saved_steps
from tests.support.mmeb import save_tiny_mmeb
from tests.support.study import save_study


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
