"""What a training checkpoint holds beyond Lightning's own state, and the checks when it is loaded.

Trainables, estimator and progress; the fingerprint of the frozen backbone instead of its weights. Optimizers,
schedules and loops are Lightning's. No generator state is kept: see ``training.randomness``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel_decoupling.model.identity import (
    backbone_fingerprint,
    check_fingerprint,
    load_trainable_state,
    trainable_state,
)
from parallel_decoupling.training.compute import Progress
from parallel_decoupling.training.settings import SETTINGS

if TYPE_CHECKING:
    from parallel_decoupling.training.module import PDFEmbedder

_SHAPING = [name for name, setting in SETTINGS.items() if setting.shapes_weights]


def trained_state(module: PDFEmbedder) -> dict[str, Tensor]:
    """CPU copies of all that trains, by name inside ``module``."""
    state = {f"encoder.{name}": value for name, value in trainable_state(module.encoder).items()}
    for name, value in module.mutual_information.state_dict().items():
        state[f"mutual_information.{name}"] = value.detach().to("cpu", copy=True)
    if module.log_temperature is not None:
        state["log_temperature"] = module.log_temperature.detach().to("cpu", copy=True)
    return state


def save_into(checkpoint: dict[str, Any], module: PDFEmbedder) -> None:
    """Replace Lightning's full ``state_dict`` and add what a resumed run needs."""
    checkpoint["state_dict"] = trained_state(module)
    checkpoint["backbone"] = fingerprint(module)
    checkpoint["data"] = module.trained_data or module.data_settings
    checkpoint["progress"] = asdict(module.progress)


def fingerprint(module: PDFEmbedder) -> dict[str, Any]:
    """What identifies the frozen weights, taken once: before they are sharded."""
    if module.fingerprint is None:
        module.fingerprint = backbone_fingerprint(module.encoder.backbone)
    return module.fingerprint


def load_into(module: PDFEmbedder, checkpoint: Mapping[str, Any]) -> None:
    """Check that the checkpoint belongs to this model, to the last key, and take it over.

    Raises:
        ValueError: another backbone, or parameters that are missing, left over or of another shape.
    """
    if not {"backbone", "data", "progress", "state_dict"} <= checkpoint.keys():
        raise ValueError("This is not a checkpoint of PDFEmbedder: it has no backbone fingerprint.")
    check_fingerprint(checkpoint["backbone"], fingerprint(module))
    stored: Mapping[str, Tensor] = checkpoint["state_dict"]
    wanted = {
        name: value.shape for name, value in trained_state(module).items() if not name.startswith("encoder.")
    }
    found = {name: value.shape for name, value in stored.items() if not name.startswith("encoder.")}
    wrong = sorted({name for name, _ in wanted.items() ^ found.items()})
    if wrong:
        raise ValueError(
            f"The checkpoint does not fit this model; missing, left over or of another shape: {wrong}. Build "
            f"the model with the values it was trained with of {', '.join(_SHAPING)}."
        )
    in_encoder = {k.removeprefix("encoder."): v for k, v in stored.items() if k.startswith("encoder.")}
    load_trainable_state(module.encoder, in_encoder)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in found:
            parameters[name].copy_(stored[name])
    module.progress = Progress(**checkpoint["progress"])
    module.trained_data = dict(checkpoint["data"])
