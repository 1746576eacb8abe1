"""Sections of ``benchmarks.gpu`` with a model of real size: training steps, GradCache, encoding, vCLUB.

Rows are those that ``plan`` assumes: a text of 64 tokens, and in a share of them a picture of 640 x 480.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.flops import step_flops
from benchmarks.gpu_machine import Machine, Row
from benchmarks.vclub import kind_seconds
from parallel_decoupling.batch import IMAGE_PLACEHOLDER, EncoderInputs, PairBatch, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.plan import CANDIDATE_IMAGES, GIB, QUERY_IMAGES, TEXT_TOKENS, Plan
from parallel_decoupling.training.module import PDFEmbedder

PREFIX_LENGTH = 8
ADAPTER = {"kind": "lora", "rank": 16, "alpha": 64}
ONE_PATH: dict[str, Any] = {"mi": {"kind": "none"}, "mi_weight": 0.0, "aggregate_weight": 0.0}


class Steps(Callback):
    """The seconds of every step after the first, and the peak memory of all."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Wait for the device and start the clock."""
        self._start = self.machine.now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Wait for the device and stop the clock."""
        self.seconds.append(self.machine.now() - self._start)


def batch_inputs(machine: Machine, backbone: Backbone, with_image: Sequence[bool]) -> EncoderInputs:
    """Make rows of ``TEXT_TOKENS`` tokens, some of them with a picture; their ends are random."""
    words = "a red circle left of a small blue square "
    tokenizer = backbone.processor.tokenizer
    text = tokenizer.decode(tokenizer(words * TEXT_TOKENS)["input_ids"][:TEXT_TOKENS])
    picture = Image.effect_noise(machine.size.image, 60).convert("RGB")
    raw = [RawInput(f"{IMAGE_PLACEHOLDER}{text}", (picture,)), RawInput(text)]
    two = Collator(backbone.processor, image_token=backbone.image_token).encode_inputs(raw)
    inputs = two.select([0 if image else 1 for image in with_image])
    ids = inputs.tokens["input_ids"].clone()
    ids[ids == tokenizer.convert_tokens_to_ids(backbone.image_token)] = backbone.config.image_token_id
    ids[:, -8:] = torch.randint(0, 100, (len(with_image), 8))
    return EncoderInputs({**inputs.tokens, "input_ids": ids}, inputs.vision)


def make_plan(machine: Machine, batch_size: int, settings: dict[str, Any]) -> Plan:
    """Plan a single process that trains with these settings."""
    kinds = (PDFEmbedder, MMEBDataModule)
    model, data = ({n: p.default for n, p in inspect.signature(kind).parameters.items()} for kind in kinds)
    model |= {"backbone": machine.backbone, "dtype": "bfloat16", "prefix_init": "random", **settings}
    data |= {"batch_size": batch_size}
    trainer = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer |= {"precision": "bf16-mixed", "max_steps": 1}
    return Plan(model, data, trainer)


def train(machine: Machine, batch_size: int, what: str, steps: int, **settings: Any) -> list[Row]:
    """Take training steps; return seconds, share of the peak and memory, each beside what it should be."""
    settings = {"adapter": ADAPTER, "prefix_length": PREFIX_LENGTH, **settings}
    plan = make_plan(machine, batch_size, settings)
    plain = {"gradient_checkpointing": False, "chunk_size": None}
    model_flops = step_flops(make_plan(machine, batch_size, {**settings, **plain}))
    peak_seconds = step_flops(plan) / machine.peak
    expected = 3 * steps * peak_seconds  # at a third of the peak
    if expected > machine.seconds_left:
        left = f"about {expected:.0f} s of the {machine.seconds_left:.0f} s that are left"
        return [Row(what, note=f"left out: it would take {left}")]
    machine.forget_memory()
    module = machine.embedder(**settings)
    shares = (QUERY_IMAGES, CANDIDATE_IMAGES)
    with_image = [row < round(share * batch_size) for share in shares for row in range(batch_size)]
    inputs = batch_inputs(machine, module.encoder.backbone, with_image)
    batch = PairBatch(inputs, torch.arange(batch_size), ("random",) * batch_size)
    clock = Steps(machine)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = {"accelerator": "gpu" if machine.is_cuda else "cpu", "devices": 1}
    options |= {"precision": "bf16-mixed", "max_steps": steps, "callbacks": [clock]}
    trainer = Trainer(**options, **dict.fromkeys(quiet, False))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None, collate_fn=None))
    seconds = min(clock.seconds[1:] or clock.seconds)
    loss = float(trainer.callback_metrics["train/loss"])
    memory, planned = machine.peak_memory() / GIB, sum(plan.memory.values()) / GIB
    share = 100 * model_flops / (seconds * machine.peak)
    return [
        Row(f"{what}: step", seconds, "s", peak_seconds, "s at the peak"),
        Row(f"{what}: model operations", share, "% of the peak"),
        Row(f"{what}: peak memory", memory, "GiB", planned, "GiB planned"),
        Row(f"{what}: loss", loss, ok=loss == loss and abs(loss) != float("inf")),
    ]


def steps(machine: Machine) -> list[Row]:
    """Train 1, 2 and 4 paths in one graph."""
    batch_size, rows = machine.size.step_batch, list[Row]()
    for paths in (1, 2, 4):
        settings: dict[str, Any] = {"num_paths": paths, "gradient_checkpointing": True}
        settings |= ONE_PATH if paths == 1 else {}
        what, count = f"N = {paths}, batch {batch_size}", 1 + machine.size.repeats
        rows += train(machine, batch_size, what, count, **settings)
    return rows


def grad_cache(machine: Machine) -> list[Row]:
    """Train four paths with big batches in chunks; memory should grow by pixels and scores alone."""
    chunk = machine.size.chunk
    options: dict[str, Any] = {"num_paths": 4, "gradient_checkpointing": True, "chunk_size": chunk}
    return [
        row
        for batch_size in machine.size.cached_batches
        for row in train(machine, batch_size, f"batch {batch_size} in chunks of {chunk}", 1, **options)
    ]


def encode(machine: Machine) -> list[Row]:
    """Encode pictures that are tensors already; the floor is the operations of a forward pass at the peak."""
    rows, images = [], machine.size.encode_batch
    kinds = {"plain backbone": (1, 0, None), "one of four paths": (4, 8, [0]), "all four paths": (4, 8, None)}
    for name, (num_paths, prefix_length, paths) in kinds.items():
        settings: dict[str, Any] = {"num_paths": num_paths, "prefix_length": prefix_length}
        settings |= {"adapter": {"kind": "frozen"}, **ONE_PATH}
        module = machine.embedder(**settings).to(machine.device).eval()
        inputs = batch_inputs(machine, module.encoder.backbone, [True] * images).to(machine.device)
        with torch.inference_mode():
            seconds = machine.seconds(partial(module, inputs, paths))
        tokens = inputs.tokens["input_ids"].numel() * (len(paths) if paths else num_paths)
        language, tower = module.encoder.backbone.layers, module.encoder.backbone.vision_tower
        patches = sum(row["pixel_values"].shape[0] for row in inputs.vision)
        weights = (sum(p.numel() for p in part.parameters() if p.ndim > 1) for part in (language, tower))
        flops = sum(2 * each * count for each, count in zip(weights, (tokens, patches), strict=True))
        rows.append(Row(name, images / seconds, "images/s", images * machine.peak / flops, "at the peak"))
    return rows


def vclub(machine: Machine) -> list[Row]:
    """Measure the estimator's part of a step: fits, value and gradient, with four paths."""
    batch_size, dim = machine.size.estimator
    machine.forget_memory()
    seconds = kind_seconds(4, batch_size, dim, machine.size.repeats, machine.device, ("vclub",))
    gib = machine.peak_memory() / GIB
    what = f"B = {batch_size}, D = {dim}, four paths"
    embeddings = 2 * batch_size * 4 * dim * 4 / GIB
    return [
        Row(f"{what}: fits, value and gradient", 1e3 * seconds["vclub"], "ms"),
        Row(f"{what}: peak memory", gib, "GiB", embeddings, "GiB of embeddings"),
    ]


SECTIONS: dict[str, Callable[[Machine], list[Row]]] = {
    "steps": steps,
    "grad_cache": grad_cache,
    "encode": encode,
    "vclub": vclub,
}
