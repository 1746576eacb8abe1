"""What a training checkpoint holds beyond Lightning's own state, and the checks when it is loaded.

Instead of the frozen backbone's weights it holds their fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel_decoupling.model import run_checkpoint
from parallel_decoupling.model.identity import check_fingerprint, load_trainable_state, trainable_state
from parallel_decoupling.training.compute import Progress
from parallel_decoupling.training.settings import SHAPES_WEIGHTS

if TYPE_CHECKING:
    from parallel_decoupling.training.module import PDFEmbedder


def trained_state(module: PDFEmbedder) -> dict[str, Tensor]:
    """Return CPU copies of all that trains, by name inside ``module``."""
    own = module.mutual_information.state_dict(prefix="mutual_information.")
    if module.log_temperature is not None:
        own["log_temperature"] = module.log_temperature
    state = {f"encoder.{name}": value for name, value in trainable_state(module.encoder).items()}
    return state | {name: value.detach().to("cpu", copy=True) for name, value in own.items()}


def save_into(checkpoint: dict[str, Any], module: PDFEmbedder) -> None:
    """Replace Lightning's full ``state_dict`` and add what a resumed run needs."""
    checkpoint["state_dict"] = trained_state(module)
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
    stored: Mapping[str, Tensor] = checkpoint["state_dict"]
    wanted, found = (
        {name: value.shape for name, value in state.items() if not name.startswith("encoder.")}
        for state in (trained_state(module), stored)
    )
    if wrong := sorted({name for name, _ in wanted.items() ^ found.items()}):
        problem = f"The checkpoint does not fit this model; missing, left over or of another shape: {wrong}"
        advice = f"Build the model with the values it was trained with of {', '.join(SHAPES_WEIGHTS)}"
        raise ValueError(f"{problem}. {advice}.")
    in_encoder = {k.removeprefix("encoder."): v for k, v in stored.items() if k.startswith("encoder.")}
    load_trainable_state(module.encoder, in_encoder)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in found:
            parameters[name].copy_(stored[name])
    module.progress = Progress(**checkpoint["progress"])
    module.trained_data = dict(checkpoint["data"])
