"""Running a study: what is started, skipped, shared, stopped and reported."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from studies import runner
from studies.results import append_result, read_results
from studies.study import Run
from tests.support.study import made_up_result, toy_study


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
