"""The memory of a step against what autograd and autocast really keep."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.profiler import ProfilerActivity, profile

from parallel_decoupling.model.backbone import AdapterConfig, load_backbone, meta_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.objective.mutual_information import MutualInformation
from parallel_decoupling.training import memory
from parallel_decoupling.training.optimization import MIConfig
from parallel_decoupling.training.terms import (
    contrastive_terms,
    frozen,
    gather_pairs,
    mutual_information_terms,
)
from tests.support.tiny import noise_image, save_tiny_backbone, tiny_inputs

LAYER = 3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16
"""Weights of the linear layers in one layer of the tiny language model."""
ADAPTERS = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
"""Of rank 2, in one layer."""


def precision(name: Any) -> AbstractContextManager[None]:
    """The context in which Lightning runs a step with ``trainer.precision=name``."""
    plugin = MixedPrecision(name, "cpu") if name == "bf16-mixed" else Precision()
    return cast(AbstractContextManager[None], plugin.forward_context())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tiny backbones with one and two language layers."""
    return [save_tiny_backbone(tmp_path_factory.mktemp("tiny"), num_layers=n) for n in (1, 2)]


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast", "rows", "words"),
    [
        (kind, dtype, autocast, rows, words)
        for kind in ("frozen", "lora", "dora", "full")
        for dtype, autocast in (("float32", False), ("float32", True), ("bfloat16", True))
        for rows, words in ((6, 30), (1, 3))  # in the second the copies of weights count
        if (kind, dtype) != ("full", "bfloat16")  # fit refuses it
        and (kind, rows) != ("dora", 1)  # what autograd saves for a moment only would count
    ],
)
def test_a_layers_activations_are_those_that_autograd_keeps(
    folders: list[str], kind: Any, dtype: Any, autocast: bool, rows: int, words: int
) -> None:
    sizes = []
    for folder in folders:
        backbone = load_backbone(folder, adapter=AdapterConfig(kind=kind, rank=2), dtype=dtype)
        encoder = ParallelEncoder(backbone, num_paths=2, prefix_length=3)
        text = "<|image_pad|>\n" + "describe the shapes the colors the positions " * words
        inputs = tiny_inputs(backbone.processor, [(text, [noise_image(64, 64)])] * rows)
        copies = memory.weight_copies(backbone, quantized=False) if autocast else memory.WeightCopies()
        with precision("bf16-mixed" if autocast else "32-true"):
            sizes.append(memory.saved_bytes(lambda: encoder(inputs), encoder.parameters()))  # noqa: B023
    length = inputs.tokens["input_ids"].shape[1]
    planned = memory.layer_bytes(
        backbone,
        element=2 if autocast else 4,
        context=(length + 3) / (2 * rows),  # without padding the mask is one for all rows
        keys_per_token=(length + 3) / length,
    )
    planned = 2 * rows * length * planned + copies.layer
    measured = sizes[1] - sizes[0]
    assert 0.9 * measured < planned <= measured


def kept_per_layer(
    folders: list[str],
    kind: Any,
    dtype: Any = "float32",
    *,
    passes: int = 1,
    checkpointing: bool = False,
    dropout: float = 0.0,
    **paths: Any,
) -> int:
    """Bytes that are alive after forward passes under autocast: those of a second layer."""
    sizes = []
    for folder in folders:
        adapter = AdapterConfig(kind=kind, rank=2, dropout=dropout)
        backbone = load_backbone(folder, adapter=adapter, dtype=dtype, gradient_checkpointing=checkpointing)
        encoder = ParallelEncoder(backbone, num_paths=2, prefix_length=3, **paths)
        inputs = tiny_inputs(backbone.processor, [("<|image_pad|> red", [noise_image(16, 16)])])
        with (
            precision("bf16-mixed"),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            graphs = [encoder(inputs) for _ in range(passes)]
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        sizes.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
        del graphs
    return int(sizes[1] - sizes[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "copied"), [("frozen", LAYER), ("lora", LAYER + ADAPTERS), ("full", LAYER)])
def test_every_forward_pass_keeps_its_own_copies(
    folders: list[str], kind: Any, copied: int, checkpointing: bool
) -> None:
    one, two = (kept_per_layer(folders, kind, passes=n, checkpointing=checkpointing) for n in (1, 2))
    assert two == 2 * one
    assert (one < 2 * LAYER) == checkpointing  # then they are gone with the layer
    backbone = meta_backbone(folders[0], adapter=AdapterConfig(kind=kind, rank=2))
    assert memory.weight_copies(backbone, quantized=False).layer == 2 * copied


def test_copies_are_what_fp32_weights_keep_more_than_bfloat16(folders: list[str]) -> None:
    def more_than_bfloat16(kind: str, **options: Any) -> int:
        both = [kept_per_layer(folders, kind, dtype, **options) for dtype in ("float32", "bfloat16")]
        return both[0] - both[1]

    assert more_than_bfloat16("frozen") == pytest.approx(2 * LAYER, rel=0.02)
    assert more_than_bfloat16("lora") == pytest.approx(2 * LAYER, rel=0.02)
    assert more_than_bfloat16("lora", passes=2) == pytest.approx(2 * 2 * LAYER, rel=0.02)
    assert more_than_bfloat16("lora", checkpointing=True) < LAYER / 10  # gone with the layer
    prompts = more_than_bfloat16("lora", checkpointing=True, prefix_type="shallow")
    assert prompts == pytest.approx(2 * LAYER, rel=0.1)  # never recomputed


def test_dora_with_dropout_multiplies_frozen_weights_twice(folders: list[str]) -> None:
    def of_dropout(kind: str) -> int:
        without, with_it = (
            kept_per_layer(folders, kind, "bfloat16", dropout=dropout) for dropout in (0.0, 0.1)
        )
        return with_it - without

    assert of_dropout("dora") - of_dropout("lora") == 2 * LAYER  # the masks are those of LoRA
    adapter = AdapterConfig(kind="dora", rank=2, dropout=0.1)
    for dtype, base in (("float32", 2 * LAYER), ("bfloat16", LAYER)):
        options: dict[str, Any] = {"dtype": dtype, "adapter": adapter}
        backbone = meta_backbone(folders[0], **options)
        assert memory.weight_copies(backbone, quantized=False).layer == 2 * (base + ADAPTERS)
    assert memory.weight_copies(backbone, quantized=True).layer == 2 * (LAYER + ADAPTERS)


@pytest.mark.parametrize("kind", ["vclub", "club_sample", "l1out", "hsic", "crosscov", "orthogonal", "none"])
def test_the_objectives_bytes_are_those_that_autograd_keeps(kind: Any) -> None:
    estimator = MutualInformation(kind, num_paths=3, embed_dim=16, hidden_size=8)
    planned = memory.objective_bytes(
        3, 16, MIConfig(kind=kind, hidden_size=8), queries=12, candidates=24, aggregate_dim=16
    )
    pairs = gather_pairs(
        torch.randn(12, 3, 16, requires_grad=True),
        torch.randn(24, 3, 16, requires_grad=True),
        torch.arange(24),
        lambda paths: paths.mean(1),
    )
    temperature = torch.ones(())
    real = memory.saved_bytes(
        lambda: contrastive_terms(pairs, temperature, symmetric=False, with_aggregate=True)
    )
    assert planned["contrastive"] == real
    with frozen(estimator):
        term = memory.saved_bytes(lambda: mutual_information_terms(estimator, pairs))
    assert planned["estimator"] >= term
    assert planned["embeddings"] == 2 * 4 * (12 + 24) * (3 * 16 + 16)
