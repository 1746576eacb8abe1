"""Where a run has its checkpoints, and whether a folder holds one; ``trainer`` are the Trainer's options."""

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from parallel_decoupling.model.run_checkpoint import LAST_CHECKPOINT, read_checkpoint

FIT_CONFIG = "config.yaml"
SUFFIX = LAST_CHECKPOINT.suffix


def is_first_process() -> bool:
    """Tell, before the processes know each other, whether this is the one that writes."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return node == "0" and not cast(Any, rank_zero_only).rank


def as_list(value: Any) -> Iterable[Any]:
    """Return what may be one, several or none as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def checkpoint_dir(trainer: Mapping[str, Any]) -> Path | None:
    """Return the folder of this configuration's checkpoints; None if its own logger numbers runs."""
    for callback in as_list(trainer.get("callbacks")):
        if callback["class_path"].endswith(".ModelCheckpoint"):
            dirpath = (callback.get("init_args") or {}).get("dirpath")
            if dirpath or trainer.get("logger") not in (None, True, False):
                return dirpath and Path(dirpath)
    return Path(trainer["default_root_dir"]) / LAST_CHECKPOINT.parent


def run_files(trainer: Mapping[str, Any]) -> list[Path]:
    """Return the files by which a folder is seen to hold a run: checkpoints, configuration, event files."""
    root, folder = Path(trainer["default_root_dir"]), checkpoint_dir(trainer)
    checkpoints = (place.glob(f"*{SUFFIX}") for place in {root, folder or root})
    others = (root.glob(pattern) for pattern in (FIT_CONFIG, "events.out.tfevents.*"))
    return sorted(chain(*checkpoints)) + sorted(chain(*others))


def requeued_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return what Lightning's plugin for SLURM has saved for a job that it requeued."""
    return sorted(Path(run_dir).glob(f"hpc_ckpt_*{SUFFIX}"))


def find_checkpoint(wanted: str | None, trainer: Mapping[str, Any], *, is_fit: bool) -> Path | None:
    """Find the checkpoint that ``ckpt_path`` means: a file, or the ``last`` or ``best`` of the run.

    A fit with ``last`` in a folder without a run starts anew: None. One that SLURM has requeued resumes.
    """
    if not wanted and is_fit and requeued_checkpoints(trainer["default_root_dir"]):
        wanted = "last"
    if not wanted:
        return None
    file: Path | None = Path(wanted)
    if wanted in ("last", "best"):
        folder = checkpoint_dir(trainer)
        if folder is None:
            raise ValueError(f"--ckpt_path {wanted}: this logger numbers its runs, so give the file instead.")
        file = _last(folder) if wanted == "last" else _best(folder)
    if file is not None and file.is_file():
        return file
    there = run_files(trainer)
    if wanted == "last" and is_fit and not there:
        rank_zero_info(f"--ckpt_path last: {file} is not there yet, so this run starts anew.")
        return None
    what = f"checkpoint file {file}" if file else "checkpoint of a ModelCheckpoint that monitors a value"
    advice = "Give a file, or 'last' or 'best' together with the trainer.default_root_dir of the run."
    if checkpoints := ", ".join(str(each) for each in there if each.suffix == SUFFIX):
        advice = f"The run has {checkpoints}: give one of them."
    elif there:
        advice = f"The run ({there[0]}) has none: remove its folder to start anew."
    raise ValueError(f"--ckpt_path {wanted}: there is no {what}. {advice}")


def _last(folder: Path) -> Path:
    """Return ``last.ckpt``, or the newest of those that Lightning has numbered.

    A run that ended between its first checkpoint and ``last.ckpt``, as on a full disk, has only the former.
    """
    file = folder / LAST_CHECKPOINT.name
    files = [each for each in (file, *folder.glob(f"{file.stem}-v*{SUFFIX}")) if each.is_file()]
    return max(files or folder.glob(f"step=*{SUFFIX}"), key=os.path.getmtime, default=file)


def _best(folder: Path) -> Path | None:
    """Return the best checkpoint of the ModelCheckpoint that monitors a value, as the newest one knows it."""
    newest = max(folder.glob(f"*{SUFFIX}"), key=os.path.getmtime, default=None)
    states = {} if newest is None else read_checkpoint(newest).get("callbacks", {})
    for name, state in states.items():
        if name.startswith("ModelCheckpoint") and state["monitor"] is not None and state["best_model_path"]:
            return folder / Path(state["best_model_path"]).name  # the run may have been moved
    return None
