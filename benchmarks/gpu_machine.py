"""What the sections of ``benchmarks.gpu`` share: the card, the sizes, random backbones, time and memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModel

from parallel_decoupling.model import encoder as encoders
from parallel_decoupling.model.adapters import AdapterConfig, add_adapters
from parallel_decoupling.model.backbone import Backbone, load_processor
from parallel_decoupling.model.families import FAMILIES
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.families import save_tiny_backbone
from tests.support.published_sizes import save_published

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 operations per second with fp32 sums, by a part of the card's name: NVIDIA's data sheets (the
figure without sparsity), for the RTX cards the white papers of Ada (AD102) and Ampere (GA102)."""


def published_peak(name: str) -> float | None:
    """Return the published peak of a card, None if it is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Row:
    """One line of the report: a value, and beside it a floor, a limit, or what ``plan`` says."""

    what: str
    value: float = math.nan
    unit: str = ""
    beside: float | None = None
    beside_is: str = ""
    note: str = ""
    ok: bool = True


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    save_config: Callable[[Path], str]
    image: tuple[int, int]
    product: int
    step_batch: int
    cached_batches: tuple[int, ...]
    chunk: int
    encode_batch: int
    estimator: tuple[int, int]  # B and D
    repeats: int


def _save_published(folder: Path) -> str:
    return save_published("Qwen/Qwen2-VL-2B-Instruct", folder)


SIZES = {
    "full": Size(_save_published, (640, 480), 8192, 16, (256, 1024), 16, 32, (1024, 1536), 5),
    "small": Size(save_tiny_backbone, (64, 48), 256, 4, (8, 16), 4, 4, (16, 32), 1),
}


@dataclass(frozen=True)
class Machine:
    """The device, the sizes, the folder of config and processor, and when all must be over."""

    device: str
    size: Size
    backbone: str
    deadline: float
    peak: float = math.nan  # operations per second behind the floors

    def with_peak(self, published: float | None, results: Mapping[str, Any]) -> Machine:
        """Return a machine that knows its peak: the published one, or the products that were measured."""
        rows = results.get("products", {}).get("rows", [])
        measured = max((1e12 * row["value"] for row in rows), default=math.nan)
        return replace(self, peak=measured if published is None else published)

    @property
    def is_cuda(self) -> bool:
        """Tell whether there is a GPU."""
        return self.device == "cuda"

    @property
    def seconds_left(self) -> float:
        """Return the time until the deadline."""
        return self.deadline - time.monotonic()

    def seconds(self, function: Callable[[], object], repeats: int | None = None) -> float:
        """Return the fastest of some calls, after one that does not count."""
        times = []
        for _ in range((repeats or self.size.repeats) + 1):
            start = self.now()
            function()
            times.append(self.now() - start)
        return min(times[1:])

    def now(self) -> float:
        """Return the clock when the device has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def forget_memory(self) -> None:
        """Start measuring the peak memory anew."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> int:
        """Return the most bytes that were allocated; of a CPU, those of the process since its start."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def embedder(self, **settings: Any) -> PDFEmbedder:
        """Build a model on the device, with random bf16 weights and no file of them."""

        @wraps(encoders.load_backbone)
        def load(name: str, **options: Any) -> Backbone:
            used = ("adapter", "dtype", "attention", "gradient_checkpointing")
            return random_backbone(name, self.device, **{key: options[key] for key in used})

        with mock.patch.object(encoders, "load_backbone", load):
            return PDFEmbedder(backbone=self.backbone, dtype="bfloat16", prefix_init="random", **settings)


def random_backbone(
    folder: str,
    device: str,
    *,
    adapter: AdapterConfig | None = None,
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
) -> Backbone:
    """Build a backbone of the config in ``folder`` with random weights, made on the device."""
    made = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        base = AutoModel.from_config(made, dtype=getattr(torch, dtype))
    family, processor = FAMILIES[made.model_type], load_processor(folder, made)
    options: dict[str, Any] = {"attention": attention, "gradient_checkpointing": gradient_checkpointing}
    backbone = Backbone(base, processor, family, name=folder, **options)
    backbone.adapter = adapter or AdapterConfig()
    with torch.device(device):
        add_adapters(base, backbone.family, backbone.adapter)
    return backbone.train()
