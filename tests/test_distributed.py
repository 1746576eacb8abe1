"""Collectives in two processes against what they stand for; everything is the identity in one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from parallel_decoupling.distributed import (
    average_gradients,
    broadcast_parameters,
    clip_gradients,
    gather_objects,
    gather_with_grad,
    rank,
    shard_like,
    whole,
    world_size,
)
from tests.support.processes import run_ranks


def parameters_with(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = gradient
    return made


def test_one_process_keeps_everything_as_it_is() -> None:
    value = torch.randn(2, 3, requires_grad=True)
    assert gather_with_grad(value) is value
    assert whole(value) is value
    assert torch.equal(shard_like(value, torch.zeros(2, 3)), value)
    assert gather_objects("a") == ["a"]
    (parameter,) = parameters_with(torch.ones(2))
    average_gradients([parameter])
    broadcast_parameters([parameter])
    assert torch.equal(parameter.grad, torch.ones(2))


@pytest.mark.parametrize("max_norm", [0.5, 100.0, float("inf")])
def test_clipping_equals_torch(max_norm: float) -> None:
    gradients = [torch.randn(2), torch.randn(2), None]
    ours = parameters_with(*(None if g is None else g.clone() for g in gradients))
    theirs = parameters_with(*gradients)
    norm = clip_gradients(ours, max_norm)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(a.grad, b.grad)
    assert clip_gradients(parameters_with(None), 1.0) == 0


def in_two_processes() -> None:
    """Assertions of both processes; a failed one is an exit code."""
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    own = rank()
    assert world_size() == 2
    assert gather_objects(("a", "b")[own]) == ["a", "b"]

    used_by_both, used_by_first, unused = parameters_with(
        torch.full((2,), 1.0 + own), torch.ones(2) if own == 0 else None, None
    )
    for _ in range(2):  # the second time changes nothing
        average_gradients([used_by_both, used_by_first, unused])
        assert torch.equal(used_by_both.grad, torch.full((2,), 1.5))
        assert torch.equal(used_by_first.grad, torch.full((2,), 0.5))
        assert unused.grad is None

    mesh = init_device_mesh("cpu", (2,))
    value = torch.arange(10.0).view(5, 2)
    sharded = nn.Parameter(distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)]))
    sharded.grad = shard_like(value, sharded)
    assert torch.equal(whole(sharded.grad), value)
    assert sharded.grad.to_local().shape[0] == (3, 2)[own]
    average_gradients([sharded])
    assert torch.equal(whole(sharded.grad), value)

    plain = nn.Parameter(torch.zeros(5, 2))
    plain.grad = value.clone()
    both, expected = [sharded, used_by_both], [plain, nn.Parameter(torch.zeros(2))]
    expected[1].grad = used_by_both.grad.clone()
    torch.testing.assert_close(clip_gradients(both, 2.0), nn.utils.clip_grad_norm_(expected, 2.0))
    torch.testing.assert_close(whole(sharded.grad), plain.grad)
    torch.testing.assert_close(used_by_both.grad, expected[1].grad)

    different, frozen = nn.Parameter(torch.full((2,), float(own))), nn.Parameter(torch.tensor([float(own)]))
    frozen.requires_grad_(False)
    broadcast_parameters([different, frozen, sharded])
    assert torch.equal(different.detach(), torch.zeros(2))
    assert frozen.item() == own
    dist.destroy_process_group()


def test_two_processes() -> None:
    run_ranks(in_two_processes, timeout=60)
