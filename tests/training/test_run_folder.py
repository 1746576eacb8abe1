"""Which folder holds a run, and what ``last`` and ``best`` mean in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling.model.run_checkpoint import RUN_KEYS
from parallel_decoupling.training.run_folder import find_checkpoint, run_files


def options(root: Path, **more: Any) -> dict[str, Any]:
    return {"default_root_dir": str(root), "callbacks": None, "logger": None, **more}


def touch(file: Path, seconds: int = 0, **content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**dict.fromkeys(RUN_KEYS, 0), **content}, file)
    os.utime(file, (seconds, seconds))
    return file


@pytest.mark.parametrize("name", ["config.yaml", "events.out.tfevents.1.x", "checkpoints/b.ckpt", "a.ckpt"])
def test_last_does_not_start_anew_in_a_folder_that_holds_a_run(name: str, tmp_path: Path) -> None:
    assert find_checkpoint("last", options(tmp_path / "new"), is_fit=True) is None
    touch(tmp_path / "notes.txt")
    assert find_checkpoint("last", options(tmp_path), is_fit=True) is None
    file = touch(tmp_path / name)
    assert run_files(options(tmp_path)) == [file]
    for wanted in ("last", "best", "nowhere.ckpt"):
        with pytest.raises(ValueError, match=f"--ckpt_path {wanted}: there is no checkpoint.*{file.name}"):
            find_checkpoint(wanted, options(tmp_path), is_fit=True)


def test_last_is_the_newest_and_what_slurm_requeues_resumes(tmp_path: Path) -> None:
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
