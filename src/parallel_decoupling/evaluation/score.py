"""Scores by MMEB's protocol: similarity, and the rank of each query's positive among its own candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.collate import identity
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.model.identity import rows_hash
from parallel_decoupling.objective.statistics import margin_correlation

DEPTHS = (1, 5, 10)
METRICS = (*(f"hit@{k}" for k in DEPTHS), "mrr", *(f"{name}@{k}" for name in ("mrr", "ndcg") for k in DEPTHS))
RANKING_DEPTH = 10
ROWS_AT_ONCE = 256

Columns = dict[str, tuple[Tensor, Tensor]]  # embeddings of queries and of candidates by name


@dataclass(frozen=True)
class TaskScore:
    """What one task's rows scored."""

    task: Task
    ranks: dict[str, Tensor]  # by column (aggregate, path_0, ...): int64 [rows], see positive_rank
    ranking: Tensor  # int64 [rows, 10]: best candidates of the first column; -1 where a row has fewer
    chance: float  # hit@1 of a random choice, the mean over rows of 1 / number of distinct candidates
    num_skipped: int = 0  # rows left out because their images could not be read
    rows_sha256: str = ""  # identifies what was asked, see task_hash
    margin_correlation: list[list[float]] = field(default_factory=list)  # [N][N] of paths, over rows

    @property
    def hits(self) -> dict[str, Tensor]:
        """By column, bool ``[rows]``: whether the positive came first."""
        return {name: rank_R == 1 for name, rank_R in self.ranks.items()}


def path_columns(query: Tensor, candidate: Tensor, aggregate: Callable[[Tensor], Tensor]) -> Columns:
    """Name what is scored of ``[U, N, D]``: the aggregate, every path, and the other ways to use all paths.

    ``mean`` is that of the paths, ``concat`` has them side by side, and with ``maxsim``, ``[U, N, D]``, every
    query path takes its best candidate path.
    """
    num_paths = query.shape[1]
    columns = {"aggregate": (aggregate(query), aggregate(candidate))}
    columns |= {f"path_{path}": (query[:, path], candidate[:, path]) for path in range(num_paths)}
    if num_paths > 1:
        query, candidate = (F.normalize(paths_UND.float(), dim=-1) for paths_UND in (query, candidate))
        columns["mean"] = query.mean(dim=1), candidate.mean(dim=1)
        columns["concat"] = query.flatten(1), candidate.flatten(1)
        columns["maxsim"] = query, candidate
    return columns


def similarities(query: Tensor, candidate: Tensor) -> Tensor:
    """Score all pairs ``[Q, C]`` of unit vectors: cosines of ``[rows, D]``, MaxSim of ``[rows, N, D]``."""
    if query.ndim == 2:
        return query @ candidate.T
    flat = query.flatten(0, 1)
    cosines = ((flat @ candidate_CD.T).view(*query.shape[:2], -1) for candidate_CD in candidate.unbind(1))
    return reduce(torch.maximum, cosines).mean(dim=1)


def score_task(task: EvalTask, columns: Columns) -> TaskScore:
    """Score every row of a task by the columns of ``path_columns``, in float32.

    Candidates equal to the positive as inputs (text and images) do not count against it. Candidates
    whose embeddings are equal bit for bit get one score, so a tie stays a tie at any matrix shape.
    """
    _check(task, columns)
    query_of_row = torch.tensor(task.query_of_row)
    longest = max(map(len, task.candidates_of_row))
    # short rows repeat their positive, which is never a rival
    index_RC = torch.tensor([row + row[:1] * (longest - len(row)) for row in task.candidates_of_row])
    identity_U = torch.tensor([identity(candidate) for candidate in task.candidates])
    rivals_RC = identity_U[index_RC] != identity_U[index_RC[:, :1]]
    ranks: dict[str, Tensor] = {}
    ranking: list[Tensor] = []
    margins: list[Tensor] = []
    for name, (query, candidate) in columns.items():
        unit_query, unit_candidate = (
            F.normalize(each.detach().float().cpu(), dim=-1) for each in (query, candidate)
        )
        distinct, distinct_of_candidate = _distinct_rows(unit_candidate)
        rank_chunks, margin_chunks = [], []
        for start in range(0, len(query_of_row), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            all_scores = similarities(unit_query[query_of_row[rows]], distinct)
            scores_RC = all_scores.gather(1, distinct_of_candidate[index_RC[rows]])
            rank_chunks.append(positive_rank(scores_RC, rivals_RC[rows]))
            best_rival_R = scores_RC.masked_fill(~rivals_RC[rows], -torch.inf).amax(dim=1)
            margin_chunks.append(scores_RC[:, 0] - best_rival_R)
            if not ranks:
                ranking.append(_ranking(scores_RC, rivals_RC[rows], index_RC[rows]))
        ranks[name] = torch.cat(rank_chunks)
        if name.startswith("path_"):
            margins.append(torch.cat(margin_chunks))
    chance = sum(1 / len(set(identity_U[row].tolist())) for row in task.candidates_of_row) / len(query_of_row)
    return TaskScore(
        task.task,
        ranks,
        torch.cat(ranking),
        chance,
        rows_sha256=task_hash(task),
        margin_correlation=margin_correlation(torch.stack(margins)).tolist() if margins else [],
    )


def task_hash(task: EvalTask) -> str:
    """Identify what a task asks, by texts and names of images; a benchmark may move to another folder."""
    rows = RawInput(f"{task.query_of_row} {task.candidates_of_row}")
    return rows_hash([*task.queries, *task.candidates, rows], files=False)


def positive_rank(scores_RC: Tensor, rivals_RC: Tensor) -> Tensor:
    """Rank the positive, column 0, after every rival that it does not beat: int64 ``[R]``, 1 is best.

    Ties are pessimistic: MMEB keeps the positive at index 0, so that breaking ties by index would call a
    collapsed model perfect. A NaN rival counts as ahead; a NaN positive is behind everything. ``rivals_RC``
    is False for the positive, its copies and padding.
    """
    positive_R1 = scores_RC[:, :1]
    ahead_RC = ~(scores_RC < positive_R1) & rivals_RC
    behind_all = scores_RC.shape[1] + 1
    return torch.where(positive_R1[:, 0].isnan(), behind_all, 1 + ahead_RC.sum(dim=1))


def mean_metrics(rank_R: Tensor) -> dict[str, float]:
    """Average ``METRICS`` over queries with one right answer each, whose rank says everything."""
    rank_R = rank_R.double()
    worth = {"hit": torch.ones_like(rank_R), "mrr": 1 / rank_R, "ndcg": 1 / torch.log2(1 + rank_R)}
    cut = {f"{name}@{k}": value_R * (rank_R <= k) for name, value_R in worth.items() for k in DEPTHS}
    return {name: float((cut | worth)[name].mean()) for name in METRICS}


def mode_costs(columns: Columns) -> dict[str, dict[str, int]]:
    """Return ``bytes_per_item`` in float32 and ``paths_per_item`` to encode of each column of any task."""
    num_paths = sum(name.startswith("path_") for name in columns)
    return {
        name: {
            "bytes_per_item": 4 * candidate[0].numel(),
            "paths_per_item": 1 if name.startswith("path_") else num_paths,
        }
        for name, (_, candidate) in columns.items()
    }


def _check(task: EvalTask, columns: Columns) -> None:
    name, num_rows = task.task.name, len(task.query_of_row)
    if not columns or not num_rows:
        raise ValueError(f"{name}: {num_rows} rows and {len(columns)} columns; nothing to score")
    if [] in task.candidates_of_row:
        raise ValueError(f"{name}: row {task.candidates_of_row.index([])} has no candidates")
    expected = len(task.queries), len(task.candidates)
    for column, (query, candidate) in columns.items():
        if (len(query), len(candidate)) != expected or query.shape[1:] != candidate.shape[1:]:
            raise ValueError(
                f"{name}, {column}: embeddings of shape {tuple(query.shape)}, {tuple(candidate.shape)} "
                f"for {expected[0]} queries and {expected[1]} candidates"
            )


def _distinct_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows ``[U, ...]`` that differ in at least one bit, and each row's index among them."""
    first: dict[bytes, int] = {}
    first_of_row = [first.setdefault(row.numpy().tobytes(), number) for number, row in enumerate(embeddings)]
    numbers = {row: number for number, row in enumerate(first.values())}
    return embeddings[list(numbers)], torch.tensor([numbers[row] for row in first_of_row])


def _ranking(scores_RC: Tensor, rivals_RC: Tensor, index_RC: Tensor) -> Tensor:
    """Rank the best candidates first, and the positive after rivals that tie with it."""
    ranked_RC = rivals_RC.clone()
    ranked_RC[:, 0] = True
    scores_RC = scores_RC.masked_fill(~ranked_RC, -torch.inf).flip(1)
    order = scores_RC.argsort(dim=1, descending=True, stable=True)[:, :RANKING_DEPTH]
    best = index_RC.flip(1).gather(1, order)
    best = best.masked_fill(~ranked_RC.flip(1).gather(1, order), -1)
    return F.pad(best, (0, RANKING_DEPTH - best.shape[1]), value=-1)
