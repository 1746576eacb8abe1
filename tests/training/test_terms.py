"""What meets what in the objective, with a second rank that is only imagined."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID
from parallel_decoupling.distributed import rank
from parallel_decoupling.objective.contrastive import info_nce
from parallel_decoupling.objective.vclub import MutualInformation
from parallel_decoupling.training import terms
from parallel_decoupling.training.terms import GatheredPairs, gather_pairs, shared
from tests.support.processes import run_ranks
from tests.support.references import (
    hit_at_1_loop,
    info_nce_loop,
    own_candidates_kl_loop,
    several_positives_loop,
)

BATCH, NEGATIVES, PATHS, WIDTH = 4, 2, 3, 5


def mean_of_paths(paths: Tensor) -> Tensor:
    return paths.mean(dim=1)


def local_pairs() -> GatheredPairs:
    query = torch.randn(BATCH, PATHS, WIDTH, requires_grad=True)
    candidate = torch.randn(BATCH + NEGATIVES, PATHS, WIDTH, requires_grad=True)
    return gather_pairs(query, candidate, torch.arange(BATCH + NEGATIVES), mean_of_paths)


def test_nested_paths_are_the_aggregates_of_the_first_ones() -> None:
    query, candidate = torch.randn(BATCH, 4, WIDTH), torch.randn(BATCH + NEGATIVES, 4, WIDTH)
    ids = torch.arange(BATCH + NEGATIVES)
    pairs = gather_pairs(query, candidate, ids, concatenated, nested_paths=True)
    _, found = terms.contrastive_terms(pairs, 0.5, symmetric=False, with_aggregate=True)
    of_sizes = [
        info_nce(
            concatenated(query[:, :size])[:, None],
            concatenated(candidate[:, :size])[:, None],
            temperature=0.5,
            **pairs.labels,
        )
        for size in (4, 3, 2)
    ]
    torch.testing.assert_close(found, torch.cat(of_sizes).mean())
    alone = gather_pairs(query, candidate, ids, concatenated)
    assert torch.equal(alone.query_aggregate, pairs.query_aggregate[:, :1])


def test_padding_of_each_rank_stays_padding_after_the_gather() -> None:
    query, candidate = (
        torch.nn.functional.normalize(torch.randn(2 * rows, PATHS, WIDTH, dtype=torch.float64), dim=-1)
        for rows in (BATCH, BATCH + NEGATIVES)
    )
    ids = torch.tensor([0, 1, 0, 2, PADDING_ID, 1, 3, 4, 1, 5, 6, PADDING_ID])
    positive = [0, 1, 2, 3, 6, 7, 8, 9]
    labels = positive, ids.tolist()

    def in_two_processes() -> None:
        mine = candidate.chunk(2)[rank()].clone().requires_grad_()
        pairs = gather_pairs(query.chunk(2)[rank()], mine, ids.chunk(2)[rank()], concatenated)
        path_N, aggregate = terms.contrastive_terms(pairs, 0.5, symmetric=False, with_aggregate=True)
        torch.testing.assert_close(path_N, info_nce_loop(query, candidate, *labels, 0.5))
        sides = concatenated(query)[:, None], concatenated(candidate)[:, None]
        torch.testing.assert_close(aggregate, info_nce_loop(*sides, *labels, 0.5)[0])
        (gradient,) = torch.autograd.grad(path_N.sum() + aggregate, mine)
        padding = ids.chunk(2)[rank()] == PADDING_ID
        assert torch.equal(gradient.flatten(1).abs().sum(dim=1) == 0, padding)
        values = terms.monitored_values(pairs, {}, path_N, torch.zeros(3))
        hits_N = torch.stack([values[f"train/hit_at_1_path_{path}"] for path in range(PATHS)])
        assert torch.equal(hits_N, hit_at_1_loop(query, candidate, [[p] for p in positive], labels[1]))

    run_ranks(in_two_processes, timeout=60, gloo=True)


def test_two_ranks_with_several_positives_and_a_teacher_equal_one() -> None:
    rows, extra = 2, 3  # a second positive and two negatives
    query, candidate = (
        torch.nn.functional.normalize(torch.randn(2 * count, PATHS, WIDTH, dtype=torch.float64), dim=-1)
        for count in (rows, rows * (1 + extra))
    )
    ids = torch.tensor([0, 1, 2, 5, 6, PADDING_ID, 0, 7, 3, 4, 8, 9, 9, 3, PADDING_ID, 5])
    own = [[0, 2, 3, 4], [1, 5, 6, 7], [8, 10, 11, 12], [9, 13, 14, 15]]
    teacher = torch.randn(4, 4, dtype=torch.float64)
    teacher[1, 1] = teacher[3, 2] = torch.nan
    positives = [of_row[:2] for of_row in own]
    taught = own_candidates_kl_loop(query, candidate, own, teacher, 0.5)
    wanted = several_positives_loop(query, candidate, positives, ids.tolist(), 0.5, True, 0.3) + 0.7 * taught

    def in_two_processes() -> None:
        sides = [each.chunk(2)[rank()].clone().requires_grad_() for each in (query, candidate)]
        labels = {"candidate_ids": ids.chunk(2)[rank()], "teacher": teacher.chunk(2)[rank()]}
        pairs = gather_pairs(*sides, aggregate=mean_of_paths, num_positives=2, **labels)
        assert pairs.own.tolist() == own
        options = {"symmetric": True, "with_aggregate": True, "teacher_weight": 0.7}
        options["false_negative_margin"] = 0.3
        path_N, _ = terms.contrastive_terms(pairs, 0.5, **options)
        torch.testing.assert_close(path_N, wanted)
        whole = [each.clone().requires_grad_() for each in (query, candidate)]
        loss = several_positives_loop(*whole, positives, ids.tolist(), 0.5, True, 0.3).sum()
        loss = loss + 0.7 * own_candidates_kl_loop(*whole, own, teacher, 0.5).sum()
        ours, theirs = torch.autograd.grad(path_N.sum(), sides), torch.autograd.grad(loss, whole)
        for mine, all_of_them in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, all_of_them.chunk(2)[rank()])

    run_ranks(in_two_processes, timeout=60, gloo=True)


def test_a_shared_parameter_takes_its_share_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.tensor(0.3, requires_grad=True)
    assert shared(parameter) is parameter
    monkeypatch.setattr(terms, "world_size", lambda: 4)
    assert torch.equal(shared(parameter), parameter)
    (shared(parameter) * 8).backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 2.0


def test_an_aggregate_without_weight_has_a_value_but_no_graph() -> None:
    pairs = local_pairs()
    (path_N, aggregate), (_, with_graph) = (
        terms.contrastive_terms(pairs, 0.5, symmetric=False, with_aggregate=on) for on in (False, True)
    )
    assert path_N.requires_grad
    assert not aggregate.requires_grad
    torch.testing.assert_close(aggregate, with_graph.detach())


def test_the_estimator_sees_detached_positives_of_both_sides() -> None:
    pairs, estimator = (
        local_pairs(),
        MutualInformation("vclub", num_paths=PATHS, embed_dim=WIDTH, hidden_size=4),
    )
    nll = terms.estimator_nll(estimator, pairs)
    sides = (pairs.query.detach(), pairs.candidate[:BATCH].detach())
    torch.testing.assert_close(nll, torch.stack([estimator.nll(side) for side in sides]).mean())
    nll.backward()
    assert pairs.query.grad is None
    mi_M = terms.mutual_information_terms(estimator, pairs)
    torch.testing.assert_close(mi_M, torch.stack([estimator(side) for side in sides]).mean(dim=0))


def test_each_side_is_given_the_other_one() -> None:
    pairs = local_pairs()
    estimator = MutualInformation("orthogonal_given_target", num_paths=PATHS, embed_dim=WIDTH)
    mi_M = terms.mutual_information_terms(estimator, pairs)
    positives = pairs.candidate[:BATCH]
    expected = estimator(pairs.query, positives) + estimator(positives, pairs.query)
    torch.testing.assert_close(mi_M, expected / 2)


def test_the_log_names_the_floor_and_the_correlation_of_margins() -> None:
    pairs = local_pairs()
    loss_N = torch.tensor([0.1, 0.2, 0.6])
    values = terms.monitored_values(pairs, {}, loss_N, torch.zeros(3))
    assert values["train/shared_nats_floor"].item() == pytest.approx(math.log(BATCH) - 2 * 0.3)
    margins = []
    for path in range(PATHS):
        score = (pairs.query[:, path] @ pairs.candidate[:, path].T).tolist()
        margins.append([row[b] - max(x for c, x in enumerate(row) if c != b) for b, row in enumerate(score)])
    correlation = torch.corrcoef(torch.tensor(margins))
    expected = (correlation[0, 1] + correlation[0, 2] + correlation[1, 2]) / 3
    torch.testing.assert_close(values["train/margin_correlation"], expected)
    one = gather_pairs(pairs.query[:, :1], pairs.candidate[:, :1], pairs.candidate_ids, mean_of_paths)
    assert "train/margin_correlation" not in terms.monitored_values(one, {}, loss_N[:1], torch.zeros(0))


def concatenated(paths: Tensor) -> Tensor:
    return torch.nn.functional.normalize(paths.flatten(1), dim=-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("aggregate", [mean_of_paths, concatenated])
def test_nested_terms_equal_the_loop_over_dimensions(
    aggregate: Callable[[Tensor], Tensor], symmetric: bool
) -> None:
    paths = [torch.randn(rows, PATHS, WIDTH, dtype=torch.float64) for rows in (BATCH, BATCH + NEGATIVES)]
    query, candidate = (torch.nn.functional.normalize(each, dim=-1).requires_grad_() for each in paths)
    ids = torch.tensor([0, 1, 0, 2, 3, 1])
    pairs = gather_pairs(query, candidate, ids, aggregate, dims=(4, 2))
    losses = terms.contrastive_terms(pairs, 0.5, symmetric=symmetric, with_aggregate=True)
    expected_N, expected = [], []
    for dim in (WIDTH, 4, 2):
        sides = [query, candidate]  # the encoder has brought all coordinates to unit norm
        if dim < WIDTH:
            rows = [[[path[:dim] / path[:dim].norm() for path in row] for row in side] for side in sides]
            sides = [torch.stack([torch.stack(row) for row in side]) for side in rows]
        arguments = (list(range(BATCH)), ids.tolist(), 0.5, symmetric)
        expected_N.append(info_nce_loop(*sides, *arguments))
        expected.append(info_nce_loop(*(aggregate(side)[:, None] for side in sides), *arguments)[0])
    reference = sum(expected_N) / 3, sum(expected) / 3
    for actual, slow in zip(losses, reference, strict=True):
        torch.testing.assert_close(actual, slow)
        for leaf in (query, candidate):
            gradients = [torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (actual, slow)]
            torch.testing.assert_close(*gradients)
