"""``lightning plan`` against real steps: run as ``python -m benchmarks.plan`` from the repository root.

A small random-weight Qwen2-VL trains two steps with bf16-mixed precision on the CPU, in one process and in
two: with LoRA on weights in bfloat16 and in float32, and whole.
Per part: bytes of the tensors that exist (weights, gradients, optimizer states) or that autograd keeps for
the largest forward pass (activations), over the plan's. The last line of a layout is the most that torch has
allocated at once during the second step, above what exists before it, over the same of the plan; passing
copies and workspace are in it, which the plan leaves out. Wants about 4 GB of memory and five minutes.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2VLForConditionalGeneration

from parallel_decoupling.batch import PairBatch
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.training.arithmetic import ImageCost
from parallel_decoupling.training.memory import saved_bytes
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.plan import Plan
from tests.support.mmeb import save_tiny_mmeb
from tests.support.processes import run_ranks
from tests.support.tiny import tiny_config, tiny_processor

BATCH_SIZE, CHUNK, STEPS = 64, 16, 2
IMAGE = ImageCost(tokens=16, patches=64, context=64)
"""The largest of the data's images, 64 x 64 pixels."""
STEP = "all that a step allocates"


def save_backbone(folder: Path) -> str:
    """Write a Qwen2-VL of about 25 million weights."""
    processor = tiny_processor()
    config = tiny_config(processor.tokenizer, num_layers=6)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads = 512, 2048, 8
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    vision.hidden_size, vision.embed_dim, vision.depth = 512, 64, 2
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


class Measure(Callback):
    """What exists after the second step, and the most that it allocated."""

    def __init__(self, result_file: Path) -> None:
        self.result_file = result_file

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Record every allocation of the second step."""
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Add up the gradients; those of the estimator are gone by now and have its size."""
        estimator = sum(map(_size, pl_module.mutual_information.parameters()))
        self.gradients = estimator + sum(_size(p.grad) for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Add up the rest after the second step."""
        self.profiler.stop()
        if pl_module.batches_done < STEPS:
            return
        batch: PairBatch = args[0]
        states = [v for o in trainer.optimizers for s in o.state.values() for v in s.values() if v.ndim]
        measured = {
            STEP: self._peak(),
            "weights": sum(map(_size, pl_module.parameters())),
            "gradients": self.gradients,
            "optimizer states": sum(map(_size, states)),
            "row_tokens": batch.query.tokens["input_ids"].shape[1],
        }
        if trainer.world_size == 1 and not pl_module.hparams.gradient_checkpointing:
            measured["activations"] = self._activations(trainer, pl_module, batch)
        self.result_file.write_text(json.dumps(measured))

    def _peak(self) -> int:
        results = self.profiler.profiler.kineto_results.events()
        changes = [event.nbytes() for event in results if event.name() == "[memory]"]
        return max(accumulate(changes))

    def _activations(self, trainer: Trainer, module: Any, batch: PairBatch) -> int:
        rows = batch.query.select(range(CHUNK))
        with trainer.precision_plugin.forward_context():
            return saved_bytes(lambda: module.encoder(rows), module.parameters())


def _size(tensor: Tensor) -> int:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.itemsize


def run(folder: Path, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Two steps in this process; the result is in ``<rank>.json``."""
    torch.set_num_threads(1)
    callback = Measure(folder / f"{os.environ['LOCAL_RANK']}.json")
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options: dict[str, Any] = dict.fromkeys(quiet, False) | {"use_distributed_sampler": False}
    Trainer(callbacks=[callback], max_steps=STEPS, accelerator="cpu", **options, **trainer).fit(
        PDFEmbedder(**model), MMEBDataModule(**data)
    )


def compare(folder: Path, model: dict[str, Any], data: dict[str, Any], strategy: str) -> None:
    """Print one table."""
    processes = 1 if strategy == "auto" else 2
    trainer: dict[str, Any] = {"devices": processes, "strategy": strategy, "precision": "bf16-mixed"}
    run_ranks(run, folder, model, data, trainer, processes=processes)
    measured = json.loads((folder / "0.json").read_text())
    settings = defaults(PDFEmbedder) | model, defaults(MMEBDataModule) | data
    plan = Plan(*settings, {**trainer, "num_nodes": 1, "max_steps": STEPS})
    plan.image, plan.text_tokens = IMAGE, measured["row_tokens"] - IMAGE.tokens
    at_rest = ("weights", "gradient buckets of DDP", "optimizer states", "pixels of the batch")
    planned = {**plan.memory, STEP: plan.peak - sum(plan.memory[part] for part in at_rest)}
    title = f"{strategy}, {processes} process(es), {model['adapter'].kind} on {model['dtype']}"
    title += ", gradient checkpointing" if model["gradient_checkpointing"] else ""
    print(f"\n{title:<64}{'plan':>10}{'measured':>10}{'ratio':>8}")
    for part in ("weights", "gradients", "optimizer states", "activations", STEP):
        if part in measured:
            mib = [size / 2**20 for size in (planned[part], measured[part])]
            print(f"{part + ' (MiB)':<64}{mib[0]:>10.1f}{mib[1]:>10.1f}{mib[1] / mib[0]:>8.2f}", flush=True)


def defaults(kind: type) -> dict[str, Any]:
    """Arguments of a class with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def main() -> None:
    """Print all tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone, data_dir = save_backbone(folder / "backbone"), save_tiny_mmeb(folder / "mmeb", rows=256)
        data = {"data_dir": data_dir, "batch_size": BATCH_SIZE, "train_subsets": ["colours_i2t"]}
        model = {"backbone": backbone, "num_paths": 4, "prefix_length": 4}
        model |= {"query_chunk_size": CHUNK, "candidate_chunk_size": CHUNK}
        for kind, dtype in (("lora", "bfloat16"), ("lora", "float32"), ("full", "float32")):
            for strategy in ("auto", "ddp", "fsdp2"):
                for checkpointing in (False, True):
                    options = {"adapter": AdapterConfig(kind=kind), "dtype": dtype}
                    options["gradient_checkpointing"] = checkpointing
                    compare(folder, {**model, **options}, data, strategy)


if __name__ == "__main__":
    main()
