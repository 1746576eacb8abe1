"""Penalties on what paths share beyond their target (ours).

Two paths that both find the target share it, so a penalty on all that they share pulls against InfoNCE. These
look at what is left once the target is known: decorrelated errors are what an aggregate gains from.

Shapes: ``B`` rows, ``N`` paths, ``D`` embedding dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 0.1  # the prediction's penalty on slopes, as a share of the target's total variance


def unexplained(paths: Tensor, target: Tensor) -> Tensor:
    """Return what is left of ``paths`` ``[B, N, D]`` once the target's mean embedding has predicted them.

    ``target`` ``[B, N, D]`` is what each row is matched with; no gradient flows to it.

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
    target_BD = target.detach().to(value_BND.dtype).mean(dim=1)
    centred_BD = target_BD - target_BD.mean(dim=0)
    kernel_BB = centred_BD @ centred_BD.T
    ridge = (_RIDGE * kernel_BB.trace() / num_rows).clamp_min(torch.finfo(kernel_BB.dtype).tiny)
    own_BB = torch.eye(num_rows, dtype=kernel_BB.dtype, device=kernel_BB.device)
    left_BB = ridge * torch.linalg.inv(kernel_BB + ridge * own_BB) - 1 / num_rows  # 1 - H
    return torch.einsum("bc,cnd->bnd", left_BB / left_BB.diagonal().unsqueeze(1), value_BND)
