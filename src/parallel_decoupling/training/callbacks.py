"""What a run shows of itself, and how it ends well: its settings, progress, alarm, saving on a signal."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from parallel_decoupling.batch import PADDING_ID, PairBatch
from parallel_decoupling.distributed import gather_objects, world_size
from parallel_decoupling.model.run_checkpoint import LAST_CHECKPOINT
from parallel_decoupling.objective.contrastive import info_nce
from parallel_decoupling.objective.statistics import effective_rank, path_cosine
from parallel_decoupling.training.optimization import total_steps
from parallel_decoupling.training.resuming import Continuity
from parallel_decoupling.training.run_folder import requeued_checkpoints
from parallel_decoupling.training.terms import mean_over_pairs

if TYPE_CHECKING:
    from parallel_decoupling.training.module import PDFEmbedder

ADVICE = {  # what to do, by kind of collapse
    "candidates": "Use a larger data.batch_size, hard negatives, or subsets with different targets",
    "rank": "Lower learning rates or mi_weight, or warm up longer",
    "loss": "Lower learning rates or mi_weight, and check that rows and images are read as intended",
    "paths": "Raise optimizer.prefix_learning_rate, prefix_length or mi_weight, or use prefix_init=meta",
}


class RunSummary(Callback):
    """Log the settings, and warn of a test that nothing scores."""

    def on_train_start(self, trainer: Trainer, pl_module: PDFEmbedder) -> None:  # type: ignore[override]
        """Log the settings."""
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        for logger in trainer.loggers:
            logger.log_hyperparams({"model": dict(pl_module.hparams), "data": dict(pl_module.data_settings)})

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for a callback that scores."""
        own = cast(Any, trainer).callbacks
        if not any(getattr(callback, "scores_tasks", False) for callback in own):
            advice = "add parallel_decoupling.evaluation.run.Scoring to the Trainer's callbacks"
            rank_zero_warn(f"Nothing scores this test: {advice}, or call evaluate(model, data_dir).")


class ProgressLines(Callback):
    """Writes a line every ten seconds where a progress bar cannot be drawn, as in a job's log."""

    SECONDS = 10.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._shown = trainer.progress_bar_callback is not None and not sys.stdout.isatty()
        self._since = self._last = time.monotonic()
        self._first, self._batches = trainer.global_step if trainer.training else 0, 0

    on_test_start = on_predict_start = on_train_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far the training is."""
        self._write("step", trainer.global_step, total_steps(trainer), outputs["loss"])

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say how many batches of all tasks are done."""
        self._batches += 1
        self._write("batch", self._batches, sum(trainer.num_test_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say how many batches of all shards are done."""
        self._batches += 1
        self._write("batch", self._batches, sum(trainer.num_predict_batches))

    def _write(self, unit: str, done: int, most: float, loss: Any = None) -> None:
        """Say how far the run is, and how long the rest takes at its speed so far."""
        now = time.monotonic()
        if not self._shown or (now - self._last < self.SECONDS and done < most):
            return
        self._last = now
        left = (now - self._since) / max(1, done - self._first) * (most - done)
        shown = f", {timedelta(seconds=round(left))} left" if left < timedelta.max.total_seconds() else ""
        shown = shown if loss is None else f", loss {float(loss):.3f}{shown}"
        rank_zero_info(f"{unit} {done} of {most:g}{shown}")


class CollapseAlarm(Callback):
    """Warn, once per kind, when embeddings or paths are losing what they tell apart.

    Loss and path cosines are looked at from ``after_steps`` on, both and the effective rank
    ``every_n_steps``.
    """

    def __init__(self, after_steps: int = 200, every_n_steps: int = 20) -> None:
        self.after_steps, self.every_n_steps = after_steps, every_n_steps
        self.first_rank: float | None = None
        self.rank = 0.0
        self.warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the effective rank that later ones are compared with, and the one that is logged."""
        return {"first_rank": self.first_rank, "rank": self.rank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep comparing with the start of the run."""
        self.first_rank, self.rank = state_dict["first_rank"], state_dict["rank"]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: PDFEmbedder, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Look at the step's loss, the cosine between paths and the effective rank."""
        done, pairs = pl_module.progress.steps_done, outputs["pairs"]
        ids = pairs.candidate_ids[pairs.candidate_ids != PADDING_ID]
        if bool((ids == ids[0]).all()):
            found = "every query of a batch has one candidate, its own: loss 0, hit@1 100 %"
            self._warn("candidates", f"{found}, and nothing is learned")
        is_due = done == 1 or done % self.every_n_steps == 0
        self.rank = rank = float(effective_rank(pairs.query[:, 0])) if is_due else self.rank
        pl_module.log("train/effective_rank", rank)
        if not is_due:
            return
        self.first_rank = rank if self.first_rank is None else self.first_rank
        if rank < 0.1 * self.first_rank:
            change = f"from {self.first_rank:.1f} to {rank:.1f}"
            self._warn("rank", f"the effective rank of a batch of embeddings fell {change}")
        if done < self.after_steps:
            return
        options = {"temperature": 1.0, "symmetric": pl_module.hparams["symmetric"], **pairs.labels}
        same = (torch.ones_like(side[:, :1, :1]) for side in (pairs.query, pairs.candidate))
        loss, constant = float(outputs["contrastive"]), float(info_nce(*same, **options))
        if abs(loss - constant) < 0.02 * constant:
            found = f"the contrastive loss {loss:.3f} is that of a constant embedding, {constant:.3f}"
            self._warn("loss", found)
        num_paths = pairs.query.shape[1]
        if num_paths > 1 and (cosine := float(mean_over_pairs(path_cosine(pairs.query)))) > 0.99:
            self._warn("paths", f"the {num_paths} paths are nearly one path (mean cosine {cosine:.4f})")

    def _warn(self, kind: str, found: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            rank_zero_warn(f"Collapse alarm: {found}. {ADVICE[kind]}.", category=UserWarning)


class SaveOnSignal(Callback):
    """Write ``last.ckpt`` when the run is told to stop (SIGTERM, Ctrl+C), or that it soon will be (SIGUSR1).

    A step that has begun is finished first, so that the run can be resumed bit for bit. With several
    processes a signal during a wait for data can leave them waiting for each other; then the last regular
    ``last.ckpt`` counts. A second Ctrl+C stops at once, without saving. After SIGUSR1 the run continues; on
    SLURM, Lightning's plugin requeues its job.
    """

    _in_step = _interrupted = _saved = _warned = False
    _previous: Any = None
    _scheduler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl+C, and SIGUSR1, which the Trainer gives back; a requeued job's state is loaded."""
        self._in_step = self._interrupted = self._saved = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
            self._scheduler = signal.signal(signal.SIGUSR1, self._on_warning)
        for file in requeued_checkpoints(trainer.default_root_dir) if trainer.is_global_zero else ():
            file.unlink()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note that the state is between two checkpoints from here on."""
        self._in_step = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save if a signal came during the step."""
        self._in_step = False
        told = gather_objects((self._interrupted or trainer.received_sigterm, self._warned))
        stop, self._warned = map(any, zip(*told, strict=True))  # one process may have been told
        if stop:
            self._save(trainer)
        self._heed_warning(trainer)
        if self._interrupted:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save within a validation, too, where no other process has to take part."""
        if world_size() == 1 and trainer.state.fn == "fit":
            self._heed_warning(trainer)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop after a batch, as Lightning does in all other stages."""
        if trainer.received_sigterm:
            raise SIGTERMException

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl+C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if a signal came between two steps."""
        told_to_stop = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        if told_to_stop and trainer.fit_loop.epoch_loop.batch_progress.total.ready and not self._in_step:
            self._save(trainer)
        self.teardown(trainer, pl_module, "fit")

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted or not self._in_step:
            raise KeyboardInterrupt
        self._interrupted = True
        rank_zero_info("Finishing this step, then saving. Ctrl+C again stops at once, without saving.")

    def _on_warning(self, signum: int, frame: FrameType | None) -> None:
        self._warned = True

    def _heed_warning(self, trainer: Trainer) -> None:
        if self._warned and not trainer.sanity_checking:
            self._warned = False
            self._save(trainer)
            self._saved = False
            if callable(self._scheduler):
                self._scheduler(signal.SIGUSR1, None)

    def _save(self, trainer: Trainer) -> None:
        if self._saved or trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        self._saved = True
        keeper = trainer.checkpoint_callback
        own = keeper.dirpath if isinstance(keeper, ModelCheckpoint) else None
        folder = own or Path(trainer.log_dir or trainer.default_root_dir) / LAST_CHECKPOINT.parent
        file = Path(folder) / LAST_CHECKPOINT.name
        trainer.save_checkpoint(file)
        rank_zero_info(f"Saved at step {trainer.global_step}; resume with --ckpt_path last ({file}).")


DEFAULTS = (RunSummary, CollapseAlarm, Continuity, SaveOnSignal)  # what every run has
