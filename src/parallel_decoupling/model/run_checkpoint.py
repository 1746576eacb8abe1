"""Where the checkpoint of a run is, and reading it without unpickling."""

import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from parallel_decoupling.files import reading
from parallel_decoupling.model.identity import SEAL, check_seal, sealed

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
SETTINGS_HASH = "settings_sha256"
SEALED_KEYS = ("backbone", "data", "progress", SETTINGS_HASH)


class Checkpoint(BaseModel, strict=True, arbitrary_types_allowed=True):
    """The types of what a checkpoint of a run holds beside Lightning's own state."""

    state_dict: dict[str, Tensor]
    hyper_parameters: dict[str, Any]
    backbone: dict[str, Any]
    data: dict[str, Any]
    progress: dict[str, Any]
    settings_sha256: str
    content_sha256: str
    lightning: str = Field(alias="pytorch-lightning_version")


def checkpoint_file(path: str | Path) -> Path:
    """Return the checkpoint that a user means by a file or the folder of a run; a ValueError if none."""
    for file in (Path(path), Path(path) / LAST_CHECKPOINT):
        if file.is_file():
            return file
    known = f"a run folder with {LAST_CHECKPOINT}, or a folder that save_pretrained or lightning export wrote"
    raise ValueError(f"no model at {str(path)!r}: name a checkpoint, {known}")


def run_dir_of(path: str | Path) -> Path:
    """Return the folder of the run that a checkpoint is in; a folder is that itself."""
    folder = Path(path) if Path(path).is_dir() else Path(path).resolve().parent
    return folder.parent if folder.name == LAST_CHECKPOINT.parent.name else folder


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Read the checkpoint of a run; none of it is mapped, as a disk that fails would end the process."""
    try:
        with reading(file), ZipFile(file) as archive:
            if archive.testzip():  # the hash below is of weights, not of an optimizer's states
                raise BadZipFile
        with reading(file):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a checkpoint, or is damaged") from error
    check_checkpoint(content, file)
    check_seal({**content["hyper_parameters"], SEAL: content[SETTINGS_HASH]}, file)
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


def check_schema(schema: type[BaseModel], content: Any, problem: str) -> None:
    """Raise a ``ValueError`` that names the keys of a file's content that are not as declared."""
    try:
        schema.model_validate(content)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"{problem}; {', '.join(wrong[:9])}") from error


def seal_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Add the hashes by which a damaged or changed checkpoint is known."""
    checkpoint[SETTINGS_HASH] = sealed(checkpoint["hyper_parameters"])[SEAL]
    checkpoint |= sealed({key: checkpoint[key] for key in SEALED_KEYS}, checkpoint["state_dict"])


def check_checkpoint(checkpoint: Mapping[str, Any], where: str | Path) -> None:
    """Check all but the settings, of which a caller may have replaced some; else a ``ValueError``."""
    check_schema(Checkpoint, checkpoint, f"{where} is not a checkpoint of a run")
    content = {key: checkpoint[key] for key in (*SEALED_KEYS, SEAL)}
    check_seal(content, where, checkpoint["state_dict"])
