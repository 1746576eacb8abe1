"""The trainable tensors of an encoder: what checkpoints and exported folders hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel_decoupling.distributed import shard_like, whole

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
"""Where a run keeps its newest checkpoint."""
PER_PATH = ("prefixes.", "path_logits")
"""Starts of the names of parameters whose first dimension is the path."""


def trainable_state(encoder: nn.Module) -> dict[str, Tensor]:
    """Return CPU copies of exactly the trainable tensors, by parameter name."""
    return {
        name: whole(parameter.detach()).to("cpu", copy=True)
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trainable_state(encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state from ``trainable_state`` into ``encoder``.

    Args:
        encoder: built with the same settings as the one that was saved.
        state: parameter name to tensor.

    Raises:
        ValueError: when names or shapes differ; nothing is changed then.

    Relations:
        Embeddings after loading equal those before saving bit for bit.
    """
    wanted = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    reshaped = [
        f"{name} {list(state[name].shape)} instead of {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in state and state[name].shape != parameter.shape
    ]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"the stored weights do not fit this model: missing {missing}, unexpected {unexpected}, "
            f"wrong shape {reshaped}; build the model with the settings it was trained with"
        )
    for name, parameter in wanted.items():
        parameter.copy_(shard_like(state[name], parameter))
