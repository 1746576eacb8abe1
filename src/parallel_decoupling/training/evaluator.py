"""What a trained encoder does under a Trainer and in a notebook: validate, test, predict, encode.

Here: Lightning's evaluation hooks. Elsewhere on purpose: training (``training.embedder``, the subclass),
collecting rows (``training.evaluation``), the metric and the report (``retrieval``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.data.collate import EvalBatch
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.distributed import world_size
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.retrieval.embedder import Embedder, warn_of_cut_texts
from parallel_decoupling.retrieval.report import ScoreReport
from parallel_decoupling.retrieval.score import TaskScore
from parallel_decoupling.training.callbacks import console, tensorboard_writer
from parallel_decoupling.training.evaluation import (
    Evaluation,
    ProjectorSample,
    TaskEmbeddings,
    draw_examples,
    write_report,
)

PREDICTIONS_DIR = "predictions"
PROJECTOR_DIR = "projector"


class EvaluatedEncoder(LightningModule):
    """A ``ParallelEncoder`` or ``DualEncoder`` that a Trainer can validate, test and predict with.

    Attributes:
        encoder: set by the subclass.
        query_instruction: default instruction of ``encode_query``.
        candidate_instruction: default instruction of ``encode_candidate``.
        steps_done: main steps behind the weights.
        rows_by_subset: training rows behind the weights, by subset.
    """

    encoder: ParallelEncoder | DualEncoder
    query_instruction: str
    candidate_instruction: str
    steps_done: int
    rows_by_subset: dict[str, int]
    _evaluation: Evaluation
    _projector: ProjectorSample
    _predict_tasks: list[EvalTask]
    _predicted: TaskEmbeddings | None

    @abstractmethod
    def run_info(self) -> dict[str, Any]:
        """What the scores came from, as plain values; the subclass knows."""

    @property
    def trainer_or_none(self) -> Trainer | None:
        """The attached Trainer, if there is one."""
        return self._trainer

    @property
    def run_dir(self) -> Path:
        """Folder of everything that the Trainer writes."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed tokenised rows: ``[B, N', D]``; ``encode`` takes texts and images."""
        return cast(Tensor, self.encoder(inputs, paths))

    def on_validation_epoch_start(self) -> None:
        """Begin with no scores."""
        self._evaluation = Evaluation(self._eval_tasks(), self._cpu_aggregate, self._sum_over_ranks)

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed one batch of task ``dataloader_idx``."""
        self._evaluation.add(dataloader_idx, batch, self.encoder(batch.inputs))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<task>/hit_at_1`` and the means, ``val/overall`` among them."""
        if self.trainer.sanity_checking:
            return
        report = self._log_scores("val")
        if report is not None and self.trainer.state.fn == "validate" and self.trainer.is_global_zero:
            console().print(report.table())

    def on_test_epoch_start(self) -> None:
        """Begin with no scores, and keep a sample for the projector."""
        tasks = self._eval_tasks()
        self._projector = ProjectorSample(len(tasks))
        self._evaluation = Evaluation(tasks, self._cpu_aggregate, self._sum_over_ranks, self._show_task)

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed one batch of task ``dataloader_idx``."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the scores, write ``scores.json`` and ``scores.csv``, print the table."""
        report, folder = self._log_scores("test"), self.run_dir
        if report is None or not self.trainer.is_global_zero:
            return
        write_report(report, folder)
        if tensorboard_writer(self.trainer) is not None:
            self._projector.write(folder / PROJECTOR_DIR)
        console().print(report.table())

    def predict_tasks(self, trainer: Trainer, data: MMEBDataModule, **options: Any) -> Any:
        """Run ``trainer.predict`` over the evaluation tasks; writes ``predictions/<task>.pt`` for each.

        Args:
            trainer: any Trainer.
            data: not set up yet.
            options: of ``trainer.predict``, such as ``ckpt_path``.
        """
        data.prepare_data()
        data.connect(self.encoder.processor, self.encoder.image_token)
        data.setup("test")
        self._predict_tasks = data.eval_tasks_data
        return trainer.predict(self, dataloaders=data.test_dataloader(), **options)

    def on_predict_start(self) -> None:
        """Begin with no task."""
        self._predicted = None

    def predict_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Embed one batch: its place, ``paths`` ``[B, N, D]`` and ``aggregate`` ``[B, D']``."""
        embeddings_BND = self.encoder(batch.inputs)
        task = self._predict_tasks[dataloader_idx]
        if self._predicted is None or self._predicted.task is not task:
            self._write_prediction()
            self._predicted = TaskEmbeddings(task, self._sum_over_ranks)
        self._predicted.add(batch, embeddings_BND)
        aggregate_BD = self.encoder.aggregate(embeddings_BND)
        return {
            "side": batch.side,
            "indices": batch.indices,
            "paths": embeddings_BND,
            "aggregate": aggregate_BD,
        }

    def on_predict_epoch_end(self) -> None:
        """Write the last task."""
        self._write_prediction()

    def _write_prediction(self) -> None:
        """Write ``predictions/<task>.pt``: per side paths ``[U, N, D]`` and aggregate ``[U, D']``."""
        if self._predicted is None:
            return
        task, sides = self._predicted.task, self._predicted.complete()
        self._predicted, folder = None, self.run_dir / PREDICTIONS_DIR
        if sides is None or not self.trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        content = {}
        for side, embeddings_UND in zip(("query", "candidate"), sides, strict=True):
            content[side] = embeddings_UND
            content[f"{side}_aggregate"] = self._cpu_aggregate(embeddings_UND)
        torch.save(content, folder / f"{task.task.name}.pt")

    def teardown(self, stage: str) -> None:
        """Say once per run how many texts did not fit into an OpenCLIP model."""
        if isinstance(self.encoder, DualEncoder):
            counts = self._sum_over_ranks(self.encoder.take_text_counts())
            if self.trainer.is_global_zero:
                warn_of_cut_texts(counts, self.encoder.processor.context_length)

    def _eval_tasks(self) -> list[EvalTask]:
        return list(cast(Any, self.trainer).datamodule.eval_tasks_data)

    def _cpu_aggregate(self, embeddings: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encoder.aggregate(embeddings.to(self.device)).cpu()

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if world_size() == 1:
            return value
        total = self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum")
        return cast(Tensor, total).cpu()

    def _show_task(self, task: EvalTask, score: TaskScore, query_UND: Tensor, candidate_UND: Tensor) -> None:
        writer = tensorboard_writer(self.trainer)
        if writer is not None:
            draw_examples(writer, task, score, self.steps_done)
            self._projector.add(task, self._cpu_aggregate(query_UND), self._cpu_aggregate(candidate_UND))

    def _log_scores(self, stage: str) -> ScoreReport | None:
        self._evaluation.finish_task()
        if not self._evaluation.scores:
            return None
        report = ScoreReport.from_scores(self._evaluation.scores, self.run_info())
        column = report.columns[0]
        values = {
            f"{stage}/{name}/hit_at_1": result.hit_at_1[column] for name, result in report.tasks.items()
        }
        values |= {f"{stage}/{name}": mean[column] for name, mean in report.means.items()}
        for path in report.path_columns:
            values[f"{stage}/overall_{path}"] = report.means["overall"][path]
        self.log_dict(values)
        return report

    @property
    def embedder(self) -> Embedder:
        """The same weights without Lightning."""
        return Embedder(self.encoder, self.query_instruction, self.candidate_instruction)

    def encode(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        """Embed texts, images and dictionaries of both; see ``Embedder.encode``."""
        return self.embedder.encode(inputs, **options)

    def encode_query(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        """``encode`` with ``query_instruction`` unless ``instruction`` is given."""
        return self.embedder.encode_query(inputs, **options)

    def encode_candidate(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        """``encode`` with ``candidate_instruction`` unless ``instruction`` is given."""
        return self.embedder.encode_candidate(inputs, **options)

    @staticmethod
    def similarity(a: Tensor, b: Tensor) -> Tensor:
        """Cosines of all pairs ``[A, B]``; mean over aligned paths for ``[A, N, D]`` and ``[B, N, D]``."""
        return Embedder.similarity(a, b)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a folder to share; see ``Embedder.save_pretrained``."""
        embedder = self.embedder
        embedder.run = {**self.run_info(), "rows_by_subset": self.rows_by_subset}
        if self.trainer_or_none is None:
            del embedder.run["commit"]  # this one did not train the weights
        embedder.save_pretrained(folder, **options)

    @staticmethod
    def from_pretrained(folder: str | Path) -> Embedder:
        """Load a shared folder: an ``Embedder``, as what is shared does not train."""
        return Embedder.from_pretrained(folder)
