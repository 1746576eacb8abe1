from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from parallel_decoupling.objective.mutual_information import MutualInformation
from studies.estimator_figures import KIND_COLOURS
from studies.estimators import KINDS, Cell, cells, draw, fitted_network, measure, run


def cell(**values: object) -> Cell:
    settings = {"rho": 0.6, "embed_dim": 3, "batch_size": 64, "cubed": False, "perfect_q": True, **values}
    return Cell(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("cubed", [False, True])
def test_drawn_paths_have_the_correlation(cubed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    paths = draw(cell(batch_size=50_000, cubed=cubed), 0.6 * torch.eye(3), generator)
    gaussian = paths.sign() * paths.abs() ** (1 / 3) if cubed else paths
    both = torch.cat((gaussian[:, 0], gaussian[:, 1]), dim=1)
    expected = torch.eye(6)
    expected[:3, 3:] = expected[3:, :3] = 0.6 * torch.eye(3)
    assert (torch.cov(both.T) - expected).abs().max() < 0.03


def test_exact_gradient_is_that_of_the_closed_form() -> None:
    """Gaussians y = R^T x + s noise have mutual information log det(I + R^T R / s^2) / 2."""
    rho, dim = 0.6, 3
    mixing = (rho * torch.eye(dim, dtype=torch.float64)).requires_grad_()
    information = torch.logdet(torch.eye(dim) + mixing.T @ mixing / (1 - rho**2)) / 2 / dim
    assert float(information.detach()) == pytest.approx(measured("vclub")["exact"])
    [gradient] = torch.autograd.grad(information, mixing)
    torch.testing.assert_close(gradient, rho * torch.eye(dim, dtype=torch.float64) / dim)


def measured(kind: str, draws: int = 200, **values: object) -> dict[str, float]:
    setting = cell(**values)
    return measure(kind, setting, fitted_network(setting, 5), draws)  # type: ignore[arg-type]


def test_with_a_true_q_vclub_is_at_its_limit_and_its_gradient_points_the_right_way() -> None:
    found = measured("vclub", batch_size=256)
    assert found["mean"] == pytest.approx(found["limit"], abs=0.02)
    assert found["bias"] == pytest.approx(found["mean"] - found["exact"])
    assert found["mean_gradient_cosine"] > 0.99
    assert found["gradient_cosine"] < found["mean_gradient_cosine"]


def test_a_fitted_q_comes_to_the_true_conditional() -> None:
    setting = cell(perfect_q=False, embed_dim=1, batch_size=256)
    estimator = MutualInformation("vclub", num_paths=2, embed_dim=1)
    estimator.network = fitted_network(setting, 150)  # type: ignore[assignment]
    paths = draw(cell(embed_dim=1, batch_size=5000), 0.6 * torch.eye(1), torch.Generator().manual_seed(9))
    entropy = 0.5 * math.log(2 * math.pi * math.e * (1 - 0.6**2))
    assert float(estimator.nll(paths).sum()) == pytest.approx(entropy, abs=0.02)


def test_run_writes_results_table_and_pictures(tmp_path: Path) -> None:
    run(tmp_path, rhos=(0.0, 0.5), embed_dims=(2,), batch_sizes=(8, 16), fit_steps=2, draws=3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(cells((0.0, 0.5), (2,), (8, 16))) == 12
    assert len(results["rows"]) == 4 * (3 + 6 + 6)  # hsic, crosscov and orthogonal need no q
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| 0.5 |") == len(results["rows"]) / 2
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {"estimates.png", "gradient_cosine.png", "gradient_noise.png"}
    assert len({KIND_COLOURS[kind] for kind in KINDS}) == len(KINDS)
