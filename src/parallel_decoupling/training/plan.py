"""``lightning plan``: what a run would need, before any weight is loaded.

From the settings of ``lightning fit`` to numbers: how the batch is made up, what trains, the memory of one
GPU by part, the work of one step. Floor arithmetic (``training.arithmetic``, ``training.memory``) on shapes
of the meta device; the tables are in ``training.plan_tables``.

Assumed, as no data is read: ``TEXT_TOKENS`` tokens of text per input; images as large as the data's image
policy says, or ``NATURAL_IMAGE`` where it leaves them alone; every row of a forward pass has one (for the
memory of activations), and as many rows as in MMEB-train have one (for the work and a batch's pixels);
``quantization=4bit`` as ``memory.weight_sizes`` says. An ``initial_adapter`` is read from a local folder;
one of the hub is not downloaded: ``adapter`` counts instead, and a row of ``Plan.parameters`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.model.backbone import AdapterConfig, meta_backbone
from parallel_decoupling.model.encoder import nested_dims
from parallel_decoupling.model.families import Family
from parallel_decoupling.model.open_clip import is_open_clip
from parallel_decoupling.model.prefixes import prefix_range
from parallel_decoupling.objective.mutual_information import MutualInformation
from parallel_decoupling.training import arithmetic, memory
from parallel_decoupling.training.memory import FP32, WeightCopies
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig
from parallel_decoupling.training.settings import (
    LOADING,
    as_config,
    as_plain,
    check_settings,
    check_trained_dtype,
)
from parallel_decoupling.training.strategies import sharded_blocks

TEXT_TOKENS = 64
"""Of one input, instruction included (ours)."""
NATURAL_IMAGE = (640, 480)
"""Width and height of an image before the image policy (ours: the usual size of COCO's)."""
QUERY_IMAGES, CANDIDATE_IMAGES = 0.77, 0.45
"""Shares of MMEB-train's 1.07 M rows whose query and whose positive candidate have an image."""
USABLE = 0.9
"""Share of a GPU's memory to plan with; kernels, fragments and the CUDA context need the rest (ours)."""
PEAK_FLOPS, UTILISATION = 989e12, 0.4
"""Dense bfloat16 of an H100, and the share of it that training reaches (ours)."""


@dataclass(frozen=True)
class Layout:
    """Processes, and how they share a model.

    Attributes:
        devices: per node, one process each.
        nodes: how many.
        strategy: ``single``, ``ddp`` or ``fsdp2``.
    """

    devices: int
    nodes: int
    strategy: str

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.devices * self.nodes

    @classmethod
    def from_trainer(cls, trainer: Mapping[str, Any]) -> Layout:
        """Read ``devices``, ``num_nodes`` and ``strategy``.

        Raises:
            ValueError: for a strategy that this package does not train with.
        """
        devices, nodes = _num_devices(trainer["devices"]), int(trainer["num_nodes"])
        strategy = trainer["strategy"]
        name = strategy if isinstance(strategy, str) else strategy["class_path"].rsplit(".", 1)[-1].lower()
        if name == "auto":
            name = "ddp" if devices * nodes > 1 else "single"
        for known in ("single", "ddp", "fsdp2"):
            if name.startswith(known):
                return cls(devices, nodes, known)
        raise ValueError(f"trainer.strategy={name} cannot be planned: use auto, ddp or fsdp2.")


def _num_devices(devices: Any) -> int:
    """What the Trainer would make of ``devices``; ``auto`` and -1 are this machine's GPUs, or 1."""
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    if isinstance(devices, list):
        return len(devices)
    return len(devices.split(",")) if "," in str(devices) else int(devices)


@dataclass(frozen=True)
class Parameters:
    """One group: how many values and bytes, whether they train, whether FSDP2 shards them."""

    name: str
    count: int
    num_bytes: int
    trains: bool
    sharded: bool = False


class Plan:
    """What one run needs.

    Args:
        model: arguments of ``PDFEmbedder``, all of them.
        data: arguments of ``MMEBDataModule``, all of them.
        trainer: arguments of the Trainer, all of them.
        gpu_memory_gib: of each GPU.

    Attributes:
        layout: processes and strategy.
        backbone: on the meta device.
        image: an image's tokens and patches.
        text_tokens: of an input beside its image.

    Raises:
        ValueError: for settings that ``lightning fit`` would refuse, a batch that the processes cannot share,
            or a backbone that cannot be planned.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        data: Mapping[str, Any],
        trainer: Mapping[str, Any],
        gpu_memory_gib: float = 80.0,
    ) -> None:
        adapter = as_config(AdapterConfig, model["adapter"], "adapter")
        self.mi = as_config(MIConfig, model["mi"], "mi")
        self.accumulate: int = as_config(OptimizerConfig, model["optimizer"], "optimizer").accumulate_batches
        plain = {**model, "mi": as_plain(self.mi), "adapter": as_plain(adapter)}
        check_settings(plain)
        check_trained_dtype(plain)
        self.model, self.data, self.trainer = model, data, trainer
        self.gpu_memory_gib, self.text_tokens = gpu_memory_gib, TEXT_TOKENS
        self.layout = Layout.from_trainer(trainer)
        self.queries = int(data["batch_size"])
        self.candidates: int = self.queries * (1 + data["hard_negatives"])
        if self.queries % self.layout.processes:
            raise ValueError(
                f"data.batch_size={self.queries} is the global batch and must be a multiple of the "
                f"{self.layout.processes} processes."
            )
        if is_open_clip(model["backbone"]):
            raise ValueError(f"backbone {model['backbone']!r} is an OpenCLIP model, which has no plan.")
        self.quantized: bool = model["quantization"] is not None
        if self.quantized and adapter.kind == "full":
            raise ValueError("quantized weights cannot train: set adapter.kind to lora, dora or frozen.")
        if self.quantized and self.layout.strategy == "fsdp2":
            raise ValueError("fsdp2 does not shard 4-bit weights: use strategy ddp, or no quantization.")
        options: dict[str, Any] = {name: model[name] for name in LOADING} | {"adapter": adapter}
        if model["family"] is not None:
            options["family"] = as_config(Family, model["family"], "family")
        self.unread_adapter: str | None = None
        if model["initial_adapter"] is not None and not Path(model["initial_adapter"]).is_dir():
            self.unread_adapter, options["initial_adapter"] = model["initial_adapter"], None
        self.backbone = meta_backbone(model["backbone"], revision=model["backbone_revision"], **options)
        factor = arithmetic.image_factor(self.backbone.config)
        resize = replace(ImagePolicy.from_settings(data), factor=factor)
        width, height = resize(Image.new("1", NATURAL_IMAGE)).size
        self.image = arithmetic.image_cost(self.backbone.config, height, width)

    @property
    def row_tokens(self) -> int:
        """L of a row with an image."""
        return self.text_tokens + self.image.tokens

    @property
    def element(self) -> int:
        """Bytes per value of matrix products and of what they leave for the backward pass."""
        return 2 if "16" in str(self.trainer["precision"]) else self.backbone.dtype.itemsize

    @property
    def paths_per_layer(self) -> float:
        """Rows per input in the average layer: layers below the first prefix see an input once."""
        return arithmetic.paths_per_layer(self.model, self.backbone.num_layers)

    @property
    def graph_rows(self) -> tuple[int, int]:
        """Rows of one process whose activations are alive at once: without chunks, and in one chunk."""
        sides = [(size, rows // self.layout.processes) for size, rows, _ in self._sides()]
        whole = sum(rows for size, rows in sides if size is None)
        return whole, max([min(size, rows) for size, rows in sides if size is not None], default=0)

    @property
    def forward_passes(self) -> int:
        """Calls of the encoder for one batch, of all processes."""
        return self.layout.processes * sum(self._passes(size, rows) for size, rows, _ in self._sides())

    def _passes(self, chunk_size: int | None, rows: int) -> int:
        """Calls of the encoder on one process for a side with ``rows`` on all of them."""
        return arithmetic.passes_of_side(chunk_size, rows // self.layout.processes)

    def _sides(self) -> list[tuple[int | None, int, float]]:
        """Chunk size, rows of all processes and images of queries and of candidates."""
        queries, candidates = self.queries, self.candidates
        return [
            (self.model["query_chunk_size"], queries, QUERY_IMAGES * queries),
            (self.model["candidate_chunk_size"], candidates, CANDIDATE_IMAGES * candidates),
        ]

    def _activations(self, rows: int, passes: int) -> dict[str, float]:
        """Of ``rows`` whose graph was made in ``passes`` forward passes; see ``memory.activation_bytes``.

        Layers below the first prefix have no gradient if nothing but the prefixes trains.
        """
        backbone, model = self.backbone, self.model
        layers, paths = backbone.num_layers, self.paths_per_layer
        if backbone.adapter.kind == "frozen":
            layers -= prefix_range(model["prefix_layers"], layers).start
            paths = model["num_paths"]
        autocast = "mixed" in str(self.trainer["precision"])
        copies = memory.weight_copies(backbone, quantized=self.quantized) if autocast else WeightCopies()
        return memory.activation_bytes(
            backbone,
            rows=rows,
            layers=layers,
            paths_per_layer=paths,
            row_tokens=self.row_tokens,
            prefix_length=model["prefix_length"],
            patches=self.image.patches,
            element=self.element,
            checkpointing=model["gradient_checkpointing"],
            prompt_tokens=arithmetic.prompt_tokens(model, passes),
            passes=passes,
            copies=copies,
        )

    @cached_property
    def parameters(self) -> list[Parameters]:
        """All groups that hold a parameter, and one without if an initial adapter could not be read."""
        backbone = self.backbone
        language = {id(parameter) for parameter in backbone.language_model.parameters()}
        sizes = memory.weight_sizes(backbone, quantized=self.quantized)
        full, fsdp2 = backbone.adapter.kind == "full", self.layout.strategy == "fsdp2"
        groups = []
        for part, inside in (("language model", True), ("vision tower and projector", False)):
            own = [p for p in backbone.base.parameters() if (id(p) in language) == inside]
            for trains in (False, True):
                chosen = [p for p in own if p.requires_grad == trains]
                name = f"{part}, adapters" if trains and not full else part
                size = round(sum(sizes[id(p)] for p in chosen))
                sharded = fsdp2 and inside and (full or not trains)
                groups.append(Parameters(name, sum(p.numel() for p in chosen), size, trains, sharded))
        for name, count in self._added_parameters().items():
            groups.append(Parameters(name, count, FP32 * count, trains=True))
        groups = [group for group in groups if group.count]
        if self.unread_adapter is not None:
            name = f"initial adapter {self.unread_adapter}: not counted (no local folder), adapter is instead"
            groups.append(Parameters(name, 0, 0, trains=False))
        return groups

    def _added_parameters(self) -> dict[str, int]:
        """What the package adds to a backbone; fp32, never sharded."""
        model, backbone, num_paths = self.model, self.backbone, self.model["num_paths"]
        slots = num_paths * model["prefix_length"]
        num_layers = len(prefix_range(model["prefix_layers"], backbone.num_layers))
        of_a_slot = {
            "deep": num_layers * 2 * backbone.num_key_value_heads * backbone.head_dim,
            "shallow": backbone.hidden_size,
        }
        with torch.device("meta"):
            estimator = MutualInformation(
                self.mi.kind,
                num_paths=num_paths,
                embed_dim=backbone.hidden_size,
                hidden_size=self.mi.hidden_size,
            )
        return {
            "prefixes": slots * of_a_slot[model["prefix_type"]],
            "aggregation": num_paths if model["aggregation"] == "learned" else 0,
            "temperature": int(model["learn_temperature"]),
            "estimator": sum(parameter.numel() for parameter in estimator.parameters()),
        }

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes on one GPU by part.

        Weights: of every group, divided by the processes if FSDP2 shards it. Gathered: under FSDP2 the
        current and the next block and the language model's embedding and norm; if they train, the gradients
        of two blocks. Gradients: one value per trainable one; DDP's buckets: the same again. Optimizers: two.
        Pixels: of the process's rows, which move to the GPU with the batch. Activations: of one chunk or of
        all rows without chunks, whichever is more. These and the objective's parts: see ``training.memory``.
        """
        processes, strategy, model = self.layout.processes, self.layout.strategy, self.model
        held = {g.name: g.num_bytes / (processes if g.sharded else 1) for g in self.parameters}
        trained = [group for group in self.parameters if group.trains]
        gradients = sum(held[group.name] for group in trained)
        block = sum(p.numel() * p.itemsize for p in sharded_blocks(self.backbone)[0].parameters())
        sharded = sum(group.num_bytes for group in self.parameters if group.sharded)
        outside_blocks = sharded - block * self.backbone.num_layers
        blocks = 4 if self.backbone.adapter.kind == "full" else 2
        whole, chunk = self.graph_rows
        passes = sum(self._passes(None, rows) for size, rows, _ in self._sides() if size is None)
        alternatives = [self._activations(whole, passes), self._activations(chunk, 1)]
        activations: dict[str, float] = max(alternatives, key=lambda parts: sum(parts.values()))
        objective = memory.objective_bytes(
            model["num_paths"],
            self.backbone.hidden_size,
            self.mi,
            queries=self.queries,
            candidates=self.candidates,
            aggregate_dim=self.backbone.hidden_size
            * (model["num_paths"] if model["aggregation"] == "concat" else 1),
            dims=nested_dims(model["matryoshka_dims"], self.backbone.hidden_size),
        )
        return {
            "weights": sum(held.values()),
            "weights gathered by FSDP2": blocks * block + outside_blocks if strategy == "fsdp2" else 0,
            "gradients": gradients,
            "gradient buckets of DDP": gradients if strategy == "ddp" else 0,
            "optimizer states": 2 * gradients,
            "pixels of the batch": self.images
            / processes
            * memory.pixel_bytes(self.backbone.config, self.image),
            **activations,
            "gathered embeddings": objective["embeddings"],
            "contrastive terms": objective["contrastive"],
            "estimator": objective["estimator"],
        }

    @cached_property
    def peak(self) -> float:
        """Bytes on one GPU at the worst moment.

        With GradCache on both sides the objective is done before the activations of a chunk exist, so the
        larger of both counts; otherwise their sum.
        """
        parts = dict(self.memory)
        activations = parts.pop("activations") + parts.pop("workspace of a layer")
        objective = parts.pop("contrastive terms") + parts.pop("estimator")
        together = activations + objective if self.graph_rows[0] else max(activations, objective)
        return sum(parts.values()) + together

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the reserve free."""
        return self.peak <= USABLE * self.gpu_memory_gib * 2**30

    @cached_property
    def tokens(self) -> float:
        """Tokens of one batch of all processes, without padding."""
        return (self.queries + self.candidates) * self.text_tokens + self.images * self.image.tokens

    @property
    def token_passes(self) -> float:
        """Of one batch of all processes; see ``arithmetic.token_passes``."""
        return arithmetic.token_passes(
            self.model, self.backbone.num_layers, tokens=self.tokens, forward_passes=self.forward_passes
        )

    @property
    def images(self) -> float:
        """Images of one batch of all processes."""
        return sum(images for _, _, images in self._sides())

    @property
    def steps(self) -> int | None:
        """Main steps of the run; None without ``max_steps``."""
        steps = int(self.trainer["max_steps"])
        return steps if steps > 0 else None

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of one main step of all processes; see ``arithmetic.step_flops``."""
        model, processes = self.model, self.layout.processes
        return self.accumulate * sum(
            arithmetic.step_flops(
                self.backbone,
                rows=rows,
                images=images,
                text_tokens=self.text_tokens,
                image=self.image,
                paths=self.paths_per_layer,
                prefix_length=model["prefix_length"],
                replayed=size is not None,
                checkpointing=model["gradient_checkpointing"],
                prompts=arithmetic.prompt_tokens(model, processes * self._passes(size, rows)),
            )
            for size, rows, images in self._sides()
        )

    @property
    def seconds(self) -> float:
        """Of one main step, on H100s at the assumed utilisation."""
        return self.flops / (self.layout.processes * PEAK_FLOPS * UTILISATION)
