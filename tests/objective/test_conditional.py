"""Penalties given the target equal their loops, and leave alone what paths share with their target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID
from parallel_decoupling.objective.conditional import Given, logit_error_correlation, unexplained
from parallel_decoupling.objective.vclub import GivenTarget, Kind, MutualInformation, path_pairs
from tests.support import references

KINDS: tuple[Kind, ...] = get_args(GivenTarget)
TWINS: dict[Kind, Kind] = {"vclub_given_target": "vclub", "orthogonal_given_target": "orthogonal"}
POSITIVE, IDS = [0, 1, 2, 3, 4], [7, 8, 7, 9, 10, 11, 8, PADDING_ID, 12]
T_DIM, U_DIM, DIM = 4, 4, 16


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example() -> tuple[Tensor, Given]:
    rows = torch.nn.functional.normalize(random(9, 3, 4, seed=1), dim=-1).requires_grad_()
    paths = torch.nn.functional.normalize(random(5, 3, 4, seed=2), dim=-1).requires_grad_()
    return paths, Given(rows, torch.tensor(POSITIVE), torch.tensor(IDS))


def assert_same(ours: Tensor, expected: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    weight = torch.linspace(0.5, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    gradients = [torch.autograd.grad((weight * value).sum(), leaf)[0] for value in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_what_the_target_leaves_equals_a_fit_per_row_on_the_other_rows() -> None:
    """The intercept is fitted without the row, too: moving all rows changes nothing."""
    paths, given = example()
    left = unexplained(paths, given)
    target = given.rows.detach()[:5].mean(dim=1)
    assert_same(left, references.unexplained_loop(paths, target, 0.1), paths)
    torch.testing.assert_close(unexplained(paths + 3, given), left)
    with pytest.raises(ValueError, match="at least 3 rows, got 2; raise batch_size"):
        unexplained(paths[:2], Given(given.rows, given.positive[:2], given.ids))


def test_logit_correlation_equals_the_loop_without_padding_and_copies_of_the_target() -> None:
    paths, given = example()
    expected = [
        references.logit_error_correlation_loop(paths, given.rows.detach(), POSITIVE, IDS, int(i), int(j))
        for i, j in path_pairs(3)
    ]
    assert_same(logit_error_correlation(paths, given, path_pairs(3)), torch.stack(expected), paths)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_target_and_none_is_lost_on_any_path(kind: Kind) -> None:
    paths, given = example()
    estimator = MutualInformation(kind, num_paths=3, embed_dim=4, hidden_size=6).double()
    assert estimator.needs_fit == (kind == "vclub_given_target") == bool(list(estimator.parameters()))
    value_M = estimator(paths, given)
    assert value_M.shape == (3,)
    gradients = torch.autograd.grad(value_M.sum(), [paths, given.rows], allow_unused=True)
    assert gradients[0] is not None
    assert gradients[0].abs().sum(dim=(0, 2)).min() > 1e-6
    assert gradients[1] is None
    alone = Given(given.rows[:, :1], given.positive, given.ids)
    assert MutualInformation(kind, num_paths=1, embed_dim=4)(paths[:, :1], alone).shape == (0,)
    with pytest.raises(ValueError, match="pass given"):
        estimator(paths)


def test_the_kinds_given_the_target_are_their_twins_on_what_is_left() -> None:
    paths, given = example()
    options: dict[str, Any] = {"num_paths": 3, "embed_dim": 4, "hidden_size": 6}
    for kind, twin in TWINS.items():
        plain, conditional = (MutualInformation(each, **options).double() for each in (twin, kind))
        conditional.load_state_dict(plain.state_dict())
        left = unexplained(paths, given)
        assert torch.equal(conditional(paths, given), plain(left))
        assert torch.equal(conditional.nll(paths, given), plain.nll(left))


def draw(num_rows: int, gains: Tensor, seed: int) -> tuple[Tensor, Given]:
    """Queries ``gains[0] T + gains[1] U + noise`` by two paths and candidates with the same T: U is nuisance.

    Both paths share U; the candidates have a nuisance of their own.
    """
    basis = torch.linalg.qr(random(DIM, DIM, seed=99)).Q
    target = random(num_rows, 1, T_DIM, seed=seed) @ basis[:T_DIM]
    nuisance = random(2, num_rows, 1, U_DIM, seed=seed + 1) @ basis[T_DIM : T_DIM + U_DIM]
    noise = 0.3 * random(2, num_rows, 2, DIM, seed=seed + 2)
    sides = gains[0] * target + gains[1] * nuisance + noise
    query, candidate = torch.nn.functional.normalize(sides, dim=-1)
    return query, Given(candidate, torch.arange(num_rows), torch.arange(num_rows))


def score_correlation(paths: Tensor, given: Given) -> Tensor:
    """Correlate the scores of negatives as they are: the twin of ``logit_correlation`` without a target."""
    score_NBB = torch.einsum("bnd,cnd->nbc", paths, given.rows.detach())
    first, second = score_NBB[:, ~torch.eye(len(paths), dtype=torch.bool)].view(2, len(paths), -1)
    return torch.stack(
        [torch.corrcoef(torch.stack(both))[0, 1] for both in zip(first, second, strict=True)]
    ).mean()


def pull(penalty: Callable[[Tensor, Given], Tensor]) -> tuple[float, float]:
    """By how much a descent step of the penalty shrinks the gains of T and of U, means over 10 batches."""
    total = torch.zeros(2, dtype=torch.float64)
    for seed in range(0, 1000, 100):
        gains = torch.ones(2, dtype=torch.float64, requires_grad=True)
        total += torch.autograd.grad(penalty(*draw(192, gains, seed)).sum(), gains)[0]
    return float(total[0]) / 10, float(total[1]) / 10


def fitted(kind: Kind) -> MutualInformation:
    torch.manual_seed(0)
    estimator = MutualInformation(kind, num_paths=2, embed_dim=DIM, hidden_size=32).double()
    if estimator.needs_fit:
        optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
        for step in range(200):
            loss = estimator.nll(*draw(192, torch.ones(2), 10_000 + 10 * step)).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return estimator


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_shared_nuisance_shrinks_and_not_the_target(kind: Kind) -> None:
    """Without the target both shrink alike; given the target, T moves by less than a fifth of what U does."""
    of_target, of_nuisance = pull(fitted(TWINS[kind]) if kind in TWINS else score_correlation)
    assert of_nuisance > 0.05
    assert of_target == pytest.approx(of_nuisance, rel=0.3)
    of_target, of_nuisance = pull(fitted(kind))
    assert of_nuisance > 0.05
    assert abs(of_target) < 0.2 * of_nuisance
