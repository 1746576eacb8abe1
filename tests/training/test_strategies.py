"""What FSDP2 shards, and which strategies are refused."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.training.strategies import FSDP2Strategy, shard_backbone
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
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    adapter = AdapterConfig(kind=kind, scope="both")
    encoders = [
        ParallelEncoder(
            load_backbone(folder, adapter=adapter, attention=attention), num_paths=2, prefix_length=3
        )
        for _ in range(2)
    ]
    whole, sharded = encoders
    rows = [RawInput(f"{IMAGE_PLACEHOLDER}\na red circle", (noise_image(32, 32),)), RawInput("a blue square")]
    collator = Collator(whole.processor, image_token=whole.image_token)
    inputs = collator.encode_inputs(rows[dist.get_rank() :])  # the second process has no image
    expected = whole(inputs)
    for _ in range(2):  # the second time changes nothing
        shard_backbone(sharded.backbone, init_device_mesh("cpu", (2,)))
    torch.testing.assert_close(sharded(inputs), expected)
    torch.testing.assert_close(sharded(inputs, [1]), expected[:, 1:])
    names = {name for name, p in sharded.named_parameters() if isinstance(p, DTensor)}
    inside = {
        f"backbone.base.{sharded.backbone.family.language_module}.{name}"
        for name, p in whole.backbone.language_model.named_parameters()
        if kind == "full" or not p.requires_grad
    }
    assert names == inside
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "kind", "attention"),
    [("qwen2_vl", "lora", "eager"), ("qwen3_vl", "full", "sdpa"), ("llava_next_mistral", "dora", "sdpa")],
)
def test_a_sharded_backbone_gives_the_same_embeddings(
    tmp_path: Any, family: str, kind: str, attention: str
) -> None:
    run_ranks(shard_and_compare, save_tiny_family(family, tmp_path), kind, attention)


def test_quantised_weights_are_refused(tiny_backbone_dir: str) -> None:
    backbone = load_backbone(tiny_backbone_dir)
    backbone.base.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"packed is quantised: use strategy ddp"):
        shard_backbone(backbone, mesh=None)  # type: ignore[arg-type]
