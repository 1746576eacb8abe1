"""Alternatives to vCLUB (ours), as functions of the two paths x and y of every pair.

Shapes: ``M`` path pairs, ``B`` batch, ``D`` embedding dim. None fits a network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    covariance_MDD = (x - x.mean(dim=1, keepdim=True)).mT @ y / x.shape[1]
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


WITHOUT_FIT = {"hsic": hsic, "crosscov": cross_covariance, "orthogonal": squared_cosine}
