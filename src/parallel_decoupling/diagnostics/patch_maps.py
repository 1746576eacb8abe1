"""Maps over the patches of a picture: where a path looks, and what its embedding depends on.

Shapes: ``B`` inputs, ``N`` paths, ``Y`` layers, ``R = N * B`` rows (path-major), ``L`` tokens, ``P`` prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.attention import register_prefix_attention
from parallel_decoupling.model.encoder import ParallelEncoder, last_token

GROUPS = ("prefix", "image", "text")
"""What the keys of a path are; the pooled token itself counts as text."""
GRID = 8
"""Patches per side that are painted over ("ours")."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of the pooled token, mean over heads.

    Attributes:
        mass: ``[N, Y, 3]``, share that goes to each of ``GROUPS``, mean over inputs.
        patches: per input ``[N, height, width]``, how that of its image is spread over the image's tokens,
            mean over layers; sums to 1 per path. Empty if these form no grid (LLaVA-NeXT cuts tiles).
    """

    mass: Tensor
    patches: list[Tensor]


def attention_maps(embedder: Embedder, inputs: Sequence[RawInput]) -> AttentionMaps:
    """Encode inputs of one image each, and read the attention of the token whose state is the embedding.

    Relations:
        With uniform attention, image mass is the share of image tokens among the keys.
    """
    encoder = cast(ParallelEncoder, embedder.encoder)
    image_id = encoder.processor.tokenizer.convert_tokens_to_ids(encoder.image_token)
    masses, patches = [], []
    for item in inputs:
        assert len(item.images) == 1, "attention maps need one image per input"
        with recorded_attention(encoder) as (tokenised, weights):
            embedder.encode([item], paths="all")
        weights_NYK = torch.stack(weights, dim=2)[:, 0].cpu()
        is_image_L = (tokenised[0].tokens["input_ids"][0] == image_id).cpu()
        prefix_NY = weights_NYK[..., : encoder.prefix_length].sum(dim=-1)
        image_NYT = weights_NYK[..., encoder.prefix_length :][..., is_image_L]
        image_NY = image_NYT.sum(dim=-1)
        masses.append(torch.stack((prefix_NY, image_NY, 1 - prefix_NY - image_NY), dim=-1))
        share_NT = image_NYT.mean(dim=1)
        grid = token_grid(tokenised[0].vision[0], share_NT.shape[1])
        if grid is not None:
            patches.append((share_NT / share_NT.sum(dim=1, keepdim=True)).reshape(-1, *grid))
    return AttentionMaps(torch.stack(masses).mean(dim=0), patches if len(patches) == len(masses) else [])


@contextmanager
def recorded_attention(encoder: ParallelEncoder) -> Iterator[tuple[list[EncoderInputs], list[Tensor]]]:
    """Collect what the encoder is given and, by layer, the attention of each row's last real token.

    The attention is ``[N, B, P + L]`` fp32, mean over heads, and sums to 1. Layers below ``prefix_layers``
    have one row for all paths and zeros for the prefix.
    """
    inputs: list[EncoderInputs] = []
    weights: list[Tensor] = []

    def keep_inputs(module: Any, args: Any) -> None:
        inputs.append(args[0])

    def keep_weights(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        mask_BL = inputs[-1].tokens["attention_mask"]
        rows_RLK = output[1].float().mean(dim=1)
        repeats = len(rows_RLK) // len(mask_BL)
        pooled_RK = last_token(rows_RLK, mask_BL.repeat(repeats, 1))
        missing = mask_BL.shape[1] + encoder.prefix_length - pooled_RK.shape[1]
        pooled_NBK = torch.nn.functional.pad(pooled_RK, (missing, 0)).reshape(repeats, len(mask_BL), -1)
        weights.append(pooled_NBK.expand(encoder.num_paths, -1, -1))

    language_model = cast(Any, encoder.backbone.language_model)
    layers = cast(Any, encoder.backbone.base.get_submodule(encoder.backbone.family.layers))
    with ExitStack() as stack:
        # only eager attention returns weights
        stack.callback(language_model.set_attn_implementation, language_model.config._attn_implementation)
        language_model.set_attn_implementation(register_prefix_attention("eager"))
        stack.callback(encoder.register_forward_pre_hook(keep_inputs).remove)
        for layer in layers:
            stack.callback(layer.self_attn.register_forward_hook(keep_weights).remove)
        yield inputs, weights


def token_grid(vision: Any, num_tokens: int) -> tuple[int, int] | None:
    """Return height and width of an image's tokens: the processor's grid after merging, or else a square.

    None when the tokens fill neither.
    """
    if "image_grid_thw" in vision:
        _, height, width = vision["image_grid_thw"][0].tolist()
        merge = isqrt(height * width // num_tokens)
        height, width = height // merge, width // merge
    else:
        height = width = isqrt(num_tokens)
    return (height, width) if height * width == num_tokens else None


def patch_contributions(
    embedder: Embedder, pictures: Sequence[Image.Image], *, instruction: str | None = None, grid: int = GRID
) -> Tensor:
    """Encode every picture whole and once without each patch, on any kind of backbone.

    A patch is painted in the picture's median colour, which in most pictures is close to the background.

    Returns:
        ``[B, N, grid, grid]``: ``1 - cosine`` of each path's embedding with and without the patch, in [0, 2];
        rows from top to bottom.

    Raises:
        ValueError: a picture is smaller than the grid.
    """
    variants = [picture for whole in pictures for picture in (whole, *occluded(whole, grid))]
    rows = embedder.encode(variants, instruction=instruction, paths="all", batch_size=64)
    embeddings_BVND = rows.reshape(len(pictures), 1 + grid * grid, *rows.shape[1:])
    change_BVN = 1 - (embeddings_BVND[:, :1] * embeddings_BVND[:, 1:]).sum(dim=-1)
    return change_BVN.transpose(1, 2).reshape(len(pictures), -1, grid, grid)


def occluded(picture: Image.Image, grid: int) -> list[Image.Image]:
    """Return copies of a picture, each with one of ``grid * grid`` patches in the median colour."""
    width, height = picture.size
    if min(width, height) < grid:
        raise ValueError(f"a picture of {width} x {height} pixels has no {grid} x {grid} patches")
    pixels = np.asarray(picture.convert("RGB"))
    median = tuple(int(value) for value in np.median(pixels.reshape(-1, 3), axis=0))
    left, top = ([size * number // grid for number in range(grid + 1)] for size in (width, height))
    copies = []
    for row in range(grid):
        for column in range(grid):
            copies.append(picture.convert("RGB"))
            copies[-1].paste(median, (left[column], top[row], left[column + 1], top[row + 1]))
    return copies


def map_agreement(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Correlate the paths' maps over patches, for the same picture and for different ones.

    Paths that look at the same places whatever the picture shows agree on different pictures, too; only what
    the same picture adds to that is agreement about it.

    Args:
        maps: per picture ``[N, height, width]``; pictures may differ in their grids.

    Returns:
        Two ``[N, N]`` in [-1, 1]: the mean over pictures, and the mean over ordered pairs of different
        pictures of one grid (nan without such a pair). A constant map counts as 0.
    """
    num_paths, pairs = len(maps[0]), 0
    same_NN, different_NN = torch.zeros(2, num_paths, num_paths, dtype=torch.float64)
    for grid in dict.fromkeys(map_NHW.shape for map_NHW in maps):
        value_BNV = torch.stack([map_NHW for map_NHW in maps if map_NHW.shape == grid]).flatten(2).double()
        unit_BNV = torch.nn.functional.normalize(value_BNV - value_BNV.mean(dim=2, keepdim=True), dim=2)
        own_NN = torch.einsum("bnv,bmv->nm", unit_BNV, unit_BNV)
        sum_NV = unit_BNV.sum(dim=0)
        same_NN = same_NN + own_NN
        different_NN = different_NN + sum_NV @ sum_NV.T - own_NN
        pairs += len(unit_BNV) * (len(unit_BNV) - 1)
    return same_NN / len(maps), different_NN / pairs if pairs else torch.full_like(same_NN, torch.nan)
