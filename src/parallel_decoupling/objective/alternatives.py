"""Alternatives to vCLUB (ours): functions of the two paths x and y of every pair. None fits a network.

``unexplained`` makes of each penalty, vCLUB included, one on what paths share beyond their target.

Shapes: ``M`` path pairs, ``B`` batch, ``N`` paths, ``D`` embedding dim.
"""

import torch
from torch import Tensor, nn

_RIDGE = 0.1  # the prediction's penalty on slopes, as a share of the target's total variance


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Normalised unbiased HSIC with Gaussian kernels: any dependence, no fit.

    ``<K, L> / sqrt(<K, K> <L, L>)`` of the U-centred kernel matrices (the unbiased HSIC of Song et al. 2012,
    normalised to the cosine of both; the biased form is about 1 for B below D). Kernel
    ``exp(-|a - b|^2 / (2 D))``: sqrt(D) is the scale of distances between standardised inputs.

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

    Takes ``[M, B, D]``; of standardised inputs the covariances are correlations. Returns ``[M]``, the mean
    over D * D entries: about 1 / B for independent inputs.
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


def unexplained(paths: Tensor, target: Tensor) -> Tensor:
    """Return what is left of ``paths`` ``[B, N, D]`` once the target's mean embedding has predicted them.

    ``target`` ``[B, N, D]`` is what each row is matched with; no gradient flows to it.

    Ridge regression with an intercept, in closed form. Each row's prediction is fitted on all OTHER rows: a
    fit that has seen the row would explain it away. With the hat matrix H of all rows, leaving row b out
    gives ``(z_b - (H z)_b) / (1 - H_bb)``. Among linear, additive effects of the target, rows of the result
    are exchangeable draws given the target, so any penalty on it is one given the target.

    Cost: O(B^2 N D) and one inverse of ``[B, B]``. Fewer than 3 rows are a ``ValueError``.
    """
    num_rows = len(paths)
    if num_rows < 3:
        raise ValueError(f"mi.kind given the target needs at least 3 rows, got {num_rows}; raise batch_size.")
    value_BND = paths.to(torch.promote_types(paths.dtype, torch.float32))
    target_BD = target.detach().to(value_BND.dtype).mean(dim=1)
    centred_BD = target_BD - target_BD.mean(dim=0)
    kernel_BB = centred_BD @ centred_BD.T
    ridge = (_RIDGE * kernel_BB.trace() / num_rows).clamp_min(torch.finfo(kernel_BB.dtype).tiny)
    own_BB = torch.eye(num_rows, dtype=kernel_BB.dtype, device=kernel_BB.device)
    left_BB = ridge * torch.linalg.inv(kernel_BB + ridge * own_BB) - 1 / num_rows  # 1 - H
    return torch.einsum("bc,cnd->bnd", left_BB / left_BB.diagonal().unsqueeze(1), value_BND)
