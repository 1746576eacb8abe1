"""What lets a resumed run equal one that was not stopped: whole checkpoints, logs with every step once."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from parallel_decoupling.files import atomic_write
from parallel_decoupling.training.run_folder import is_first_process

if TYPE_CHECKING:
    from parallel_decoupling.training.module import PDFEmbedder


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, on the file system that it is for."""

    def save_checkpoint(self, checkpoint: Any, path: str | Path, storage_options: Any = None) -> None:
        """Write beside ``path``, then rename."""
        if storage_options is not None:
            raise TypeError("checkpoints are local files: storage_options cannot be used")
        with atomic_write(path) as unfinished, unfinished.open("wb") as stream:
            torch.save(checkpoint, stream)


class Continuity(Callback):
    """Keeps in checkpoints what their last step has logged, and whether its validation is still to come.

    A run that resumes logs that step again, in place of what the stopped one had logged from there on, and
    makes up for the validation.
    """

    def __init__(self) -> None:
        self._logged: list[dict[str, float]] = []
        self._epoch = 0
        self.validation_is_due = self._resumes = False
        self._trainer: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the trainer, whose loops know what was logged, and let it write whole checkpoints."""
        self._trainer = trainer
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user has given no other
            trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Take what the Trainer is about to log of this step."""
        loop, connector = cast(Any, trainer.fit_loop), cast(Any, trainer)._logger_connector
        self._logged = [self._values()] if connector.should_update_logs else []
        self.validation_is_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what the validation after this step has logged."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._logged.append(self._values())
            self.validation_is_due = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of now keeps."""
        batches = self._trainer.fit_loop.epoch_loop.batch_progress.total
        if batches.completed < batches.processed:  # a callback that comes first saves at the end of a batch
            self.on_train_batch_end(self._trainer, self._trainer.lightning_module)
        epoch = self._trainer.current_epoch
        return {"logged": self._logged, "validation_is_due": self.validation_is_due, "epoch": epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over from the run that was stopped."""
        self._resumes = True
        self._logged, self._epoch = list(state_dict["logged"]), state_dict["epoch"]
        self.validation_is_due = state_dict["validation_is_due"]

    def on_train_start(self, trainer: Trainer, pl_module: PDFEmbedder) -> None:  # type: ignore[override]
        """Log the step of the checkpoint again, and validate if the stopped run did not come to it."""
        self._log_again(trainer, pl_module)
        if self.validation_is_due:
            loop = cast(Any, trainer.fit_loop).epoch_loop
            trainer.validating, loop.val_loop.restarting = True, False
            loop._batches_that_stepped = pl_module.progress.steps_done - 1
            epochs = trainer.fit_loop.epoch_progress.current
            now, epochs.completed = epochs.completed, self._epoch
            loop.val_loop.run()
            trainer.training, epochs.completed = True, now

    def on_train_batch_start(self, trainer: Trainer, pl_module: PDFEmbedder, *args: Any) -> None:  # type: ignore[override]
        """Set the step that is logged, which Lightning restores one too high at the end of an epoch."""
        cast(Any, trainer.fit_loop).epoch_loop._batches_that_stepped = pl_module.progress.steps_done

    def on_fit_end(self, trainer: Trainer, pl_module: PDFEmbedder) -> None:  # type: ignore[override]
        """Log the step again where nothing was left to train."""
        self._log_again(trainer, pl_module)

    def _log_again(self, trainer: Trainer, module: PDFEmbedder) -> None:
        if not self._resumes:
            return
        self._resumes, step = False, module.progress.steps_done - 1
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                start = Event(session_log=SessionLog(status=SessionLog.START))  # drops steps from this one on
                cast(Any, logger.experiment)._get_file_writer().add_event(start, step)
            for values in self._logged:
                logger.log_metrics(values, step)
            logger.save()

    def _values(self) -> dict[str, float]:
        logged = self._trainer._logger_connector.metrics["log"]
        return {name: float(value) for name, value in logged.items()} | {"epoch": self._trainer.current_epoch}


def continue_logs(loggers: Iterable[Any], step: int) -> None:
    """Let a run that resumes at a step log where it did; CSV files keep the steps before."""
    for logger in loggers:
        if not isinstance(logger, CSVLogger | TensorBoardLogger):
            continue
        if logger._version is None and isinstance(last := logger.version, int):
            logger._version = max(0, last - 1)
        file = Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        if isinstance(logger, CSVLogger) and is_first_process() and file.is_file():
            with file.open(newline="") as stream:
                reader = csv.DictReader(stream)
                rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < step]
            with atomic_write(file) as unfinished, unfinished.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, reader.fieldnames or ())
                writer.writeheader()
                writer.writerows(rows)
            logger._experiment = _SameFile(logger.log_dir)
            logger._experiment.metrics_keys = list(reader.fieldnames or ())


class _SameFile(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Keep the file, which Lightning would delete."""
