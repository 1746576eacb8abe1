from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from parallel_decoupling.diagnostics.similarity import (
    linear_cka,
    path_similarity,
    principal_angles,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_subspace(basis_SD: Tensor, count: int, seed: int) -> Tensor:
    """Embeddings that lie in the span of a basis, away from the origin."""
    return normal(count, len(basis_SD), seed=seed) @ basis_SD + 3


def test_identical_paths_are_the_same_by_every_measure() -> None:
    path = normal(40, 12)
    found = path_similarity(torch.stack((path, path), dim=1))
    ones = torch.ones(2, 2, dtype=torch.float64)
    for matrix in (found.cosine, found.centred_cosine, found.cka):
        torch.testing.assert_close(matrix, ones)
    assert found.angles.max() < 1e-5
    torch.testing.assert_close(found.rank[0], found.rank[1])
    assert found.joined_rank == pytest.approx(float(found.rank[0]))


def test_independent_paths_look_like_chance() -> None:
    found = path_similarity(normal(2000, 2, 16))
    assert abs(found.cosine[0, 1]) < 0.02
    assert abs(found.centred_cosine[0, 1]) < 0.02
    assert found.cka[0, 1] < 0.02
    assert found.joined_rank == pytest.approx(32, abs=0.5)
    assert found.rank.tolist() == pytest.approx([16, 16], abs=0.2)


def test_cka_equals_the_kernel_formula_and_ignores_rotation_shift_and_scale() -> None:
    x, y = normal(30, 6), normal(30, 6, seed=1) + normal(30, 6)
    centring = torch.eye(30, dtype=torch.float64) - 1 / 30
    first, second = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    expected = float((first * second).sum() / (first.norm() * second.norm()))
    found = linear_cka(torch.stack((x, y), dim=1))
    assert float(found[0, 1]) == pytest.approx(expected)
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    moved = linear_cka(torch.stack((x, 7 * y @ rotation - 2), dim=1))
    torch.testing.assert_close(moved, found)


def test_shuffled_cka_is_that_of_unrelated_paths() -> None:
    path = normal(300, 10)
    found = path_similarity(torch.stack((path, path), dim=1))
    unrelated = float(linear_cka(torch.stack((path, normal(300, 10, seed=1)), dim=1))[0, 1])
    assert found.cka[0, 1] == pytest.approx(1)
    assert found.shuffled_cka.shape == (2, 2)
    assert found.shuffled_cka.numpy() == pytest.approx(unrelated, abs=0.015)
    assert 0.02 < unrelated < 0.06


def test_principal_angles_of_a_known_subspace() -> None:
    """Two planes of a five-dimensional space that share one direction and meet at 30 degrees otherwise."""
    axes = torch.eye(5, dtype=torch.float64)
    turned = np.cos(np.pi / 6) * axes[1] + np.sin(np.pi / 6) * axes[2]
    paths = [in_subspace(torch.stack(plane), 60, seed=4) for plane in ((axes[0], axes[1]), (axes[0], turned))]
    found = principal_angles(torch.stack(paths, dim=1), 2)
    assert found.shape == (1, 2)
    assert found[0].tolist() == pytest.approx([0, 30], abs=1e-4)


def test_principal_angles_equal_scipy() -> None:
    paths = normal(50, 3, 8)
    found = principal_angles(paths, 4)
    bases = [np.linalg.svd(path - path.mean(0))[2][:4].T for path in paths.transpose(0, 1).numpy()]
    for row, (i, j) in zip(found, ((0, 1), (0, 2), (1, 2)), strict=True):
        expected = np.rad2deg(subspace_angles(bases[i], bases[j]))[::-1]
        assert row.numpy() == pytest.approx(expected)


def test_a_shared_direction_hides_in_the_centred_cosine() -> None:
    shared = 20 * torch.ones(8, dtype=torch.float64)
    found = path_similarity(normal(500, 2, 8) + shared)
    assert found.cosine[0, 1] > 0.98
    assert abs(found.centred_cosine[0, 1]) < 0.1


def test_too_few_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        path_similarity(normal(2, 2, 4))
