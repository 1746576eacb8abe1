"""A low-rank adapter for every path: paths that share the frozen weights, and nothing that trains."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from parallel_decoupling.model.paths import CALL

PERTURBATION = 0.1
"""Noise on the paths of a published adapter but the first, in its standard deviations ("ours")."""


class PathLoRA(nn.Module):
    """A linear layer with N low-rank updates: path n computes ``W x + scaling * B_n A_n x``.

    ``path_lora_A`` is ``[N, r, D_in]``, ``path_lora_B`` ``[N, D_out, r]``, both fp32. Rows are path-major, so
    one batched product serves the paths of a call. Source: LoRA-Ensemble (arXiv 2405.14438); for embeddings
    ours.

    Relations:
        With one path it equals LoRA. Outside a call of ``Backbone`` it equals the frozen layer.
        N paths equal N models with one path each, and no path's loss reaches another path's update.
    """

    def __init__(self, shared: Any, num_paths: int) -> None:
        """Give ``num_paths`` paths a copy each of the update of a peft layer."""
        super().__init__()
        self.base_layer, self.num_paths = shared.get_base_layer(), num_paths
        self.scaling: float = shared.scaling["default"]
        self.dropout: nn.Module = shared.lora_dropout["default"]
        lora_A, lora_B = (part["default"].weight.detach() for part in (shared.lora_A, shared.lora_B))
        self.path_lora_A = nn.Parameter(lora_A.repeat(num_paths, 1, 1))
        self.path_lora_B = nn.Parameter(lora_B.repeat(num_paths, 1, 1))

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows ``[N' * B, L, D_in]`` of the call's paths to ``[N' * B, L, D_out]``."""
        result = cast(Tensor, self.base_layer(rows))
        call = CALL.get()
        if call is None:
            return result
        lora_A: Tensor = self.path_lora_A  # [N', r, D_in]
        lora_B: Tensor = self.path_lora_B  # [N', D_out, r]
        if call.paths != list(range(self.num_paths)):
            lora_A, lora_B = lora_A[call.paths], lora_B[call.paths]
        dtype = rows.dtype if torch.is_autocast_enabled(rows.device.type) else lora_A.dtype
        rows_NTD = self.dropout(rows).to(dtype).reshape(call.num_paths, -1, rows.shape[-1])
        low_NTr = rows_NTD @ lora_A.mT
        base_NTD = result.to(low_NTr.dtype).reshape(call.num_paths, -1, result.shape[-1])
        sum_NTD = torch.baddbmm(base_NTD, low_NTr, lora_B.mT, alpha=self.scaling)
        return sum_NTD.reshape(result.shape).to(result.dtype)

    @torch.no_grad()
    def draw(self, path: int) -> None:
        """Start one path as peft starts LoRA: ``A`` uniform, ``B`` zero."""
        nn.init.kaiming_uniform_(self.path_lora_A[path], a=math.sqrt(5))
        self.path_lora_B[path].zero_()

    @torch.no_grad()
    def perturb(self, path: int) -> None:
        """Move one path's ``A`` a little."""
        own = self.path_lora_A[path]
        own.add_(PERTURBATION * own.std() * torch.randn_like(own))

    @torch.no_grad()
    def merged_weight(self, path: int) -> Tensor:
        """Return the weight ``[D_out, D_in]`` of a plain linear layer that computes what one path does."""
        weight = cast(Any, self.base_layer).weight
        update = self.path_lora_B[path] @ self.path_lora_A[path]
        return cast(Tensor, (weight.float() + self.scaling * update).to(weight.dtype))
