"""The package's only collectives. Every function is the identity in a single process.

Parameters are whole on every process, except those that FSDP2 shards (``DTensor``).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Value = TypeVar("Value")


def rank() -> int:
    """Return the index of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def torchrun_group() -> Iterator[int]:
    """Join the processes of ``torchrun``, if there are any, and yield this one's number on its machine.

    For commands without a Trainer: the group exchanges objects, and tensors of the CPU.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # shares of work differ in length
    try:
        yield int(os.environ.get("LOCAL_RANK", "0"))
    finally:
        if several:
            dist.destroy_process_group()


def gather_with_grad(local: Tensor) -> Tensor:
    """Concatenate ``local`` of all ranks along dim 0; gradient flows to the local shard only.

    When every rank computes the same loss from the gathered rows, the sum over ranks of the gradients is
    that of one process with the whole batch. ``local`` is ``[B, ...]`` of the same shape everywhere.
    """
    if world_size() == 1:
        return local
    shards = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(shards, local.detach().contiguous())
    shards[rank()] = local
    return torch.cat(shards)


def gather_objects(value: Value) -> list[Value]:
    """List the value of every rank, in their order; any object that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every trainable gradient by its mean over ranks, in place.

    A parameter without a gradient on some ranks counts as zero there; one without a gradient anywhere keeps
    none. Sharded parameters are left alone: FSDP2 has averaged their gradients in the backward pass.
    """
    if world_size() == 1:
        return
    own = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not own:
        return
    used = torch.tensor([p.grad is not None for p in own], dtype=torch.int32, device=own[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for parameter in (p for p, anywhere in zip(own, used.tolist(), strict=True) if anywhere):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Do what ``torch.nn.utils.clip_grad_norm_`` does, for whole and sharded parameters together."""
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p, DTensor)]
    own = [p for p in with_gradient if not isinstance(p, DTensor)]
    groups = [group for group in (own, sharded) if group]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in group])) for group in groups]  # type: ignore[misc]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm() if norms else torch.zeros(())
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


@torch.no_grad()
def broadcast_parameters(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every rank the first rank's values of the trainable parameters that are not sharded."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, src=0)


def whole(value: Value) -> Value | Any:
    """Return a sharded tensor gathered from all ranks, and anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of ``value`` if ``parameter`` is sharded, else ``value``; on its device."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
