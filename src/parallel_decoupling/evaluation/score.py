"""Scores by MMEB's protocol: similarity, and the ranks of each query's right answers among its candidates.

MMEB has one right answer per query, its positive; other tasks have several, each with a grade.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.collate import identity
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.model.identity import rows_hash
from parallel_decoupling.objective.statistics import margin_correlation

DEPTHS = (1, 5, 10)
CUT = ("hit", "mrr", "ndcg", "recall")
METRICS = (*(f"{name}@{k}" for name in CUT for k in DEPTHS), "mrr", "r_precision")
RANKING_DEPTH = 10
ROWS_AT_ONCE = 256

Columns = dict[str, tuple[Tensor, Tensor]]  # embeddings of queries and of candidates by name
RowMetrics = dict[str, dict[str, Tensor]]  # by column and METRICS: float64 [rows]
NOT_KEPT = ("rows", "ranking")  # of a ``TaskResult`` in files


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task, by column (aggregate, path_0, ...)."""

    task: Task
    num_queries: int  # rows scored
    chance: float  # hit@1 of a random choice, the mean over rows of right / all distinct candidates
    hit_at_1: dict[str, float]  # in [0, 1]
    hits: dict[str, str] = field(default_factory=dict)  # one 0 or 1 per row; empty if not known
    num_skipped: int = 0  # rows left out because they could not be embedded
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # means of METRICS
    rows_sha256: str = ""  # identifies what was asked, see task_hash
    margin_correlation: list[list[float]] = field(default_factory=list)  # [N][N] of paths, over rows
    answers: float = 1.0  # right answers per row
    values: dict[str, list[float]] = field(default_factory=dict)  # of a metric other than hit@1, per row
    rows: RowMetrics = field(default_factory=dict, compare=False)
    ranking: Tensor | None = field(default=None, compare=False)
    """int64 [rows, 10]: best candidates of the first column; -1 where a row has fewer."""

    @classmethod
    def of(cls, task: Task, rows: RowMetrics, ranking: Tensor, chance: float, **about: Any) -> "TaskResult":
        """Keep the means of all metrics, and of the task's own what every row has."""
        hits = {key: "".join("01"[hit] for hit in of["hit@1"].int().tolist()) for key, of in rows.items()}
        metrics = {key: {name: float(row.mean()) for name, row in of.items()} for key, of in rows.items()}
        hit_at_1 = {key: each.count("1") / len(each) for key, each in hits.items()}
        if task.metric != "hit@1":
            about["values"] = {key: of[task.metric].tolist() for key, of in rows.items()}
        about |= {"hits": hits, "metrics": metrics, "rows": rows, "ranking": ranking}
        return cls(task, len(ranking), chance, hit_at_1, **about)

    @property
    def score(self) -> dict[str, float]:
        """The task's own metric by column."""
        if self.task.metric == "hit@1":
            return self.hit_at_1
        return {column: metrics[self.task.metric] for column, metrics in self.metrics.items()}

    @property
    def title(self) -> str:
        """The task's name, with its metric if that is another one than hit@1."""
        return self.task.name + ("" if self.task.metric == "hit@1" else f", {self.task.metric}")

    def row_scores(self, column: str) -> list[float]:
        """Return what every row contributes to ``score``."""
        return self.values[column] if self.values else [float(hit) for hit in self.hits[column]]


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


def similarities(query: Tensor, candidate: Tensor | Sequence[Tensor]) -> Tensor:
    """Score all pairs ``[Q, C]`` of unit vectors: cosines of ``[rows, D]``, MaxSim of ``[rows, N, D]``.

    The candidates of MaxSim may also be a list of ``[C, D]``, one per path.
    """
    if query.ndim == 2:
        return query @ cast(Tensor, candidate).T
    paths = candidate.unbind(1) if isinstance(candidate, Tensor) else candidate
    cosines = ((query.flatten(0, 1) @ path_CD.T).view(*query.shape[:2], -1) for path_CD in paths)
    return reduce(torch.maximum, cosines).mean(dim=1)


def score_task(task: EvalTask, columns: Columns) -> TaskResult:
    """Score every row of a task by the columns of ``path_columns``, in float32.

    Candidates equal to the positive as inputs (text and images) do not count against it. Candidates
    whose embeddings are equal bit for bit get one score, so a tie stays a tie at any matrix shape.
    """
    if [] in task.candidates_of_row:
        raise ValueError(f"{task.task.name}: row {task.candidates_of_row.index([])} has no candidates")
    size = len(task.queries), len(task.candidates)
    for query, candidate in columns.values():
        assert (len(query), len(candidate)) == size, f"{task.task.name}: an embedding of every input"
    query_of_row, rows_sha256 = torch.tensor(task.query_of_row), task_hash(task)
    identities = [identity(candidate) for candidate in task.candidates]
    task = _without_copies(task, identities)
    sides: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, both in columns.items():
        query, candidate = (F.normalize(each.detach().float().cpu(), dim=-1) for each in both)
        sides[name] = (query, *_distinct_rows(candidate))
    chunks: dict[str, list[dict[str, Tensor]]] = {name: [] for name in columns}
    margins: dict[str, list[Tensor]] = {}
    ranking: list[Tensor] = []
    for start in range(0, len(query_of_row), ROWS_AT_ONCE):
        rows = range(len(query_of_row))[start : start + ROWS_AT_ONCE]
        index_RC, grades_RC, counted_RC = _judged(task, rows, torch.tensor(identities))
        for name, (query, distinct, distinct_of_candidate) in sides.items():
            all_scores = similarities(query[query_of_row[rows]], distinct)
            scores_RC = all_scores.gather(1, distinct_of_candidate[index_RC])
            order_RC, found_RC = ranked(scores_RC, grades_RC, counted_RC)
            chunks[name].append(row_metrics(found_RC, grades_RC))
            if name.startswith("path_"):
                right_RC = grades_RC > 0
                best_R = scores_RC.masked_fill(~right_RC, -torch.inf).amax(dim=1)
                rival_R = scores_RC.masked_fill(right_RC | ~counted_RC, -torch.inf).amax(dim=1)
                margins.setdefault(name, []).append(best_R - rival_R)
            if name == next(iter(columns)):
                best_RC = index_RC.masked_fill(~counted_RC, -1).gather(1, order_RC[:, :RANKING_DEPTH])
                ranking.append(F.pad(best_RC, (0, RANKING_DEPTH - best_RC.shape[1]), value=-1))
    metrics = {
        name: {metric: torch.cat([each[metric] for each in parts]) for metric in METRICS}
        for name, parts in chunks.items()
    }
    right = [{identities[each] for each in task.answers(row)} for row in range(len(query_of_row))]
    everyone = ({identities[each] for each in candidates} for candidates in task.candidates_of_row)
    chance = sum(len(some) / len(each) for some, each in zip(right, everyone, strict=True)) / len(right)
    of_paths = [torch.cat(each) for each in margins.values()]
    return TaskResult.of(
        task.task,
        metrics,
        torch.cat(ranking),
        chance,
        rows_sha256=rows_sha256,
        answers=sum(map(len, right)) / len(right),
        margin_correlation=margin_correlation(torch.stack(of_paths)).tolist() if of_paths else [],
    )


def task_hash(task: EvalTask) -> str:
    """Identify what a task asks, by texts and names of images; a benchmark may move to another folder."""
    of_row = task.candidates_of_row if task.relevance_of_row is None else task.relevance_of_row
    rows = RawInput(f"{task.query_of_row} {of_row}")
    return rows_hash([*task.queries, *task.candidates, rows], files=False)


def _without_copies(task: EvalTask, identities: Sequence[int]) -> EvalTask:
    """Put the first of equal candidates in place of all, with the highest grade, where rows have grades."""
    if task.relevance_of_row is None:
        return task
    lists = {id(row): row for row in task.candidates_of_row}  # which may all be one
    first: dict[int, int] = {}
    for candidate in chain.from_iterable(lists.values()):
        first.setdefault(identities[candidate], candidate)
    kept = {name: list(dict.fromkeys(first[identities[each]] for each in row)) for name, row in lists.items()}
    relevance: list[dict[int, float]] = []
    for row_grades in task.relevance_of_row:
        grades: dict[int, float] = {}
        for candidate, grade in row_grades.items():
            number = first[identities[candidate]]
            grades[number] = max(grade, grades.get(number, 0.0))
        relevance.append(grades)
    rows = [kept[id(row)] for row in task.candidates_of_row]
    return replace(task, candidates_of_row=rows, relevance_of_row=relevance)


def _judged(task: EvalTask, rows: range, identity_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates of some rows, their grades, and which of them count: ``[R, C]`` each.

    The columns of a row are in the order of their grades, wrong ones first. Copies of the positive and the
    padding of short rows do not count.
    """
    lists = task.candidates_of_row[rows.start : rows.stop]
    longest = max(map(len, lists))
    if all(row is lists[0] for row in lists):
        index_RC = torch.tensor(lists[0]).expand(len(rows), -1)
    else:
        index_RC = torch.tensor([row + row[:1] * (longest - len(row)) for row in lists])
    if task.relevance_of_row is None:
        counted_RC = identity_U[index_RC] != identity_U[index_RC[:, :1]]
        counted_RC[:, 0] = True
        grades_RC = torch.zeros(index_RC.shape, dtype=torch.float64)
        grades_RC[:, 0] = 1
    else:
        grades_RU = torch.zeros(len(rows), len(task.candidates), dtype=torch.float64)
        for number, row in enumerate(rows):
            for candidate, grade in task.relevance_of_row[row].items():
                grades_RU[number, candidate] = grade
        counted_RC = torch.arange(longest) < torch.tensor([[len(row)] for row in lists])
        grades_RC = grades_RU.gather(1, index_RC).masked_fill(~counted_RC, 0)
    by_grade_RC = grades_RC.argsort(dim=1, stable=True)
    index_RC, grades_RC = index_RC.gather(1, by_grade_RC), grades_RC.gather(1, by_grade_RC)
    return index_RC, grades_RC, counted_RC.gather(1, by_grade_RC)


def ranked(scores_RC: Tensor, grades_RC: Tensor, counted_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Order the candidates of every row, best first: their columns and the grades found there, ``[R, C]``.

    Ties are pessimistic: of equal scores the lower grade comes first, as the columns are in the order of
    grades. A wrong candidate whose score is NaN is ahead of all, and a right one is never found.
    """
    lost_RC, wrong_RC = scores_RC.isnan(), grades_RC == 0
    scores_RC = scores_RC.masked_fill(lost_RC & wrong_RC, torch.inf)
    scores_RC = scores_RC.masked_fill(lost_RC & ~wrong_RC | ~counted_RC, -torch.inf)
    order_RC = scores_RC.argsort(dim=1, descending=True, stable=True)
    return order_RC, grades_RC.masked_fill(lost_RC, 0).gather(1, order_RC)


def row_metrics(found_RC: Tensor, grades_RC: Tensor) -> dict[str, Tensor]:
    """Return every row's ``METRICS`` from the grades in the order of the ranking: float64 ``[R]`` each.

    A grade above 0 is a right answer. nDCG is the linear one, grade / log2(1 + rank) over that of the best
    order of all ``grades_RC`` of the row; only in it grades make a difference.
    """
    right_RC, count_R = found_RC > 0, (grades_RC > 0).sum(dim=1).double()
    rank_C = torch.arange(1, found_RC.shape[1] + 1, dtype=torch.float64)
    first_R = torch.where(right_RC, rank_C, torch.inf).amin(dim=1)
    values = {"mrr": 1 / first_R}
    values["r_precision"] = (right_RC & (rank_C <= count_R[:, None])).sum(dim=1) / count_R
    for k in DEPTHS:
        discount_K = 1 / torch.log2(1 + rank_C[:k])
        best_RK = grades_RC.topk(len(discount_K), dim=1).values.double()
        values[f"hit@{k}"] = (first_R <= k).double()
        values[f"mrr@{k}"] = values["mrr"] * values[f"hit@{k}"]
        values[f"ndcg@{k}"] = found_RC[:, :k].double() @ discount_K / (best_RK @ discount_K)
        values[f"recall@{k}"] = right_RC[:, :k].sum(dim=1) / count_R
    return {name: values[name] for name in METRICS}


def mode_costs(columns: Columns) -> dict[str, dict[str, int]]:
    """Return ``bytes_per_item`` in float32 and ``paths_per_item`` to encode of each column of any task."""
    all_paths, costs = sum(name.startswith("path_") for name in columns), {}
    for name, (_, candidate) in columns.items():
        num_paths = 1 if name.startswith("path_") else all_paths
        costs[name] = {"bytes_per_item": 4 * candidate[0].numel(), "paths_per_item": num_paths}
    return costs


def _distinct_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows ``[U, ...]`` that differ in at least one bit, and each row's index among them."""
    first: dict[bytes, int] = {}
    first_of_row = [first.setdefault(row.numpy().tobytes(), number) for number, row in enumerate(embeddings)]
    numbers = {row: number for number, row in enumerate(first.values())}
    return embeddings[list(numbers)], torch.tensor([numbers[row] for row in first_of_row])
