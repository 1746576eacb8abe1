"""Alternatives to vCLUB (ours), as functions of the two paths x and y of every pair.

Shapes: ``M`` path pairs, ``B`` batch, ``D`` embedding dim. The first two need a fitted Gaussian q of y given
x, the others no fit; ``squared_cosine`` estimates not dependence but the angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def club_sample_bound(
    target: Tensor, mean: Tensor, log_variance: Tensor, negative: Tensor | None = None
) -> Tensor:
    """CLUB with one negative per row: unbiased for the full bound, noisier.

    Takes ``[M, B, D]``, returns ``[M]`` in nats per dimension. ``negative`` (``[B]`` int64) is the row of
    ``target`` that row b is contrasted with; None draws one for each.
    """
    if negative is None:
        negative = torch.randperm(target.shape[1], device=target.device)
    wrong_MBD, right_MBD = (target[:, negative] - mean).square(), (target - mean).square()
    return 0.5 * ((wrong_MBD - right_MBD) * (-log_variance).exp()).mean(dim=(1, 2))


def l1out_bound(target: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Leave-one-out upper bound, tighter than CLUB where the dependence is weak.

    ``mean_b [ log q(y_b | x_b) - log( sum_{b' != b} q(y_b | x_b') / (B - 1) ) ] / D``. Needs all
    pairs of rows. The density is joint over dimensions, so D enters the logarithm: of all kinds
    only this one keeps some dependence on D.

    All arguments are ``[M, B, D]``; returns ``[M]`` in nats per dimension. Needs at least 2 rows.
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

    Takes ``[M, B, D]``, standardised, with B at least 4; returns ``[M]`` between -1 and 1: 1 for identical
    inputs, mean 0 for independent ones.
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

    Takes ``[M, B, D]`` (standardised, the covariances are correlations), returns ``[M]``, the mean over D * D
    entries: about 1 / B for independent inputs.
    """
    x_MBD, y_MBD = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    covariance_MDD = x_MBD.mT @ y_MBD / x.shape[1]
    return covariance_MDD.square().mean(dim=(1, 2))


def squared_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Penalty on paths that are not orthogonal: ``mean_b (<x_b, y_b> / (|x_b| |y_b|))^2``.

    Row by row and without centring: only the angle between an input's two embeddings counts, whatever they do
    over the batch. Independent embeddings with a common mean have a high value, and orthogonal ones that
    determine each other have 0.

    Takes ``[M, B, D]`` at any scale, returns ``[M]`` between 0 and 1: 1 for identical inputs, mean ``1 / D``
    for independent directions.
    """
    return nn.functional.cosine_similarity(x, y, dim=2).square().mean(dim=1)


OTHER_BOUNDS = {"club_sample": club_sample_bound, "l1out": l1out_bound}
WITHOUT_FIT = {"hsic": hsic, "crosscov": cross_covariance, "orthogonal": squared_cosine}
