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

from parallel_decoupling.batch import RawInput
from parallel_decoupling.evaluation.embedder import Embedder

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
        texts: finished prompts, kept to the letter, one per picture, for the change of the score.
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
        text_I1ND = embedder.encode([RawInput(text) for text in texts], batch_size=64)[:, None]
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


def agreement(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Correlation of the paths' maps over patches, for the same picture and for different ones.

    Paths that look at the same places whatever the picture shows agree on different pictures, too; only what
    the same picture adds to that is agreement about it.

    Args:
        maps: per picture ``[N, height, width]``; pictures may differ in their grids.

    Returns:
        Two ``[N, N]``, symmetric, in [-1, 1]: the mean over pictures, and the mean over ordered pairs of
        different pictures of one grid (nan without such a pair). A constant map counts as 0.
    """
    num_paths, pairs = len(maps[0]), 0
    same_NN, different_NN = torch.zeros(2, num_paths, num_paths, dtype=torch.float64)
    for grid in dict.fromkeys(map_NHW.shape for map_NHW in maps):
        value_INV = torch.stack([map_NHW for map_NHW in maps if map_NHW.shape == grid]).flatten(2).double()
        value_INV = value_INV - value_INV.mean(dim=2, keepdim=True)
        unit_INV = torch.nn.functional.normalize(value_INV, dim=2)
        own_NN = torch.einsum("inv,imv->nm", unit_INV, unit_INV)
        sum_NV = unit_INV.sum(dim=0)
        same_NN = same_NN + own_NN
        different_NN = different_NN + sum_NV @ sum_NV.T - own_NN
        pairs += len(unit_INV) * (len(unit_INV) - 1)
    return same_NN / len(maps), different_NN / pairs if pairs else torch.full_like(same_NN, torch.nan)


def _maps(value_IVN: Tensor, grid: int) -> Tensor:
    return value_IVN.transpose(1, 2).reshape(len(value_IVN), -1, grid, grid)
