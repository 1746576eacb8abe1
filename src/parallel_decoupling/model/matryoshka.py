"""Nested embeddings (Matryoshka): the first coordinates of an embedding are an embedding themselves.

Here: what a shorter embedding is, for training and for encoding alike. Elsewhere: the terms of the loss at
nested dimensions (``training.terms``), ``truncate_dim`` of ``encode`` (``evaluation.encode``).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch.nn.functional as F
from torch import Tensor


def truncate(paths: Tensor, dim: int) -> Tensor:
    """Keep the first ``dim`` coordinates of every path and bring them back to unit norm.

    A shorter aggregate is the aggregate of shorter paths: with ``concat`` it is ``N * dim`` wide.

    Args:
        paths: ``[B, N, D]``, unit norm.
        dim: 1 to D.

    Returns:
        ``[B, N, dim]``, unit norm.

    Relations:
        ``dim = D`` changes nothing (up to rounding). Truncating twice is truncating once, to the smaller one.
    """
    return F.normalize(paths[..., :dim], dim=-1)


def check_dim(dim: int, embed_dim: int, name: str) -> int:
    """Return ``dim`` as an int.

    Raises:
        ValueError: if it is no whole number from 1 to ``embed_dim``; ``name`` says where it came from.
    """
    if not isinstance(dim, Integral) or isinstance(dim, bool) or not 1 <= dim <= embed_dim:
        raise ValueError(f"{name}={dim!r}: embeddings have {embed_dim} dimensions; use 1 to {embed_dim}")
    return int(dim)


def nested_dims(dims: Sequence[int] | None, embed_dim: int) -> tuple[int, ...]:
    """Dimensions below ``embed_dim`` at which training also computes its contrastive terms, largest first.

    Args:
        dims: in any order; ``embed_dim`` itself counts anyway, once. None is none.
        embed_dim: D.

    Raises:
        ValueError: for a dimension that the embeddings do not have.
    """
    checked = {check_dim(dim, embed_dim, "matryoshka_dims") for dim in dims or ()}
    return tuple(sorted(checked - {embed_dim}, reverse=True))
