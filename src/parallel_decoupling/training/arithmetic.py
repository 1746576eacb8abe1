"""What a training step needs, by arithmetic: image tokens, bytes on one GPU, multiply-adds.

Every number is a floor: what the algorithm must keep or compute, without padding, allocator and kernels'
workspace. Shapes only: a backbone on the meta device is enough. Here: formulas. Elsewhere on purpose: which
run is meant, and the tables (``training.plan``); ``benchmarks/plan.py`` compares with measured steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.objective.mutual_information import MutualInformation
from parallel_decoupling.training.embedder import frozen
from parallel_decoupling.training.strategies import sharded_blocks
from parallel_decoupling.training.terms import (
    contrastive_terms,
    estimator_nll,
    gather_pairs,
    mutual_information_terms,
)

FP32 = 4
"""Bytes."""


@dataclass(frozen=True)
class Stack:
    """A pile of equal transformer layers, in numbers.

    Attributes:
        layers: how many.
        hidden: width of the residual stream.
        attention: query heads times head dim.
        key_value: key/value heads times head dim.
        intermediate: width inside the MLP.
        gated: whether the MLP has a gate (SwiGLU) beside its input projection.
        matrix_weights: weights of all layers that a token is multiplied with, adapters among them.
    """

    layers: int
    hidden: int
    attention: int
    key_value: int
    intermediate: int
    gated: bool
    matrix_weights: int

    def forward_flops(self, tokens: float, context: float) -> float:
        """Floating-point operations of a forward pass: two per weight and token, and the attention's.

        ``tokens * (2 * matrix_weights + 4 * layers * attention * context)``, where every token meets
        ``context`` keys (its row's, prefix included: a mask does not spare work).
        """
        return tokens * (2 * self.matrix_weights + 4 * self.layers * self.attention * context)


def language_stack(backbone: Backbone) -> Stack:
    """The decoder layers."""
    text = backbone.config.get_text_config()
    return Stack(
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        attention=text.num_attention_heads * backbone.head_dim,
        key_value=backbone.num_key_value_heads * backbone.head_dim,
        intermediate=text.intermediate_size,
        gated=True,
        matrix_weights=_matrix_weights(backbone.base.get_submodule(backbone.family.layers)),
    )


def vision_stack(backbone: Backbone) -> Stack:
    """The vision tower; its patch embedding and merger are counted with its weights."""
    vision = backbone.config.vision_config
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    ratio = getattr(vision, "mlp_ratio", None)
    return Stack(
        layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
        hidden=hidden,
        attention=hidden,
        key_value=hidden,
        intermediate=int(hidden * ratio) if ratio else vision.intermediate_size,
        gated=False,
        matrix_weights=_matrix_weights(backbone.base.get_submodule(backbone.family.vision_module)),
    )


def _matrix_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


@dataclass(frozen=True)
class ImageCost:
    """One image: ``tokens`` in the language model, ``patches`` in the vision tower, in rows of ``context``."""

    tokens: int
    patches: int
    context: int


def image_cost(config: Any, height: int, width: int) -> ImageCost:
    """Tokens and patches of an image that the processor is given at ``height`` x ``width`` pixels.

    With a merger (the Qwen-VL families) sides are rounded to multiples of ``patch_size * merge_size``, one
    token each. With any-resolution tiles (LLaVA-1.6): the whole image at the tower's size, and the best
    fitting grid of tiles of that size, without the rows and columns that only pad, a newline after each row.

    Args:
        config: of the backbone.
        height: in pixels, after the data's image policy.
        width: in pixels, after the data's image policy.

    Raises:
        ValueError: for a family whose rule is not known here.

    Relations:
        Equals what the processor of the family makes of such an image.
    """
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge:
        factor = vision.patch_size * merge
        tokens = max(1, round(height / factor)) * max(1, round(width / factor))
        return ImageCost(tokens, tokens * merge**2, tokens * merge**2)
    grids = getattr(config, "image_grid_pinpoints", None)
    if not grids:
        raise ValueError(f"how many tokens an image of {config.model_type} has is not known to the plan.")
    side = vision.image_size // vision.patch_size
    tile = side**2
    best_height, best_width = _best_grid(height, width, grids)
    rows, columns = best_height // vision.image_size * side, best_width // vision.image_size * side
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    tiles = 1 + best_height * best_width // vision.image_size**2
    return ImageCost(tile + rows * columns + rows, tiles * (tile + 1), tile + 1)


def _best_grid(height: int, width: int, grids: Iterable[Sequence[int]]) -> tuple[int, int]:
    """The grid in which most of the image's pixels survive, and among those the smallest."""

    def quality(grid: Sequence[int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    best = max(grids, key=quality)
    return best[0], best[1]


def layer_bytes(stack: Stack, backbone: Backbone, *, element: int, context: float, keys_per_token: float) -> float:
    """Bytes per token that the backward pass of one layer needs.

    In order: both norms keep their input in fp32 (and those of query and key heads, where a family has them);
    attention keeps query and output, key and value repeated to all query heads, and its mask; the MLP keeps
    what its activation function and its product meet. LoRA and DoRA keep the input of every adapted layer
    (a copy each unless the weights are fp32 already), its low-rank image, and one byte per input for dropout.
    ``full`` keeps the inputs of all layers, shared, and the normalised states.

    Args:
        stack: the language model's.
        backbone: what is adapted, and how.
        element: bytes per value of the matrix products: 2 under bfloat16, 4 otherwise.
        context: keys that a token meets; the mask's columns.
        keys_per_token: keys and values per token, ``(P + L) / L``.
    """
    width = stack.attention
    norms = 2 * stack.hidden
    if any(name.endswith("q_norm.weight") for name, _ in sharded_blocks(backbone)[0].named_parameters()):
        norms += width + stack.key_value
    kept = FP32 * norms + element * (2 * width + 2 * width * keys_per_token + context)
    kept += element * (3 if stack.gated else 2) * stack.intermediate
    if backbone.adapter.kind == "full":
        kept += element * (4 * stack.hidden + stack.intermediate)
    if backbone.adapter.kind in ("lora", "dora"):
        kept += _adapter_bytes(backbone, stack, element)
    return kept


def _adapter_bytes(backbone: Backbone, stack: Stack, element: int) -> float:
    adapter, layer = backbone.adapter, sharded_blocks(backbone)[0]
    inputs = {
        name.rsplit(".", 2)[0].rsplit(".", 1)[-1]: parameter.shape[1]
        for name, parameter in layer.named_parameters()
        if "lora_A" in name
    }
    del stack
    copied = backbone.dtype != torch.float32 or element < FP32
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    kept = inputs if copied else {shared.get(name, name): size for name, size in inputs.items() if name != "o_proj"}
    dropout = sum(inputs.values()) if adapter.dropout else 0
    return element * (sum(kept.values()) + adapter.rank * len(inputs)) + dropout
