"""The command line's runs that are stopped: what their logs, exit codes and jobs on SLURM come to."""

from __future__ import annotations

import csv
import errno
import os
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel_decoupling import cli, lightning_cli
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.processes import run_ranks

MODEL = {"num_paths": 2, "prefix_length": 2, "mi": {"warmup_steps": 1}}
STEPS = 8  # an epoch has 6 batches
LOGGERS = [("TensorBoardLogger", {"name": "", "version": "", "default_hp_metric": False}), ("CSVLogger", {})]


@pytest.fixture(scope="module")
def config_file(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both loggers, a checkpoint and a validation after every other step."""
    trainer = {"max_steps": STEPS, "val_check_interval": 2, "log_every_n_steps": 1, "accelerator": "cpu"}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    data = {"data_dir": tiny_mmeb_dir, "batch_size": 8, "validation_tasks": ["colours_i2t"]}
    content = {"model": {**MODEL, "backbone": tiny_backbone_dir}, "data": data, "trainer": trainer}
    file = tmp_path_factory.mktemp("resuming") / "config.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    monkeypatch.setattr(lightning_cli, "SAVE_EVERY", 2)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fit(config_file: Path, folder: Path, *options: str) -> None:
    logger = [{"class_path": name, "init_args": {"save_dir": str(folder), **more}} for name, more in LOGGERS]
    config = {"trainer": {"logger": logger, "default_root_dir": str(folder)}}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    cli.main(["fit", "--config", str(config_file), "--config", str(file), *options])


def logged(folder: Path) -> tuple[dict[Any, list[float]], dict[Any, list[float]]]:
    """All values by step and name, of TensorBoard and of the CSV file, without those of the clock."""
    events, scalars, cells = EventAccumulator(str(folder)), {}, {}
    events.Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            scalars.setdefault((event.step, name), []).append(event.value)
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):  # train and val have a row each
                    cells.setdefault((int(row["step"]), name), []).append(float(value))
    return tuple({k: v for k, v in each.items() if "throughput" not in k[1]} for each in (scalars, cells))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def uninterrupted(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_cli, "SAVE_EVERY", 2)
        fit(config_file, folder)
    values = logged(folder)
    assert {step for step, _ in values[0]} == set(range(STEPS))
    assert [step for step, name in sorted(values[1]) if name == "val/overall"] == [1, 3, 5, 7]
    assert all(len(each) == 1 for each in values[1].values())
    return values, state(folder)


def state(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def stop_at(place: str, steps: int, number: int) -> None:
    """Send this process a signal: in a step, in its validation, or when its checkpoint is written."""
    step, validation, save = PDFEmbedder._main_step, PDFEmbedder.validation_step, Trainer.save_checkpoint

    def in_step(self: PDFEmbedder) -> None:
        if self.progress.steps_done == steps:
            os.kill(os.getpid(), number)
        step(self)

    def in_validation(self: PDFEmbedder, *args: Any) -> Any:
        if self.progress.steps_done == steps:
            os.kill(os.getpid(), number)
        return validation(self, *args)

    def after_save(self: Trainer, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        if self.global_step == steps:
            os.kill(os.getpid(), number)

    if place == "step":
        PDFEmbedder._main_step = in_step  # type: ignore[method-assign]
    if place == "validation":
        PDFEmbedder.validation_step = in_validation  # type: ignore[method-assign]
    if place == "save":
        Trainer.save_checkpoint = after_save  # type: ignore[method-assign]


def stopped(config_file: Path, folder: Path, place: str, steps: int, number: int) -> None:
    stop_at(place, steps, number)
    fit(config_file, folder)


@pytest.mark.parametrize(
    ("place", "steps", "number", "code"),
    [
        ("step", 7, signal.SIGKILL, -9),
        ("validation", 4, signal.SIGKILL, -9),
        ("save", 6, signal.SIGKILL, -9),
        ("step", 3, signal.SIGTERM, 143),
        ("validation", 8, signal.SIGTERM, 143),
        ("step", 3, signal.SIGINT, 130),
    ],
)
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(
    uninterrupted: Any, config_file: Path, tmp_path: Path, place: str, steps: int, number: int, code: int
) -> None:
    folder, weights = tmp_path / "run", uninterrupted[1]
    with pytest.raises(RuntimeError, match=rf"exit codes \[{code}\]"):
        run_ranks(stopped, config_file, folder, place, steps, number, processes=1)
    fit(config_file, folder, "--ckpt_path", "last")
    assert all(torch.equal(value, weights[name]) for name, value in state(folder).items())
    for found, expected in zip(logged(folder), uninterrupted[0], strict=True):
        assert found == expected
    assert not list(folder.rglob(".*"))


def warned(config_file: Path, folder: Path, on_slurm: bool) -> None:
    """Get SIGUSR1 in the fourth step; elsewhere than on SLURM, SIGKILL in the sixth."""
    if on_slurm:
        job = {"NTASKS": "1", "JOB_NAME": "fit", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
        os.environ |= {f"SLURM_{name}": value for name, value in job.items()}
    lightning_cli.SAVE_EVERY = 100
    stop_at("step", 3, signal.SIGUSR1)
    if not on_slurm:
        stop_at("step", 5, signal.SIGKILL)
    fit(config_file, folder)


def test_the_scheduler_s_warning_saves_and_the_run_goes_on(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(warned, config_file, tmp_path / "run", False, processes=1)
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4


def test_on_slurm_the_job_is_requeued_and_resumes(
    uninterrupted: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Lightning's plugin, which calls ``scontrol``; SLURM then ends the job with SIGTERM."""
    scontrol, folder = tmp_path / "scontrol", tmp_path / "run"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nkill -TERM $PPID\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=r"\[143\]"):
        run_ranks(warned, config_file, folder, True, processes=1)
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
    time.sleep(1)  # TensorBoard orders files of one second by process
    fit(config_file, folder)  # the same command: it resumes by itself
    for found, expected in zip(logged(folder), uninterrupted[0], strict=True):
        assert found == expected
    assert not list(folder.glob("hpc_*"))


def test_checkpoints_are_whole_files_on_their_own_disk(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the temporary folder nor the half of a file: with a full disk the last good one stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    folder, number = tmp_path / "run", os.umask(0o022)
    os.umask(number)

    def save(content: dict[str, Any], stream: Any) -> None:
        if content["global_step"] > 4:
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        torch_save(content, stream)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit, match="2"):
        fit(config_file, folder)
    shown = capsys.readouterr().err
    assert f"{folder}/checkpoints/last.ckpt does not fit on its disk, which has" in shown
    (file,) = (folder / "checkpoints").iterdir()
    assert torch.load(file, weights_only=True)["global_step"] == 4
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~number
