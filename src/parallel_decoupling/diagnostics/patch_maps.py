"""Maps over the patches of a picture: where a path looks, and what its embedding depends on.

Shapes: ``B`` inputs, ``N`` paths, ``Y`` layers, ``R = N * B`` rows (path-major), ``L`` tokens, ``P`` prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.attention import prefix_attention
from parallel_decoupling.model.encoder import ParallelEncoder, last_token

GROUPS = ("prefix", "image", "text")  # what the keys of a path are; the pooled token counts as text
GRID = 8  # patches per side that are painted over (ours)


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of the pooled token, mean over heads."""

    mass: Tensor  # [N, Y, 3], share that goes to each of GROUPS, mean over inputs
    patches: list[Tensor]  # per input [N, height, width], share of each image token, mean over layers


def attention_maps(embedder: Embedder, inputs: Sequence[RawInput]) -> AttentionMaps:
    """Encode inputs of one image each, and read the attention of the token whose state is the embedding.

    There are no ``patches`` if the image's tokens form no grid (LLaVA-NeXT cuts tiles).
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
    """Collect what the encoder is given and, by layer, the attention ``[N, B, P + L]`` of last real tokens.

    Layers below ``prefix_layers`` have one row for all paths and zeros for the prefix.
    """
    inputs: list[EncoderInputs] = []
    weights: list[Tensor] = []

    def keep_weights(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        mask_BL = inputs[-1].tokens["attention_mask"]
        rows_RLK = output[1].float().mean(dim=1)
        repeats = len(rows_RLK) // len(mask_BL)
        token_R = last_token(mask_BL).repeat(repeats)
        pooled_RK = rows_RLK[torch.arange(len(token_R), device=token_R.device), token_R]
        missing = mask_BL.shape[1] + encoder.prefix_length - pooled_RK.shape[1]
        pooled_NBK = F.pad(pooled_RK, (missing, 0)).reshape(repeats, len(mask_BL), -1)
        weights.append(pooled_NBK.expand(encoder.num_paths, -1, -1))

    language_model = cast(Any, encoder.backbone.language_model)
    layers = cast(Any, encoder.backbone.base.get_submodule(encoder.backbone.family.layers))
    hooks = [encoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))]
    hooks += [layer.self_attn.register_forward_hook(keep_weights) for layer in layers]
    former = language_model.config._attn_implementation
    language_model.set_attn_implementation(prefix_attention("eager"))  # only it returns weights
    try:
        yield inputs, weights
    finally:
        language_model.set_attn_implementation(former)
        for hook in hooks:
            hook.remove()


def token_grid(vision: Any, num_tokens: int) -> tuple[int, int] | None:
    """Return height and width of an image's tokens, by the processor or as a square; None if neither fits."""
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
    """Return ``1 - cosine`` of each path's embedding with and without each patch: ``[B, N, grid, grid]``.

    A patch is painted in the picture's median colour, which in most pictures is close to the background.
    """
    variants = [picture for whole in pictures for picture in (whole, *occluded(whole, grid))]
    rows = embedder.encode(variants, instruction=instruction, paths="all", batch_size=64)
    embeddings_BVND = rows.reshape(len(pictures), 1 + grid * grid, *rows.shape[1:])
    change_BVN = 1 - (embeddings_BVND[:, :1] * embeddings_BVND[:, 1:]).sum(dim=-1)
    return change_BVN.transpose(1, 2).reshape(len(pictures), -1, grid, grid)


def occluded(picture: Image.Image, grid: int) -> list[Image.Image]:
    """Return copies of a picture, each with one of ``grid * grid`` patches in the median colour."""
    pixels = np.asarray(picture.convert("RGB"))
    if min(pixels.shape[:2]) < grid:
        size = f"{picture.width} x {picture.height} pixels"
        raise ValueError(f"a picture of {size} has no {grid} x {grid} patches")
    median, copies = np.median(pixels.reshape(-1, 3), axis=0).astype(np.uint8), []
    for rows in np.array_split(np.arange(picture.height), grid):
        for columns in np.array_split(np.arange(picture.width), grid):
            hidden = pixels.copy()
            hidden[np.ix_(rows, columns)] = median
            copies.append(Image.fromarray(hidden))
    return copies


def map_agreement(maps: Sequence[Tensor]) -> Tensor:
    """Correlate maps ``[N, height, width]`` over patches: ``[N, N]``, mean over pictures; constant maps 0."""
    centred = [map_NHW.flatten(1).double() - map_NHW.double().mean(dim=(1, 2))[:, None] for map_NHW in maps]
    unit = [F.normalize(map_NV, dim=1) for map_NV in centred]
    return torch.stack([map_NV @ map_NV.T for map_NV in unit]).mean(dim=0)
