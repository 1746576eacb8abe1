"""The work of a training step, by arithmetic: image tokens, token passes and floating-point operations.

Every number is a floor: what the algorithm must compute, without padding. Shapes only: a backbone on the meta
device is enough. Here: formulas. Elsewhere on purpose: bytes (``training.memory``), which run is meant
(``training.plan``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.model.prefixes import prefix_range
from parallel_decoupling.training.grad_cache import LENGTH_GROUPS


@dataclass(frozen=True)
class Stack:
    """A pile of equal transformer layers, in numbers.

    Attributes:
        layers: how many.
        hidden: width of the residual stream.
        attention: query heads times head dim.
        key_value: key/value heads times head dim.
        intermediate: width inside the MLP.
        matrix_weights: weights of all layers that a token is multiplied with, adapters among them.
    """

    layers: int
    hidden: int
    attention: int
    key_value: int
    intermediate: int
    matrix_weights: int

    def flops(self, tokens: float, context: float, *, forward: int, backward: int) -> float:
        """Floating-point operations of passing ``tokens`` through all layers, forth and back.

        Per token ``2 * matrix_weights`` for each pass, forth or back, and for each forward pass
        ``4 * layers * attention * context``, twice that for the way back. A token meets ``context`` keys, its
        row's and the prefix: a mask does not spare work.

        Args:
            tokens: of all rows.
            context: keys per token.
            forward: how many forward passes, recomputed ones among them.
            backward: 0 without, 1 for the gradient of the inputs, 2 also for that of the weights.
        """
        weights = 2 * self.matrix_weights * (forward + backward)
        attention = 4 * self.layers * self.attention * context * (forward + (2 if backward else 0))
        return tokens * (weights + attention)


def language_stack(backbone: Backbone) -> Stack:
    """The decoder layers."""
    text = backbone.config.get_text_config()
    return Stack(
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        attention=text.num_attention_heads * backbone.head_dim,
        key_value=backbone.num_key_value_heads * backbone.head_dim,
        intermediate=text.intermediate_size,
        matrix_weights=_matrix_weights(backbone.base.get_submodule(backbone.family.layers)),
    )


def vision_stack(backbone: Backbone) -> Stack:
    """The blocks of the vision tower, without its patch embedding and what joins its patches to tokens."""
    vision = backbone.config.vision_config
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    ratio = getattr(vision, "mlp_ratio", None)
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    tower = backbone.base.get_submodule(backbone.family.vision_module)
    blocks = next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    return Stack(
        layers=layers,
        hidden=hidden,
        attention=hidden,
        key_value=hidden,
        intermediate=int(hidden * ratio) if ratio else vision.intermediate_size,
        matrix_weights=_matrix_weights(blocks),
    )


def _matrix_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


@dataclass(frozen=True)
class ImageCost:
    """One image: ``tokens`` of the language model, ``patches`` of the vision tower in rows of ``context``."""

    tokens: int
    patches: int
    context: int


def image_factor(config: Any) -> int:
    """Pixels of a token's side where patches are merged, 1 where the processor makes tiles instead.

    Raises:
        ValueError: for a config without a vision tower of that name.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError(f"the vision tower of {config.model_type} is not known to the plan.")
    merge = getattr(vision, "spatial_merge_size", None)
    return int(vision.patch_size * merge) if merge else 1


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
    factor = image_factor(config)
    if factor > 1:
        tokens = max(1, round(height / factor)) * max(1, round(width / factor))
        patches = tokens * vision.spatial_merge_size**2
        return ImageCost(tokens, patches, patches)
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


def vision_trains(backbone: Backbone) -> bool:
    """Whether any weight of the vision tower trains."""
    return any(
        p.requires_grad for p in backbone.base.get_submodule(backbone.family.vision_module).parameters()
    )


def paths_per_layer(settings: Mapping[str, Any], num_layers: int) -> float:
    """Rows per input in the average layer: layers below the first prefix see an input once."""
    shared = prefix_range(settings["prefix_layers"], num_layers).start / num_layers
    return shared + float(settings["num_paths"]) * (1 - shared)


def forward_passes(settings: Mapping[str, Any], queries: int, candidates: int) -> int:
    """Calls of the encoder for one batch of one process, without GradCache's second ones."""
    sides = ((settings["query_chunk_size"], queries), (settings["candidate_chunk_size"], candidates))
    return sum(passes_of_side(chunk_size, rows) for chunk_size, rows in sides)


def passes_of_side(chunk_size: int | None, rows: int) -> int:
    """Calls of the encoder for the queries or the candidates of one process."""
    return math.ceil(rows / (chunk_size or math.ceil(rows / LENGTH_GROUPS)))


def prompt_tokens(settings: Mapping[str, Any], num_passes: int) -> int:
    """Tokens of shallow prefixes: each forward pass runs every path's prompt once, whatever its rows."""
    if settings["prefix_type"] == "deep":
        return 0
    return int(settings["num_paths"] * settings["prefix_length"] * num_passes)


def token_passes(
    settings: Mapping[str, Any], num_layers: int, *, tokens: float, forward_passes: int
) -> float:
    """Tokens times paths through all layers of the language model: the unit of compute of a run.

    Shared lower layers count once for all paths; a deep prefix costs none; a repeated pass (GradCache,
    checkpointing) does not count.

    Args:
        settings: arguments of ``PDFEmbedder``.
        num_layers: of the language model.
        tokens: of the inputs, without padding.
        forward_passes: calls of the encoder.
    """
    return tokens * paths_per_layer(settings, num_layers) + prompt_tokens(settings, forward_passes)


def step_flops(
    backbone: Backbone,
    *,
    rows: int,
    images: float,
    text_tokens: int,
    image: ImageCost,
    paths: float,
    prefix_length: int,
    replayed: bool,
    checkpointing: bool,
    prompts: int = 0,
) -> float:
    """Floating-point operations of encoding rows and back, over all processes.

    A forward pass counts once for itself, once more under GradCache and once more under checkpointing.
    Weights that do not train have no gradient of their own, and adapters' are little. A vision tower without
    trainable weights has no backward pass and is not recomputed.

    Args:
        backbone: what trains.
        rows: queries, candidates or both.
        images: how many of the rows have one.
        text_tokens: of every row.
        image: cost of one image.
        paths: rows of the language model per input, mean over layers.
        prefix_length: P.
        replayed: whether these rows are chunked (GradCache).
        checkpointing: whether layers are recomputed.
        prompts: tokens of shallow prefixes, in all forward passes; never recomputed by checkpointing.
    """
    language, vision = language_stack(backbone), vision_stack(backbone)
    backward, long = 2 if backbone.adapter.kind == "full" else 1, text_tokens + image.tokens
    passes: dict[str, int] = {"forward": 1 + replayed + checkpointing, "backward": backward}
    total = paths * images * language.flops(long, long + prefix_length, **passes)
    short = language.flops(text_tokens, text_tokens + prefix_length, **passes)
    total += paths * (rows - images) * short
    total += language.flops(prompts, prefix_length, forward=1 + replayed, backward=backward)
    if not vision_trains(backbone):
        passes = {"forward": 1 + replayed, "backward": 0}
    return total + images * vision.flops(image.patches, image.context, **passes)
