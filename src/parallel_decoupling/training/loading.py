"""From a file or folder that a user names to an ``Embedder``."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import SCORES_FILE, ScoreReport, progress
from parallel_decoupling.model.pretrained import is_pretrained
from parallel_decoupling.training.module import PDFEmbedder

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
CHECKPOINT_KEYS = ("state_dict", "pytorch-lightning_version", "hyper_parameters", "data", "progress")
"""What a checkpoint of a run has at least."""


def load_embedder(model_path: str | Path) -> Embedder:
    """Load a trained model for encoding, on the CPU.

    Args:
        model_path: a Lightning checkpoint (``runs/demo/checkpoints/last.ckpt``), the folder of a run (its
            last checkpoint), or a folder that ``save_pretrained`` or ``lightning export`` wrote.

    Returns:
        In evaluation mode, with what is known of the run that trained it.

    Raises:
        ValueError: there is nothing of that kind; what ``from_pretrained`` and ``read_checkpoint`` refuse.
    """
    path = Path(model_path)
    if is_pretrained(path):
        return Embedder.from_pretrained(path)
    file = checkpoint_file(path)
    read_checkpoint(file)
    module = PDFEmbedder.load_from_checkpoint(file, map_location="cpu")
    module.eval()
    embedder = module.embedder
    embedder.run = run_of(file)
    return embedder


def default_device() -> str:
    """Where commands encode: the first GPU, if there is one. Not tried on a GPU yet."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checkpoint_file(path: Path) -> Path:
    """The checkpoint that a user means with a file or the folder of a run.

    Raises:
        ValueError: there is none.
    """
    if path.is_file():
        return path
    if (path / LAST_CHECKPOINT).is_file():
        return path / LAST_CHECKPOINT
    raise ValueError(
        f"no checkpoint {str(path)!r}; name a file such as runs/demo/checkpoints/last.ckpt, a run folder "
        f"with {LAST_CHECKPOINT}, or a folder that lightning export wrote"
    )


def read_checkpoint(file: Path) -> Mapping[str, Any]:
    """Read the checkpoint of a run; weights stay in the file.

    Raises:
        ValueError: the file is something else, or damaged.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: this file is no checkpoint, or a damaged one") from error
    missing = [key for key in CHECKPOINT_KEYS if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise ValueError(
            f"{file}: this file is no checkpoint of a run, it has no {', '.join(missing)}; give its last.ckpt"
        )
    return dict(content)


def run_of(file: Path) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it: settings, data, mixture, steps and compute."""
    checkpoint = read_checkpoint(file)
    progress = checkpoint["progress"]
    return {
        "model": checkpoint["hyper_parameters"],
        "data": checkpoint["data"],
        "seed": checkpoint["hyper_parameters"]["seed"],
        "global_step": progress["steps_done"],
        "token_passes": progress["token_passes"],
        "rows_by_subset": progress["rows_by_subset"],
    }


def scores_of(file: Path) -> ScoreReport | None:
    """Scores that a run folder holds for exactly the weights of a checkpoint; None without."""
    run_dir = file.parent.parent if file.parent.name == LAST_CHECKPOINT.parent.name else file.parent
    if not (run_dir / SCORES_FILE).is_file():
        return None
    report = ScoreReport.from_json_file(run_dir / SCORES_FILE)
    return report if progress(report.run) == progress(run_of(file)) else None
