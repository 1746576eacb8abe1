"""The package's only collectives. Every function is the identity in a single process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_with_grad(local: Tensor) -> Tensor:
    """Concatenate ``local`` of all ranks along dim 0; gradient flows to the local shard only.

    For rank 1 of 2 the result is ``[rank 0 (constant); rank 1 (with graph)]``. When every rank computes the
    same loss from the gathered rows of ALL queries and candidates, the sum over ranks of the gradients is
    the gradient of one process with the whole batch.

    Args:
        local: ``[B, ...]``, the same shape on every rank.

    Returns:
        ``[world_size * B, ...]``; ``local`` itself in a single process.
    """
    if world_size() == 1:
        return local
    shards = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(shards, local.detach().contiguous())
    shards[rank()] = local
    return torch.cat(shards)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every trainable gradient by its mean over ranks, in place.

    Called once after all backward passes of a step. A parameter without a gradient counts as
    zero, so ranks whose chunks hold no image still agree on the collective.
    """
    if world_size() == 1:
        return
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()
