"""Penalties on what paths share beyond their target (ours).

Two paths that both find the target share it, so a penalty on all that they share pulls against InfoNCE. These
look at what is left once the target is known: decorrelated errors are what an aggregate gains from.

Shapes: ``B`` rows of one side, ``C`` rows of the other side, ``N`` paths, ``M`` path pairs, ``D`` embedding
dim. The other side is always detached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel_decoupling.batch import PADDING_ID

_RIDGE = 0.1  # the prediction's penalty on slopes, as a share of the target's total variance


@dataclass(frozen=True)
class Given:
    """The side that rows are matched with: candidates for queries, queries for candidates.

    ``rows`` are ``[C, N, D]``; ``positive`` ``[B]`` is the index of each row's target among them. Equal
    ``ids`` ``[C]`` are the same target, ``PADDING_ID`` is none.
    """

    rows: Tensor
    positive: Tensor
    ids: Tensor

    @property
    def target(self) -> Tensor:
        """The target's embedding by every path, ``[B, N, D]``, without graph and in full precision."""
        rows_CND = self.rows.detach()
        return rows_CND.to(torch.promote_types(rows_CND.dtype, torch.float32))[self.positive]


def unexplained(paths: Tensor, given: Given) -> Tensor:
    """Return what is left of ``paths`` ``[B, N, D]`` once the target's mean embedding has predicted them.

    Ridge regression with an intercept, in closed form. Each row's prediction is fitted on all OTHER rows: a
    fit that has seen the row would explain it away. With the hat matrix H of all rows, leaving row b out
    gives ``(z_b - (H z)_b) / (1 - H_bb)``. Among linear, additive effects of the target, rows of the result
    are exchangeable draws given the target, so any penalty on it is one given the target.

    Cost: O(B^2 N D) and one inverse of ``[B, B]``.
    """
    num_rows = len(paths)
    if num_rows < 3:
        raise ValueError(f"mi.kind given the target needs at least 3 rows, got {num_rows}; raise batch_size.")
    value_BND = paths.to(torch.promote_types(paths.dtype, torch.float32))
    target_BD = given.target.mean(dim=1)
    centred_BD = target_BD - target_BD.mean(dim=0)
    kernel_BB = centred_BD @ centred_BD.T
    ridge = (_RIDGE * kernel_BB.trace() / num_rows).clamp_min(torch.finfo(kernel_BB.dtype).tiny)
    own_BB = torch.eye(num_rows, dtype=kernel_BB.dtype, device=kernel_BB.device)
    left_BB = ridge * torch.linalg.inv(kernel_BB + ridge * own_BB) - 1 / num_rows  # 1 - H
    return torch.einsum("bc,cnd->bnd", left_BB / left_BB.diagonal().unsqueeze(1), value_BND)


def logit_error_correlation(paths: Tensor, given: Given, pairs: Tensor) -> Tensor:
    """Return the correlation of two paths' errors in the scores of negatives, ``[M]``, the mean over rows.

    Row b's error at negative c is what it scores above the target's own embedding,
    ``<z_b - target_b, row_c>``. It is correlated over negatives between the paths of ``pairs`` ``[M, 2]``.
    The scores themselves, with or without softmax, would not do: paths that know the target agree on which
    negatives resemble it. Between -1 and 1; of all kinds only this one goes on below independence, as the
    error of a mean does.

    Cost: O(N B C D), as InfoNCE. The same target and padding are no negatives.
    """
    value_BND = paths.to(torch.promote_types(paths.dtype, torch.float32))
    rows_CND = given.rows.detach().to(value_BND.dtype)
    error_NBC = torch.einsum("bnd,cnd->nbc", value_BND - given.target, rows_CND)
    negative_BC = (given.ids != given.ids[given.positive].unsqueeze(1)) & (given.ids != PADDING_ID)
    count_B1 = negative_BC.sum(dim=1, keepdim=True).clamp_min(1)
    mean_NB1 = (error_NBC * negative_BC).sum(dim=2, keepdim=True) / count_B1
    centred_NBC = (error_NBC - mean_NB1) * negative_BC
    first_MBC, second_MBC = centred_NBC[pairs[:, 0]], centred_NBC[pairs[:, 1]]
    return nn.functional.cosine_similarity(first_MBC, second_MBC, dim=2).mean(dim=1)
