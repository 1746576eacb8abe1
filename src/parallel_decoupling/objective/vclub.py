"""The paper's penalty on the dependence between paths: the vCLUB upper bound, and the estimator around it.

Shapes: ``B`` batch, ``N`` paths, ``M`` path pairs, ``D`` embedding dim. In a pair (i, j) path i is the input
x of q and path j its target y. Every estimate is a mean over dimensions, so that its weight in the loss does
not depend on ``D``. The caller detaches the paths for the fit and freezes q in the main step.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from parallel_decoupling.objective.alternatives import WITHOUT_FIT, unexplained
from parallel_decoupling.option_types import check_memory

Unconditional = Literal["vclub", "hsic", "crosscov", "orthogonal", "none"]
GivenTarget = Literal["vclub_given_target", "orthogonal_given_target"]
Kind = Literal[Unconditional, GivenTarget]


def path_pairs(num_paths: int) -> Tensor:
    """Return the unordered pairs i < j of paths (ours), ``[M, 2]`` int64 with ``M = N (N - 1) / 2``."""
    return torch.stack(torch.triu_indices(num_paths, num_paths, offset=1).unbind(), dim=1)


def standardise(paths: Tensor) -> Tensor:
    """Shift and scale each path and dimension to the batch's mean 0 and variance 1.

    With gradient through the statistics (ours), so that no estimate is lowered by shrinking or moving the
    embeddings. The variance (over B, not B - 1) has a floor of 1e-12. Returns ``[B, N, D]`` in fp32 (fp64 for
    fp64 inputs).
    """
    value_BND = paths.to(torch.promote_types(paths.dtype, torch.float32))
    variance_ND, mean_ND = torch.var_mean(value_BND, dim=0, correction=0)
    return (value_BND - mean_ND) * variance_ND.clamp_min(1e-12).rsqrt()


def gaussian_nll(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the negative log-likelihood of a diagonal Gaussian, all arguments ``[M, B, D]``.

    ``[M]`` in nats, the mean over B and D, with the constant ``log(2 pi) / 2``.
    """
    squared_MBD = (target - mean).square() * (-log_variance).exp()
    return 0.5 * (squared_MBD + log_variance).mean(dim=(1, 2)) + 0.5 * math.log(2 * math.pi)


def vclub_bound(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Variational CLUB with all B * B negatives, at the cost of B rows.

    ``mean_b log q(y_b | x_b) - mean_b mean_b' log q(y_b' | x_b)``. For Gaussian q the inner mean
    needs only the batch's moments of y, ``mean_b' (y_b' - mu)^2 = var(y) + (mean(y) - mu)^2``, and
    the log-variance terms cancel: O(B D) instead of O(B^2 D), the same value. It does not estimate
    the mutual information itself: with a perfect q, Gaussians of correlation rho give
    ``rho^2 / (1 - rho^2)`` per dimension (times (B - 1) / B, as b' = b counts).

    Takes ``[M, B, D]`` each, y at any scale. Returns ``[M]`` in nats per dimension; about 0 for independent
    inputs, below 0 possible.
    """
    variance_M1D, center_M1D = torch.var_mean(target, dim=1, correction=0, keepdim=True)
    y_MBD, mu_MBD = target - center_M1D, mean - center_M1D
    gap_MBD = y_MBD * mu_MBD + 0.5 * (variance_M1D - y_MBD.square())
    return (gap_MBD * (-log_variance).exp()).mean(dim=(1, 2))


class PairNetwork(nn.Module):
    """Mean and log-variance of q(z_j | z_i) for all M pairs in one batched network.

    One hidden layer (GELU), no parameter shared between pairs, each initialised like ``nn.Linear`` from a
    draw of its own. The log-variance is clamped to -6 .. 6, so identical paths give at most ``exp(6)``, about
    403 per dimension.
    """

    def __init__(self, num_pairs: int, embed_dim: int, hidden_size: int) -> None:
        super().__init__()
        what = f"mi.hidden_size={hidden_size} for {num_pairs} pairs of paths"
        check_memory(what, 4.0 * num_pairs * (3 * embed_dim + 1) * hidden_size)
        self.hidden_weight = nn.Parameter(torch.empty(num_pairs, embed_dim, hidden_size))
        self.hidden_bias = nn.Parameter(torch.empty(num_pairs, 1, hidden_size))
        self.output_weight = nn.Parameter(torch.empty(num_pairs, hidden_size, 2 * embed_dim))
        self.output_bias = nn.Parameter(torch.empty(num_pairs, 1, 2 * embed_dim))
        sizes = (embed_dim, embed_dim, hidden_size, hidden_size)
        for parameter, fan_in in zip(self.parameters(), sizes, strict=True):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict y from ``x [M, B, D]``: mean and log-variance, both ``[M, B, D]``."""
        hidden_weight, hidden_bias, output_weight, output_bias = (p.to(x.dtype) for p in self.parameters())
        hidden_MBH = nn.functional.gelu(torch.baddbmm(hidden_bias, x, hidden_weight))
        mean_MBD, raw_MBD = torch.baddbmm(output_bias, hidden_MBH, output_weight).chunk(2, dim=2)
        return mean_MBD, raw_MBD.clamp(-6, 6)


class MutualInformation(nn.Module):
    """Penalty on the dependence between paths, one value per path pair.

    Which estimator the paper uses inside vCLUB (size, direction, normalisation) is not known; all of it is
    ours. Runs in fp32 (fp64 for fp64 inputs), also under autocast.

    Args:
        kind: ``vclub`` fits a network q; ``hsic``, ``crosscov`` and ``orthogonal`` (see ``alternatives``)
            need no fit; ``none`` is zero. ``vclub_given_target`` and ``orthogonal_given_target`` are the same
            functions of what the target leaves ``unexplained``.
        num_paths: N.
        embed_dim: D of a path.
        hidden_size: width of q's hidden layer, per pair.

    Attributes:
        needs_fit: True if there is a network to fit by ``nll``.
        pairs: ``[M, 2]`` int64, the pair (i, j) of each value.

    Relations:
        ``num_paths=1`` has no pairs: values of shape ``[0]``, no parameters, nothing to fit.
        ``M`` pairs in one call equal ``M`` separate networks.
        Values do not change when a path is scaled by a positive number, nor, but for ``orthogonal``, when it
        is shifted.
    """

    pairs: Tensor

    def __init__(self, kind: Kind, *, num_paths: int, embed_dim: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.num_paths, self.embed_dim = num_paths, embed_dim
        self.register_buffer("pairs", path_pairs(num_paths), persistent=False)
        self.estimate, self.given_target = kind.removesuffix("_given_target"), kind.endswith("_given_target")
        self.needs_fit = self.estimate == "vclub" and num_paths > 1
        self.network = PairNetwork(len(self.pairs), embed_dim, hidden_size) if self.needs_fit else None

    def nll(self, paths: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of q on ``[B, N, D]`` (not detached here), the loss of its step.

        ``[M]`` in nats per dimension; zeros if there is nothing to fit.
        """
        with torch.autocast(device_type=paths.device.type, enabled=False):
            x_MBD, y_MBD = self._pair_sides(paths, target)
            if self.network is None:
                return x_MBD.new_zeros(len(self.pairs))
            return gaussian_nll(y_MBD, *self.network(x_MBD))

    def forward(self, paths: Tensor, target: Tensor | None = None) -> Tensor:
        """Estimate the dependence between the paths of each pair, a term of the main loss.

        Takes ``[B, N, D]``; gradient flows to both paths of a pair and to q (the caller freezes q), none to
        ``target``, what the rows are matched with. Returns ``[M]``; sum it, as a mean over no pairs is nan.
        """
        with torch.autocast(device_type=paths.device.type, enabled=False):
            x_MBD, y_MBD = self._pair_sides(paths, target)
            if self.network is not None:
                return vclub_bound(y_MBD, *self.network(x_MBD))
            if self.estimate in WITHOUT_FIT and len(self.pairs) > 0:
                return WITHOUT_FIT[self.estimate](x_MBD, y_MBD)
            return x_MBD.new_zeros(len(self.pairs))

    def _pair_sides(self, paths: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``x`` and ``y`` of every pair, each ``[M, B, D]``; standardised but for ``orthogonal``."""
        assert paths.shape[1:] == (self.num_paths, self.embed_dim), "[B, N, D]"
        if self.given_target:
            assert target is not None, "the side that the rows are matched with"
            paths = unexplained(paths, target)
        angles = self.estimate == "orthogonal"
        path_BND = paths.to(torch.promote_types(paths.dtype, torch.float32)) if angles else standardise(paths)
        path_NBD = path_BND.transpose(0, 1)
        return path_NBD[self.pairs[:, 0]], path_NBD[self.pairs[:, 1]]
