"""What a checkpoint holds of the model: its trainable tensors, and a fingerprint of the rest.

The frozen backbone is not stored; its name, revision and hash are. Elsewhere: optimizers, schedules, random
states (``training``), reading and writing files (the trainer).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
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

    Frozen weights are hashed rounded to bfloat16 so that float32 and bfloat16 give the same; float16, which
    rounds otherwise, does not. Call it before the weights are sharded.

    Returns:
        ``name``, ``revision``, ``model_type``, ``num_frozen`` (parameters), ``sha256`` of config and frozen
        weights, ``weights_sha256``, ``config`` and ``transformers_version`` (None for an OpenCLIP model),
        plain types only.
    """
    config = json.dumps(_plain_config(backbone.config), sort_keys=True, default=str)
    both, weights = hashlib.sha256(config.encode()), hashlib.sha256()
    num_frozen = 0
    for name, parameter in sorted(backbone.base.named_parameters()):
        if parameter.requires_grad:
            continue
        num_frozen += parameter.numel()
        about = f"{name.replace('.base_layer', '')} {list(parameter.shape)}".encode()
        content = about + _sample(parameter.detach()).numpy().tobytes()
        both.update(content)
        weights.update(content)
    return {
        "name": backbone.name,
        "revision": backbone.revision,
        "model_type": str(backbone.config.model_type),
        "num_frozen": num_frozen,
        "sha256": both.hexdigest(),
        "weights_sha256": weights.hexdigest(),
        "config": json.loads(config),
        "transformers_version": backbone.config.to_dict().get("transformers_version"),
    }


def check_fingerprint(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that two results of ``backbone_fingerprint`` are of the same backbone.

    The config holds class defaults too, of which a release of transformers adds or removes some: between two
    versions a warning names the keys that only one side has.

    Args:
        stored: of a checkpoint; until ``weights_sha256`` was kept, it has one hash of config and weights.
        current: of the backbone that was loaded.

    Raises:
        ValueError: when frozen weights differ, or a value of the config that both have, or with the same
            version of transformers anything in it.
    """
    if stored.get("sha256") == current["sha256"]:
        return
    differ = f"the checkpoint was trained on backbone {_short(stored)}, but {_short(current)} was loaded: "
    if "weights_sha256" not in stored:
        _check_without_config(stored, current, differ)
        return
    if stored["weights_sha256"] != current["weights_sha256"]:
        raise ValueError(f"{differ}frozen weights differ; load the backbone it was trained on")
    then, now = stored["transformers_version"], current["transformers_version"]
    one_sided, changed = _config_differences(stored["config"], current["config"])
    if changed or then == now:
        found = "; ".join(changed + [f"only one has {key}" for key in one_sided])
        found = found or "in nothing but this hash, so the file was changed"
        raise ValueError(f"{differ}config differs: {found}; load the backbone it was trained on")
    if one_sided:
        warnings.warn(
            f"the checkpoint was written with transformers {then}, and {now} is installed: only one of them "
            f"has {', '.join(one_sided)} in the config of {current['name']!r}. All else is equal.",
            stacklevel=2,
        )


def _check_without_config(stored: Mapping[str, Any], current: Mapping[str, Any], differ: str) -> None:
    """Let a differing hash pass where it cannot be the weights': none are frozen, or of the same commit."""
    same = all(stored.get(each) == current[each] for each in ("name", "revision", "num_frozen"))
    commit = re.fullmatch("[0-9a-f]{40}", str(current["revision"]))
    if not (stored.get("num_frozen") == current["num_frozen"] == 0 or (same and commit)):
        raise ValueError(
            f"{differ}config or frozen weights differ, and an old checkpoint does not tell which. Load the "
            "backbone that it was trained on; if only transformers is another, load the checkpoint under the "
            "version it was written with and save it again (lightning export)"
        )
    warnings.warn(
        f"{differ}only the config differs. An old checkpoint does not tell in what, so it may be no more "
        "than a default that another transformers version added",
        stacklevel=3,
    )


def _config_differences(
    stored: Mapping[str, Any], current: Mapping[str, Any], path: str = ""
) -> tuple[list[str], list[str]]:
    """Keys that only one side has, and keys that both have, with their two values."""
    one_sided = [path + key for key in sorted(stored.keys() ^ current.keys())]
    changed = []
    for key in sorted(stored.keys() & current.keys()):
        then, now = stored[key], current[key]
        if isinstance(then, dict) and isinstance(now, dict):
            inside = _config_differences(then, now, f"{path}{key}.")
            one_sided += inside[0]
            changed += inside[1]
        elif then != now:
            changed.append(f"{path}{key} was {then!r} and is {now!r}")
    return one_sided, changed


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
