"""The callbacks that take what ``PDFEmbedder`` embeds: ``Scoring`` and ``EmbeddingWriter``."""

import json
import subprocess
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.names import printable
from parallel_decoupling.data.row_sources import RowSource, TaskSide
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.distributed import gather_objects, rank, world_size
from parallel_decoupling.evaluation import checks
from parallel_decoupling.evaluation.encode import RowBatch
from parallel_decoupling.evaluation.leaderboard import SCORE_FILES_DIR, write_predictions
from parallel_decoupling.evaluation.report import ScoreReport, console, write_report
from parallel_decoupling.evaluation.score import TaskResult, mode_costs, path_columns, score_task
from parallel_decoupling.evaluation.store import AGGREGATE, Keeper, Store, path_vectors
from parallel_decoupling.files import write_text
from parallel_decoupling.objective.statistics import path_cosine
from parallel_decoupling.training.module import PDFEmbedder

BAD_ROWS_FILE = "bad_rows.jsonl"
_Side = tuple[Tensor, dict[int, str]]  # embeddings [U, N, D], and why rows could not be embedded


@dataclass
class CollectedEmbeddings:
    """Embeddings of the rows of a task's side or of a shard, batch by batch in any order."""

    rows: list[int] = field(default_factory=list)
    bad_rows: dict[int, str] = field(default_factory=dict)
    num_cut: int = 0
    parts: list[Tensor] = field(default_factory=list)

    def add(self, batch: RowBatch, embeddings_BND: Tensor) -> None:
        """Take the embeddings of one batch."""
        self.rows += batch.rows
        self.parts.append(embeddings_BND[: len(batch.rows)].float().cpu())
        self.bad_rows |= batch.bad_rows
        self.num_cut += batch.inputs.num_cut

    @property
    def vectors(self) -> Tensor:
        """The embeddings of ``rows``, ``[len(rows), N, D]``."""
        return torch.cat(self.parts)

    def complete(self, num_rows: int, trainer: Trainer, module: LightningModule) -> Tensor | None:
        """Join what all processes have: ``[U, N, D]`` of ``num_rows``, NaN where a row could not be embedded.

        None, on every process, if rows are missing, as they are when batches were limited.
        """
        parts = gather_objects((self.rows, self.bad_rows))
        self.bad_rows = {row: why for _, bad_rows in parts for row, why in bad_rows.items()}
        if sum(len(rows) for rows, _ in parts) + len(self.bad_rows) < num_rows:
            return None
        embeddings_UND = torch.zeros(num_rows, *self.vectors.shape[1:])
        embeddings_UND[self.rows] = self.vectors
        if world_size() > 1:
            reduced = trainer.strategy.reduce(embeddings_UND.to(module.device), reduce_op="sum")
            embeddings_UND = cast(Tensor, reduced).cpu()
        embeddings_UND[list(self.bad_rows)] = torch.nan
        return embeddings_UND


class Scoring(Callback):
    """Scores the tasks of ``validate`` and ``test``, and writes and shows the scores of ``test``.

    Logs ``val/<task>/hit_at_1`` (or ``test/``) and the means, such as ``val/overall``. The last ``report``
    stays here; ``test`` also writes its files. With ``keeper``, also given to ``data.connect``, a stopped
    test resumes.
    """

    scores_tasks = True

    def __init__(self, data: MMEBDataModule, keeper: Keeper | None = None) -> None:
        self.data, self.keeper = data, keeper
        self.report: ScoreReport | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with no scores."""
        self.report = None
        self._run_dir = Path(trainer.log_dir or trainer.default_root_dir)  # all processes must ask
        self._index = -1
        self._side: CollectedEmbeddings | None = None
        self._query: _Side | None = None
        self._scores: dict[str, TaskResult] = {}
        self._found: list[checks.Finding] = []
        self._cosines: list[Tensor] = []
        self._modes: dict[str, dict[str, int]] = {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take one batch; the first of a side completes the side before it."""
        if dataloader_idx != self._index:
            self._finish_side(trainer, pl_module)
            self._index = dataloader_idx
            self._side = CollectedEmbeddings()
        assert self._side is not None
        self._side.add(batch, outputs)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: PDFEmbedder) -> None:  # type: ignore[override]
        """Log the scores; ``validate`` prints them, too."""
        self._finish_side(trainer, pl_module)
        if trainer.sanity_checking:
            return
        self._log("val", pl_module)
        if self.report is not None and trainer.state.fn == "validate" and trainer.is_global_zero:
            console().print(self.report.task_table())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: PDFEmbedder) -> None:  # type: ignore[override]
        """Log the scores, write the score files, print the tables and what makes them doubtful."""
        self._finish_side(trainer, pl_module)
        self._log("test", pl_module)
        if self.report is None or not trainer.is_global_zero:
            return
        write_report(self.report, self._run_dir)  # whatever happens to the checks
        cosine_NN = torch.stack(self._cosines).mean(dim=0).tolist() if self._cosines else None
        found = [vars(each) | {"advice": checks.ADVICE[each.check]} for each in self._doubts(pl_module)]
        self.report = replace(self.report, modes=self._modes, warnings=found, path_cosine=cosine_NN)
        write_report(self.report, self._run_dir)
        tables = self.report.task_table(), self.report.mode_table()
        console().print(*tables, *self.report.warning_panels(), sep="\n")

    def _finish_side(self, trainer: Trainer, module: PDFEmbedder) -> None:
        """Join the embeddings of a side; with the candidates the task is complete and gets its score."""
        if self._side is None:
            return
        rows, side = cast(TaskSide, self.data.rows[self._index]), self._side
        writer = self.keeper.writers[rows.name] if self.keeper and trainer.state.fn == "test" else None
        embeddings_UND: Tensor | None
        if writer and writer.kept:  # by an earlier test
            store = Store(writer.folder)
            paths_UND = torch.stack([store.column(name) for name in store.columns], dim=1)
            embeddings_UND = torch.full((len(rows), *paths_UND.shape[1:]), torch.nan)
            embeddings_UND[store.source_rows()] = paths_UND
            bad_rows = {row["row"]: row["reason"] for row in store.bad_rows}
        else:
            embeddings_UND, bad_rows = side.complete(len(rows), trainer, module), side.bad_rows
            if num_cut := sum(gather_objects(side.num_cut)):
                cut = f"the ends of {num_cut} of {len(rows)} texts were cut off"
                rank_zero_warn(f"{rows.name}: {cut}, as they have more than max_tokens.")
            if writer and rank() == 0 and embeddings_UND is not None:
                good = [row for row in range(len(rows)) if row not in bad_rows]
                writer.write(0, good, path_vectors(embeddings_UND[good]), bad_rows)
        self._side, query, self._query = None, self._query, None
        found = None if embeddings_UND is None else (embeddings_UND, bad_rows)
        if rows.side == "query":
            self._query = found
        elif query and found:
            self._score(trainer, module, rows.task, [query, found])
        elif not trainer.sanity_checking:
            reason = "not all rows were encoded (limited batches), so it has no score"
            rank_zero_warn(f"{rows.task.task.name}: {reason}.")

    def _score(self, trainer: Trainer, module: PDFEmbedder, task: EvalTask, both: list[_Side]) -> None:
        """Score a task by its queries and candidates, without those that could not be embedded."""
        name, num_rows = task.task.name, len(task.query_of_row)
        (queries_UND, bad_queries), (candidates_UND, bad_candidates) = both
        missing = len(bad_queries), len(bad_candidates)
        if any(missing):
            task = task.without(set(bad_queries), set(bad_candidates))
            lost = f"{missing[0]} queries and {missing[1]} candidates cannot be embedded"
            rows = f"{num_rows - len(task.query_of_row)} of {num_rows} rows"
            rank_zero_warn(f"{name}: {lost}; {rows} are left out of the score.")
        if not task.query_of_row:
            rank_zero_warn(f"{name}: no row could be embedded, so it has no score.")
            return
        columns = path_columns(queries_UND, candidates_UND, partial(_aggregate, module))
        score = replace(score_task(task, columns), num_skipped=num_rows - len(task.query_of_row))
        self._scores[name] = score
        self._modes = mode_costs(columns)
        if trainer.state.fn != "test" or not trainer.is_global_zero:
            return
        queries, candidates = zip((queries_UND, candidates_UND), columns[AGGREGATE], strict=True)
        self._found += checks.check_task(score, queries, candidates, missing=missing)
        finite_U = queries_UND.isfinite().flatten(1).all(dim=1)
        if finite_U.any():
            self._cosines.append(path_cosine(queries_UND[finite_U]))
        write_predictions(self._run_dir / SCORE_FILES_DIR, task, score)

    def _log(self, stage: str, module: PDFEmbedder) -> None:
        if not self._scores:
            return
        self.report = ScoreReport(self._scores, {**module.run_info(), "commit": git_commit()})
        column, means = self.report.columns[0], self.report.means
        values = {f"{stage}/{name}/hit_at_1": r.hit_at_1[column] for name, r in self.report.tasks.items()}
        for name, result in self.report.tasks.items():
            values[f"{stage}/{name}/{result.task.metric.replace('@', '_at_')}"] = result.score[column]
        values |= {f"{stage}/{name}": mean[column] for name, mean in means.items()}
        headline = self.report.headline
        values |= {f"{stage}/{headline}_{path}": means[headline][path] for path in self.report.path_columns}
        module.log_dict(values)

    def _doubts(self, module: PDFEmbedder) -> list[checks.Finding]:
        """Say what makes the scores doubtful. A model that never trained has nothing to differ from."""
        found = list(self._found)
        if module.progress.steps_done:
            trained = module.trained_data
            found += checks.check_images(trained, self.data.settings)
            same = trained.get("data_dir") in (None, self.data.data_dir)
            folder = self.data.folder if same else Path(trained["data_dir"])
            found += checks.check_prompts(folder, self.data.eval_tasks_data)
        return checks.findings(found)


class EmbeddingWriter(Callback):
    """Writes what ``predict`` embeds; ``data.connect`` was given the same ``keeper``."""

    def __init__(self, data: MMEBDataModule, keeper: Keeper) -> None:
        self.data, self.keeper = data, keeper

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with no embeddings."""
        self._shards: dict[tuple[int, int], CollectedEmbeddings] = {}  # by loader and shard
        self._num_cut = 0

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the embeddings of a batch, and write the shard that ends with it."""
        if batch.place.shard is None:
            return
        shard = self._shards.setdefault((dataloader_idx, batch.place.shard), CollectedEmbeddings())
        shard.add(batch, outputs)
        self._num_cut += batch.inputs.num_cut
        if batch.place.last:
            vectors = path_vectors(shard.vectors, batch.paths)
            if batch.paths is None:
                vectors[AGGREGATE] = _aggregate(pl_module, shard.vectors)
            writer = self.keeper.writers[self.data.rows[dataloader_idx].name]
            writer.write(batch.place.shard, shard.rows, vectors, shard.bad_rows)
            del self._shards[dataloader_idx, batch.place.shard]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When all processes are done, write ``bad_rows.jsonl`` and say what there is."""
        trainer.strategy.barrier()
        num_cut = sum(gather_objects(self._num_cut))
        if not trainer.is_global_zero:
            return
        missing, num_rows, bad_rows = self.keeper.written()
        bad_rows_file = Path(self.keeper.root, BAD_ROWS_FILE)
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in bad_rows)
        write_text(bad_rows_file, lines.encode("utf-8", "backslashreplace").decode())  # as JSON has it
        message = f"{self.keeper.root}: {num_rows - len(bad_rows):,} rows embedded."
        if bad_rows:
            message += f" {len(bad_rows):,} rows could not be embedded: {bad_rows_file} says which and why."
        if num_cut:
            message += f" The ends of {num_cut:,} texts were cut off, as they have more than max_tokens."
        if missing:
            message += f" {missing} files are missing: run the same command again."
        left_out = [rows.left_out for rows in self.data.rows if isinstance(rows, RowSource) and rows.left_out]
        message += "".join(f" Left out: {each}." for each in left_out)
        if num_rows == len(bad_rows):
            why = " A file waits for its last row: see limit_predict_batches." if missing else ""
            raise ValueError(printable(f"{message} Nothing was embedded.{why}"))
        rank_zero_info(printable(message))


def evaluate(model: PDFEmbedder, data: MMEBDataModule | str | Path, **trainer_options: Any) -> ScoreReport:
    """Score a model on a data module or folder (or ``mini-mmeb``); ``trainer_options`` are Lightning's."""
    module = data if isinstance(data, MMEBDataModule) else MMEBDataModule(str(data))
    scoring = Scoring(module.connect(model))
    options = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    Trainer(callbacks=[scoring], **{**options, **trainer_options}).test(model, module, verbose=False)
    if scoring.report is None:
        raise ValueError("no task was scored; the warnings above say why")
    return scoring.report


def git_commit() -> str | None:
    """Return the commit of the working folder, with ``+changes`` if files differ; None outside git."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


@torch.no_grad()
def _aggregate(module: PDFEmbedder, embeddings_BND: Tensor) -> Tensor:
    return module.encoder.aggregate(embeddings_BND.to(module.device)).cpu()
