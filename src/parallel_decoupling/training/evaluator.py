"""What a trained encoder does under a Trainer and in a notebook: validate, test, predict, encode.

Here: Lightning's evaluation hooks. Elsewhere on purpose: training (``training.module``, the subclass),
collecting rows (``training.evaluation``), the metric and the report (``evaluation``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.data.collate import EvalBatch
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.images import IMAGE_SETTINGS, ImagePolicy
from parallel_decoupling.data.row_loaders import RowBatch
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.distributed import gather_objects, world_size
from parallel_decoupling.evaluation.embedder import Embedder, warn_of_cut_texts
from parallel_decoupling.evaluation.html_report import (
    Baseline,
    PageParts,
    TaskExamples,
    task_examples,
    write_run_report,
)
from parallel_decoupling.evaluation.modes import EncodingTimes, encoding_times, mode_costs
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.sanity import (
    FinalNormCheck,
    Finding,
    TaskHealth,
    findings,
    prompt_mismatches,
    side_health,
    task_health,
)
from parallel_decoupling.evaluation.score import TaskScore
from parallel_decoupling.evaluation.score_files import SCORE_FILES_DIR, write_predictions
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.identity import backbone_fingerprint
from parallel_decoupling.objective.statistics import path_cosine
from parallel_decoupling.training.callbacks import console, tensorboard_writer
from parallel_decoupling.training.embedding_cache import CachedTask, EmbeddingCache, model_hash
from parallel_decoupling.training.evaluation import (
    Evaluation,
    ProjectorSample,
    TaskEmbeddings,
    draw_examples,
    write_report,
)
from parallel_decoupling.training.prediction_writer import row_embeddings

PREDICTIONS_DIR = "predictions"
EMBEDDINGS_DIR = "embeddings"
PROJECTOR_DIR = "projector"


class EvaluatedEncoder(LightningModule):
    """A ``ParallelEncoder`` or ``DualEncoder`` that a Trainer can validate, test and predict with.

    Attributes:
        encoder: set by the subclass.
        query_instruction: default instruction of ``encode_query``.
        candidate_instruction: default instruction of ``encode_candidate``.
        steps_done: main steps behind the weights.
        rows_by_subset: training rows behind the weights, by subset.
        trained_data: settings of the data behind the weights, plain values; empty if not known.
        baseline: a tested run that the report of a test compares with.
    """

    encoder: ParallelEncoder | DualEncoder
    query_instruction: str
    candidate_instruction: str
    steps_done: int
    rows_by_subset: dict[str, int]
    trained_data: dict[str, Any]
    baseline: Baseline | None = None
    _evaluation: Evaluation
    _projector: ProjectorSample
    _predict_tasks: list[EvalTask]
    _predicted: TaskEmbeddings | None
    _cache: EmbeddingCache | None = None
    _health: list[TaskHealth]
    _examples: list[TaskExamples]
    _path_cosines: list[Tensor]
    _score_files_dir: Path
    _final_norm: FinalNormCheck
    _encoding: EncodingTimes | None

    @abstractmethod
    def run_info(self) -> dict[str, Any]:
        """What the scores came from, as plain values; the subclass knows."""

    @property
    def trainer_or_none(self) -> Trainer | None:
        """The attached Trainer, if there is one."""
        return self._trainer

    @property
    def run_dir(self) -> Path:
        """Folder of everything that the Trainer writes; a collective, so all ranks must ask."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed tokenised rows: ``[B, N', D]``; ``encode`` takes texts and images."""
        return cast(Tensor, self.encoder(inputs, paths))

    def on_validation_epoch_start(self) -> None:
        """Begin with no scores."""
        quiet = bool(self.trainer.sanity_checking)
        tasks = self._eval_tasks()
        self._evaluation = Evaluation(tasks, self._cpu_aggregate, self._sum_over_ranks, quiet=quiet)

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
        """Begin with no scores, a sample for the projector, and what the sanity checks watch."""
        cache, self._cache = self._cache, None  # of the loaders of this test alone
        tasks = self._eval_tasks()
        if self.baseline is not None and (
            different := {task.task.name for task in tasks} ^ self.baseline.report.tasks.keys()
        ):
            raise ValueError(
                f"--baseline {self.baseline.name} scored other tasks; the difference: {sorted(different)}"
            )
        self._projector, self._health = ProjectorSample(len(tasks)), []
        self._examples, self._path_cosines, self._encoding = [], [], None
        self._score_files_dir = self.run_dir / SCORE_FILES_DIR
        self._final_norm = FinalNormCheck(self.encoder.backbone)
        self._evaluation = Evaluation(
            tasks, self._cpu_aggregate, self._sum_over_ranks, self._show_task, cache=cache
        )

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed one batch of task ``dataloader_idx``; an empty one says that the task is in the cache."""
        if not len(batch.indices):
            self._evaluation.add_cached(dataloader_idx)
            return
        self.validation_step(batch, batch_idx, dataloader_idx)
        if self._encoding is None and isinstance(self.encoder, ParallelEncoder):  # the other one counts texts
            self._encoding = encoding_times(partial(self.encoder, batch.inputs), len(batch.indices))

    def on_test_epoch_end(self) -> None:
        """Log the scores, write the score files, print the tables and what makes them doubtful."""
        report, folder = self._log_scores("test"), self.run_dir
        if self._final_norm.waiting:  # every task was in the cache
            self.encode(["What are the states of one forward pass?"])
        self._final_norm.remove()
        if report is None or not self.trainer.is_global_zero:
            return
        write_report(report, folder)  # whatever happens to the checks
        warnings = [finding.plain() for finding in self._findings()]
        modes = mode_costs(self._evaluation.shapes, self._encoding)
        report = replace(report, modes=modes, warnings=warnings)
        write_report(report, folder)
        cosines = torch.stack(self._path_cosines).mean(dim=0).tolist() if self._path_cosines else None
        PageParts(self._examples, cosines, self.baseline).write(folder)
        write_run_report(folder)
        if tensorboard_writer(self.trainer) is not None:
            self._projector.write(folder / PROJECTOR_DIR)
        tables = [report.table(), report.metrics_table(), report.modes_table()]
        console().print(*tables, *report.warning_panels(), sep="\n")

    def cached_tasks(self, tasks: Sequence[EvalTask], folder: str | Path | None) -> set[str]:
        """Open the embedding cache of a test and say which tasks it holds; all ranks agree.

        Where ``missing_images`` is an error, embeddings with unreadable rows do not count: the rows are
        read again.

        Args:
            tasks: to be scored.
            folder: of the cache; ``None`` is ``embeddings`` in the run's folder.
        """
        cache_dir = self.run_dir / EMBEDDINGS_DIR if folder is None else Path(folder)
        self._cache = EmbeddingCache(cache_dir, self.embedding_hash())
        whole = cast(Any, self.trainer).datamodule.missing_images == "error"
        found = {task.task.name for task in tasks if self._cache.holds(task, whole=whole)}
        return gather_objects(found)[0]

    def embedding_hash(self) -> str:
        """Identify what turns inputs into embeddings, to know which of an earlier run are still good."""
        return model_hash(
            self.encoder, self._frozen_part(), self._plain_settings(), str(self.trainer.precision)
        )

    def _frozen_part(self) -> dict[str, Any]:
        fingerprint = getattr(self, "fingerprint", None)
        return fingerprint or backbone_fingerprint(self.encoder.backbone)

    def _plain_settings(self) -> dict[str, Any]:
        info = self.run_info()
        return {**info.get("data", {}), **info.get("model", {})}

    def _findings(self) -> list[Finding]:
        """What makes the scores doubtful. An encoder that never trained has no prompts to differ from."""
        found = [*findings(self._health), *self._final_norm.findings()]
        data = cast(Any, self.trainer).datamodule
        if self.steps_done == 0 or not isinstance(data, MMEBDataModule):
            return found
        settings = {name: getattr(data, name) for name in (*IMAGE_SETTINGS, "split")}
        trained = {**settings, "data_dir": data.data_dir, **self.trained_data}
        changed = [
            f"{name}: trained {trained[name]}, asked {settings[name]}"
            for name in IMAGE_SETTINGS
            if trained[name] != settings[name]
        ]
        if changed:
            found.append(Finding("prompt_mismatch", "; ".join(changed)))
        folder = data.folder if trained["data_dir"] == data.data_dir else Path(trained["data_dir"])
        return [*found, *prompt_mismatches(folder, trained["split"], self._evaluation.tasks)]

    def on_predict_start(self) -> None:
        """Begin with no task."""
        self._predicted = None
        self._predict_tasks = getattr(getattr(self.trainer, "datamodule", None), "eval_tasks_data", [])

    def predict_step(
        self, batch: EvalBatch | RowBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Embed one batch: its place, ``paths`` ``[B, N, D]`` and ``aggregate`` ``[B, D']``.

        Of a ``RowBatch`` the wanted columns, each ``[B, D]`` or ``[B, D']``.
        """
        if isinstance(batch, RowBatch):
            return row_embeddings(self.encoder, batch)
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
        if sides is None:
            raise ValueError(
                f"{task.task.name}: not all rows were encoded, so there is nothing to write. Remove "
                "trainer.limit_predict_batches and fast_dev_run; --data.query_limit makes tasks shorter."
            )
        if not self.trainer.is_global_zero:
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
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "eval_tasks_data"):
            raise ValueError(
                "Scoring needs to know which rows belong together, and loaders alone do not say: pass "
                "datamodule=MMEBDataModule(...) instead of dataloaders=..."
            )
        return list(cast(Any, data).eval_tasks_data)

    def _cpu_aggregate(self, embeddings: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encoder.aggregate(embeddings.to(self.device)).cpu()

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if world_size() == 1:
            return value
        total = self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum")
        return cast(Tensor, total).cpu()

    def _show_task(self, task: EvalTask, score: TaskScore, content: CachedTask) -> None:
        if not self.trainer.is_global_zero:
            return
        sides = {"query": content.query, "candidate": content.candidate}
        aggregates = {side: self._cpu_aggregate(paths_UND) for side, paths_UND in sides.items()}
        health = [
            side_health(side, sides[side], aggregates[side], len(content.missing[side])) for side in sides
        ]
        self._health.append(task_health(score, health))
        self._examples.append(task_examples(task, score))
        finite_U = content.query.isfinite().flatten(1).all(dim=1)
        if finite_U.any():
            self._path_cosines.append(path_cosine(content.query[finite_U]))
        write_predictions(self._score_files_dir, task, score)
        writer = tensorboard_writer(self.trainer)
        if writer is not None:
            draw_examples(writer, task, score, self.steps_done)
            self._projector.add(task, aggregates["query"], aggregates["candidate"])

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
        """The same weights without Lightning; pictures as in training."""
        images = ImagePolicy.from_settings(self.trained_data)
        return Embedder(self.encoder, self.query_instruction, self.candidate_instruction, images)

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
        info = self.run_info()
        data = self.trained_data or info.get("data", {})  # a Trainer may since have read other data
        embedder.run = {**info, "data": data, "rows_by_subset": self.rows_by_subset}
        if self.trainer_or_none is None:
            del embedder.run["commit"]  # this one did not train the weights
        embedder.save_pretrained(folder, **options)

    @staticmethod
    def from_pretrained(folder: str | Path) -> Embedder:
        """Load a shared folder: an ``Embedder``, as what is shared does not train."""
        return Embedder.from_pretrained(folder)
