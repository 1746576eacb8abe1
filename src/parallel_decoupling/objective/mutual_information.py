"""Dependence between paths: the vCLUB upper bound and its alternatives.

Here: pure functions of tensors, and one module that holds the estimator q(z_j | z_i) of all path
pairs. Elsewhere on purpose: detaching the paths for the fit, freezing q for the main step, and
both optimizers (``training``); gathering over ranks (``distributed``).

Shapes: ``B`` batch, ``N`` paths, ``M`` path pairs, ``D`` embedding dim. In a pair (i, j) path i is
the input x of q and path j its target y. Every estimate is a mean over dimensions, so that its weight
in the loss does not depend on ``D``; ``squared_cosine`` is no estimate of dependence, but of the angle.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["vclub", "club_sample", "l1out", "hsic", "crosscov", "orthogonal", "none"]
_FITTED = ("vclub", "club_sample", "l1out")
_LOG_VARIANCE_LIMIT = 6.0
_SMALLEST_VARIANCE = 1e-12


def path_pairs(num_paths: int) -> Tensor:
    """List the unordered pairs i < j of paths.

    Ours: CLUB is asymmetric, but both directions cost twice as much and gain little.

    Args:
        num_paths: N, at least 1.

    Returns:
        ``[M, 2]`` int64 with ``M = N (N - 1) / 2``; ``[0, 2]`` for one path.
    """
    pairs = [(i, j) for i in range(num_paths) for j in range(i + 1, num_paths)]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def standardise(paths: Tensor) -> Tensor:
    """Shift and scale each path and dimension to the batch's mean 0 and variance 1.

    With gradient through the statistics (ours): the result does not change when embeddings shrink
    or move, so no estimate built on it can be lowered that way. The variance (over B, not B - 1)
    has a floor of 1e-12, which only a constant dimension reaches.

    Args:
        paths: ``[B, N, D]``, any scale.

    Returns:
        ``[B, N, D]`` in fp32 (fp64 for fp64 inputs).
    """
    value_BND = paths.to(torch.promote_types(paths.dtype, torch.float32))
    variance_ND, mean_ND = torch.var_mean(value_BND, dim=0, correction=0)
    return (value_BND - mean_ND) * variance_ND.clamp_min(_SMALLEST_VARIANCE).rsqrt()


def gaussian_nll(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood of a diagonal Gaussian, per dimension.

    Args:
        target: ``[M, B, D]``.
        mean: ``[M, B, D]``.
        log_variance: ``[M, B, D]``.

    Returns:
        ``[M]`` in nats, the mean over B and D, with the constant ``log(2 pi) / 2``.
    """
    squared_MBD = (target - mean).square() * (-log_variance).exp()
    return 0.5 * (squared_MBD + log_variance).mean(dim=(1, 2)) + 0.5 * math.log(2 * math.pi)


def vclub_bound(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Variational CLUB with all B * B negatives, at the cost of B rows.

    ``mean_b log q(y_b | x_b) - mean_b mean_b' log q(y_b' | x_b)``. For Gaussian q the inner mean
    needs only the batch's moments of y, ``mean_b' (y_b' - mu)^2 = var(y) + (mean(y) - mu)^2``, and
    the log-variance terms cancel: O(B D) instead of O(B^2 D), the same value. It is no estimate of
    the mutual information itself: with a perfect q, Gaussians of correlation rho give
    ``rho^2 / (1 - rho^2)`` per dimension (times (B - 1) / B, as b' = b counts).

    Args:
        target: y, ``[M, B, D]``, at any scale.
        mean: mu(x), ``[M, B, D]``.
        log_variance: of q, ``[M, B, D]``.

    Returns:
        ``[M]`` in nats per dimension; about 0 for independent inputs, below 0 possible.

    Relations:
        The mean of ``club_sample_bound`` over all shifts of the batch equals this.
    """
    variance_M1D, center_M1D = torch.var_mean(target, dim=1, correction=0, keepdim=True)
    y_MBD, mu_MBD = target - center_M1D, mean - center_M1D
    gap_MBD = y_MBD * mu_MBD + 0.5 * (variance_M1D - y_MBD.square())
    return (gap_MBD * (-log_variance).exp()).mean(dim=(1, 2))


def club_sample_bound(target: Tensor, mean: Tensor, log_variance: Tensor, negative: Tensor) -> Tensor:
    """CLUB with one negative per row: unbiased for the full bound, noisier.

    Args:
        target: y, ``[M, B, D]``.
        mean: mu(x), ``[M, B, D]``.
        log_variance: of q, ``[M, B, D]``.
        negative: ``[B]`` int64, the row of ``target`` that row b is contrasted with.

    Returns:
        ``[M]`` in nats per dimension.
    """
    wrong_MBD, right_MBD = (target[:, negative] - mean).square(), (target - mean).square()
    return 0.5 * ((wrong_MBD - right_MBD) * (-log_variance).exp()).mean(dim=(1, 2))


def l1out_bound(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Leave-one-out upper bound, tighter than CLUB where the dependence is weak.

    ``mean_b [ log q(y_b | x_b) - log( sum_{b' != b} q(y_b | x_b') / (B - 1) ) ] / D``. Needs all
    pairs of rows. The density is joint over dimensions, so D enters the logarithm: of all kinds
    only this one keeps some dependence on D.

    Args:
        target: y, ``[M, B, D]``.
        mean: mu(x), ``[M, B, D]``.
        log_variance: of q, ``[M, B, D]``.

    Returns:
        ``[M]`` in nats per dimension.

    Raises:
        ValueError: if B is below 2.
    """
    num_rows, embed_dim = target.shape[1:]
    if num_rows < 2:
        raise ValueError("l1out needs at least 2 rows per batch; raise the batch size.")
    center_M1D = target.mean(dim=1, keepdim=True)
    y_MBD, mu_MBD = target - center_M1D, mean - center_M1D
    precision_MBD = (-log_variance).exp()
    # [m, b, c]: log-density of row b's target under row c's Gaussian, up to a constant.
    squared_MBC = (
        y_MBD.square() @ precision_MBD.mT
        - 2 * y_MBD @ (precision_MBD * mu_MBD).mT
        + (precision_MBD * mu_MBD.square()).sum(dim=2).unsqueeze(1)
    )
    log_density_MBC = -0.5 * (squared_MBC + log_variance.sum(dim=2).unsqueeze(1))
    own_BC = torch.eye(num_rows, dtype=torch.bool, device=target.device)
    others_MB = log_density_MBC.masked_fill(own_BC, -torch.inf).logsumexp(dim=2) - math.log(num_rows - 1)
    return (log_density_MBC.diagonal(dim1=1, dim2=2) - others_MB).mean(dim=1) / embed_dim


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Normalised unbiased HSIC with Gaussian kernels: any dependence, no fit.

    ``<K, L> / sqrt(<K, K> <L, L>)`` of the U-centred kernel matrices (the unbiased HSIC of Song et
    al. 2012, normalised to the cosine of both). Kernel ``exp(-|a - b|^2 / (2 D))``: the bandwidth
    is sqrt(D), the scale of distances between standardised inputs, so nothing is estimated. The
    biased form is of no use here: for B below D it reports about 1 whatever the inputs.

    Args:
        x: ``[M, B, D]``, standardised.
        y: ``[M, B, D]``, standardised.

    Returns:
        ``[M]`` between -1 and 1; 1 for identical inputs, mean 0 for independent ones.

    Raises:
        ValueError: if B is below 4.
    """
    if x.shape[1] < 4:
        raise ValueError(f"hsic needs at least 4 rows per batch, got {x.shape[1]}; raise the batch size.")
    kernel_x, kernel_y = _centred_kernel(x), _centred_kernel(y)
    return nn.functional.cosine_similarity(kernel_x.flatten(1), kernel_y.flatten(1), dim=1)


def _centred_kernel(value_MBD: Tensor) -> Tensor:
    """U-centred Gaussian kernel matrix with zero diagonal, ``[M, B, B]``."""
    num_rows, embed_dim = value_MBD.shape[1:]
    norm_MB = value_MBD.square().sum(dim=2)
    distance_MBB = norm_MB.unsqueeze(2) + norm_MB.unsqueeze(1) - 2 * value_MBD @ value_MBD.mT
    off_BB = ~torch.eye(num_rows, dtype=torch.bool, device=value_MBD.device)
    kernel_MBB = (-distance_MBB / (2 * embed_dim)).exp() * off_BB
    row_MB1 = kernel_MBB.sum(dim=2, keepdim=True) / (num_rows - 2)
    total_M11 = row_MB1.sum(dim=1, keepdim=True) / (num_rows - 1)
    return (kernel_MBB - row_MB1 - row_MB1.mT + total_M11) * off_BB


def cross_covariance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared covariance between the dimensions of x and those of y: linear dependence only.

    Args:
        x: ``[M, B, D]``; on standardised inputs the covariances are correlations.
        y: ``[M, B, D]``.

    Returns:
        ``[M]``, the mean over D * D entries; about 1 / B for independent inputs.
    """
    x_MBD, y_MBD = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    covariance_MDD = x_MBD.mT @ y_MBD / x.shape[1]
    return covariance_MDD.square().mean(dim=(1, 2))


def squared_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Penalty on paths that are not orthogonal: ``mean_b (<x_b, y_b> / (|x_b| |y_b|))^2``.

    Row by row and without centring: only the angle between an input's two embeddings counts, whatever they do
    over the batch. Independent embeddings with a common mean have a high value, and orthogonal ones that
    determine each other have 0.

    Args:
        x: ``[M, B, D]``, any scale.
        y: ``[M, B, D]``, any scale.

    Returns:
        ``[M]`` between 0 and 1; 1 for identical inputs, mean ``1 / D`` for independent directions.
    """
    return nn.functional.cosine_similarity(x, y, dim=2).square().mean(dim=1)


class PairNetwork(nn.Module):
    """Mean and log-variance of q(z_j | z_i) for all M pairs in one batched network.

    One hidden layer (GELU), no parameter shared between pairs, each initialised like ``nn.Linear``
    from a draw of its own. The log-variance is clamped to -6 .. 6, so identical paths give at most
    ``exp(6)``, about 403 per dimension. A clamp, not tanh: where tanh saturates, the raw value keeps
    drifting, and q needs about twice as many steps to follow paths that come apart.
    """

    def __init__(self, num_pairs: int, embed_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.empty(num_pairs, embed_dim, hidden_size))
        self.hidden_bias = nn.Parameter(torch.empty(num_pairs, 1, hidden_size))
        self.output_weight = nn.Parameter(torch.empty(num_pairs, hidden_size, 2 * embed_dim))
        self.output_bias = nn.Parameter(torch.empty(num_pairs, 1, 2 * embed_dim))
        for parameter, fan_in in (
            (self.hidden_weight, embed_dim),
            (self.hidden_bias, embed_dim),
            (self.output_weight, hidden_size),
            (self.output_bias, hidden_size),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict y from ``x [M, B, D]``: mean and log-variance, both ``[M, B, D]``."""
        hidden_weight, hidden_bias, output_weight, output_bias = (
            parameter.to(x.dtype)
            for parameter in (self.hidden_weight, self.hidden_bias, self.output_weight, self.output_bias)
        )
        hidden_MBH = nn.functional.gelu(torch.baddbmm(hidden_bias, x, hidden_weight))
        mean_MBD, raw_MBD = torch.baddbmm(output_bias, hidden_MBH, output_weight).chunk(2, dim=2)
        return mean_MBD, raw_MBD.clamp(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT)


class MutualInformation(nn.Module):
    """Penalty on the dependence between paths, one value per path pair.

    Which estimator the paper uses inside vCLUB (size, direction, normalisation) is not known; all
    of it is ours. Runs in fp32 (fp64 for fp64 inputs), also under autocast.

    Args:
        kind: ``vclub``, ``club_sample`` and ``l1out`` fit a network q; ``hsic``, ``crosscov`` and
            ``orthogonal`` (``squared_cosine``) need no fit; ``none`` is zero.
        num_paths: N.
        embed_dim: D.
        hidden_size: width of q's hidden layer, per pair.

    Attributes:
        needs_fit: True if there is a network to fit by ``nll``.
        pairs: ``[M, 2]`` int64, the pair (i, j) of each value.

    Raises:
        ValueError: if ``kind`` is unknown.

    Relations:
        ``num_paths=1`` has no pairs: values of shape ``[0]``, no parameters, nothing to fit.
        ``M`` pairs in one call equal ``M`` separate networks.
        Values do not change when a path is scaled by a positive number, nor, but for ``orthogonal``, when it
        is shifted.
    """

    pairs: Tensor

    def __init__(self, kind: Kind, *, num_paths: int, embed_dim: int, hidden_size: int = 64) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"Unknown mutual information kind {kind!r}; choose one of {get_args(Kind)}.")
        self.kind = kind
        self.num_paths = num_paths
        self.embed_dim = embed_dim
        self.register_buffer("pairs", path_pairs(num_paths), persistent=False)
        self.needs_fit = kind in _FITTED and num_paths > 1
        self.network = PairNetwork(len(self.pairs), embed_dim, hidden_size) if self.needs_fit else None

    def nll(self, paths: Tensor) -> Tensor:
        """Negative log-likelihood of q, the loss of its own step.

        Args:
            paths: ``[B, N, D]``; not detached here.

        Returns:
            ``[M]`` in nats per dimension; zeros if there is nothing to fit.

        Raises:
            ValueError: if the shape is not ``[B, num_paths, embed_dim]``.
        """
        with torch.autocast(device_type=paths.device.type, enabled=False):
            x_MBD, y_MBD = self._inputs_and_targets(paths)
            if self.network is None:
                return x_MBD.new_zeros(len(self.pairs))
            return gaussian_nll(y_MBD, *self.network(x_MBD))

    def forward(self, paths: Tensor) -> Tensor:
        """Dependence between the paths of each pair, a term of the main loss.

        Args:
            paths: ``[B, N, D]``; gradient flows to both paths of a pair and to q (the caller
                freezes q). ``club_sample`` draws its negatives from torch's global generator.

        Returns:
            ``[M]``; sum it, as a mean over no pairs is nan. Zeros for ``none``.

        Raises:
            ValueError: if the shape is not ``[B, num_paths, embed_dim]``, or B is too small for
                ``l1out`` (2) or ``hsic`` (4).
        """
        with torch.autocast(device_type=paths.device.type, enabled=False):
            x_MBD, y_MBD = self._inputs_and_targets(paths)
            if self.kind == "none" or len(self.pairs) == 0:
                return x_MBD.new_zeros(len(self.pairs))
            if self.kind == "orthogonal":
                return squared_cosine(x_MBD, y_MBD)
            if self.kind == "hsic":
                return hsic(x_MBD, y_MBD)
            if self.kind == "crosscov":
                return cross_covariance(x_MBD, y_MBD)
            return self._bound(x_MBD, y_MBD)

    def _bound(self, x_MBD: Tensor, y_MBD: Tensor) -> Tensor:
        assert self.network is not None
        mean_MBD, log_variance_MBD = self.network(x_MBD)
        if self.kind == "l1out":
            return l1out_bound(y_MBD, mean_MBD, log_variance_MBD)
        if self.kind == "club_sample":
            negative_B = torch.randperm(y_MBD.shape[1], device=y_MBD.device)
            return club_sample_bound(y_MBD, mean_MBD, log_variance_MBD, negative_B)
        return vclub_bound(y_MBD, mean_MBD, log_variance_MBD)

    def _inputs_and_targets(self, paths: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``y`` of every pair, each ``[M, B, D]``; standardised but for ``orthogonal``."""
        if paths.ndim != 3 or paths.shape[1:] != (self.num_paths, self.embed_dim):
            expected = f"[B, {self.num_paths}, {self.embed_dim}]"
            raise ValueError(f"paths must be {expected}, got {tuple(paths.shape)}.")
        if self.kind == "orthogonal":
            path_BND = paths.to(torch.promote_types(paths.dtype, torch.float32))
        else:
            path_BND = standardise(paths)
        path_NBD = path_BND.transpose(0, 1)
        return path_NBD[self.pairs[:, 0]], path_NBD[self.pairs[:, 1]]


def mi_weight_schedule(step: int, *, weight: float, warmup_steps: int, ramp_steps: int) -> float:
    """Weight of the mutual-information term at a main step.

    0 while only q is fitted, then a straight line up to ``weight`` (ours).

    Args:
        step: main steps done so far, from 0.
        weight: the final weight.
        warmup_steps: steps with weight 0.
        ramp_steps: length of the ramp; 0 switches the term on at once.

    Returns:
        0 for ``step < warmup_steps``, ``weight`` from ``warmup_steps + ramp_steps`` on.
    """
    if step < warmup_steps:
        return 0.0
    if step >= warmup_steps + ramp_steps:
        return weight
    return weight * (step - warmup_steps) / ramp_steps
