"""The bounds equal their loop forms, and behave on Gaussians as the closed form says.

On Gaussians of correlation rho per dimension, CLUB with a perfect q is ``rho^2 / (1 - rho^2)`` per dimension,
times ``(B - 1) / B`` when ``b' = b`` counts among the negatives. It is not the mutual information.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from benchmarks.vclub import count_elements, quadratic_vclub
from parallel_decoupling.objective.alternatives import cross_covariance, hsic, squared_cosine
from parallel_decoupling.objective.vclub import (
    GivenTarget,
    Kind,
    MutualInformation,
    Unconditional,
    gaussian_nll,
    path_pairs,
    vclub_bound,
)
from tests.support import references
from tests.support.references import random

KINDS: tuple[Kind, ...] = get_args(Unconditional)
DEPENDENCE: tuple[Kind, ...] = ("vclub", "hsic", "crosscov")

BOUNDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gaussian_nll": (gaussian_nll, references.gaussian_nll_loop),
    "vclub": (vclub_bound, references.vclub_quadratic),
    "vclub_benchmark": (quadratic_vclub, references.vclub_quadratic),
}
BOUNDS |= {
    name: (lambda x, y, _, ours=ours: ours(x, y), lambda x, y, _, loop=loop: loop(x, y))
    for name, ours, loop in (
        ("hsic", hsic, references.normalised_hsic_loop),
        ("crosscov", cross_covariance, references.cross_covariance_loop),
        ("orthogonal", squared_cosine, references.squared_cosine_loop),
    )
}


def correlated(rho: float, batch_size: int, embed_dim: int, seed: int) -> Tensor:
    """``[B, 2, D]``: two standard Gaussian paths with correlation rho in every dimension."""
    x, noise = random(2, batch_size, embed_dim, seed=seed)
    return torch.stack([x, rho * x + math.sqrt(1 - rho**2) * noise], dim=1)


def perfect_bound(paths_BND: Tensor, rho: float) -> Tensor:
    """vCLUB with the true conditional as q."""
    x, y = paths_BND.transpose(0, 1)
    log_variance = torch.full_like(x, math.log(1 - rho**2))
    return vclub_bound(y[None], rho * x[None], log_variance[None])[0]


def fit(estimator: MutualInformation, batches: Iterable[Tensor], *, rate: float) -> list[float]:
    """Maximise q's likelihood, one step per batch; the losses on the way."""
    optimizer = torch.optim.Adam(estimator.parameters(), lr=rate)
    losses = []
    for paths_BND in batches:
        loss = estimator.nll(paths_BND).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_value_and_gradients(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], arguments: list[Tensor], num_pairs: int
) -> None:
    weight_M = torch.linspace(0.5, 2, num_pairs, dtype=torch.float64)
    results = []
    for batched in (True, False):
        leaves = [argument.clone().requires_grad_() for argument in arguments]
        if batched:
            value_M = ours(*leaves)
        else:
            value_M = torch.stack([reference(*(leaf[m] for leaf in leaves)) for m in range(num_pairs)])
        total = (weight_M * value_M).sum()
        results.append(
            (value_M, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BOUNDS)
def test_value_and_gradients_equal_the_loop(name: str) -> None:
    """Inputs are NOT standardised: the closed form holds for any moments."""
    y = 3 * random(3, 5, 4, seed=1) + 2
    assert_same_value_and_gradients(*BOUNDS[name], [y, random(3, 5, 4, seed=2), random(3, 5, 4, seed=3)], 3)


@pytest.mark.parametrize("kind", DEPENDENCE)
def test_pairs_in_one_network_equal_one_network_per_pair(kind: Kind) -> None:
    estimator = MutualInformation(kind, num_paths=3, embed_dim=4, hidden_size=6).double()
    paths = (2 * random(5, 3, 4, seed=1) + 1).requires_grad_()
    path_BND = references.standardise_loop(paths)
    values, losses = [], []
    for m, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        x, y = path_BND[:, i], path_BND[:, j]
        mean = log_variance = x
        if estimator.network is not None:
            q = estimator.network
            hidden = nn.functional.gelu(x @ q.hidden_weight[m] + q.hidden_bias[m])
            output = hidden @ q.output_weight[m] + q.output_bias[m]
            mean, log_variance = output[:, :4], output[:, 4:].clamp(-6, 6)
            losses.append(references.gaussian_nll_loop(y, mean, log_variance))
        reference = BOUNDS[kind][1]
        values.append(
            reference(x, y, None) if kind in ("hsic", "crosscov") else reference(y, mean, log_variance)
        )
    leaves = [paths, *estimator.parameters()]
    options: Any = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    pairs = [(estimator(paths), torch.stack(values))]
    if losses:
        pairs.append((estimator.nll(paths), torch.stack(losses)))
    for ours_M, expected_M in pairs:
        torch.testing.assert_close(ours_M, expected_M, rtol=1e-9, atol=1e-12)
        for ours, expected in zip(
            torch.autograd.grad(ours_M.sum(), leaves, **options),
            torch.autograd.grad(expected_M.sum(), leaves, **options),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_vclub_cost_grows_with_the_batch_and_not_with_its_square() -> None:
    closed = [count_elements(vclub_bound, 2, batch_size, 8) for batch_size in (64, 128)]
    quadratic = [count_elements(quadratic_vclub, 2, batch_size, 8) for batch_size in (64, 128)]
    assert closed[1] / closed[0] == pytest.approx(2, rel=0.05)
    assert quadratic[1] / quadratic[0] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("batch_size", [8, 256])
def test_perfect_q_gives_the_closed_form(rho: float, batch_size: int) -> None:
    values = torch.stack([perfect_bound(correlated(rho, batch_size, 20, seed), rho) for seed in range(200)])
    expected = rho**2 / (1 - rho**2) * (batch_size - 1) / batch_size
    standard_error = values.std().item() / math.sqrt(len(values))
    assert abs(values.mean().item() - expected) < 4 * standard_error
    assert standard_error < 0.08 * expected


def test_independent_paths_give_about_zero() -> None:
    """q from another correlation: what vanishes is the dependence, not q's opinion."""
    x, y = random(2, 1, 4096, 20, seed=1)
    for rho in (0.3, 0.9):
        log_variance = torch.full_like(x, math.log(1 - rho**2))
        scale = rho / (1 - rho**2) / math.sqrt(x.numel())
        assert abs(vclub_bound(y, rho * x, log_variance).item()) < 4 * scale


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_fitted_q_is_within_ten_percent_of_the_closed_form_on_held_out_rows(rho: float) -> None:
    estimator = MutualInformation("vclub", num_paths=2, embed_dim=3, hidden_size=32)
    losses = fit(estimator, (correlated(rho, 256, 3, seed).float() for seed in range(300)), rate=1e-2)
    held_out = correlated(rho, 20_000, 3, 10_000).float()
    with torch.no_grad():
        value, nll = estimator(held_out).item(), estimator.nll(held_out).item()
    assert value == pytest.approx(rho**2 / (1 - rho**2), rel=0.1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * (1 - rho**2))
    assert nll == pytest.approx(entropy, abs=0.02)
    assert losses[0] - losses[-1] > 0.1


@pytest.mark.parametrize("kind", DEPENDENCE)
def test_descent_through_the_penalty_decouples_the_paths(kind: Kind) -> None:
    """Alternate: three steps of q on detached paths, one step of the correlation through the penalty."""
    estimator = MutualInformation(kind, num_paths=2, embed_dim=3, hidden_size=16)
    angle = torch.tensor(math.atanh(0.9), requires_grad=True)
    optimizer = torch.optim.Adam([angle], lr=0.1)
    for step in range(50):
        x, noise = random(2, 128, 3, seed=step).float()
        rho = torch.tanh(angle)
        paths = torch.stack([x, rho * x + (1 - rho**2).sqrt() * noise], dim=1)
        if estimator.needs_fit:
            fit(estimator, [paths.detach()] * 3, rate=1e-2)
        optimizer.zero_grad()
        estimator(paths).sum().backward()
        optimizer.step()
    assert abs(torch.tanh(angle).item()) < 0.3


def test_hsic_sees_dependence_without_correlation() -> None:
    x, noise = random(2, 500, 2, seed=1)
    paths = torch.stack([x, x**2 + 0.1 * noise], dim=1)
    shuffled = torch.stack([x, paths[:, 1].roll(1, dims=0)], dim=1)
    estimator = MutualInformation("hsic", num_paths=2, embed_dim=2)
    assert estimator(paths).item() > 0.1 > 10 * abs(estimator(shuffled).item())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "orthogonal"])
def test_shrinking_or_moving_the_embeddings_cannot_lower_the_value(kind: Kind) -> None:
    """The trap that collapsed a prototype: the value must not depend on scale or shift."""
    estimator = MutualInformation(kind, num_paths=3, embed_dim=4, hidden_size=8).double()
    paths = random(10, 3, 4, seed=1).requires_grad_()
    factor_ND, shift_ND = 0.001 + random(3, 4, seed=2).abs(), random(3, 4, seed=3)

    value_M = estimator(paths)
    torch.testing.assert_close(estimator(factor_ND * paths + shift_ND), value_M, rtol=1e-7, atol=1e-10)
    if kind == "none":
        return
    (gradient,) = torch.autograd.grad(value_M.sum(), paths)
    assert gradient.abs().max() > 1e-4
    assert (gradient * paths).sum(dim=0).abs().max() < 1e-12
    assert gradient.sum(dim=0).abs().max() < 1e-12


def test_orthogonal_looks_at_the_angle_of_each_row_alone() -> None:
    estimator = MutualInformation("orthogonal", num_paths=3, embed_dim=400).double()
    paths = random(50, 3, 400, seed=1)
    value_M = estimator(paths)
    torch.testing.assert_close(value_M, torch.full_like(value_M, 1 / 400), rtol=0.5, atol=0)
    torch.testing.assert_close(estimator(paths * torch.tensor([0.01, 1.0, 7.0])[:, None]), value_M)
    assert (estimator(paths + 5) > 0.9).all()  # a common mean is a common direction
    turned = torch.stack([paths[:, 0], -paths[:, 0], paths[:, 0].roll(200, 1)], dim=1)
    assert estimator(turned)[0].item() == pytest.approx(1)


@pytest.mark.parametrize("name", BOUNDS)
def test_repeating_the_dimensions_changes_nothing(name: str) -> None:
    arguments = [random(2, 5, 3, seed=seed) for seed in range(3)]
    repeated = [argument.repeat(1, 1, 4) for argument in arguments]
    torch.testing.assert_close(BOUNDS[name][0](*repeated), BOUNDS[name][0](*arguments))


def test_pairs_are_unordered_and_complete() -> None:
    assert path_pairs(4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert path_pairs(1).shape == (0, 2)


@pytest.mark.parametrize("num_paths", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_path_has_no_pairs_and_only_kinds_with_a_network_need_a_fit(kind: Kind, num_paths: int) -> None:
    estimator, paths = MutualInformation(kind, num_paths=num_paths, embed_dim=4), torch.randn(5, num_paths, 4)
    fitted = kind == "vclub" and num_paths > 1
    assert estimator.needs_fit == fitted == bool(list(estimator.parameters()))
    assert list(estimator.state_dict()) == [name for name, _ in estimator.named_parameters()]
    zeros = torch.zeros(num_paths * (num_paths - 1) // 2)
    assert estimator(paths).shape == zeros.shape
    assert fitted or torch.equal(estimator.nll(paths), zeros)
    assert kind != "none" or torch.equal(estimator(paths), zeros)


def test_log_variance_stays_in_a_wide_range() -> None:
    estimator = MutualInformation("vclub", num_paths=2, embed_dim=4)
    assert estimator.network is not None
    with torch.no_grad():
        estimator.network.output_bias.copy_(torch.tensor([0.0] * 4 + [-100.0, 100.0, 3.0, 0.0]))
        estimator.network.output_weight.zero_()
        _, log_variance = estimator.network(torch.zeros(1, 2, 4))
    torch.testing.assert_close(log_variance[0, 0], torch.tensor([-6.0, 6.0, 3.0, 0.0]))


def test_q_that_fitted_identical_paths_follows_when_they_come_apart() -> None:
    """Identical paths press the log-variance against its limit; it must not stay there."""
    estimator = MutualInformation("vclub", num_paths=2, embed_dim=3, hidden_size=16)
    fit(estimator, (correlated(1.0, 64, 3, seed).float() for seed in range(300)), rate=1e-2)
    held_out = correlated(0.0, 2048, 3, 10_000).float()
    with torch.no_grad():
        assert estimator(correlated(1.0, 2048, 3, 10_000).float()).item() > 20
        assert estimator.nll(held_out).item() > 50
    fit(estimator, (correlated(0.0, 64, 3, seed).float() for seed in range(100)), rate=1e-2)
    with torch.no_grad():
        assert estimator.nll(held_out).item() < 10


@pytest.mark.parametrize("kind", [*KINDS, *get_args(GivenTarget)])
def test_collapsed_paths_and_half_precision_give_finite_float32_whatever_autocast_says(kind: Kind) -> None:
    estimator = MutualInformation(kind, num_paths=3, embed_dim=8)
    for rows in (torch.full((12, 3, 8), 0.3), torch.randn(12, 3, 8).bfloat16()):
        results: list[tuple[Any, ...]] = []
        for enabled in (False, True):
            paths = rows.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = estimator(paths, rows.flip(0))
                results.append((value, estimator.nll(paths, rows.flip(0))))
            if kind != "none":
                value.sum().backward()
                assert paths.grad is not None
                assert paths.grad.isfinite().all()
        for plain, mixed in zip(*results, strict=True):
            assert plain.dtype == mixed.dtype == torch.float32
            assert torch.equal(plain, mixed)
            assert plain.isfinite().all()


def test_too_few_rows_are_named() -> None:
    with pytest.raises(ValueError, match="at least 4 rows per batch, got 3"):
        MutualInformation("hsic", num_paths=2, embed_dim=4)(torch.zeros(3, 2, 4))
