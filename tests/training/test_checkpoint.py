"""What is in a checkpoint, where it is found, and that a resumed run equals one that was not stopped."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from parallel_decoupling.model.pretrained import load_encoder
from parallel_decoupling.model.run_checkpoint import seal_checkpoint
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.run_folder import find_checkpoint, run_files
from tests.support.fit import (
    Recorder,
    SaveAll,
    assert_equal,
    make_trainer,
    small_data,
    small_embedder,
    trained,
)

DROPOUT: dict[str, Any] = {"adapter": {"dropout": 0.2, "per_path": True}}
LOADERS = (PDFEmbedder.load_from_checkpoint, load_encoder)
PREFIXES = "encoder.prefixes.key_values"
BAD_HASHES = dict.fromkeys(("sha256", "weights_sha256"), "0" * 64)
ALL_STEPS = 9  # an epoch has 6 batches


@pytest.fixture
def checkpoint_file(trained_run: Path) -> Path:
    return trained_run / "checkpoints" / "last.ckpt"


def test_a_checkpoint_holds_what_trains_and_nothing_else(
    checkpoint_file: Path, tiny_backbone_dir: str
) -> None:
    content = torch.load(checkpoint_file, weights_only=True)
    module = small_embedder(tiny_backbone_dir, learn_temperature=True, aggregation="learned")
    assert content["state_dict"].keys() == trained(module).keys()
    assert content["backbone"].keys() >= {"name", "revision", "sha256"}
    assert len(content["optimizer_states"]) == 2
    assert content["progress"]["steps_done"] == 2
    assert content["hyper_parameters"]["mi"]["hidden_size"] == 8


def changed(checkpoint_file: Path, folder: Path, change: Any) -> Path:
    content = torch.load(checkpoint_file, weights_only=True)
    change(content)
    if "progress" in content:
        seal_checkpoint(content)
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize(
    ("change", "message", "load"),
    [
        *((lambda c: c["state_dict"].pop(PREFIXES), "missing .*prefixes", load) for load in LOADERS),
        *(
            (lambda c: c["state_dict"][PREFIXES].fill_(math.nan), "not finite: .*prefixes", load)
            for load in LOADERS
        ),
        *((lambda c: c["backbone"].update(BAD_HASHES), "frozen weights differ", load) for load in LOADERS),
        (lambda c: c["hyper_parameters"].update(num_paths=3), "wrong shape", load_encoder),
        (lambda c: c["hyper_parameters"].update(num_paths=3), "do not fit this model.*num_paths", LOADERS[0]),
        (lambda c: c["state_dict"].update({"encoder.extra": torch.zeros(1)}), "extra", LOADERS[0]),
        (lambda c: c["state_dict"].pop("log_temperature"), "log_temperature", LOADERS[0]),
        (lambda c: c["state_dict"].update({"mutual_information.x": torch.zeros(1)}), r"n\.x", LOADERS[0]),
        (lambda c: c.pop("progress"), "not a checkpoint of a run; progress: ", LOADERS[0]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    checkpoint_file: Path, tmp_path: Path, change: Any, message: str, load: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        load(changed(checkpoint_file, tmp_path, change))


def run(
    backbone: str, data_dir: str, folder: Path, *extra: Callback, resume: Path | None = None, **options: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Fit to ``ALL_STEPS`` and return parameters and logged values."""
    workers = options.pop("num_workers", 0)
    optimizer = {"schedule": "cosine", "warmup_steps": 2}
    module, recorder = small_embedder(backbone, **DROPOUT, optimizer=optimizer), Recorder()
    data = small_data(data_dir, num_workers=workers, validation_tasks=["colours_i2t"])
    options = {"max_steps": ALL_STEPS, "val_check_interval": 3, **options}
    trainer = make_trainer(folder, recorder, *extra, **options)
    torch.manual_seed(len(list(folder.iterdir())))  # the surroundings must not matter
    trainer.fit(module, data, ckpt_path=resume)
    return trained(module), recorder.values


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor], list[dict[str, float]]]:
    """Folder with all checkpoints, parameters and logged values of the run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    state, values = run(tiny_backbone_dir, tiny_mmeb_dir, folder, SaveAll(folder))
    assert len(values) == ALL_STEPS
    return folder, state, values


@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (3, 0), (5, 2), (6, 0), (7, 0)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    uninterrupted: Any, tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, stop: int, workers: int
) -> None:
    folder, state, values = uninterrupted
    file = folder / f"{stop}.ckpt"
    again, tail = run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path, resume=file, num_workers=workers)
    assert tail == values[stop:]
    assert_equal(state, again)


def test_a_resumed_run_steps_with_the_rates_that_it_was_given(
    uninterrupted: Any, tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    """A checkpoint restores its own rates into optimizer and schedule, after they were built."""
    rates = {"learning_rate": 3e-5, "prefix_learning_rate": 4e-4, "weight_decay": 0.3, "schedule": "constant"}
    options = {**DROPOUT, "optimizer": rates, "mi": {"learning_rate": 5e-4}}
    module = small_embedder(tiny_backbone_dir, **options)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, max_steps=ALL_STEPS)
    trainer.fit(module, small_data(tiny_mmeb_dir), ckpt_path=uninterrupted[0] / "3.ckpt")
    for values in recorder.values:
        assert (values["lr/adapters"], values["lr/prefixes"]) == pytest.approx((3e-5, 4e-4))
    main, estimator = trainer.optimizers
    assert {group["name"]: group["weight_decay"] for group in main.param_groups}["adapters"] == 0.3
    assert estimator.param_groups[0]["lr"] == 5e-4


def test_a_checkpoint_names_the_data_of_its_training(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    module = small_embedder(tiny_backbone_dir)

    def named(file: str) -> int:
        return int(torch.load(tmp_path / file, weights_only=True)["data"]["max_pixels"])

    def fit(max_pixels: int, steps: int, resume: Path | None = None) -> int:
        trainer = make_trainer(tmp_path, SaveAll(tmp_path), max_steps=steps)
        trainer.fit(module, small_data(tiny_mmeb_dir, max_pixels=max_pixels), ckpt_path=resume)
        return named(f"{steps}.ckpt")

    assert fit(1024, 1) == 1024
    trainer = make_trainer(tmp_path)
    trainer.test(module, small_data(tiny_mmeb_dir, max_pixels=2048))
    trainer.save_checkpoint(tmp_path / "tested.ckpt")
    assert named("tested.ckpt") == 1024
    assert fit(3072, 2, resume=tmp_path / "1.ckpt") == 3072, "of the fit that resumes"


def test_a_second_interrupt_stops_at_once_without_saving(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    class Twice(Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores Ctrl+C after the first
    with pytest.raises(SystemExit):
        run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path, Twice())
    signal.signal(signal.SIGINT, handler)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def options(root: Path, **more: Any) -> dict[str, Any]:
    return {"default_root_dir": str(root), "callbacks": None, "logger": None, **more}


def touch(file: Path, seconds: int = 0, **content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = dict.fromkeys(("state_dict", "hyper_parameters", "backbone", "data", "progress"), {})
    content = {"pytorch-lightning_version": "2", **plain, **content}
    seal_checkpoint(content)
    torch.save(content, file)
    os.utime(file, (seconds, seconds))
    return file


@pytest.mark.parametrize("name", ["config.yaml", "events.out.tfevents.1.x", "checkpoints/b.ckpt", "a.ckpt"])
def test_last_does_not_start_anew_in_a_folder_that_holds_a_run(name: str, tmp_path: Path) -> None:
    assert find_checkpoint("last", options(tmp_path / "new"), is_fit=True) is None
    with pytest.raises(ValueError, match=r"--ckpt_path last: there is no checkpoint file .*last\.ckpt"):
        find_checkpoint("last", options(tmp_path / "new"), is_fit=False)
    touch(tmp_path / "notes.txt")
    assert find_checkpoint("last", options(tmp_path), is_fit=True) is None
    file = touch(tmp_path / name)
    assert run_files(options(tmp_path)) == [file]
    for wanted in ("last", "best", "nowhere.ckpt"):
        with pytest.raises(ValueError, match=f"--ckpt_path {wanted}: there is no checkpoint.*{file.name}"):
            find_checkpoint(wanted, options(tmp_path), is_fit=True)


def test_last_is_the_newest_and_what_slurm_requeues_resumes(tmp_path: Path) -> None:
    first = touch(tmp_path / "checkpoints" / "step=2.ckpt", 9)
    assert find_checkpoint("last", options(tmp_path), is_fit=True) == first
    last = touch(tmp_path / "checkpoints" / "last.ckpt", 1)
    for is_fit in (True, False):
        assert find_checkpoint("last", options(tmp_path), is_fit=is_fit) == last
    newer = touch(tmp_path / "checkpoints" / "last-v1.ckpt", 2)
    assert find_checkpoint("last", options(tmp_path), is_fit=True) == newer
    assert find_checkpoint(None, options(tmp_path), is_fit=True) is None
    touch(tmp_path / "hpc_ckpt_1.ckpt")
    assert find_checkpoint(None, options(tmp_path), is_fit=True) == newer
    assert find_checkpoint(None, options(tmp_path), is_fit=False) is None


def test_best_is_what_the_newest_checkpoint_says_of_the_monitored_value(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    callback = {"class_path": "x.ModelCheckpoint", "init_args": {"dirpath": str(folder)}}
    trainer = options(tmp_path, callbacks=[callback])
    for number, best in enumerate(("a.ckpt", "b.ckpt")):
        every = {"monitor": None, "best_model_path": "every.ckpt"}
        monitored = {"monitor": "x", "best_model_path": f"/old/{best}"}
        states = {"ModelCheckpoint{0}": every, "ModelCheckpoint{1}": monitored}
        touch(folder / best, number, callbacks=states)
    assert find_checkpoint("best", trainer, is_fit=False) == folder / "b.ckpt"
    (folder / "b.ckpt").rename(folder / "c.ckpt")
    with pytest.raises(ValueError, match=r"no checkpoint file .*b\.ckpt. The run has .*a\.ckpt, .*c\.ckpt"):
        find_checkpoint("best", trainer, is_fit=False)
    numbered = options(tmp_path, callbacks=[{"class_path": "x.ModelCheckpoint"}], logger={"class_path": "x"})
    with pytest.raises(ValueError, match="numbers its runs"):
        find_checkpoint("best", numbered, is_fit=False)
