"""From the embeddings of an evaluation loop to a score report, its files and its pictures.

Here: collecting rows over batches and ranks, task by task. Elsewhere on purpose: the metric and the report
(``evaluation``), which rows a task has (``data.tasks``), the loop itself (Lightning, ``training.module``).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from parallel_decoupling.data.collate import EvalBatch
from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.distributed import rank
from parallel_decoupling.evaluation.plots import retrieval_examples_figure
from parallel_decoupling.evaluation.score import Columns, TaskScore, path_columns, score_task
from parallel_decoupling.training.embedding_cache import CachedTask, EmbeddingCache

PROJECTOR_ROWS = 300
SIDES: tuple[Literal["query", "candidate"], ...] = ("query", "candidate")


class TaskEmbeddings:
    """All rows of one task, filled batch by batch in any order.

    Args:
        task: the task.
        reduce: sums a tensor over ranks.

    Attributes:
        missing: by side, the places whose images no rank could read; known once all rows are there.
    """

    def __init__(self, task: EvalTask, reduce: Callable[[Tensor], Tensor]) -> None:
        self.task = task
        self._reduce = reduce
        self._sizes = {"query": len(task.queries), "candidate": len(task.candidates)}
        self._sum_UND: dict[str, Tensor] = {}  # both sides, from the first batch on
        self._count_U = {side: torch.zeros(size) for side, size in self._sizes.items()}
        self._missing_U = {side: torch.zeros(size) for side, size in self._sizes.items()}
        self.missing: dict[str, list[int]] = {"query": [], "candidate": []}

    def add(self, batch: EvalBatch, embeddings_BND: Tensor) -> None:
        """Put one batch in its place."""
        rows, side = batch.indices.cpu(), batch.side
        if not self._sum_UND:
            trailing = embeddings_BND.shape[1:]
            self._sum_UND = {each: torch.zeros(size, *trailing) for each, size in self._sizes.items()}
        self._sum_UND[side][rows] = embeddings_BND.float().cpu()
        self._count_U[side][rows] = 1
        self._missing_U[side][list(batch.missing)] = 1

    def complete(self) -> tuple[Tensor, Tensor] | None:
        """Queries ``[Uq, N, D]`` and candidates ``[Uc, N, D]`` of all ranks; ``None`` if rows are missing.

        A row that two ranks encoded counts with its mean; one whose images could not be read is NaN. Every
        rank takes part in the same collectives, whichever sides its own batches had.
        """
        counts = {side: self._reduce(self._count_U[side]) for side in SIDES}
        if not all(bool((count_U > 0).all()) for count_U in counts.values()):
            return None
        sides = {}
        for side in SIDES:
            sides[side] = self._reduce(self._sum_UND[side]) / counts[side].view(-1, 1, 1)
            self.missing[side] = self._reduce(self._missing_U[side]).nonzero()[:, 0].tolist()
            sides[side][self.missing[side]] = torch.nan
        return sides["query"], sides["candidate"]


class Evaluation:
    """Scores tasks one after the other, keeping the embeddings of only one at a time.

    Args:
        tasks: in the order of the evaluation loaders.
        aggregate: combines paths, ``[U, N, D]`` to ``[U, D']``, on the CPU.
        reduce: sums a tensor over ranks.
        on_task: called with each complete task: task, its score, its embeddings.
        cache: takes every complete task, on the first rank; ``None`` keeps nothing.
        quiet: say nothing about tasks that a batch limit cut short.

    Attributes:
        scores: of the tasks done.
        columns: one query and one candidate by column, known after the first task.
    """

    def __init__(
        self,
        tasks: list[EvalTask],
        aggregate: Callable[[Tensor], Tensor],
        reduce: Callable[[Tensor], Tensor],
        on_task: Callable[[EvalTask, TaskScore, CachedTask], None] | None = None,
        *,
        cache: EmbeddingCache | None = None,
        quiet: bool = False,
    ) -> None:
        self.tasks = tasks
        self.scores: list[TaskScore] = []
        self.columns: Columns = {}
        self._aggregate, self._reduce, self._on_task = aggregate, reduce, on_task
        self._cache, self._quiet = cache, quiet
        self._index = -1
        self._current: TaskEmbeddings | None = None

    def add(self, index: int, batch: EvalBatch, embeddings_BND: Tensor) -> None:
        """Take a batch of task ``index``; tasks come in order."""
        if self._current is None or index != self._index:
            self.finish_task()
            self._index, self._current = index, TaskEmbeddings(self.tasks[index], self._reduce)
        self._current.add(batch, embeddings_BND)

    def add_cached(self, index: int) -> None:
        """Score task ``index`` from the cache."""
        assert self._cache is not None, "only a cache makes loaders of cached tasks"
        self.finish_task()
        self._index = index
        self._score(self.tasks[index], self._cache.load(self.tasks[index]))

    def finish_task(self) -> None:
        """Score the task at hand; a task that a batch limit cut short is left out with a warning."""
        if self._current is None:
            return
        task, sides, missing = self._current.task, self._current.complete(), self._current.missing
        self._current = None
        if sides is None:
            if not self._quiet:
                rank_zero_warn(
                    f"{task.task.name}: not all rows were encoded (limited batches), so it has no score."
                )
            return
        content = CachedTask(*sides, missing)
        if self._cache is not None and rank() == 0:
            self._cache.save(task, content)
        self._score(task, content)

    def _score(self, task: EvalTask, content: CachedTask) -> None:
        readable, num_skipped = _without_missing(task, **content.missing)
        if not readable.query_of_row:
            rank_zero_warn(f"{task.task.name}: no row's images could be read, so it has no score.")
            return
        columns = path_columns(content.query, content.candidate, self._aggregate)
        score = replace(score_task(readable, columns), num_skipped=num_skipped)
        self.scores.append(score)
        self.columns = {name: (query[:1], candidate[:1]) for name, (query, candidate) in columns.items()}
        if self._on_task is not None:
            self._on_task(readable, score, content)


def _without_missing(task: EvalTask, query: list[int], candidate: list[int]) -> tuple[EvalTask, int]:
    """The task without the inputs whose images could not be read, and the number of rows left out."""
    if not query and not candidate:
        return task, 0
    readable = task.without(set(query), set(candidate))
    num_skipped = len(task.query_of_row) - len(readable.query_of_row)
    rank_zero_warn(
        f"{task.task.name}: {len(query)} queries and {len(candidate)} candidates have images that cannot "
        f"be read; {num_skipped} of {len(task.query_of_row)} rows are left out of the score."
    )
    return readable, num_skipped


def draw_examples(writer: SummaryWriter, task: EvalTask, score: TaskScore, step: int) -> None:
    """Show a few queries with their best candidates in TensorBoard."""
    writer.add_figure(f"retrieval/{task.task.name}", retrieval_examples_figure(task, score), global_step=step)


class ProjectorSample:
    """A few hundred aggregated embeddings of all tasks for TensorBoard's projector."""

    def __init__(self, num_tasks: int) -> None:
        self._rows_per_side = max(1, PROJECTOR_ROWS // max(1, 2 * num_tasks))
        self._vectors: list[Tensor] = []
        self._labels: list[list[str]] = []

    def add(self, task: EvalTask, query_UD: Tensor, candidate_UD: Tensor) -> None:
        """Take the first rows of both sides."""
        sides = (("query", task.queries, query_UD), ("candidate", task.candidates, candidate_UD))
        for side, inputs, vectors_UD in sides:
            rows = vectors_UD.isfinite().all(dim=1).nonzero()[: self._rows_per_side, 0]
            self._vectors.append(vectors_UD[rows])
            for row in rows.tolist():
                text = " ".join(inputs[row].text.split())[:80]
                self._labels.append([task.task.name, side, text])

    def write(self, folder: Path) -> None:
        """Write the sample as a TensorBoard run of its own: the projector puts files next to the events."""
        if not self._vectors:
            return
        header = ["task", "side", "text"]
        with SummaryWriter(str(folder)) as writer:
            writer.add_embedding(torch.cat(self._vectors), self._labels, metadata_header=header)


def git_commit() -> str | None:
    """The commit of the working folder, with ``+changes`` if files differ from it; ``None`` outside git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        status = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    if commit.returncode or status.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
