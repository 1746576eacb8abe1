"""Which patch of a picture an embedding depends on: leave one out, and see what changes.

Here: occlusion, the same for every kind of backbone, and its effect per path. Elsewhere: attention, which
tells where a path looks but not what follows from it (``attention``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parallel_decoupling.retrieval.embedder import Embedder

GRID = 8
"""Patches per side ("ours")."""


@dataclass(frozen=True)
class Contributions:
    """Effect of leaving out each patch.

    Attributes:
        change: ``[I, N, grid, grid]`` for ``I`` pictures: ``1 - cosine`` of each path's embedding with and
            without the patch, in [0, 2]; rows from top to bottom.
        score: of the same shape, what the cosine to the text loses without the patch (negative where the
            patch hurts); None without texts.
    """

    change: Tensor
    score: Tensor | None


def patch_contributions(
    embedder: Embedder,
    pictures: Sequence[Image.Image],
    *,
    instruction: str | None = None,
    texts: Sequence[str] | None = None,
    grid: int = GRID,
) -> Contributions:
    """Encode every picture whole and once without each patch.

    A patch is painted in the picture's median colour, which in most pictures is close to the background.

    Args:
        embedder: the model.
        pictures: at least ``grid`` pixels high and wide.
        instruction: put to every picture.
        texts: finished prompts, one per picture, for the change of the score.
        grid: patches per side.

    Raises:
        ValueError: a picture is smaller than the grid, or texts and pictures differ in number.
    """
    if texts is not None and len(texts) != len(pictures):
        raise ValueError(f"contributions: {len(texts)} texts for {len(pictures)} pictures")
    variants = [picture for whole in pictures for picture in (whole, *occluded(whole, grid))]
    rows = embedder.encode(variants, instruction=instruction, batch_size=64)
    embeddings_IVND = rows.reshape(len(pictures), 1 + grid * grid, *rows.shape[1:])
    whole_I1ND, without_IVND = embeddings_IVND[:, :1], embeddings_IVND[:, 1:]
    change_IVN = 1 - (whole_I1ND * without_IVND).sum(dim=-1)
    score_IVN = None
    if texts is not None:
        text_I1ND = embedder.encode(list(texts), batch_size=64)[:, None]
        score_IVN = ((whole_I1ND - without_IVND) * text_I1ND).sum(dim=-1)
    return Contributions(_maps(change_IVN, grid), None if score_IVN is None else _maps(score_IVN, grid))


def occluded(picture: Image.Image, grid: int) -> list[Image.Image]:
    """Copies of a picture, each with one of ``grid * grid`` patches in the median colour, row by row."""
    width, height = picture.size
    if min(width, height) < grid:
        raise ValueError(
            f"contributions: a picture of {width} x {height} pixels has no {grid} x {grid} patches"
        )
    pixels = np.asarray(picture.convert("RGB"))
    median = tuple(int(value) for value in np.median(pixels.reshape(-1, 3), axis=0))
    copies = []
    for row in range(grid):
        for column in range(grid):
            box = (
                width * column // grid,
                height * row // grid,
                width * (column + 1) // grid,
                height * (row + 1) // grid,
            )
            copy = picture.convert("RGB")
            copy.paste(median, box)
            copies.append(copy)
    return copies


def agreement(maps_INGG: Tensor) -> Tensor:
    """Correlation of the paths' maps over patches, ``[N, N]``, mean over images; 0 for a constant map."""
    value_INV = maps_INGG.flatten(2).double()
    value_INV = value_INV - value_INV.mean(dim=2, keepdim=True)
    unit_INV = torch.nn.functional.normalize(value_INV, dim=2)
    return torch.einsum("inv,imv->nm", unit_INV, unit_INV) / len(maps_INGG)


def _maps(value_IVN: Tensor, grid: int) -> Tensor:
    return value_IVN.transpose(1, 2).reshape(len(value_IVN), -1, grid, grid)
