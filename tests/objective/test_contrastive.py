"""InfoNCE, hit@1 and what is monitored equal their loop forms, and mean what they say."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID
from parallel_decoupling.objective.contrastive import (
    in_batch_margins,
    info_nce,
    own_candidates_kl,
    score_distillation,
)
from parallel_decoupling.objective.statistics import (
    effective_rank,
    margin_correlation,
    path_cosine,
    target_entropy,
)
from tests.support.references import (
    hit_at_1_loop,
    info_nce_loop,
    own_candidates_kl_loop,
    random,
    several_positives_loop,
)

CASES = {
    "in_batch": ([0, 1, 2, 3], [10, 11, 12, 13]),
    "repeated_label": ([0, 1, 2, 3], [10, 11, 10, 10]),
    "all_one_label": ([0, 1, 2, 3], [5, 5, 5, 5]),
    "hard_negatives": ([0, 1, 2, 3], [10, 11, 12, 13, 20, 21, 22]),
    "hard_negative_is_a_positive": ([0, 1, 2, 3], [10, 11, 12, 13, 11, 20, 10, 20]),
    "rows_of_rank_1_of_2": ([4, 5, 6, 7], [10, 11, 12, 13, 14, 11, 10, 14]),
    "shuffled_and_shared_positive": ([5, 0, 2, 2], [10, 11, 12, 13, 10, 15]),
    "some_negatives_are_padding": ([0, 1, 2, 3], [10, 11, 12, 13, 20, PADDING_ID, 11, PADDING_ID]),
    "all_negatives_are_padding": ([0, 1, 2, 3], [10, 11, 10, 13, PADDING_ID, PADDING_ID]),
}


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def hit_at_1(*sides: Tensor, **labels: Tensor) -> Tensor:
    return (in_batch_margins(*sides, **labels) > 0).double().mean(dim=1)


def both(case: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    positive, ids = CASES[case]
    labels: dict[str, Any] = {"positive": torch.tensor(positive), "candidate_ids": torch.tensor(ids)}
    return unit(len(positive), 3, 5, seed=1), unit(len(ids), 3, 5, seed=2), labels


@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_the_loop(case: str, symmetric: bool, margin: float | None) -> None:
    query, candidate, labels = both(case)
    labels["false_negative_margin"] = margin
    weight_N = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    results = []
    for function in (info_nce, info_nce_loop):
        leaves = [query.clone(), candidate.clone(), torch.tensor(0.2, dtype=torch.float64)]
        for leaf in leaves:
            leaf.requires_grad_()
        if function is info_nce:
            loss = info_nce(leaves[0], leaves[1], temperature=leaves[2], symmetric=symmetric, **labels)
        else:
            limit = math.inf if margin is None else margin
            loss = info_nce_loop(leaves[0], leaves[1], *CASES[case], leaves[2], symmetric, limit)
        results.append((loss, *torch.autograd.grad((weight_N * loss).sum(), leaves)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_hit_at_1_equals_the_loop(case: str) -> None:
    query, candidate, labels = both(case)
    positive, ids = CASES[case]
    expected = hit_at_1_loop(query, candidate, [[p] for p in positive], ids)
    assert torch.equal(hit_at_1(query, candidate, **labels), expected)


def test_identical_embeddings_give_log_of_the_candidates_that_are_left() -> None:
    one = unit(1, 1, 6, seed=3)
    query, candidate = one.expand(3, 2, 6), one.expand(7, 2, 6)
    labels: dict[str, Any] = {
        "positive": torch.tensor([0, 1, 2]),
        "candidate_ids": torch.tensor([4, 5, 4, 4, 6, 7, 8]),
    }
    expected = (math.log(5) + math.log(7) + math.log(5)) / 3
    loss = info_nce(query, candidate, temperature=0.05, **labels)
    torch.testing.assert_close(loss, torch.full((2,), expected, dtype=torch.float64))
    both_ways = info_nce(query, candidate, temperature=0.05, symmetric=True, **labels)
    expected = (expected + (math.log(2) + math.log(3) + math.log(2)) / 3) / 2
    torch.testing.assert_close(both_ways, torch.full((2,), expected, dtype=torch.float64))


def test_collapsed_embeddings_do_not_count_as_hits() -> None:
    one = torch.ones(4, 1, 8) / math.sqrt(8)
    labels: dict[str, Any] = {"positive": torch.arange(4), "candidate_ids": torch.arange(4)}
    assert hit_at_1(one, one, **labels).item() == 0.0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", ["some_negatives_are_padding", "all_negatives_are_padding"])
def test_padding_is_as_if_it_were_not_there(case: str, symmetric: bool) -> None:
    query, candidate, labels = both(case)
    there = labels["candidate_ids"] != PADDING_ID
    without = {**labels, "candidate_ids": labels["candidate_ids"][there]}
    options: dict[str, Any] = {"temperature": 0.1, "symmetric": symmetric}
    loss_N = info_nce(query, candidate, **labels, **options)
    torch.testing.assert_close(loss_N, info_nce(query, candidate[there], **without, **options))


def test_a_path_sees_no_other_path() -> None:
    query, candidate, labels = both("in_batch")
    one_by_one = zip(query.split(1, dim=1), candidate.split(1, dim=1), strict=True)
    alone = [info_nce(*sides, temperature=0.1, **labels) for sides in one_by_one]
    torch.testing.assert_close(info_nce(query, candidate, temperature=0.1, **labels), torch.cat(alone))


def test_half_precision_inputs_and_autocast_compute_in_float32() -> None:
    query, candidate, labels = both("in_batch")
    query, candidate = query.bfloat16(), candidate.bfloat16()
    plain = info_nce(query.float(), candidate.float(), temperature=0.02, **labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = info_nce(query, candidate, temperature=0.02, **labels)
        full = info_nce(query.float(), candidate.float(), temperature=0.02, **labels)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)
    assert torch.equal(plain, full)


SEVERAL = {
    "all_given": ([[0, 3], [1, 4], [2, 5]], [10, 11, 12, 13, 14, 15, 20]),
    "some_are_padding": ([[0, 3], [1, 4], [2, 5]], [10, 11, 12, 13, PADDING_ID, 15, PADDING_ID]),
    "shared_and_repeated": ([[0, 3, 4], [1, 5, 6], [2, 7, 8]], [10, 11, 12, 11, 10, 13, PADDING_ID, 10, 14]),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", SEVERAL)
def test_several_positives_equal_the_loop(case: str, symmetric: bool) -> None:
    positives, ids = SEVERAL[case]
    labels: dict[str, Any] = {"positive": torch.tensor(positives), "candidate_ids": torch.tensor(ids)}
    query, candidate = unit(3, 2, 5, seed=1).requires_grad_(), unit(len(ids), 2, 5, seed=2).requires_grad_()
    results = []
    for loss_N in (
        info_nce(query, candidate, temperature=0.2, symmetric=symmetric, **labels),
        several_positives_loop(query, candidate, positives, ids, 0.2, symmetric),
    ):
        results.append((loss_N, *torch.autograd.grad(loss_N @ loss_N.new_tensor([1, 2]), (query, candidate))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
    padding = torch.tensor(ids) == PADDING_ID
    assert results[0][2][padding].abs().sum() == 0
    hits_N = hit_at_1(query, candidate, **labels)
    assert torch.equal(hits_N, hit_at_1_loop(query, candidate, positives, ids))


def test_a_teachers_ranking_equals_the_loop_and_rows_without_one_add_nothing() -> None:
    nan = torch.nan
    own = [[0, 4, 5], [1, 6, 7], [2, 8, 9], [3, 10, 11]]
    teacher = torch.tensor([[2, 1, -1], [nan, 0.5, 3], [nan, 1, nan], [nan, nan, nan]], dtype=torch.float64)
    query, candidate = unit(4, 2, 5, seed=1).requires_grad_(), unit(12, 2, 5, seed=2).requires_grad_()
    labels: dict[str, Any] = {"own": torch.tensor(own), "teacher": teacher}
    found = own_candidates_kl(query, candidate, temperature=0.2, **labels)
    wanted = own_candidates_kl_loop(query, candidate, own, teacher, 0.2)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(each.sum(), (query, candidate)) for each in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][0][2:].abs().sum() == 0
    labels["teacher"] = torch.full_like(teacher, nan)
    assert own_candidates_kl(query, candidate, temperature=0.2, **labels).tolist() == [0, 0]
    one = query.detach()
    labels = {
        "own": torch.tensor([[0, 1], [1, 2]]),
        "teacher": torch.einsum("bnd,gnd->bg", one[:2, :1], one[:, :1]),
    }
    labels["teacher"] = labels["teacher"].gather(1, labels["own"]) / 0.2
    same = own_candidates_kl(one[:2, :1], one[:, :1], temperature=0.2, **labels)
    torch.testing.assert_close(same, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("case", SEVERAL)
def test_distillation_is_the_divergence_over_what_info_nce_contrasts(case: str) -> None:
    """The teacher receives no gradient, and a path that is the aggregate has nothing to learn."""
    positives, ids = SEVERAL[case]
    shapes = (3, 2, 5), (len(ids), 2, 5), (3, 1, 4), (len(ids), 1, 4)
    sides = [unit(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    labels: dict[str, Any] = {"positive": torch.tensor(positives), "candidate_ids": torch.tensor(ids)}
    own, scores = [], torch.full((3, len(ids)), torch.nan, dtype=torch.float64)
    for b, of_query in enumerate(positives):
        left_out = {ids[p] for p in of_query}
        seen = [j for j in range(len(ids)) if j in of_query or ids[j] not in left_out]
        own.append([j for j in seen if ids[j] != PADDING_ID])
        for k, j in enumerate(own[-1]):
            scores[b, k] = (sides[2][b, 0] @ sides[3][j, 0]).detach() / 0.3
    found = score_distillation(*sides, temperature=0.3, **labels)
    wanted = own_candidates_kl_loop(sides[0], sides[1], own, scores, 0.3)
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(found.sum(), sides, allow_unused=True)
    torch.testing.assert_close(gradients[:2], torch.autograd.grad(wanted.sum(), sides[:2]))
    assert gradients[2:] == (None, None)
    own_teacher = score_distillation(*sides[2:], *sides[2:], temperature=0.3, **labels)
    torch.testing.assert_close(own_teacher, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-12)


def test_path_cosine_equals_the_loop() -> None:
    paths = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.empty(3, 3, dtype=torch.float64)
    for n in range(3):
        for m in range(3):
            cosines = [p[n].dot(p[m]) / math.sqrt(p[n].dot(p[n]) * p[m].dot(p[m])) for p in paths]
            expected[n, m] = sum(cosines) / len(cosines)
    torch.testing.assert_close(path_cosine(paths), expected, rtol=1e-9, atol=1e-12)


def test_margins_without_a_rival_do_not_count_and_a_constant_path_has_no_correlation() -> None:
    margins = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margins[2] = 0.3
    expected = torch.corrcoef(margins[:2])
    margins = torch.cat([torch.full((3, 1), torch.inf), margins, torch.full((3, 1), torch.nan)], dim=1)
    found = margin_correlation(margins)
    torch.testing.assert_close(found[:2, :2], expected)
    assert found[2].tolist() == [0, 0, 0]
    margins[2] += 1e-7 * torch.arange(22) % 3
    assert margin_correlation(margins)[2].tolist() == [0, 0, 0], "rounding is not a difference"


def test_entropy_of_targets_counts_repeats_together() -> None:
    assert target_entropy(torch.tensor([4, 7, 1, 0])).item() == pytest.approx(math.log(4))
    assert target_entropy(torch.tensor([4, 7, 4, 0])).item() == pytest.approx(1.5 * math.log(2))


def test_effective_rank_equals_numpy() -> None:
    value = np.random.default_rng(0).normal(size=(12, 5)) * [5.0, 2.0, 1.0, 0.5, 0.1]
    centred = value - value.mean(axis=0)
    singular = np.sqrt(np.linalg.eigvalsh(centred.T @ centred))
    share = singular / singular.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert effective_rank(torch.tensor(value)).item() == pytest.approx(expected, rel=1e-9)


def test_effective_rank_of_a_collapsed_batch_is_one() -> None:
    one = torch.nn.functional.normalize(
        torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    noise = 1e-9 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    assert effective_rank(one.expand(32, 64)).item() == 1.0
    assert effective_rank(one + noise).item() == 1.0
