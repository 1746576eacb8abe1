"""How alike the embedding spaces of the paths are: kernels, subspaces, ranks.

Here: pure functions of embeddings that say more than one cosine can. Elsewhere: the mean cosine and the
effective rank that training logs (``objective.statistics``), which inputs are embedded (``study``).

Shapes: ``B`` inputs, ``N`` paths, ``M`` path pairs (i < j), ``D`` embedding dim, ``S`` subspace dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_decoupling.objective.mutual_information import path_pairs
from parallel_decoupling.objective.statistics import effective_rank, path_cosine

SUBSPACE_DIM = 10
"""Directions per path whose angles are compared ("ours"); fewer when there are fewer inputs or dimensions."""


@dataclass(frozen=True)
class PathSimilarity:
    """All measures of ``path_similarity``.

    Attributes:
        cosine: ``[N, N]``, mean cosine between paths of one input, in [-1, 1].
        centred_cosine: ``[N, N]``, the same after each path's mean embedding is subtracted: a direction that
            all inputs share makes the plain cosine high whatever the paths say about an input.
        cka: ``[N, N]``, linear CKA, in [0, 1].
        shuffled_cka: ``[N, N]``, the same with the inputs of the second path in another order: what unrelated
            embeddings of these ranks would show.
        angles: ``[M, S]``, principal angles in degrees, smallest first.
        chance_angles: ``[S]``, the same of two random subspaces of this size, their mean.
        pairs: ``[M, 2]``, the paths of each row of ``angles``.
        rank: ``[N]``, effective rank of each path's embeddings.
        joined_rank: effective rank of the paths' embeddings side by side, ``[B, N * D]``.
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
    """Compute every measure on the embeddings of the same inputs.

    Args:
        embeddings_BND: at least 3 inputs.

    Raises:
        ValueError: another shape, or fewer inputs.
    """
    if embeddings_BND.ndim != 3 or len(embeddings_BND) < 3:
        raise ValueError(
            f"the similarity of paths needs [B, N, D] with B of at least 3, got {list(embeddings_BND.shape)}"
        )
    value_BND = embeddings_BND.double()
    count, _, dim = value_BND.shape
    subspace_dim = min(SUBSPACE_DIM, count - 1, dim)
    return PathSimilarity(
        cosine=path_cosine(value_BND),
        centred_cosine=path_cosine(value_BND - value_BND.mean(dim=0)),
        cka=linear_cka(value_BND),
        shuffled_cka=shuffled_cka(value_BND),
        angles=principal_angles(value_BND, subspace_dim),
        chance_angles=random_angles(dim, subspace_dim),
        pairs=path_pairs(value_BND.shape[1]),
        rank=torch.stack([effective_rank(value_BD) for value_BD in value_BND.unbind(1)]),
        joined_rank=float(effective_rank(value_BND.flatten(1))),
    )


def linear_cka(embeddings_BND: Tensor) -> Tensor:
    """Linear centred kernel alignment between all paths (Kornblith et al. 2019).

    ``|X^T Y|^2 / (|X^T X| |Y^T Y|)`` in Frobenius norms of centred embeddings: do two paths call the same
    inputs similar, whatever rotation and scale their spaces have?

    Args:
        embeddings_BND: ``[B, N, D]``, any scale.

    Returns:
        ``[N, N]`` in [0, 1], symmetric, diagonal 1. Independent embeddings do not reach 0 but about
        ``D / (B + D)``, so compare runs at equal B and D.

    Relations:
        Unchanged when a path is rotated, shifted or multiplied by a number.
    """
    centred_NBD = (embeddings_BND - embeddings_BND.mean(dim=0)).transpose(0, 1)
    cross_NN = torch.einsum("nbd,mbe->nmde", centred_NBD, centred_NBD).square().sum(dim=(2, 3))
    own_N = cross_NN.diagonal().sqrt().clamp_min(torch.finfo(cross_NN.dtype).tiny)
    return cross_NN / (own_N[:, None] * own_N[None, :])


def shuffled_cka(embeddings_BND: Tensor) -> Tensor:
    """Linear CKA ``[N, N]`` of path i with path j of other inputs: one seeded order of the B rows."""
    order_B = torch.randperm(len(embeddings_BND), generator=torch.Generator().manual_seed(0))
    num_paths = embeddings_BND.shape[1]
    return linear_cka(torch.cat((embeddings_BND, embeddings_BND[order_B]), dim=1))[:num_paths, num_paths:]


def principal_angles(embeddings_BND: Tensor, subspace_dim: int) -> Tensor:
    """Principal angles between the subspaces that hold most of each path's variance.

    Args:
        embeddings_BND: ``[B, N, D]``.
        subspace_dim: S, leading directions of every path, at most ``min(B - 1, D)``.

    Returns:
        ``[M, S]`` degrees, smallest first: 0 a shared direction, 90 a direction the other path lacks.
        Row m belongs to ``path_pairs(N)[m]``.

    Relations:
        Equals ``scipy.linalg.subspace_angles`` of the leading right singular vectors.
    """
    centred_NBD = (embeddings_BND - embeddings_BND.mean(dim=0)).transpose(0, 1)
    directions_NSD = torch.linalg.svd(centred_NBD, full_matrices=False).Vh[:, :subspace_dim]
    first_M, second_M = path_pairs(len(directions_NSD)).unbind(1)
    return _angles(directions_NSD[first_M], directions_NSD[second_M])


def random_angles(dim: int, subspace_dim: int, draws: int = 20) -> Tensor:
    """Mean principal angles ``[S]`` in degrees of independent random subspaces: what chance looks like."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, draws, dim, subspace_dim, generator=generator, dtype=torch.float64)
    first, second = torch.linalg.qr(noise).Q.mT.unbind(0)
    return _angles(first, second).mean(dim=0)


def _angles(first_MSD: Tensor, second_MSD: Tensor) -> Tensor:
    """Angles between orthonormal bases, by the sine where it is the exact one (below 45 degrees)."""
    cosine_MSS = first_MSD @ second_MSD.mT
    cosine_MS = torch.linalg.svdvals(cosine_MSS).clamp(max=1)
    rest_MSD = second_MSD - cosine_MSS.mT @ first_MSD
    sine_MS = torch.linalg.svdvals(rest_MSD).flip(1).clamp(max=1)
    return torch.rad2deg(torch.where(cosine_MS.square() > 0.5, sine_MS.asin(), cosine_MS.acos()))
