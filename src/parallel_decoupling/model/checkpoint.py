"""What a checkpoint holds of the model: its trainable tensors, and a fingerprint of the rest.

The frozen backbone is not stored; its name, revision and hash are. Elsewhere: optimizers, schedules, random
states (``training``), reading and writing files (the trainer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decoupling.distributed import shard_like, whole
from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.model.dual_backbone import DualBackbone

SAMPLED_VALUES = 2**18
"""Larger tensors are hashed at this many evenly spaced values, so that billions take seconds."""
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")
"""Config entries that say how or from where a model was loaded, not what it is."""


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
            f"the checkpoint does not fit this model: missing {missing}, unexpected {unexpected}, "
            f"wrong shape {reshaped}; build the model with the settings it was trained with"
        )
    for name, parameter in wanted.items():
        parameter.copy_(shard_like(state[name], parameter))


def backbone_fingerprint(backbone: Backbone | DualBackbone) -> dict[str, Any]:
    """Identify the frozen part of a backbone.

    The hash covers the config and the frozen weights, rounded to bfloat16 so that float32 and bfloat16 give
    the same; float16, which rounds otherwise, does not. Call it before the weights are sharded.

    Returns:
        ``name``, ``revision``, ``model_type``, ``num_frozen`` (parameters) and ``sha256``, plain types only.
    """
    digest = hashlib.sha256(json.dumps(_plain_config(backbone.config), sort_keys=True, default=str).encode())
    num_frozen = 0
    for name, parameter in sorted(backbone.base.named_parameters()):
        if parameter.requires_grad:
            continue
        num_frozen += parameter.numel()
        digest.update(f"{name.replace('.base_layer', '')} {list(parameter.shape)}".encode())
        digest.update(_sample(parameter.detach()).numpy().tobytes())
    return {
        "name": backbone.name,
        "revision": backbone.revision,
        "model_type": str(backbone.config.model_type),
        "num_frozen": num_frozen,
        "sha256": digest.hexdigest(),
    }


def check_fingerprint(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise a ValueError when two results of ``backbone_fingerprint`` are of different backbones."""
    if stored.get("sha256") != current["sha256"]:
        raise ValueError(
            f"the checkpoint was trained on backbone {_short(stored)}, but {_short(current)} was loaded: "
            "config or frozen weights differ"
        )


def _short(fingerprint: Mapping[str, Any]) -> str:
    sha256 = str(fingerprint.get("sha256"))[:12]
    return f"{fingerprint.get('name')!r} (revision {fingerprint.get('revision')}, sha256 {sha256})"


def _plain_config(config: Any) -> dict[str, Any]:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in VOLATILE_CONFIG}
        return value

    stripped: dict[str, Any] = strip(config.to_dict())
    return stripped


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    stride = max(1, -(-flat.numel() // SAMPLED_VALUES))
    return flat[::stride].to(torch.bfloat16).contiguous().cpu().view(torch.int16)
