"""Path statistics equal their loop forms and are not fooled by rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from parallel_decoupling.objective.statistics import effective_rank, path_cosine


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
