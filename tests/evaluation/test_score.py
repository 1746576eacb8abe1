from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.tasks import EvalTask, Task
from parallel_decoupling.evaluation.metrics import positive_rank
from parallel_decoupling.evaluation.score import score_task

TASK = Task("toy", "vqa", True)


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


def slow_hits(task: EvalTask, query: torch.Tensor, candidate: torch.Tensor) -> list[bool]:
    hits = []
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
        hits.append(hit)
    return hits


@pytest.mark.parametrize("seed", range(5))
def test_hits_equal_a_slow_loop_with_ties_and_copies(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    task = random_task(rng)
    query = torch.randn(7, 4, generator=generator).sign() / 2  # few directions and exact sums: many ties
    candidate = torch.randn(30, 4, generator=generator).sign() / 2
    smooth_query, smooth_candidate = (F.normalize(torch.randn(n, 9, generator=generator)) for n in (7, 30))
    score = score_task(task, {"aggregate": (query, candidate), "path_0": (smooth_query, smooth_candidate)})
    assert score.hits["aggregate"].tolist() == slow_hits(task, query, candidate)
    assert score.hits["path_0"].tolist() == slow_hits(task, smooth_query, smooth_candidate)
    assert score.hits["aggregate"].dtype == torch.bool


def test_a_tie_with_another_candidate_is_a_miss() -> None:
    rivals = torch.tensor([[False, True, True]])
    assert positive_rank(torch.tensor([[0.5, 0.4, 0.3]]), rivals).tolist() == [1]
    assert positive_rank(torch.tensor([[0.5, 0.5, 0.3]]), rivals).tolist() == [2]
    assert positive_rank(torch.tensor([[0.5, 0.5, 0.5]]), rivals).tolist() == [3]


def test_copies_of_the_positive_do_not_count_against_it() -> None:
    task = EvalTask(
        TASK, [RawInput("q")], [RawInput("yes"), RawInput("no"), RawInput("yes")], [0], [[0, 1, 2]]
    )
    candidate = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0]])  # the copy scores even higher
    score = score_task(task, {"aggregate": (torch.tensor([[1.0, 0.0]]), candidate)})
    assert score.hits["aggregate"].tolist() == [True]
    assert score.chance == 0.5
    assert score.ranking[0, :3].tolist() == [0, 1, -1]


def test_same_text_with_another_image_is_another_candidate() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    candidates = [RawInput("x", (image,)) for image in (red, blue, red.copy())]
    candidate = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    query = torch.tensor([[1.0, 0.0]])
    for rivals, hit in (([0, 1], False), ([0, 2], True)):
        task = EvalTask(TASK, [RawInput("q")], candidates, [0], [rivals])
        assert score_task(task, {"aggregate": (query, candidate)}).hits["aggregate"].tolist() == [hit]


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
                assert not score.hits["aggregate"].any()


def test_nan_is_a_miss() -> None:
    rivals = torch.tensor([[False, True], [False, True], [False, False]])
    scores = torch.tensor([[torch.nan, 0.1], [0.2, torch.nan], [torch.nan, 0.0]])
    assert positive_rank(scores, rivals).tolist() == [3, 2, 3]


def test_scores_do_not_depend_on_row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(random.Random(3))
    columns = {"aggregate": (torch.randn(7, 6), torch.randn(30, 6))}
    whole = score_task(task, columns)
    monkeypatch.setattr("parallel_decoupling.evaluation.score.ROWS_AT_ONCE", 7)
    chunked = score_task(task, columns)
    assert torch.equal(whole.hits["aggregate"], chunked.hits["aggregate"])
    assert torch.equal(whole.ranking, chunked.ranking)


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
        found = [x for x in score.ranking[row].tolist() if x >= 0]
        assert [round(values[x], 5) for x in found] == [round(values[x], 5) for x in expected]
        assert (found[0] == positive) == bool(score.hits["aggregate"][row])
    tied = EvalTask(TASK, [RawInput("q")], [RawInput("a"), RawInput("b")], [0], [[0, 1]])
    score = score_task(tied, {"aggregate": (torch.ones(1, 2), torch.ones(2, 2))})
    assert score.ranking[0, :2].tolist() == [1, 0]


def test_chance_is_the_mean_over_rows_of_one_by_distinct_candidates() -> None:
    candidates = [RawInput(str(number)) for number in range(4)]
    task = EvalTask(TASK, [RawInput("q")], candidates, [0, 0], [[0, 1], [0, 1, 2, 3]])
    score = score_task(task, {"aggregate": (torch.randn(1, 3), torch.randn(4, 3))})
    assert score.chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_half_precision_embeddings_are_scored_in_float32() -> None:
    query = torch.tensor([[1.0, 0.0]]).bfloat16()
    candidate = torch.tensor([[1.0, 0.0625], [1.0, 0.0703125]]).bfloat16()  # equal cosines in bfloat16
    task = EvalTask(TASK, [RawInput("q")], [RawInput("a"), RawInput("b")], [0], [[0, 1]])
    assert score_task(task, {"aggregate": (query, candidate)}).hits["aggregate"].tolist() == [True]


def test_embeddings_that_do_not_fit_are_an_error() -> None:
    task = random_task(random.Random(0))
    with pytest.raises(
        ValueError, match=r"toy, path_0: embeddings of shape \(7, 4\), \(29, 4\) for 7 queries"
    ):
        score_task(task, {"path_0": (torch.ones(7, 4), torch.ones(29, 4))})
    with pytest.raises(ValueError, match="toy: no embeddings"):
        score_task(task, {})
    task.candidates_of_row[3] = []
    with pytest.raises(ValueError, match="toy: row 3 has no candidates"):
        score_task(task, {"path_0": (torch.ones(7, 4), torch.ones(30, 4))})
    with pytest.raises(ValueError, match="toy: 0 rows"):
        score_task(EvalTask(TASK, [], [], [], []), {"path_0": (torch.ones(0, 4), torch.ones(0, 4))})
