"""Scores of rows that have one right answer each, from its ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_decoupling.evaluation.score import row_metrics


def values_of_ranks(rank_R: Tensor) -> dict[str, Tensor]:
    """What ``TaskScore.values`` has for a column."""
    found_RC = torch.nn.functional.one_hot(rank_R - 1, 20).double()
    return row_metrics(found_RC, found_RC)
