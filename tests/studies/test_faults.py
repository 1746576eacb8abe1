"""Campaigns of faults: a short try of each, and what they make of it."""

import importlib
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from studies.faults import campaign, disks, kills, threads
from tests.support.fit import small_data


@pytest.mark.parametrize("name", ["inputs", "mutations", "serve"])
def test_a_campaign_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"studies.faults.{name}").main


def test_threads_beside_a_training_encode_what_one_thread_does(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "NUM_CALLS", 6)
    module, data = threads.make_model(tiny_backbone_dir), small_data(tiny_mmeb_dir)
    steps, differences = threads.encode_beside(module, data, callers=2, seed=0, max_time={"seconds": 1})
    assert steps > 0
    assert len(differences) >= 2
    assert set(differences) == {0.0}


@pytest.mark.parametrize(
    ("kind", "code", "messages", "wrong"),
    [
        ("full", 2, f"error: {disks.DISK}/x does not fit, 0.1 MB free", []),
        ("full", 2, f"error: {disks.DISK}/x does not fit", ["no free space is named"]),
        ("read-only", 2, f"usage\nerror: {disks.DISK}/x is read-only", []),
        ("read-only", 2, "error: Read-only file system", ["no file is named"]),
        ("read-only", 1, f"Traceback\nerror: {disks.DISK}", ["exit code 1", "traceback"]),
        ("read-only", 2, f"error: x\nerror: {disks.DISK}", ["not one message"]),
    ],
)
def test_the_end_of_a_command_without_a_disk(kind: str, code: int, messages: str, wrong: list[str]) -> None:
    assert disks.faults_of(kind, code, messages) == wrong


def test_a_disk_fills_up_and_is_well_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "DISK", tmp_path / "disk")
    try:
        with disks.mounted(disks.DISK):
            for kind in ("full", "read-only"):
                with disks.disturbed(kind, 8192), pytest.raises(OSError, match="No space|Read-only"):
                    (disks.DISK / "file").write_bytes(bytes(100_000))
            (disks.DISK / "file").write_bytes(bytes(100_000))
    except SystemExit as error:
        pytest.skip(str(error))


def test_a_command_that_ended_in_spite_of_its_signal_was_not_killed() -> None:
    killed: dict[str, Any] = {"kind": "fit", "commit": "a" * 40, "exit_code": 130, "ok": True}
    lines = [killed, {**killed, "exit_code": 0}, {**killed, "ended_before": True}, {**killed, "ok": False}]
    assert [campaign.verdict_of(line) for line in lines] == ["right", "ended", "ended", "wrong"]
    assert campaign.table({"kills": lines}).endswith(
        "| kills | fit | aaaaaaa | 4 | ended: 2, right: 1, wrong: 1 |"
    )


def test_what_is_killed_hears_an_interrupt_that_a_background_shell_ignores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(
        kills.subprocess, "Popen", lambda command, **options: real(["sleep", "60"], **options)
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = kills.start()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_try_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[int]()

    def one_try(kind: str, seed: int) -> dict[str, Any]:
        tried.append(seed)
        return {"verdict": "wrong" if seed == 2 else "right"}

    tries = [{"kind": "fit", "seed": seed} for seed in range(3)]
    assert campaign.run_missing(tmp_path / "x.jsonl", tries[:2], one_try) == 0
    assert campaign.run_missing(tmp_path / "x.jsonl", tries, one_try) == 1
    assert tried == [0, 1, 2]
