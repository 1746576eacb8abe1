"""Measure how good the estimators of dependence are, and the gradients that training takes from them.

``python -m studies estimators`` takes about ten minutes on one thread.

Two paths are D-dimensional Gaussians of correlation rho in each dimension, or the cubes of such Gaussians
(the mutual information is the same, but a Gaussian q does not fit). q is either the true conditional
(Gaussians only) or ``MutualInformation``'s own network, fitted by Adam on fresh batches of the same size, as
in training. Then q is frozen, and every estimator sees the same fresh batches.

- Bias: mean estimate minus the exact mutual information per dimension, ``-log(1 - rho^2) / 2`` nats. vCLUB's
  limit is not that but ``rho^2 / (1 - rho^2)`` (with a perfect q); hsic, crosscov and orthogonal have neither
  a q nor a unit of information, and therefore no bias: only their spread and gradients can be compared.
- Gradient: path 2 is ``R^T x + sqrt(1 - rho^2) noise`` at ``R = rho I``; the gradient is that of the
  estimate with respect to the D x D matrix R, q frozen, as in a main step. The exact gradient of the mutual
  information per dimension is ``rho I / D``, which is zero at rho = 0. The study reports the cosine between
  one batch's gradient and the exact one, and the noise: the root of the summed variance over the norm of the
  mean gradient.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.progress import track
from torch import Tensor, nn

from parallel_decoupling.objective.vclub import MutualInformation, Unconditional
from studies.estimator_figures import WITHOUT_Q, write_figures, write_table
from studies.results import code_version, commit_name

KINDS = tuple(kind for kind in get_args(Unconditional) if kind != "none")


@dataclass(frozen=True)
class Cell:
    """One setting: what is drawn, and what q is."""

    rho: float
    embed_dim: int
    batch_size: int
    cubed: bool
    perfect_q: bool


class TrueConditional(nn.Module):
    """q(y | x) of standardised Gaussians of correlation rho, in place of the fitted network."""

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho

    def forward(self, x_MBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of y, each in the shape of x."""
        return self.rho * x_MBD, torch.full_like(x_MBD, math.log(1 - self.rho**2))


def draw(cell: Cell, mixing_DD: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one batch of two paths, ``[B, 2, D]``, differentiable in the mixing matrix R."""
    x, noise = torch.randn(2, cell.batch_size, cell.embed_dim, generator=generator)
    paths = torch.stack((x, x @ mixing_DD + math.sqrt(1 - cell.rho**2) * noise), dim=1)
    return paths**3 if cell.cubed else paths


def fitted_network(cell: Cell, fit_steps: int, learning_rate: float = 1e-3) -> nn.Module:
    """Return a frozen q: fitted on ``fit_steps`` batches, or the true conditional."""
    if cell.perfect_q:
        return TrueConditional(cell.rho)
    torch.manual_seed(0)
    estimator = MutualInformation("vclub", num_paths=2, embed_dim=cell.embed_dim)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(1)
    mixing = cell.rho * torch.eye(cell.embed_dim)
    for _ in range(fit_steps):
        optimizer.zero_grad()
        estimator.nll(draw(cell, mixing, generator)).sum().backward()
        optimizer.step()
    assert estimator.network is not None
    return estimator.network.requires_grad_(False)


def measure(kind: Unconditional, cell: Cell, network: nn.Module, draws: int) -> dict[str, Any]:
    """Measure bias and spread of the estimates, direction and noise of their gradients, on fresh batches."""
    estimator = MutualInformation(kind, num_paths=2, embed_dim=cell.embed_dim)
    if estimator.needs_fit:
        estimator.network = network  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(2)
    mixing = (cell.rho * torch.eye(cell.embed_dim)).requires_grad_()
    values, gradients = [], []
    for _ in range(draws):
        value = estimator(draw(cell, mixing, generator)).sum()
        gradients.append(torch.autograd.grad(value, mixing)[0].flatten())
        values.append(value.detach())
    value_S, gradient_SW = torch.stack(values).double(), torch.stack(gradients).double()
    exact = 0.5 * math.log(1 / (1 - cell.rho**2))
    mean_W = gradient_SW.mean(dim=0)
    norm, variance = norm_and_variance(gradient_SW)
    direction_W = torch.eye(cell.embed_dim, dtype=torch.float64).flatten()
    cosine = nn.functional.cosine_similarity
    cosine_S = cosine(gradient_SW, direction_W[None], dim=1)
    has_direction = cell.rho > 0
    return {
        "kind": kind,
        **vars(cell),
        "exact": exact,
        "limit": cell.rho**2 / (1 - cell.rho**2),
        "mean": float(value_S.mean()),
        "bias": None if kind in WITHOUT_Q else float(value_S.mean()) - exact,
        "std": float(value_S.std()),
        "gradient_cosine": float(cosine_S.mean()) if has_direction else None,
        "mean_gradient_cosine": float(cosine(mean_W, direction_W, dim=0)) if has_direction else None,
        "gradient_noise": math.sqrt(variance) / norm if has_direction and norm else None,
    }


def norm_and_variance(gradient_SW: Tensor) -> tuple[float, float]:
    """Return the norm of the expected gradient, and the variance of one draw summed over its W numbers.

    The mean of S draws is longer than the expectation by what is left of their noise, which is taken off;
    0 if nothing is left.
    """
    variance = float(gradient_SW.var(dim=0).sum())
    squared = float(gradient_SW.mean(dim=0).square().sum()) - variance / len(gradient_SW)
    return math.sqrt(max(squared, 0.0)), variance


def cells(rhos: Sequence[float], embed_dims: Sequence[int], batch_sizes: Sequence[int]) -> list[Cell]:
    """Return the grid; cubes have no true q, and hsic, crosscov and orthogonal do not use a q at all."""
    return [
        Cell(rho, embed_dim, batch_size, cubed, perfect_q)
        for embed_dim in embed_dims
        for batch_size in batch_sizes
        for rho in rhos
        for cubed, perfect_q in ((False, True), (False, False), (True, False))
    ]


def run(
    output_dir: Path,
    *,
    rhos: Sequence[float] = (0.0, 0.5, 0.9),
    embed_dims: Sequence[int] = (4, 16, 64),
    batch_sizes: Sequence[int] = (16, 64, 256),
    fit_steps: int = 800,
    draws: int = 100,
) -> dict[str, Any]:
    """Measure the whole grid and write results, table and pictures.

    Args:
        output_dir: must exist; gets ``results.json``, ``table.md`` and PNGs.
        rhos: correlations, in [0, 1).
        embed_dims: D.
        batch_sizes: B, at least 4.
        fit_steps: batches that the fitted q sees.
        draws: fresh batches per cell.

    Returns:
        The content of ``results.json``.
    """
    start, commit = time.perf_counter(), commit_name(*code_version())
    rows = []
    for cell in track(cells(rhos, embed_dims, batch_sizes), description="estimators"):
        network = fitted_network(cell, fit_steps)
        kinds = [kind for kind in KINDS if not cell.perfect_q or kind not in WITHOUT_Q]
        rows += [measure(kind, cell, network, draws) for kind in kinds]
    results = {
        "study": "estimators",
        "command": "python -m studies estimators",
        "commit": commit,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - start, 1),
        "settings": {"fit_steps": fit_steps, "draws": draws, "hidden_size": 64, "learning_rate": 1e-3},
        "rows": rows,
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_table(results, output_dir / "table.md")
    write_figures(rows, output_dir)
    return results
