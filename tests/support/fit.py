"""Short real runs of ``PDFEmbedder`` on the tiny benchmark, and what they recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.training.module import PDFEmbedder

SMALL: dict[str, Any] = {
    "num_paths": 2,
    "prefix_length": 3,
    "mi": {"hidden_size": 8, "warmup_steps": 1, "ramp_steps": 2, "fit_steps": 2},
    "optimizer": {"learning_rate": 1e-3, "prefix_learning_rate": 1e-2, "schedule": "constant"},
}


class Recorder(Callback):
    """The values that every batch logs, without the clock's and those of every so many batches."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        kept = {k: v for k, v in metrics.items() if k.startswith(("train/", "lr/", "compute/", "mix/"))}
        kept.pop("train/effective_rank", None)
        self.values.append(kept)


class RecordingEmbedder(PDFEmbedder):
    """Keeps the gradients that each main step sees; ``gradients`` are the last step's."""

    def _main_step(self) -> None:
        named = self.named_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        self.history = [*getattr(self, "history", []), self.gradients]
        super()._main_step()


def small_embedder(backbone: str, *, kind: type[PDFEmbedder] = PDFEmbedder, **settings: Any) -> PDFEmbedder:
    """Two paths, short prefixes; ``settings`` win, dictionaries key by key."""
    merged = {**SMALL, **settings}
    for name in ("mi", "optimizer"):
        merged[name] = {**SMALL[name], **settings.get(name, {})}
    return kind(backbone=backbone, **merged)


def small_data(data_dir: str, **settings: Any) -> MMEBDataModule:
    """Six batches of eight rows per epoch."""
    return MMEBDataModule(data_dir=data_dir, **{"batch_size": 8, "eval_batch_size": 8, **settings})


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet CPU trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "use_distributed_sampler": False}
    options = {"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **fixed, **options}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)


def trained(module: PDFEmbedder) -> dict[str, Tensor]:
    """Copies of all trainable parameters, the estimator's among them."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Same names, same bits."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
