from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from studies.estimator_figures import KIND_COLOURS
from studies.estimators import KINDS, Cell, cells, fitted_network, measure, run


def cell(**values: object) -> Cell:
    settings = {"rho": 0.6, "embed_dim": 3, "batch_size": 64, "cubed": False, "perfect_q": True, **values}
    return Cell(**settings)  # type: ignore[arg-type]


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
