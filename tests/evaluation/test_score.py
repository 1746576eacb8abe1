"""Ranks, metrics and columns against slow definitions that share no code with them."""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.functional import retrieval

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.score import (
    METRICS,
    TaskResult,
    path_columns,
    ranked,
    row_metrics,
    score_task,
    similarities,
    task_hash,
)

TASK = Task("toy", "vqa", True)


def ranking(score: TaskResult) -> torch.Tensor:
    assert score.ranking is not None
    return score.ranking


def random_task(rng: random.Random, queries: int = 7, candidates: int = 30, rows: int = 40) -> EvalTask:
    """Ragged rows with copies of the positive: equal inputs under two indices, and repeated indices."""
    texts = [f"candidate {rng.randrange(candidates - 6)}" for _ in range(candidates)]
    chosen = [[rng.randrange(candidates) for _ in range(rng.randint(2, 25))] for _ in range(rows)]
    return EvalTask(
        TASK,
        [RawInput(f"query {number}") for number in range(queries)],
        [RawInput(text) for text in texts],
        [rng.randrange(queries) for _ in range(rows)],
        chosen,
    )


def tied_sides(generator: torch.Generator) -> list[torch.Tensor]:
    """Few directions and exact sums: many ties."""
    return [torch.randn(rows, 4, generator=generator).sign() / 2 for rows in (7, 30)]


def slow_hits(task: EvalTask, query: torch.Tensor, candidate: torch.Tensor) -> str:
    hits = ""
    for row, indices in enumerate(task.candidates_of_row):
        positive, *others = indices
        vector = query[task.query_of_row[row]]
        best = sum(float(x) * float(y) for x, y in zip(vector, candidate[positive], strict=True))
        hit = True
        for other in others:
            if task.candidates[other] == task.candidates[positive]:
                continue
            value = sum(float(x) * float(y) for x, y in zip(vector, candidate[other], strict=True))
            hit = hit and best > value
        hits += "01"[hit]
    return hits


@pytest.mark.parametrize("seed", range(5))
def test_hits_equal_a_slow_loop_with_ties_and_copies(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    task, (query, candidate) = random_task(rng), tied_sides(generator)
    smooth_query, smooth_candidate = (F.normalize(torch.randn(n, 9, generator=generator)) for n in (7, 30))
    score = score_task(task, {"aggregate": (query, candidate), "path_0": (smooth_query, smooth_candidate)})
    assert score.hits["aggregate"] == slow_hits(task, query, candidate)
    assert score.hits["path_0"] == slow_hits(task, smooth_query, smooth_candidate)
    distinct = [len({task.candidates[each].text for each in row}) for row in task.candidates_of_row]
    assert score.chance == pytest.approx(sum(1 / count for count in distinct) / len(distinct))


def test_margins_of_paths_are_correlated_over_rows_that_have_a_rival() -> None:
    texts = ["yes", "no", "maybe", "yes"]
    rows = [[0, 1, 2], [1, 0], [2, 0, 1], [0, 3]]  # the last one has only a copy
    task = EvalTask(
        TASK, [RawInput(str(n)) for n in range(4)], list(map(RawInput, texts)), [0, 1, 2, 3], rows
    )
    generator = torch.Generator().manual_seed(0)
    sides = F.normalize(torch.randn(2, 2, 4, 5, generator=generator), dim=-1)
    margins = []
    for score in sides[0] @ sides[1].mT:
        margins.append([score[b, row[0]] - score[b, row[1:]].max() for b, row in enumerate(rows[:3])])
    columns = {f"path_{path}": (sides[0, path], sides[1, path]) for path in range(2)}
    found = score_task(task, {"aggregate": columns["path_0"], **columns}).margin_correlation
    assert found == pytest.approx(torch.corrcoef(torch.tensor(margins)).numpy(), abs=1e-5)


@pytest.mark.parametrize("answers", [1, 4, 30])
def test_metrics_equal_torchmetrics_over_random_rankings(answers: int) -> None:
    generator = torch.Generator().manual_seed(answers)
    grades = torch.zeros(40, 60)
    grades[:, :answers] = torch.randint(1, 4, (40, answers), generator=generator).float()
    grades = grades.sort(dim=1).values
    scores = torch.rand(40, 60, generator=generator, dtype=torch.float64)
    expected: dict[str, list[float]] = {name: [] for name in METRICS}
    for score, grade in zip(scores, grades, strict=True):
        relevant = grade > 0
        reciprocal = float(retrieval.retrieval_reciprocal_rank(score, relevant))
        expected["mrr"].append(reciprocal)
        expected["r_precision"].append(float(retrieval.retrieval_r_precision(score, relevant)))
        for k in (1, 5, 10):
            hit = float(retrieval.retrieval_hit_rate(score, relevant, top_k=k))
            expected[f"hit@{k}"].append(hit)
            expected[f"mrr@{k}"].append(reciprocal * hit)
            expected[f"recall@{k}"].append(float(retrieval.retrieval_recall(score, relevant, top_k=k)))
            gain = retrieval.retrieval_normalized_dcg(score, grade.long(), top_k=k)
            expected[f"ndcg@{k}"].append(float(gain))
    _, found = ranked(scores, grades, torch.ones_like(grades, dtype=torch.bool))
    metrics = row_metrics(found, grades)
    assert tuple(metrics) == METRICS
    for name, values in expected.items():
        assert metrics[name].tolist() == pytest.approx(values, abs=1e-6), name


def slow_metrics(scores: list[float], grades: list[float]) -> dict[str, float]:
    """Walk down the ranking: of equal scores the worse candidate first, NaN as bad as it can be."""

    def key(both: tuple[float, float]) -> tuple[float, float]:
        score, grade = both
        return (-score if not math.isnan(score) else math.inf if grade else -math.inf), grade

    ranking = sorted(zip(scores, grades, strict=True), key=key)
    found = [0.0 if math.isnan(score) else grade for score, grade in ranking]
    best, count = sorted(grades, reverse=True), sum(grade > 0 for grade in grades)
    first = next((rank for rank, grade in enumerate(found, 1) if grade), math.inf)
    values = {"mrr": 1 / first, "r_precision": sum(grade > 0 for grade in found[:count]) / count}
    for k in (1, 5, 10):
        gain, most = (
            sum(grade / math.log2(1 + rank) for rank, grade in enumerate(each[:k], 1))
            for each in (found, best)
        )
        values |= {f"hit@{k}": float(first <= k), f"mrr@{k}": 1 / first if first <= k else 0.0}
        values |= {f"ndcg@{k}": gain / most, f"recall@{k}": sum(grade > 0 for grade in found[:k]) / count}
    return values


def judged_task(rng: random.Random, queries: int = 7, candidates: int = 30, rows: int = 40) -> EvalTask:
    task = random_task(rng, queries, candidates, rows)
    grades = [
        {rng.randrange(candidates): rng.choice([0.5, 1.0, 2.0]) for _ in range(rng.randint(1, 12))}
        for _ in range(rows)
    ]
    everyone = [list(range(candidates))] * rows
    return replace(task, candidates_of_row=everyone, relevance_of_row=grades)


@pytest.mark.parametrize("seed", range(3))
def test_several_answers_equal_a_slow_walk_with_ties_nan_and_missing_candidates(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    task, (query, candidate) = judged_task(rng), tied_sides(generator)
    candidate[[3, 11]] = torch.nan
    whole = task
    for missing in (set[int](), {5, 6, 20}, {*whole.answers(0)}):
        task = whole.without({2}, missing)
        score = score_task(task, {"aggregate": (query, candidate)})
        copies: dict[str, list[int]] = {}  # of which the first stands for all
        for each in (each for each in range(30) if each not in missing):
            copies.setdefault(whole.candidates[each].text, []).append(each)
        assert max(map(len, copies.values())) > 1
        for row, of_row in enumerate(task.relevance_of_row or ()):
            vector = query[task.query_of_row[row]]
            scores = [float(vector @ candidate[first]) for first, *_ in copies.values()]
            grades = [max(of_row.get(each, 0.0) for each in equal) for equal in copies.values()]
            wanted = slow_metrics(scores, grades)
            found = {name: float(values[row]) for name, values in score.rows["aggregate"].items()}
            assert found == pytest.approx(wanted)
        assert task.query_of_row == [
            each
            for row, each in enumerate(whole.query_of_row)
            if each != 2 and whole.answers(row).keys() - missing
        ]
    rows = range(len(whole.query_of_row))
    texts = [candidate.text for candidate in whole.candidates]
    right = [len({texts[each] for each in whole.answers(row)}) for row in rows]
    score = score_task(whole, {"aggregate": (query, candidate)})
    assert score.chance == pytest.approx(sum(right) / len(rows) / len(set(texts)))
    assert score.answers == sum(right) / len(rows)
    other = replace(whole, relevance_of_row=[{**each, 0: 3.0} for each in whole.relevance_of_row or ()])
    assert task_hash(other) != task_hash(whole)


def test_a_collapsed_model_scores_zero_at_any_size() -> None:
    """A matrix product alone gives equal rows scores that differ in the last bit, at many shapes."""
    generator = torch.Generator().manual_seed(0)
    for size in (37, 64, 100, 192):
        for candidates in range(2, 20):
            query, vector = F.normalize(torch.randn(2, 1, size, generator=generator), dim=-1)
            for positive in (0, candidates - 1):
                indices = [positive, *(x for x in range(candidates) if x != positive)]
                inputs = [RawInput(str(number)) for number in range(candidates)]
                task = EvalTask(TASK, [RawInput("q")], inputs, [0], [indices])
                score = score_task(task, {"aggregate": (query, vector.expand(candidates, -1))})
                assert score.hits["aggregate"] == "0"


def test_scores_do_not_depend_on_row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(random.Random(3))
    columns = {"aggregate": (torch.randn(7, 6), torch.randn(30, 6))}
    whole = score_task(task, columns)
    monkeypatch.setattr("parallel_decoupling.evaluation.score.ROWS_AT_ONCE", 7)
    chunked = score_task(task, columns)
    assert whole == chunked
    assert torch.equal(ranking(whole), ranking(chunked))


def test_ranking_is_sorted_by_the_first_column_and_puts_the_positive_after_ties() -> None:
    task = random_task(random.Random(1))
    query, candidate = F.normalize(torch.randn(7, 6)), F.normalize(torch.randn(30, 6))
    columns = {"aggregate": (query, candidate), "path_0": (torch.randn(7, 3), torch.randn(30, 3))}
    score = score_task(task, columns)
    for row, indices in enumerate(task.candidates_of_row):
        positive = indices[0]
        rivals = [x for x in indices[1:] if task.candidates[x] != task.candidates[positive]]
        values = {x: float(query[task.query_of_row[row]] @ candidate[x]) for x in (positive, *rivals)}
        expected = sorted((positive, *rivals), key=lambda x: -values[x])[:10]
        found = [x for x in ranking(score)[row].tolist() if x >= 0]
        assert [round(values[x], 5) for x in found] == [round(values[x], 5) for x in expected]
        assert (found[0] == positive) == (score.hits["aggregate"][row] == "1")
    tied = EvalTask(TASK, [RawInput("q")], [RawInput("a"), RawInput("b")], [0], [[0, 1]])
    score = score_task(tied, {"aggregate": (torch.ones(1, 2), torch.ones(2, 2))})
    assert ranking(score)[0, :2].tolist() == [1, 0]


def test_a_row_without_candidates_is_an_error() -> None:
    task = random_task(random.Random(0))
    task.candidates_of_row[3] = []
    with pytest.raises(ValueError, match="toy: row 3 has no candidates"):
        score_task(task, {"path_0": (torch.ones(7, 4), torch.ones(30, 4))})


def test_the_hash_is_of_what_the_rows_ask() -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    candidates = [RawInput("a", (red,)), RawInput("b", ("here/pictures/1.png",)), RawInput("c")]
    task = EvalTask(TASK, [RawInput("q"), RawInput("r")], candidates, [0, 1], [[0, 1], [1, 2]])
    moved = replace(
        task, candidates=[*candidates[:1], RawInput("b", ("there/pictures/1.png",)), candidates[2]]
    )
    assert task_hash(task) == task_hash(moved), "a benchmark may move"
    others = [
        replace(task, candidates=[RawInput("a", (blue,)), *candidates[1:]]),
        replace(task, candidates=[*candidates[:1], RawInput("b", ("here/pictures/2.png",)), candidates[2]]),
        replace(task, queries=[RawInput("q"), RawInput("R")]),
        replace(task, query_of_row=[0, 0]),
        replace(task, candidates_of_row=[[0, 1], [1]]),
        replace(task, candidates_of_row=[[1, 0], [1, 2]]),
    ]
    assert len({task_hash(each) for each in (task, *others)}) == 1 + len(others)


def paths(rows: int, num_paths: int = 3, dim: int = 4) -> torch.Tensor:
    return F.normalize(torch.randn(rows, num_paths, dim), dim=-1)


def test_concat_is_the_mean_cosine_of_aligned_paths_and_maxsim_a_loop_never_below_it() -> None:
    query, candidate = paths(6), paths(9)
    columns = path_columns(query, candidate, lambda z: z[:, 0])
    concat = similarities(*(F.normalize(embeddings, dim=-1) for embeddings in columns["concat"]))
    by_hand = sum(query[:, path] @ candidate[:, path].T for path in range(3)) / 3
    torch.testing.assert_close(concat, by_hand)
    found = similarities(query, candidate)
    for q in range(6):
        for c in range(9):
            best = [max(float(x @ y) for y in candidate[c]) for x in query[q]]
            assert float(found[q, c]) == pytest.approx(sum(best) / 3, abs=1e-6)
    assert (found >= concat - 1e-6).all()


def test_maxsim_is_scored_like_its_similarities_and_keeps_ties() -> None:
    query, candidate = paths(4), paths(6)
    candidate[3] = candidate[2]  # of rows 2 and 3 the positives tie
    rows = [[row, *(x for x in range(6) if x != row)] for row in range(4)]
    inputs = [RawInput(str(number)) for number in range(6)]
    task = EvalTask(TASK, inputs[:4], inputs, [0, 1, 2, 3], rows)
    score = score_task(task, path_columns(query, candidate, lambda z: z.mean(dim=1)))
    ranks = 1 / score.rows["maxsim"]["mrr"]
    scores = similarities(query, candidate)
    for row in range(4):
        ahead = sum(
            bool(scores[row, x] > scores[row, row] + 1e-6 or x == {2: 3, 3: 2}.get(row))
            for x in range(6)
            if x != row
        )
        assert round(float(ranks[row])) == 1 + ahead


def test_half_precision_embeddings_are_scored_in_float32() -> None:
    query = torch.tensor([[1.0, 0.0]]).bfloat16()
    candidate = torch.tensor([[1.0, 0.0625], [1.0, 0.0703125]]).bfloat16()  # equal cosines in bfloat16
    task = EvalTask(TASK, [RawInput("q")], [RawInput("a"), RawInput("b")], [0], [[0, 1]])
    assert score_task(task, {"aggregate": (query, candidate)}).hits["aggregate"] == "1"
