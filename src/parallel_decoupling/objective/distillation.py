"""What every path learns from all of them: its scores within the batch follow those of the aggregate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.objective.contrastive import candidate_logits


def score_distillation(
    query: Tensor,
    candidate: Tensor,
    teacher_query: Tensor,
    teacher_candidate: Tensor,
    *,
    positive: Tensor,
    candidate_ids: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """Return ``KL(teacher || path)`` of the distributions over candidates, per path ``[N]``, means over B.

    ``p_b = softmax_j(<teacher query b, teacher candidate j> / t)`` and ``p_bn`` the same of path n, over
    the candidates that ``info_nce`` contrasts. The teacher does not receive gradient. The temperature divides
    both, and only the paths' side gives it gradient.

    Source: ours, with the loss of Hinton et al. (arXiv 1503.02531).

    The teacher's are aggregates, ``[B, 1, D']`` and ``[G, 1, D']``; the other arguments are those of
    ``info_nce``.

    Relations:
        It is 0 for one path that is its own aggregate, and never negative.
    """
    labels = positive, candidate_ids
    path_NBG = (candidate_logits(query, candidate, *labels) / temperature).log_softmax(dim=2)
    with torch.no_grad():
        teacher_1BG = (candidate_logits(teacher_query, teacher_candidate, *labels) / temperature).softmax(2)
    teacher_NBG = teacher_1BG.expand_as(path_NBG)
    finite_NBG = path_NBG.masked_fill(path_NBG.isinf(), 0.0)  # candidates left out, which the teacher gives 0
    return F.kl_div(finite_NBG, teacher_NBG, reduction="none").sum(dim=2).mean(dim=1)
