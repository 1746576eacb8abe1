"""Short real runs of ``PDFEmbedder`` on the tiny benchmark, and what they recorded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from parallel_decoupling.batch import PairBatch, TokenLimit
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.evaluation.run import Scoring
from parallel_decoupling.evaluation.store import Keeper
from parallel_decoupling.training.module import PDFEmbedder

SMALL: dict[str, Any] = {
    "num_paths": 2,
    "prefix_length": 3,
    "mi": {"hidden_size": 8, "warmup_steps": 1, "ramp_steps": 2, "fit_steps": 2},
    "optimizer": {"learning_rate": 1e-3, "prefix_learning_rate": 1e-2, "schedule": "constant"},
}


ONE_PATH: dict[str, Any] = {"num_paths": 1, "prefix_length": 0, "mi_weight": 0.0, "aggregate_weight": 0.0}
"""The single-path recipe, and all that an OpenCLIP model takes."""


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


def first_batch(module: PDFEmbedder, data_dir: str) -> PairBatch:
    """The first training batch of ``small_data``."""
    data = small_data(data_dir)
    data.connect(module)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def small_config(backbone: str, data_dir: str, **trainer: Any) -> dict[str, Any]:
    """What a YAML file says of a run of two paths."""
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    model = {"backbone": backbone, "num_paths": 2, "prefix_length": 2, "mi": {"warmup_steps": 1}}
    data = {"data_dir": data_dir, "batch_size": 8}
    return {"model": model, "data": data, "trainer": {**quiet, **trainer}}


class SaveAll(Callback):
    """A checkpoint after every batch, ``<batches done>.ckpt``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{pl_module.progress.steps_done}.ckpt")


class ConnectedTrainer(Trainer):
    """Hands model and data to each other and to the callback that scores, as the command line does."""

    def _connect(self, model: Any, data: Any) -> None:
        if isinstance(data, MMEBDataModule):
            keeper = getattr(data, "keeper", None)
            data.connect(model, keeper)
            self.scoring = Scoring(data, keeper)
            others = [each for each in self.callbacks if not isinstance(each, Scoring)]
            self.callbacks = [*others, self.scoring]

    def fit(self, model: Any, data: Any = None, **options: Any) -> None:
        self._connect(model, data)
        super().fit(model, datamodule=data, **options)

    def validate(self, model: Any, data: Any = None, **options: Any) -> Any:
        self._connect(model, data)
        return super().validate(model, datamodule=data, **options)

    def test(self, model: Any, data: Any = None, **options: Any) -> Any:
        self._connect(model, data)
        return super().test(model, datamodule=data, **{"verbose": False, **options})


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> ConnectedTrainer:
    """A quiet CPU trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "use_distributed_sampler": False}
    options = {"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **fixed, **options}
    return ConnectedTrainer(default_root_dir=folder, callbacks=list(callbacks), **options)


def kept_data(module: PDFEmbedder, folder: Path, data_dir: str, **settings: Any) -> MMEBDataModule:
    """Data whose test keeps its embeddings in a folder."""
    data = small_data(data_dir, **settings)
    data.keeper = Keeper(folder, module.about, replace=True)  # type: ignore[attr-defined]
    return data


def stand_in_model(processor: Any, image_token: str = "<image>", num_paths: int = 1) -> Any:
    """What the data needs of a model, for tests without one."""
    names = {"processor": processor, "image_token": image_token, "template": None, "num_paths": num_paths}
    encoder = SimpleNamespace(**names)
    about = {"images": ImagePolicy(), "limit": TokenLimit(), "candidate_instruction": ""}
    return SimpleNamespace(encoder=encoder, **about)


def trained(module: PDFEmbedder) -> dict[str, Tensor]:
    """Copies of all trainable parameters, the estimator's among them."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Same names, same bits."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
