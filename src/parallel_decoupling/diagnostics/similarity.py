"""How alike the embedding spaces of the paths are: kernels, subspaces, ranks.

Shapes: ``B`` inputs, ``N`` paths, ``M`` path pairs (i < j), ``D`` embedding dim, ``S`` subspace dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_decoupling.objective.statistics import effective_rank, path_cosine
from parallel_decoupling.objective.vclub import path_pairs

SUBSPACE_DIM = 10
"""Directions per path whose angles are compared ("ours"); fewer when there are fewer inputs or dimensions."""


@dataclass(frozen=True)
class PathSimilarity:
    """All measures of ``path_similarity``.

    Attributes:
        cosine: ``[N, N]``, mean cosine between paths of one input.
        centred_cosine: ``[N, N]``, the same after each path's mean embedding is subtracted: a direction that
            all inputs share makes the plain cosine high whatever the paths say about an input.
        cka: ``[N, N]``, linear CKA.
        shuffled_cka: ``[N, N]``, the same with the inputs of the second path in another order: what unrelated
            embeddings of these ranks would show.
        angles: ``[M, S]``, principal angles in degrees, smallest first.
        chance_angles: ``[S]``, their mean for random subspaces.
        pairs: ``[M, 2]``, the paths of each row of ``angles``.
        rank: ``[N]``, effective rank of each path.
        joined_rank: effective rank of the paths side by side, ``[B, N * D]``.
    """

    cosine: Tensor
    centred_cosine: Tensor
    cka: Tensor
    shuffled_cka: Tensor
    angles: Tensor
    chance_angles: Tensor
    pairs: Tensor
    rank: Tensor
    joined_rank: float


def path_similarity(embeddings_BND: Tensor) -> PathSimilarity:
    """Compute every measure on the embeddings ``[B, N, D]`` of the same inputs.

    Raises:
        ValueError: there are fewer than 3 inputs.
    """
    count, num_paths, dim = embeddings_BND.shape
    if count < 3:
        raise ValueError(f"the similarity of paths needs at least 3 inputs, got {count}")
    value_BND = embeddings_BND.double()
    subspace_dim = min(SUBSPACE_DIM, count - 1, dim)
    order_B = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return PathSimilarity(
        cosine=path_cosine(value_BND),
        centred_cosine=path_cosine(value_BND - value_BND.mean(dim=0)),
        cka=linear_cka(value_BND),
        shuffled_cka=linear_cka(torch.cat((value_BND, value_BND[order_B]), dim=1))[:num_paths, num_paths:],
        angles=principal_angles(value_BND, subspace_dim),
        chance_angles=random_angles(dim, subspace_dim),
        pairs=path_pairs(num_paths),
        rank=torch.stack([effective_rank(value_BD) for value_BD in value_BND.unbind(1)]),
        joined_rank=float(effective_rank(value_BND.flatten(1))),
    )


def linear_cka(embeddings_BND: Tensor) -> Tensor:
    """Compute the linear centred kernel alignment ``[N, N]`` of all paths (Kornblith et al. 2019).

    ``|X^T Y|^2 / (|X^T X| |Y^T Y|)`` in Frobenius norms of centred embeddings. Independent embeddings do not
    reach 0 but about ``D / (B + D)``, so compare runs at equal B and D.

    Relations:
        Unchanged when a path is rotated, shifted or multiplied by a number.
    """
    centred_NBD = (embeddings_BND - embeddings_BND.mean(dim=0)).transpose(0, 1)
    cross_NN = torch.einsum("nbd,mbe->nmde", centred_NBD, centred_NBD).square().sum(dim=(2, 3))
    own_N = cross_NN.diagonal().sqrt().clamp_min(torch.finfo(cross_NN.dtype).tiny)
    return cross_NN / (own_N[:, None] * own_N[None, :])


def principal_angles(embeddings_BND: Tensor, subspace_dim: int) -> Tensor:
    """Compute the principal angles between the subspaces that hold most of each path's variance.

    Returns:
        ``[M, S]`` degrees, smallest first: 0 a shared direction, 90 a direction the other path lacks.
        Row m belongs to ``path_pairs(N)[m]``. S is at most ``min(B - 1, D)``.

    Relations:
        Equals ``scipy.linalg.subspace_angles`` of the leading right singular vectors.
    """
    centred_NBD = (embeddings_BND - embeddings_BND.mean(dim=0)).transpose(0, 1)
    directions_NSD = torch.linalg.svd(centred_NBD, full_matrices=False).Vh[:, :subspace_dim]
    first_M, second_M = path_pairs(len(directions_NSD)).unbind(1)
    return _angles(directions_NSD[first_M], directions_NSD[second_M])


def random_angles(dim: int, subspace_dim: int, draws: int = 20) -> Tensor:
    """Compute the mean principal angles ``[S]`` of random subspaces in degrees: what chance looks like."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, draws, dim, subspace_dim, generator=generator, dtype=torch.float64)
    first, second = torch.linalg.qr(noise).Q.mT.unbind(0)
    return _angles(first, second).mean(dim=0)


def _angles(first_MSD: Tensor, second_MSD: Tensor) -> Tensor:
    """Compute angles between orthonormal bases, by the sine where it is the exact one (below 45 degrees)."""
    cosine_MSS = first_MSD @ second_MSD.mT
    cosine_MS = torch.linalg.svdvals(cosine_MSS).clamp(max=1)
    rest_MSD = second_MSD - cosine_MSS.mT @ first_MSD
    sine_MS = torch.linalg.svdvals(rest_MSD).flip(1).clamp(max=1)
    return torch.rad2deg(torch.where(cosine_MS.square() > 0.5, sine_MS.asin(), cosine_MS.acos()))
