"""The scoring callback: from what ``PDFEmbedder`` embeds to scores, files and tables.

The module only embeds, the data module only loads; the callback gets both when it is built or called.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.images import IMAGE_SETTINGS
from parallel_decoupling.data.row_sources import TaskSide
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.distributed import gather_objects, rank, world_size
from parallel_decoupling.evaluation import checks
from parallel_decoupling.evaluation.encode import RowBatch
from parallel_decoupling.evaluation.leaderboard import SCORE_FILES_DIR, write_predictions
from parallel_decoupling.evaluation.plots import path_similarity_figure, retrieval_examples_figure
from parallel_decoupling.evaluation.report import ScoreReport, write_report
from parallel_decoupling.evaluation.score import (
    Columns,
    TaskScore,
    milliseconds_per_item,
    mode_costs,
    path_columns,
    score_task,
)
from parallel_decoupling.evaluation.store import (
    AGGREGATE,
    Keeper,
    Store,
    path_column,
    shard_hash,
)
from parallel_decoupling.objective.statistics import path_cosine
from parallel_decoupling.training.callbacks import console
from parallel_decoupling.training.module import PDFEmbedder


class SideEmbeddings:
    """All embeddings of one side of a task, filled batch by batch in any order and by any process.

    Args:
        num_rows: U, of the side.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._rows: list[int] = []
        self._vectors: list[Tensor] = []
        self.bad_rows: dict[int, str] = {}

    def add(self, batch: RowBatch, embeddings_BND: Tensor) -> None:
        """Take the embeddings of one batch."""
        self._rows += batch.rows
        self._vectors.append(embeddings_BND[: len(batch.rows)].float().cpu())
        self.bad_rows |= batch.bad_rows

    def complete(self, trainer: Trainer, module: LightningModule) -> Tensor | None:
        """Join what all processes have: ``[U, N, D]``, NaN where a row could not be embedded.

        Returns:
            None if rows are missing, as they are when batches were limited. Every process gets the same.
        """
        vectors = torch.cat(self._vectors)
        embeddings_UND = torch.zeros(self._num_rows, *vectors.shape[1:])
        embeddings_UND[self._rows] = vectors
        seen_U = torch.zeros(self._num_rows)
        seen_U[[*self._rows, *self.bad_rows]] = 1
        if world_size() > 1:
            embeddings_UND, seen_U = (
                cast(Tensor, trainer.strategy.reduce(each.to(module.device), reduce_op="sum")).cpu()
                for each in (embeddings_UND, seen_U)
            )
            self.bad_rows = {row: why for each in gather_objects(self.bad_rows) for row, why in each.items()}
        if not bool((seen_U > 0).all()):
            return None
        embeddings_UND[list(self.bad_rows)] = torch.nan
        return embeddings_UND


class Scoring(Callback):
    """Scores the tasks of ``validate`` and ``test``, and writes and shows the scores of ``test``.

    Logs ``val/<task>/hit_at_1`` (or ``test/``) and the means, ``val/overall`` among them, for ModelCheckpoint
    and EarlyStopping. ``test`` writes ``scores.json``, ``scores.csv``, VLM2Vec's score files and the
    leaderboard's into the folder of the run, prints the tables, and says what makes the scores doubtful.

    Args:
        data: the data module whose tasks are scored.
        keeper: keeps the embeddings of ``test``, so that a test that was stopped resumes; the same that
            ``data.connect`` was given.

    Attributes:
        report: of the last ``validate`` or ``test``.
    """

    scores_tasks = True

    def __init__(self, data: MMEBDataModule, keeper: Keeper | None = None) -> None:
        self.data, self.keeper = data, keeper
        self.report: ScoreReport | None = None
        self._milliseconds: dict[str, float] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with no scores."""
        self._begin(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with no scores."""
        self._begin(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Take one batch."""
        self._take(trainer, cast(PDFEmbedder, pl_module), *args)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Take one batch, and measure the time per item with the first."""
        module, batch = cast(PDFEmbedder, pl_module), args[1]
        self._take(trainer, module, *args)
        if not self._milliseconds and not self._was_kept(trainer):
            with trainer.precision_plugin.forward_context():
                self._milliseconds = {
                    name: milliseconds_per_item(partial(module, batch.inputs, paths), len(batch.inputs))
                    for name, paths in (("one_path", (0,)), ("all_paths", None))
                }

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores; ``validate`` prints them, too."""
        self._finish_side(trainer, cast(PDFEmbedder, pl_module))
        if trainer.sanity_checking:
            return
        self._log("val", cast(PDFEmbedder, pl_module))
        if self.report is not None and trainer.state.fn == "validate" and trainer.is_global_zero:
            console().print(self.report.task_grid().terminal())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores, write the score files, print the tables and what makes them doubtful."""
        module = cast(PDFEmbedder, pl_module)
        self._finish_side(trainer, module)
        self._log("test", module)
        if self.report is None or not trainer.is_global_zero:
            return
        write_report(self.report, self._run_dir)  # whatever happens to the checks
        cosine_NN = torch.stack(self._cosines).mean(dim=0).tolist() if self._cosines else None
        modes = mode_costs(self._columns, **self._milliseconds)
        found = [finding.plain() for finding in self._doubts(module)]
        self.report = replace(self.report, modes=modes, warnings=found, path_cosine=cosine_NN)
        write_report(self.report, self._run_dir)
        grids = [self.report.task_grid().terminal(), self.report.mode_grid().terminal()]
        console().print(*grids, *self.report.warning_panels(), sep="\n")

    def _begin(self, trainer: Trainer) -> None:
        self.report = None
        self._run_dir = run_dir(trainer)
        self._index = -1
        self._side: SideEmbeddings | None = None
        self._query: tuple[Tensor, dict[int, str]] | None = None
        self._scores: list[TaskScore] = []
        self._found: list[checks.Finding] = []
        self._cosines: list[Tensor] = []
        self._columns: Columns = {}
        self._milliseconds = {}

    def _take(
        self,
        trainer: Trainer,
        module: PDFEmbedder,
        outputs: Any,
        batch: RowBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx != self._index:
            self._finish_side(trainer, module)
            self._index = dataloader_idx
            self._side = SideEmbeddings(len(self.data.rows[dataloader_idx]))
        assert self._side is not None
        self._side.add(batch, outputs)

    def _finish_side(self, trainer: Trainer, module: PDFEmbedder) -> None:
        """Join the embeddings of a side; with the candidates the task is complete and gets its score."""
        if self._side is None:
            return
        rows, side = cast(TaskSide, self.data.rows[self._index]), self._side
        self._side = None
        testing = trainer.state.fn == "test"
        embeddings_UND: Tensor | None
        if self._was_kept(trainer):
            embeddings_UND, bad_rows = self._load(rows, module)
        else:
            embeddings_UND, bad_rows = side.complete(trainer, module), side.bad_rows
            if embeddings_UND is not None and testing and self.keeper is not None and rank() == 0:
                self._keep(rows, embeddings_UND, bad_rows)
        if rows.side == "query":
            self._query = None if embeddings_UND is None else (embeddings_UND, bad_rows)
            return
        query, self._query = self._query, None
        if query is not None and embeddings_UND is not None:
            self._score(trainer, module, rows.task, query, (embeddings_UND, bad_rows))
        elif not trainer.sanity_checking:
            rank_zero_warn(
                f"{rows.task.task.name}: not all rows were encoded (limited batches), so it has no score."
            )

    def _was_kept(self, trainer: Trainer) -> bool:
        """Tell whether an earlier test kept the embeddings of the side at hand."""
        name = self.data.rows[self._index].name
        return trainer.state.fn == "test" and self.keeper is not None and bool(self.keeper.kept[name])

    def _score(
        self,
        trainer: Trainer,
        module: PDFEmbedder,
        task: EvalTask,
        query: tuple[Tensor, dict[int, str]],
        candidate: tuple[Tensor, dict[int, str]],
    ) -> None:
        (query_UND, bad_queries), (candidate_UND, bad_candidates) = query, candidate
        readable, num_skipped = _without(task, bad_queries, bad_candidates)
        if not readable.query_of_row:
            rank_zero_warn(f"{task.task.name}: no row's images could be read, so it has no score.")
            return

        @torch.no_grad()
        def aggregate(embeddings_UND: Tensor) -> Tensor:
            return module.encoder.aggregate(embeddings_UND.to(module.device)).cpu()

        columns = path_columns(query_UND, candidate_UND, aggregate)
        score = replace(score_task(readable, columns), num_skipped=num_skipped)
        self._scores.append(score)
        self._columns = {name: (each[0][:1], each[1][:1]) for name, each in columns.items()}
        if trainer.state.fn != "test" or not trainer.is_global_zero:
            return
        aggregates = columns[AGGREGATE]
        self._found += checks.check_task(
            score,
            (query_UND, aggregates[0]),
            (candidate_UND, aggregates[1]),
            missing=(len(bad_queries), len(bad_candidates)),
        )
        finite_U = query_UND.isfinite().flatten(1).all(dim=1)
        if finite_U.any():
            self._cosines.append(path_cosine(query_UND[finite_U]))
        write_predictions(self._run_dir / SCORE_FILES_DIR, readable, score)
        if (writer := tensorboard_writer(trainer)) is not None:
            figure = retrieval_examples_figure(readable, score)
            writer.add_figure(f"retrieval/{task.task.name}", figure, global_step=module.progress.steps_done)

    def _log(self, stage: str, module: PDFEmbedder) -> None:
        if not self._scores:
            return
        self.report = ScoreReport.from_scores(self._scores, {**module.run_info(), "commit": git_commit()})
        column = self.report.columns[0]
        means = self.report.means
        values = {f"{stage}/{name}/hit_at_1": r.hit_at_1[column] for name, r in self.report.tasks.items()}
        values |= {f"{stage}/{name}": mean[column] for name, mean in means.items()}
        values |= {f"{stage}/overall_{path}": means["overall"][path] for path in self.report.path_columns}
        module.log_dict(values)

    def _doubts(self, module: PDFEmbedder) -> list[checks.Finding]:
        """Say what makes the scores doubtful. A model that never trained has nothing to differ from."""
        found = checks.findings(self._found)
        if module.progress.steps_done == 0:
            return found
        trained, asked = module.trained_data, self.data.settings
        found += checks.check_images(trained, {name: asked[name] for name in IMAGE_SETTINGS})
        same = trained.get("data_dir") in (None, self.data.data_dir)
        folder = self.data.folder if same else Path(trained["data_dir"])
        return [*found, *checks.check_prompts(folder, self.data.eval_tasks_data)]

    def _keep(self, rows: TaskSide, embeddings_UND: Tensor, bad_rows: dict[int, str]) -> None:
        """Write a whole side as one shard."""
        assert self.keeper is not None
        good = [row for row in range(len(rows)) if row not in bad_rows]
        paths = {path_column(path): vectors for path, vectors in enumerate(embeddings_UND[good].unbind(1))}
        self.keeper.writers[rows.name].write(
            0,
            rows.columns(good),
            paths,
            rows_sha256=shard_hash(rows, range(len(rows))),
            bad_rows=[{"row": row, "id": str(row), "reason": bad_rows[row]} for row in sorted(bad_rows)],
        )

    def _load(self, rows: TaskSide, module: PDFEmbedder) -> tuple[Tensor, dict[int, str]]:
        """Read a whole side that an earlier test kept."""
        assert self.keeper is not None
        store = Store(self.keeper.writers[rows.name].folder)
        paths = [store.column(path_column(path)) for path in range(module.encoder.num_paths)]
        embeddings_UND = torch.full((len(rows), len(paths), paths[0].shape[1]), torch.nan)
        embeddings_UND[store.source_rows()] = torch.stack(paths, dim=1)
        return embeddings_UND, {row["row"]: row["reason"] for row in store.bad_rows}


class PathPictures(Callback):
    """Draws the path cosine matrix to TensorBoard.

    Args:
        every_n_steps: how often; the first step of the run is always drawn.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw this batch's queries."""
        step, query_GND = cast(PDFEmbedder, pl_module).progress.steps_done, outputs["pairs"].query
        writer = tensorboard_writer(trainer)
        if writer is None or query_GND.shape[1] == 1 or (step != 1 and step % self.every_n_steps):
            return
        figure = path_similarity_figure(path_cosine(query_GND).cpu())
        writer.add_figure("paths/cosine", figure, global_step=trainer.global_step)


def evaluate(model: PDFEmbedder, data: MMEBDataModule | str | Path, **trainer_options: Any) -> ScoreReport:
    """Score a model on the evaluation tasks of a data folder.

    Args:
        model: to be scored.
        data: a data module, or the folder that holds ``MMEB-eval/``, or ``mini-mmeb``.
        trainer_options: of Lightning's Trainer; ``default_root_dir`` is where the score files go.

    Raises:
        ValueError: what the data module refuses, or no task that could be scored.
    """
    module = data if isinstance(data, MMEBDataModule) else MMEBDataModule(str(data))
    scoring = Scoring(module.connect(model))
    options = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    Trainer(callbacks=[scoring], **{**options, **trainer_options}).test(model, module, verbose=False)
    if scoring.report is None:
        raise ValueError("no task was scored; the warnings above say why")
    return scoring.report


def run_dir(trainer: Trainer) -> Path:
    """Return the folder of everything that the Trainer writes; all processes must ask."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def tensorboard_writer(trainer: Trainer) -> SummaryWriter | None:
    """Return TensorBoard's writer on rank 0, and None elsewhere and without a TensorBoard logger."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None


def git_commit() -> str | None:
    """Return the commit of the working folder, with ``+changes`` if files differ; None outside git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _without(task: EvalTask, queries: dict[int, str], candidates: dict[int, str]) -> tuple[EvalTask, int]:
    """Return the task without the inputs that could not be read, and the number of rows left out."""
    if not queries and not candidates:
        return task, 0
    readable = task.without(set(queries), set(candidates))
    num_skipped = len(task.query_of_row) - len(readable.query_of_row)
    rank_zero_warn(
        f"{task.task.name}: {len(queries)} queries and {len(candidates)} candidates have images that cannot "
        f"be read; {num_skipped} of {len(task.query_of_row)} rows are left out of the score."
    )
    return readable, num_skipped
