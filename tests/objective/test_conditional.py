"""Penalties given the target equal their loops, and leave alone what paths share with their target."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from parallel_decoupling.objective.alternatives import unexplained
from parallel_decoupling.objective.vclub import GivenTarget, Kind, MutualInformation
from tests.support.references import random, unexplained_loop

TWINS: dict[Kind, Kind] = {kind: kind.removesuffix("_given_target") for kind in get_args(GivenTarget)}
T_DIM, U_DIM, DIM = 4, 4, 16


def example() -> tuple[Tensor, Tensor]:
    paths, target = (normalize(random(5, 3, 4, seed=seed), dim=-1).requires_grad_() for seed in (2, 1))
    return paths, target


def test_what_the_target_leaves_equals_a_fit_per_row_on_the_other_rows() -> None:
    """The intercept is fitted without the row, too: moving all rows changes nothing."""
    paths, target = example()
    left, expected = unexplained(paths, target), unexplained_loop(paths, target.detach().mean(dim=1), 0.1)
    torch.testing.assert_close(left, expected, rtol=1e-9, atol=1e-12)
    weight = torch.linspace(0.5, 2, left.numel(), dtype=torch.float64).view_as(left)
    gradients = [torch.autograd.grad((weight * value).sum(), paths)[0] for value in (left, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(unexplained(paths + 3, target), left)
    with pytest.raises(ValueError, match="at least 3 rows, got 2; raise batch_size"):
        unexplained(paths[:2], target[:2])


@pytest.mark.parametrize("kind", TWINS)
def test_the_kinds_given_the_target_are_their_twins_on_what_is_left_without_gradient_to_it(
    kind: Kind,
) -> None:
    paths, target = example()
    options: dict[str, Any] = {"num_paths": 3, "embed_dim": 4, "hidden_size": 6}
    plain, conditional = (MutualInformation(each, **options).double() for each in (TWINS[kind], kind))
    conditional.load_state_dict(plain.state_dict())
    left = unexplained(paths, target)
    assert torch.equal(conditional(paths, target), plain(left))
    assert torch.equal(conditional.nll(paths, target), plain.nll(left))
    to_paths, to_target = torch.autograd.grad(
        conditional(paths, target).sum(), [paths, target], allow_unused=True
    )
    assert to_paths.abs().sum(dim=(0, 2)).min() > 1e-6
    assert to_target is None


def draw(num_rows: int, gains: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Queries ``gains[0] T + gains[1] U + noise`` by two paths and candidates with the same T: U is nuisance.

    Both paths share U; the candidates have a nuisance of their own.
    """
    basis = torch.linalg.qr(random(DIM, DIM, seed=99)).Q
    target = random(num_rows, 1, T_DIM, seed=seed) @ basis[:T_DIM]
    nuisance = random(2, num_rows, 1, U_DIM, seed=seed + 1) @ basis[T_DIM : T_DIM + U_DIM]
    noise = 0.3 * random(2, num_rows, 2, DIM, seed=seed + 2)
    sides = gains[0] * target + gains[1] * nuisance + noise
    query, candidate = normalize(sides, dim=-1)
    return query, candidate


def pull(penalty: MutualInformation) -> tuple[float, float]:
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


@pytest.mark.parametrize("kind", TWINS)
def test_only_the_shared_nuisance_shrinks_and_not_the_target(kind: Kind) -> None:
    """Without the target both shrink alike; given the target, T moves by less than a fifth of what U does."""
    of_target, of_nuisance = pull(fitted(TWINS[kind]))
    assert of_nuisance > 0.05
    assert of_target == pytest.approx(of_nuisance, rel=0.3)
    of_target, of_nuisance = pull(fitted(kind))
    assert of_nuisance > 0.05
    assert abs(of_target) < 0.2 * of_nuisance
