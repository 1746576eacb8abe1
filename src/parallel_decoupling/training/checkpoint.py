"""What a training checkpoint holds beyond Lightning's own state, and the checks when it is loaded.

Trainables, estimator, progress counters and the gradients of an unfinished accumulation; in place of the
frozen backbone its fingerprint. Elsewhere on purpose: optimizers, schedules and loops (Lightning), which
tensors of the encoder train and what the fingerprint covers (``model.trained_state``, ``model.identity``). No
generator state: see ``training.randomness``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel_decoupling.distributed import average_gradients, shard_like, whole
from parallel_decoupling.model.identity import backbone_fingerprint, check_fingerprint
from parallel_decoupling.model.trained_state import load_trainable_state, trainable_state

if TYPE_CHECKING:
    from parallel_decoupling.training.module import PDFEmbedder

PROGRESS = (
    "batches_done",
    "batches_since_step",
    "accumulate_batches",
    "steps_done",
    "token_passes",
    "rows_by_subset",
)
_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))


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
    unfinished = module.batches_since_step > 0
    if unfinished:
        average_gradients(p for group in module.trainables().values() for p in group)
    checkpoint["state_dict"] = trained_state(module)
    checkpoint["backbone"] = fingerprint(module)
    checkpoint["data"] = module.trained_data or data_settings(module)  # since a fit, those of the fit
    checkpoint["progress"] = {name: getattr(module, name) for name in PROGRESS}
    checkpoint["accumulated_gradients"] = {
        name: whole(parameter.grad.detach()).to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if unfinished and parameter.grad is not None
    }


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
    if not {"backbone", "progress", "state_dict"} <= checkpoint.keys():
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
            f"The checkpoint does not fit this model; missing, left over or of another shape: {wrong}. "
            "Build the model with the num_paths, mi and learn_temperature it was trained with."
        )
    in_encoder = {k.removeprefix("encoder."): v for k, v in stored.items() if k.startswith("encoder.")}
    load_trainable_state(module.encoder, in_encoder)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in found:
            parameters[name].copy_(stored[name])
    progress = _with_accumulation(checkpoint["progress"], module.accumulate_batches)
    for name in PROGRESS:
        setattr(module, name, progress[name])
    module.pending_gradients = dict(checkpoint["accumulated_gradients"])
    module.trained_data = dict(checkpoint.get("data", {}))


def _with_accumulation(progress: Mapping[str, Any], accumulate_batches: int) -> Mapping[str, Any]:
    """Add what older checkpoints did not say: theirs is taken to be the accumulation of this run."""
    since_step = progress["batches_done"] % accumulate_batches
    return {"batches_since_step": since_step, "accumulate_batches": accumulate_batches, **progress}


def resume_accumulation(module: PDFEmbedder) -> None:
    """Give the parameters the gradients of an unfinished accumulation that a checkpoint held.

    Raises:
        ValueError: for another number of batches per main step than those gradients are scaled by.
    """
    stored, asked = module.accumulate_batches, module.optimizer_config.accumulate_batches
    if module.batches_since_step and stored != asked:
        raise ValueError(
            f"The checkpoint was saved {module.batches_since_step} batches into a main step of {stored}, so "
            f"optimizer.accumulate_batches={asked} cannot go on with it: set {stored}, or resume from a "
            "checkpoint saved at the end of a main step."
        )
    module.accumulate_batches = asked
    parameters = dict(module.named_parameters())
    for name, gradient in module.pending_gradients.items():
        parameters[name].grad = shard_like(gradient, parameters[name])
    module.pending_gradients = {}


def data_settings(module: PDFEmbedder) -> dict[str, Any]:
    """Arguments of the trainer's datamodule, as far as they are plain values; not those of predict.

    Without a trainer those behind the loaded weights.
    """
    if module.trainer_or_none is None:
        return dict(module.trained_data)
    datamodule = getattr(module.trainer_or_none, "datamodule", None)
    if datamodule is None:
        return {}
    names = inspect.signature(type(datamodule).__init__).parameters
    values = {name: getattr(datamodule, name) for name in names if hasattr(datamodule, name)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, _PLAIN) and not name.startswith("predict_")
    }
