"""Path statistics equal their loop forms and are not fooled by rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from parallel_decoupling.objective.statistics import (
    effective_rank,
    margin_correlation,
    path_cosine,
    target_entropy,
)


def test_path_cosine_equals_the_loop() -> None:
    paths = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.empty(3, 3, dtype=torch.float64)
    for n in range(3):
        for m in range(3):
            cosines = [p[n].dot(p[m]) / math.sqrt(p[n].dot(p[n]) * p[m].dot(p[m])) for p in paths]
            expected[n, m] = sum(cosines) / len(cosines)
    torch.testing.assert_close(path_cosine(paths), expected, rtol=1e-9, atol=1e-12)


def test_path_cosine_of_equal_paths_is_one_at_any_norm() -> None:
    one = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(path_cosine(torch.cat([one, 3 * one], dim=1)), torch.ones(2, 2))


def test_margins_without_a_rival_do_not_count_and_a_constant_path_has_no_correlation() -> None:
    margins = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margins[2] = 0.3
    expected = torch.corrcoef(margins[:2])
    margins = torch.cat([torch.full((3, 1), torch.inf), margins, torch.full((3, 1), torch.nan)], dim=1)
    found = margin_correlation(margins)
    torch.testing.assert_close(found[:2, :2], expected)
    assert found[2].tolist() == [0, 0, 0]


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


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[B, D\]"):
        effective_rank(torch.zeros(3, 4, 5))
