"""What a training checkpoint holds beyond Lightning's own state, and the checks when it is loaded.

Instead of the frozen backbone's weights it holds their fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from parallel_decoupling.model import run_checkpoint
from parallel_decoupling.model.identity import check_fingerprint, load_trainable_state, trainable_state
from parallel_decoupling.training.compute import Progress
from parallel_decoupling.training.settings import SHAPES_WEIGHTS

if TYPE_CHECKING:
    from parallel_decoupling.training.module import PDFEmbedder


def save_into(checkpoint: dict[str, Any], module: PDFEmbedder) -> None:
    """Replace Lightning's full ``state_dict`` and add what a resumed run needs."""
    checkpoint["state_dict"] = trainable_state(module)
    checkpoint["backbone"] = module.fingerprint
    checkpoint["data"] = module.trained_data or module.data_settings
    checkpoint["progress"] = asdict(module.progress)
    run_checkpoint.seal_checkpoint(checkpoint)


def load_into(module: PDFEmbedder, checkpoint: Mapping[str, Any]) -> None:
    """Check that the checkpoint belongs to this model, to the last key, and take it over."""
    fits = module._trainer is not None and module.trainer.state.fn == "fit"
    if fits and not checkpoint.get("optimizer_states"):
        advice = "resume from a checkpoint that the run itself wrote, such as last.ckpt"
        raise ValueError(f"The checkpoint holds weights alone, as compress writes it: {advice}.")
    run_checkpoint.check_checkpoint(checkpoint, "the checkpoint")
    check_fingerprint(checkpoint["backbone"], module.fingerprint)
    try:
        load_trainable_state(module, checkpoint["state_dict"])
    except ValueError as error:
        raise ValueError(f"{error}: {', '.join(SHAPES_WEIGHTS)}") from error
    module.progress = Progress(**checkpoint["progress"])
    module.trained_data = dict(checkpoint["data"])
