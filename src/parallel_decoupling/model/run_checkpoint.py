"""Where the checkpoint of a run is, and reading it without unpickling."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from parallel_decoupling.model.identity import SEAL, check_seal, sealed

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
SETTINGS_HASH = "settings_sha256"
SEALED_KEYS = ("backbone", "data", "progress", SETTINGS_HASH)
RUN_KEYS = ("state_dict", "pytorch-lightning_version", "hyper_parameters", *SEALED_KEYS)


def checkpoint_file(path: str | Path) -> Path:
    """Return the checkpoint that a user means by a file or the folder of a run; a ValueError if none."""
    for file in (Path(path), Path(path) / LAST_CHECKPOINT):
        if file.is_file():
            return file
    known = f"a run folder with {LAST_CHECKPOINT}, or a folder that save_pretrained or lightning export wrote"
    raise ValueError(f"no model at {str(path)!r}: name a checkpoint, {known}")


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Read the checkpoint of a run; none of it is mapped, as a disk that fails would end the process."""
    try:
        with ZipFile(file) as archive:
            if archive.testzip():  # the hash below is of weights, not of an optimizer's states
                raise BadZipFile
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a checkpoint, or is damaged") from error
    missing = [key for key in RUN_KEYS if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise ValueError(f"{file} is not a checkpoint of a run, it lacks {', '.join(missing)}")
    settings = content["hyper_parameters"]
    check_seal({**settings, SEAL: content[SETTINGS_HASH]} if isinstance(settings, Mapping) else {}, file)
    check_checkpoint(content, file)
    return dict(content)


def run_info(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of the run that wrote it: settings, data, mixture, steps and compute."""
    settings, progress = checkpoint["hyper_parameters"], checkpoint["progress"]
    return {
        "model": settings,
        "data": checkpoint["data"],
        "seed": settings["seed"],
        "global_step": progress["steps_done"],
        "token_passes": progress["token_passes"],
        "rows_by_subset": progress["rows_by_subset"],
    }


def seal_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Add the hashes by which a damaged or changed checkpoint is known."""
    checkpoint[SETTINGS_HASH] = sealed(checkpoint["hyper_parameters"])[SEAL]
    checkpoint |= sealed({key: checkpoint[key] for key in SEALED_KEYS}, checkpoint["state_dict"])


def check_checkpoint(checkpoint: Mapping[str, Any], where: str | Path) -> None:
    """Check all but the settings, of which a caller may have replaced some; else a ``ValueError``."""
    content = {key: checkpoint.get(key) for key in (*SEALED_KEYS, SEAL)}
    check_seal(content, where, checkpoint["state_dict"])
