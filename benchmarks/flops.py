"""The floating-point operations of a training step, from shapes alone, and the time that they would take.

The hours in ``docs/reproduce.md`` are these; ``benchmarks.gpu`` and ``benchmarks.step`` set measured steps
beside them. A forward pass counts 2 per weight and token plus the attention; once more for GradCache, once
more for checkpointing; the backward pass of a mostly frozen model counts once for the weights and twice for
the attention.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from parallel_decoupling.model.path_lora import PathLoRA
from parallel_decoupling.plan import TEXT_TOKENS, Plan

PEAK_FLOPS, UTILISATION = 989e12, 0.4
"""An H100's dense bfloat16 operations per second, and the share that training is assumed to reach (ours)."""


def layer_flops(
    layers: nn.Module, width: int, tokens: float, context: float, *, forward: int, backward: int
) -> float:
    """Return the operations of passing tokens, each with ``context`` keys, through layers.

    ``width`` is layers times heads times head dim; ``backward`` is 0 without, 1 for the gradient of the
    inputs, and 2 also for that of the weights.
    """
    weights = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    adapters = [m for m in layers.modules() if isinstance(m, PathLoRA)]
    weights += sum((m.path_lora_A.numel() + m.path_lora_B.numel()) // m.num_paths for m in adapters)
    attention = 4 * width * context * (forward + (2 if backward else 0))
    return tokens * (2 * weights * (forward + backward) + attention)


def step_flops(plan: Plan) -> float:
    """Return the operations of one main step of all processes."""
    backbone, settings = plan.backbone, plan.model
    width = backbone.num_layers * plan.encoder.embed_dim
    once = {"forward": 1 + (settings["chunk_size"] is not None), "backward": 0}
    both = {"forward": once["forward"] + settings["gradient_checkpointing"]}
    both["backward"] = 2 if backbone.adapter.kind == "full" else 1
    total = 0.0
    for count, length in (
        (plan.images, TEXT_TOKENS + plan.image.tokens),
        (plan.rows - plan.images, TEXT_TOKENS),
    ):
        tokens, keys = plan.paths * count * length, length + plan.encoder.prefix_length
        total += layer_flops(backbone.layers, width, tokens, keys, **both)
    if plan.image.patches:
        tower, vision = backbone.vision_tower, backbone.config.vision_config
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        width = _value(vision, "depth", "num_hidden_layers") * _value(vision, "embed_dim", "hidden_size")
        patch, whole = (_side(getattr(vision, name, None)) for name in ("patch_size", "image_size"))
        context = plan.image.patches if whole is None else min(plan.image.patches, (whole // patch) ** 2)
        patches = plan.images * plan.image.patches
        total += layer_flops(tower, width, patches, context, **(both if trains else once))
    return total * plan.processes


def step_seconds(plan: Plan) -> float:
    """Return the seconds of one main step on as many H100s as there are processes."""
    return step_flops(plan) / (plan.processes * PEAK_FLOPS * UTILISATION)


def _value(config: Any, *names: str) -> int:
    return int(next(filter(None, (getattr(config, name, None) for name in names))))


def _side(size: Any) -> Any:
    return size[0] if isinstance(size, list | tuple) else size
