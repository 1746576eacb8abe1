"""Ranks by MMEB's protocol: each query ranks the candidates of its own row.

Here: from embeddings to the rank of every row's positive. Deliberately elsewhere: encoding (``encode``), what
is scored (``modes``), metrics of a rank (``metrics``), means over tasks (``report``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.collate import identity
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.metrics import positive_rank
from parallel_decoupling.evaluation.modes import similarities
from parallel_decoupling.model.identity import rows_hash

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
        ranks: by column, int64 ``[rows]``: the positive's rank after all rivals that it does not beat.
        rows_sha256: what was asked, see ``asked_hash``; "" if unknown.
    """

    task: Task
    hits: dict[str, Tensor]
    ranking: Tensor
    chance: float
    num_skipped: int = 0
    ranks: dict[str, Tensor] = field(default_factory=dict)
    rows_sha256: str = ""


def score_task(task: EvalTask, columns: Mapping[str, tuple[Tensor, Tensor]]) -> TaskScore:
    """Score every row of a task by cosine in float32, for several kinds of embeddings at once.

    Candidates equal to the positive as inputs (text and images) do not count against it. Candidates
    whose embeddings are equal bit for bit get one score, so a tie stays a tie at any matrix shape.

    Args:
        task: rows as indices into unique queries and candidates, each row's positive first.
        columns: name to (``[Uq, D]`` of the queries, ``[Uc, D]`` of the candidates), see
            ``modes.path_columns``; several vectors ``[U, N, D]`` are scored by MaxSim. The ranking is that
            of the first column.

    Returns:
        Ranks and hits per row and column, the ranking, and the level of chance.

    Raises:
        ValueError: no rows, a row without candidates, or embeddings that do not fit the task.
    """
    _check(task, columns)
    query_of_row = torch.tensor(task.query_of_row)
    index_RC = _padded(task.candidates_of_row)
    identity_U = torch.tensor([identity(candidate) for candidate in task.candidates])
    identity_RC = identity_U[index_RC]
    rivals_RC = identity_RC != identity_RC[:, :1]
    ranks, ranking = {}, torch.empty(0)
    for number, (name, (query, candidate)) in enumerate(columns.items()):
        distinct, distinct_of_candidate = _distinct_rows(
            F.normalize(candidate.detach().float().cpu(), dim=-1)
        )
        unit_query = F.normalize(query.detach().float().cpu(), dim=-1)
        ranks_by_chunk, ranking_by_chunk = [], []
        for start in range(0, len(query_of_row), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            all_scores = similarities(unit_query[query_of_row[rows]], distinct)
            scores_RC = all_scores.gather(1, distinct_of_candidate[index_RC[rows]])
            ranks_by_chunk.append(positive_rank(scores_RC, rivals_RC[rows]))
            if number == 0:
                ranking_by_chunk.append(_ranking(scores_RC, rivals_RC[rows], index_RC[rows]))
        ranks[name] = torch.cat(ranks_by_chunk)
        ranking = torch.cat(ranking_by_chunk) if number == 0 else ranking
    chance = sum(1 / len(set(identity_U[row].tolist())) for row in task.candidates_of_row) / len(query_of_row)
    hits = {name: rank_R == 1 for name, rank_R in ranks.items()}
    return TaskScore(task.task, hits, ranking, chance, ranks=ranks, rows_sha256=asked_hash(task))


def asked_hash(task: EvalTask) -> str:
    """Identify what a task asks: the texts and images of every row's query and candidates, in order."""
    rows = RawInput(json.dumps([task.query_of_row, task.candidates_of_row]))
    return rows_hash((*task.queries, *task.candidates, rows), files=False)


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
            or query.ndim not in (2, 3)
        ):
            raise ValueError(
                f"{name}, {column}: embeddings of shape {tuple(query.shape)}, {tuple(candidate.shape)} "
                f"for {expected[0]} queries and {expected[1]} candidates"
            )


def _padded(candidates_of_row: list[list[int]]) -> Tensor:
    """Rows as one ``[R, C]`` tensor; short rows repeat their positive, which is never a rival."""
    longest = max(map(len, candidates_of_row))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in candidates_of_row])


def _distinct_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[U, ...]`` that differ in at least one bit, and each row's index among them."""
    numbers: dict[bytes, int] = {}
    of_row = [numbers.setdefault(row.numpy().tobytes(), len(numbers)) for row in embeddings]
    first = {number: row for row, number in reversed(list(enumerate(of_row)))}
    return embeddings[[first[number] for number in range(len(numbers))]], torch.tensor(of_row)


def _ranking(scores_RC: Tensor, rivals_RC: Tensor, index_RC: Tensor) -> Tensor:
    """Best candidates first; the positive after rivals that tie with it."""
    ranked_RC = rivals_RC.clone()
    ranked_RC[:, 0] = True
    scores_RC = scores_RC.masked_fill(~ranked_RC, -torch.inf).flip(1)
    order = scores_RC.argsort(dim=1, descending=True, stable=True)[:, :RANKING_DEPTH]
    best = index_RC.flip(1).gather(1, order)
    best = best.masked_fill(~ranked_RC.flip(1).gather(1, order), -1)
    return F.pad(best, (0, RANKING_DEPTH - best.shape[1]), value=-1)
