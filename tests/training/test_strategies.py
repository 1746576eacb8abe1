"""Collectives in two processes against what they stand for, what FSDP2 shards, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
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
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.training.strategies import FSDP2Strategy, shard_encoder
from tests.model.test_families import collate
from tests.support.families import save_tiny_family
from tests.support.fit import small_embedder
from tests.support.processes import run_ranks
from tests.support.tiny import noise_image


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()])
def test_other_ways_of_sharding_are_refused_with_the_alternative(
    tiny_backbone_dir: str, strategy: Any
) -> None:
    module = small_embedder(tiny_backbone_dir)
    module._trainer = SimpleNamespace(strategy=strategy, precision="32-true")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="use strategy ddp, or fsdp2"):
        module.setup("fit")
    module._trainer = SimpleNamespace(strategy=FSDP2Strategy(), precision="32-true")  # type: ignore[assignment]
    module.setup("fit")


def shard_and_compare(folder: str, kind: Any, attention: Any) -> None:
    """Assertions of both processes; a failed one is an exit code."""
    adapter = AdapterConfig(kind=kind, scope="both")
    encoders = [
        ParallelEncoder(
            load_backbone(folder, adapter=adapter, attention=attention), num_paths=2, prefix_length=3
        )
        for _ in range(2)
    ]
    whole, sharded = encoders
    rows = [RawInput(f"{IMAGE_PLACEHOLDER}\na red circle", (noise_image(32, 32),)), RawInput("a blue square")]
    inputs = collate(whole, rows[rank() :])  # the second process has no image
    expected = whole(inputs)
    for _ in range(2):  # the second time changes nothing
        shard_encoder(sharded, init_device_mesh("cpu", (2,)))
    torch.testing.assert_close(sharded(inputs), expected)
    torch.testing.assert_close(sharded(inputs, [1]), expected[:, 1:])
    names = {name for name, p in sharded.named_parameters() if isinstance(p, DTensor)}
    inside = {
        f"backbone.base.{sharded.backbone.family.language_module}.{name}"
        for name, p in whole.backbone.language_model.named_parameters()
        if kind == "full" or not p.requires_grad
    }
    assert names == inside


@pytest.mark.parametrize(
    ("family", "kind", "attention"),
    [("qwen2_vl", "lora", "eager"), ("qwen3_vl", "full", "sdpa"), ("llava_next_mistral", "dora", "sdpa")],
)
def test_a_sharded_backbone_gives_the_same_embeddings(
    tmp_path: Any, family: str, kind: str, attention: str
) -> None:
    run_ranks(shard_and_compare, save_tiny_family(family, tmp_path), kind, attention, gloo=True)


def test_quantised_weights_are_refused(tiny_backbone_dir: str) -> None:
    encoder = ParallelEncoder(load_backbone(tiny_backbone_dir))
    encoder.backbone.base.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"packed is quantised: use strategy ddp"):
        shard_encoder(encoder, mesh=None)  # type: ignore[arg-type]


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


def test_two_processes() -> None:
    run_ranks(in_two_processes, timeout=60, gloo=True)
