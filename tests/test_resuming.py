"""Files that are whole or not there, locks, what ``~`` means; runs that are stopped, and what they log."""

import csv
import errno
import os
import signal
import stat
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel_decoupling import cli, files, lightning_cli
from parallel_decoupling.files import UNFINISHED, atomic_write, expand_paths, locked, reading, write_text
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.fit import small_config
from tests.support.processes import run_ranks

STEPS = 8  # an epoch has 6 batches
LOGGERS = [("TensorBoardLogger", {"name": "", "version": "", "default_hp_metric": False}), ("CSVLogger", {})]


@pytest.fixture(scope="module")
def config_file(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both loggers, a checkpoint and a validation after every other step."""
    trainer = {"max_steps": STEPS, "val_check_interval": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 1}
    content = small_config(tiny_backbone_dir, tiny_mmeb_dir, **trainer)
    content["data"]["validation_tasks"] = ["colours_i2t"]
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
    return scalars, cells


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


def test_a_run_logs_its_terms_and_the_scores_of_its_validation_tasks_alone(uninterrupted: Any) -> None:
    terms = "loss contrastive_path_1 mi_pair_0_1 estimator_nll_held_out hit_at_1_aggregate path_cosine"
    terms += " effective_rank gradient_norm"
    wanted = {*(f"train/{term}" for term in terms.split()), "lr/estimator", "mix/colours_i2t"}
    for values in uninterrupted[0]:
        names = {name for _, name in values}
        assert names >= {*wanted, "compute/token_passes", "val/overall", "val/colours_i2t/hit_at_1"}
        assert not any("colours_t2i" in name for name in names if name.startswith("val/"))


def stop_at(place: str, steps: int, number: int) -> None:
    """Send this process a signal: in or before a step, in a validation, or when a checkpoint is written."""
    if place == "save":
        save = Trainer.save_checkpoint

        def after_save(self: Trainer, *args: Any, **options: Any) -> None:
            save(self, *args, **options)
            if self.global_step == steps:
                os.kill(os.getpid(), number)

        Trainer.save_checkpoint = after_save  # type: ignore[method-assign]
        return
    name = {"between": "on_train_batch_start", "step": "_main_step", "validation": "validation_step"}
    name |= {"loading": "setup"}
    function = getattr(PDFEmbedder, name[place])

    def stopping(self: PDFEmbedder, *args: Any, **options: Any) -> Any:
        if self.progress.steps_done == steps:
            os.kill(os.getpid(), number)
        return function(self, *args, **options)

    setattr(PDFEmbedder, name[place], stopping)


def stopped(config_file: Path, folder: Path, place: str, steps: int, number: int) -> None:
    lightning_cli.SAVE_EVERY = 2
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
        ("validation", 4, signal.SIGINT, 130),
        ("between", 4, signal.SIGTERM, 143),
        ("between", 4, signal.SIGINT, 130),
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
    names = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert names == ["last.ckpt", f"step={STEPS if steps < STEPS else 6}.ckpt"]


def warned(config_file: Path, folder: Path, on_slurm: bool) -> None:
    """Get SIGUSR1 in the fourth step; elsewhere than on SLURM, one while loading and SIGKILL in the sixth."""
    if on_slurm:
        job = {"NTASKS": "1", "JOB_NAME": "fit", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
        os.environ |= {f"SLURM_{name}": value for name, value in job.items()}
    lightning_cli.SAVE_EVERY = 100
    stop_at("step", 3, signal.SIGUSR1)
    if not on_slurm:
        stop_at("loading", 0, signal.SIGUSR1)
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


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_and_folders_have_the_mode_that_umask_gives(umask: int, tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new" / "a.safetensors") as file:  # which the library writes with 0600
        save_file({"x": torch.ones(2)}, file)
    with atomic_write(tmp_path / "folder") as folder:
        folder.mkdir(0o700)
        (folder / "private").touch(0o600)
    assert mode(tmp_path / "new" / "a.safetensors") == mode(tmp_path / "folder" / "private") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask


def test_what_fails_leaves_the_old_file_and_nothing_else_and_keeps_its_words(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with suppress(KeyError), atomic_write(file) as unfinished:
        unfinished.write_text("half")
        assert file.read_text() == "old"
        assert unfinished.stat().st_dev == file.stat().st_dev
        raise KeyError
    with pytest.raises(RuntimeError, match="^unexpected pos 704$"):
        fill(file, KeyError())
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "folder" / "a", "old")
    with pytest.raises(OSError, match="not empty"), atomic_write(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["a"]


def killed(file: Path) -> None:
    with atomic_write(file) as unfinished:
        unfinished.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_leaves_is_removed_by_the_next_writer_only(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(killed, tmp_path / "a", processes=1)
    assert len(list(tmp_path.glob(f"{UNFINISHED}*"))) == 1
    (own := tmp_path / f"{UNFINISHED}thesis").mkdir()
    assert (tmp_path / "a").read_text() == "old"
    with atomic_write(tmp_path / "b") as mine:
        mine.write_text("b")
        write_text(tmp_path / "c", "another writer of the folder")
        assert {*tmp_path.glob(f"{UNFINISHED}*")} == {mine.parent, own}
    own.rmdir()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c"]


class NoSpaceError(Exception):
    """As of a library that writes by itself, in Rust or C++."""


def fill(file: Path, error: Exception) -> None:
    with atomic_write(file) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError("unexpected pos 704") from error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), NoSpaceError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_names_file_and_space_and_keeps_the_old_one(error: Exception, tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match=r"/a does not fit on its disk, which has [\d,.]+ MB free") as raised:
        fill(tmp_path / "a", error)
    assert raised.value.errno == errno.ENOSPC
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]
    with pytest.raises(OSError, match="/a does not fit on its disk"), locked(tmp_path):
        fill(tmp_path / "a", error)
    with pytest.raises(OSError, match=f"{tmp_path} does not fit on its disk"), locked(tmp_path):
        raise error  # of what another package writes there


def test_a_file_that_cannot_be_read_on_is_named() -> None:
    with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: 'a.ckpt'"), reading("a.ckpt"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    for other in (OSError(errno.EIO, "x", "b"), OSError(errno.ENOENT, "x"), OSError("x")):
        with pytest.raises(OSError, match="x") as caught, reading("a.ckpt"):
            raise other
        assert caught.value is other


def try_lock(folder: Path, held: bool) -> None:
    if held:
        with pytest.raises(ValueError, match="is in use by process"), locked(folder):
            pass
    else:
        with locked(folder):
            pass


def hold_and_die(folder: Path) -> None:
    with locked(folder):
        if os.fork() == 0:  # a loader's worker, which lives on for a while
            os.execvp("sleep", ["sleep", "5"])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder):
        run_ranks(try_lock, folder, True, processes=1)
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(folder):
            pass
    assert not folder.exists(), "it was made for the lock"
    run_ranks(try_lock, folder, False, processes=1)
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(hold_and_die, folder, processes=1)
    with locked(folder):
        pass


def test_a_file_system_without_locks_is_written_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(tmp_path), atomic_write(tmp_path / "a") as unfinished:
        unfinished.write_text("a")
        write_text(tmp_path / "b", "does not take the other for a leftover")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_tilde_is_home_in_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    callback = Namespace(class_path="X", init_args=Namespace(dirpath="~/c", name="~/n"))
    options = Namespace(
        trainer=Namespace(default_root_dir="~/run", callbacks=[callback], logger=None),
        data={"data_dir": "~", "predict_source": "./~/x"},
        run_dirs=["~/a", "b/~"],
        text="~/words",
        ckpt_path="last",
    )
    found = expand_paths(options)
    assert found.trainer.default_root_dir == "/home/me/run"
    assert vars(found.trainer.callbacks[0].init_args) == {"dirpath": "/home/me/c", "name": "~/n"}
    assert found.data == {"data_dir": "/home/me", "predict_source": "./~/x"}
    assert (found.run_dirs, found.text, found.ckpt_path) == (["/home/me/a", "b/~"], "~/words", "last")
    with pytest.raises(ValueError, match="output_dir '~nobody-here/x': no such home folder"):
        expand_paths({"output_dir": "~nobody-here/x"})
