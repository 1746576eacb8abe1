"""hit@1 by MMEB's protocol: each query ranks the candidates of its own row.

Here: the metric on embeddings. Deliberately elsewhere: encoding (``encode``), means over tasks (``report``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.data.collate import identity
from parallel_decoupling.data.tasks import EvalTask, Task

RANKING_DEPTH = 10
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class TaskScore:
    """What one task's rows scored.

    Attributes:
        task: name, meta-task and distribution.
        hits: by column (``"aggregate"``, ``"path_0"``, ...): bool ``[rows]``.
        ranking: ``[rows, 10]`` int64, the first column's best candidates, best first, as indices
            into the task's candidates; copies of the positive are left out; -1 where a row has fewer.
        chance: hit@1 of a random choice, the mean over rows of 1 / number of distinct candidates.
        num_skipped: rows left out because their images could not be read.
    """

    task: Task
    hits: dict[str, Tensor]
    ranking: Tensor
    chance: float
    num_skipped: int = 0


def path_columns(
    query: Tensor, candidate: Tensor, aggregate: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name what is scored: the aggregate, then every path on its own.

    Args:
        query: ``[Uq, N, D]``, all paths.
        candidate: ``[Uc, N, D]``.
        aggregate: combines paths; ``ParallelEncoder.aggregate``.

    Returns:
        Column name to a pair of ``[Uq, D]`` and ``[Uc, D]``; the aggregate may have another ``D``.
    """
    columns = {"aggregate": (aggregate(query), aggregate(candidate))}
    columns |= {f"path_{path}": (query[:, path], candidate[:, path]) for path in range(query.shape[1])}
    return columns


def hit_at_1(scores_RC: Tensor, rivals_RC: Tensor) -> Tensor:
    """Whether the positive, column 0, scores strictly above every rival of its row.

    A tie is a miss: MMEB keeps the positive at index 0, so that breaking ties by index would call a
    collapsed model perfect. NaN anywhere that matters is a miss as well.

    Args:
        scores_RC: ``[R, C]`` scores, higher is better.
        rivals_RC: ``[R, C]`` bool; False for the positive, its copies and padding.

    Returns:
        bool ``[R]``.
    """
    positive_R1 = scores_RC[:, :1]
    beaten_RC = (scores_RC < positive_R1) | ~rivals_RC
    return beaten_RC.all(dim=1) & ~positive_R1[:, 0].isnan()


def score_task(task: EvalTask, columns: Mapping[str, tuple[Tensor, Tensor]]) -> TaskScore:
    """Score every row of a task by cosine in float32, for several kinds of embeddings at once.

    Candidates equal to the positive as inputs (text and images) do not count against it. Candidates
    whose embeddings are equal bit for bit get one score, so a tie stays a tie at any matrix shape.

    Args:
        task: rows as indices into unique queries and candidates, each row's positive first.
        columns: name to (``[Uq, D]`` of the queries, ``[Uc, D]`` of the candidates), see
            ``path_columns``; the ranking is that of the first column.

    Returns:
        Hits per row and column, the ranking, and the level of chance.

    Raises:
        ValueError: no rows, a row without candidates, or embeddings that do not fit the task.
    """
    _check(task, columns)
    query_of_row = torch.tensor(task.query_of_row)
    index_RC = _padded(task.candidates_of_row)
    identity_U = torch.tensor([identity(candidate) for candidate in task.candidates])
    identity_RC = identity_U[index_RC]
    rivals_RC = identity_RC != identity_RC[:, :1]
    hits, ranking = {}, torch.empty(0)
    for number, (name, (query, candidate)) in enumerate(columns.items()):
        distinct_UD, distinct_of_candidate = _distinct_rows(
            F.normalize(candidate.detach().float().cpu(), dim=-1)
        )
        unit_query = F.normalize(query.detach().float().cpu(), dim=-1)
        hits_by_chunk, ranking_by_chunk = [], []
        for start in range(0, len(query_of_row), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            all_scores = unit_query[query_of_row[rows]] @ distinct_UD.T
            scores_RC = all_scores.gather(1, distinct_of_candidate[index_RC[rows]])
            hits_by_chunk.append(hit_at_1(scores_RC, rivals_RC[rows]))
            if number == 0:
                ranking_by_chunk.append(_ranking(scores_RC, rivals_RC[rows], index_RC[rows]))
        hits[name] = torch.cat(hits_by_chunk)
        ranking = torch.cat(ranking_by_chunk) if number == 0 else ranking
    chance = sum(1 / len(set(identity_U[row].tolist())) for row in task.candidates_of_row) / len(query_of_row)
    return TaskScore(task.task, hits, ranking, chance)


def _check(task: EvalTask, columns: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    name = task.task.name
    if not columns:
        raise ValueError(f"{name}: no embeddings to score")
    if not task.query_of_row or len(task.query_of_row) != len(task.candidates_of_row):
        raise ValueError(
            f"{name}: {len(task.query_of_row)} rows and {len(task.candidates_of_row)} lists of candidates; "
            "both must be the same number, at least 1"
        )
    for row, candidates in enumerate(task.candidates_of_row):
        if not candidates:
            raise ValueError(f"{name}: row {row} has no candidates")
    for column, (query, candidate) in columns.items():
        expected = len(task.queries), len(task.candidates)
        if (
            (len(query), len(candidate)) != expected
            or query.shape[1:] != candidate.shape[1:]
            or query.ndim != 2
        ):
            raise ValueError(
                f"{name}, {column}: embeddings of shape {tuple(query.shape)}, {tuple(candidate.shape)} "
                f"for {expected[0]} queries and {expected[1]} candidates"
            )


def _padded(candidates_of_row: list[list[int]]) -> Tensor:
    """Rows as one ``[R, C]`` tensor; short rows repeat their positive, which is never a rival."""
    longest = max(map(len, candidates_of_row))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in candidates_of_row])


def _distinct_rows(embedding_UD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that differ in at least one bit, and each row's index among them."""
    numbers: dict[bytes, int] = {}
    of_row = [numbers.setdefault(row.numpy().tobytes(), len(numbers)) for row in embedding_UD]
    first = {number: row for row, number in reversed(list(enumerate(of_row)))}
    return embedding_UD[[first[number] for number in range(len(numbers))]], torch.tensor(of_row)


def _ranking(scores_RC: Tensor, rivals_RC: Tensor, index_RC: Tensor) -> Tensor:
    """Best candidates first; the positive after rivals that tie with it."""
    ranked_RC = rivals_RC.clone()
    ranked_RC[:, 0] = True
    scores_RC = scores_RC.masked_fill(~ranked_RC, -torch.inf).flip(1)
    order = scores_RC.argsort(dim=1, descending=True, stable=True)[:, :RANKING_DEPTH]
    best = index_RC.flip(1).gather(1, order)
    best = best.masked_fill(~ranked_RC.flip(1).gather(1, order), -1)
    return F.pad(best, (0, RANKING_DEPTH - best.shape[1]), value=-1)
