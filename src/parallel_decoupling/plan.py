"""``plan``: an estimate, good to about a third, of the memory of a run, before any weight is loaded."""

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from rich.table import Table
from torch import nn

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.evaluation.report import text_table
from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.model.encoder import ParallelEncoder, build_encoder
from parallel_decoupling.model.open_clip import is_open_clip
from parallel_decoupling.model.path_lora import PathLoRA
from parallel_decoupling.objective.vclub import MutualInformation
from parallel_decoupling.option_types import PositiveFloat, checked
from parallel_decoupling.training.compute import paths_per_layer
from parallel_decoupling.training.settings import check_trained_dtype, check_trainer, read_settings

TEXT_TOKENS, NATURAL_IMAGE = 64, (640, 480)
"""Assumed tokens of text per input, and width and height of an image before the image policy (ours)."""
QUERY_IMAGES, CANDIDATE_IMAGES = 0.77, 0.45
"""Shares of MMEB-train's 1.07 M rows whose query and whose positive candidate have an image."""
USABLE = 0.9  # the share of a GPU's memory that kernels, fragments and the CUDA context leave (ours)
FP32, NF4, GIB = 4, 0.5 + 1 / 64 + 4 / (64 * 256), 2**30
"""Bytes per value in fp32, and in four bits with their (quantized) scales; bytes per GiB."""
PRECISIONS = {"32": "32-true", "None": "32-true", "bf16": "bf16-mixed"}
"""The Trainer's other names for what trains here."""


@checked()
def plan_tables(
    model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any], gpu_memory_gib: PositiveFloat = 80.0
) -> list[Table]:
    """Return tables for all arguments of ``PDFEmbedder``, of ``MMEBDataModule`` and of the Trainer."""
    plan = Plan(model, data, trainer)
    needed = sum(plan.memory.values())
    fits = "fits" if needed <= USABLE * gpu_memory_gib * GIB else "does not fit"
    shares = f"{QUERY_IMAGES:.0%} of queries and {CANDIDATE_IMAGES:.0%} of candidates"
    memory = {name: f"{size / GIB:.2f} GiB" for name, size in plan.memory.items() if size}
    tables = {
        "Batch": {
            "global batch": f"{plan.queries} pairs, {plan.queries // plan.processes} per process",
            "processes": f"{plan.processes} ({plan.strategy})",
            "negatives per query": f"{plan.candidates - 1} (gathered from all processes)",
            "pairs of the run": f"{plan.steps * plan.queries:,} in {plan.steps:,} steps",
            "assumed tokens": f"{TEXT_TOKENS} of text, {plan.image.tokens} of an image in {shares}",
        },
        "Parameters": {
            name: f"{count:,} ({size / GIB:.2f} GiB)" for name, (count, size, _) in plan.groups.items()
        },
        f"Memory of one GPU of {gpu_memory_gib:g} GiB (estimate)": {
            **memory,
            "together": f"{needed / GIB:.2f} GiB: {fits} into {USABLE:.0%}",
        },
    }
    return [text_table(title, ("quantity", "value"), [*rows.items()]) for title, rows in tables.items()]


def read_layout(trainer: Mapping[str, Any]) -> tuple[int, str]:
    """Return the number of processes and ``single``, ``ddp`` or ``fsdp2``, as the Trainer would."""
    devices, strategy = str(trainer["devices"]), trainer["strategy"]
    if devices in ("auto", "-1"):
        count = max(1, torch.cuda.device_count())
    elif "," in devices or "[" in devices:
        count = len({*re.findall(r"\d+", devices)})
    else:
        count = int(devices) if devices.isdecimal() else 0
    if count < 1:
        raise ValueError(f"trainer.devices={devices} cannot be planned: use 1 or more.")
    if trainer["accelerator"] not in ("auto", "cpu", "cuda", "gpu"):
        raise ValueError(f"trainer.accelerator={trainer['accelerator']} cannot be planned: use cpu or gpu.")
    processes = count * int(trainer["num_nodes"])
    name = ("ddp" if processes > 1 else "single") if strategy == "auto" else str(strategy).lower()
    for known in ("fsdp2", "ddp", "single"):
        if known in name:  # of a class, too
            return processes, known
    raise ValueError(f"trainer.strategy={strategy} cannot be planned: use auto, ddp or fsdp2.")


class ImageCost(NamedTuple):
    """Tokens of one image in the language model, its patches in the tower, and the bytes of its pixels."""

    tokens: int
    patches: int
    num_bytes: int


def image_cost(backbone: Backbone, images: ImagePolicy) -> ImageCost:
    """Let the backbone's processor prepare a picture of ``NATURAL_IMAGE``, and count: 0 without vision."""
    if backbone.family.vision_module is None:
        return ImageCost(0, 0, 0)
    collator = Collator.of(backbone, images=images)
    inputs = collator.encode_inputs([RawInput(IMAGE_PLACEHOLDER, (Image.new("RGB", NATURAL_IMAGE),))])
    token = backbone.processor.tokenizer.convert_tokens_to_ids(backbone.image_token)
    tokens = int((inputs.tokens["input_ids"] == token).sum())
    pixels, vision = inputs.vision[0]["pixel_values"].numel(), backbone.config.vision_config
    patch = vision.patch_size[0] if isinstance(vision.patch_size, list | tuple) else vision.patch_size
    patches = pixels // (3 * patch**2 * getattr(vision, "temporal_patch_size", 1))
    return ImageCost(tokens, patches, pixels * FP32)


def saved_bytes(layers: nn.Module, element: int) -> int:
    """Return the bytes per token that the backward pass of transformer layers needs.

    Those are input and output of every linear layer, again the (cast) input of a trained or adapted one, and
    in fp32 the input of every norm.
    """
    linear = {name: m for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
    own = [m.in_features + m.out_features for name, m in linear.items() if "lora_" not in name]
    cast = [m.in_features for n, m in linear.items() if m.weight.requires_grad and "lora_B" not in n]
    cast += [m.path_lora_A.shape[-1] for m in layers.modules() if isinstance(m, PathLoRA)]
    norms = [p.numel() for n, p in layers.named_parameters() if "norm" in n and n.endswith("weight")]
    return element * (sum(own) + sum(cast)) + FP32 * sum(norms)


class Plan:
    """What one run needs."""

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
        if is_open_clip(model["backbone"]):
            raise ValueError(f"backbone {model['backbone']!r} is an OpenCLIP model, which has no plan.")
        self.model, plain = read_settings(model)
        check_trained_dtype(plain)
        precision = PRECISIONS.get(str(trainer["precision"]), str(trainer["precision"]))
        check_trainer(None, precision)
        self.processes, self.strategy = read_layout(trainer)
        if trainer["max_steps"] == 0:
            raise ValueError("trainer.max_steps=0 trains nothing: use 1 or more.")
        self.queries, self.steps = int(data["batch_size"]), max(0, int(trainer["max_steps"]))
        self.candidates: int = self.queries * (data["positives"] + data["hard_negatives"])
        if self.queries % self.processes:
            raise ValueError(f"batch_size={self.queries} must be a multiple of {self.processes} processes.")
        on_paper = {"meta": True, "prefix_init": "random", "attention": "sdpa", "quantization": None}
        on_paper |= {"gradient_checkpointing": False, "revision": model["backbone_revision"]}
        self.encoder = cast(ParallelEncoder, build_encoder(model["backbone"], {**self.model, **on_paper}))
        self.backbone = self.encoder.backbone
        self.element = 2 if precision == "bf16-mixed" else self.backbone.dtype.itemsize
        self.image = image_cost(self.backbone, ImagePolicy.from_settings(data))
        self.paths = paths_per_layer(self.model, self.backbone.num_layers)
        queries, candidates = self.queries // self.processes, self.candidates // self.processes
        self.rows = queries + candidates  # of a process
        self.images = QUERY_IMAGES * queries + CANDIDATE_IMAGES * candidates

    @cached_property
    def groups(self) -> dict[str, tuple[int, float, bool]]:
        """Return by part how many parameters it has, their bytes on one GPU, and whether they train."""
        language = set(self.backbone.language_model.parameters())
        linear = {m.weight for m in self.backbone.base.modules() if isinstance(m, nn.Linear)}
        sizes = {"num_paths": self.encoder.num_paths, "embed_dim": self.encoder.embed_dim}
        with torch.device("meta"):
            mi = self.model["mi"]
            estimator = MutualInformation(mi.kind, hidden_size=mi.hidden_size, **sizes)
        named = [*self.encoder.named_parameters(), *(("estimator", p) for p in estimator.parameters())]
        if self.model["learn_temperature"]:
            named.append(("temperature", nn.Parameter(torch.zeros(()))))
        groups: dict[str, tuple[int, float, bool]] = {}
        for name, parameter in named:
            part, trains, size = name.split(".")[0], parameter.requires_grad, float(parameter.itemsize)
            if part == "backbone":
                inside = parameter in language
                part = "language model" if inside else "vision tower and projector"
                part += ", trained" if trains else ""
                if self.model["quantization"] and parameter in linear and not trains:
                    size = NF4
                if self.strategy == "fsdp2" and inside and trains == (self.backbone.adapter.kind == "full"):
                    size /= self.processes
            count, num_bytes, _ = groups.get(part, (0, 0.0, trains))
            groups[part] = count + parameter.numel(), num_bytes + size * parameter.numel(), trains
        return groups

    @property
    def memory(self) -> dict[str, float]:
        """Return the bytes on one GPU by part."""
        gradients = sum(size for _, size, trains in self.groups.values() if trains)
        block = sum(p.numel() * p.itemsize for p in self.backbone.layers[0].parameters())
        rows = min(self.rows, self.model["chunk_size"] or self.rows)
        pairs, dim = math.comb(self.encoder.num_paths, 2), self.encoder.embed_dim
        scores = 4 * (self.encoder.num_paths + 1) * self.queries * self.candidates
        embeddings = (self.queries + self.candidates) * dim * (2 * self.encoder.num_paths + 2 + 8 * pairs)
        return {
            "weights": sum(size for _, size, _ in self.groups.values()),
            "weights gathered by FSDP2": 2 * block if self.strategy == "fsdp2" else 0,
            "gradients": gradients,
            "gradient buckets of DDP": gradients if self.strategy == "ddp" else 0,
            "optimizer states": 2 * gradients,
            "pixels of the batch": self.images * self.image.num_bytes,
            "activations of a forward pass": rows * self._activations(),
            "objective": FP32 * (scores + embeddings),
        }

    def _activations(self) -> float:
        """Return the bytes that a row with an image leaves for its backward pass."""
        tower, layers = self.backbone.vision_tower, self.backbone.num_layers
        kept, of_patch = saved_bytes(self.backbone.layers, self.element), saved_bytes(tower, self.element)
        if self.model["gradient_checkpointing"]:  # the inputs of all layers, and one layer at a time
            inputs = layers * self.backbone.hidden_size * self.backbone.dtype.itemsize
            kept, of_patch = inputs + kept // layers, of_patch // layers
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        tokens = (TEXT_TOKENS + self.image.tokens) * self.paths
        return tokens * kept + self.image.patches * of_patch * trains
