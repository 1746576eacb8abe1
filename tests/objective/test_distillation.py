"""Paths that learn the aggregate's scores: against a loop, and what does not receive gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID
from parallel_decoupling.objective.contrastive import score_distillation

POSITIVE = torch.tensor([0, 1, 2, 3])
IDS = torch.tensor([7, 3, 7, 1, PADDING_ID, 3, 9])  # 0 and 2, and 1 and 5, are the same target


def unit(rows: int, paths: int) -> Tensor:
    return F.normalize(torch.randn(rows, paths, 5, dtype=torch.float64), dim=-1).requires_grad_()


def loop(query: Tensor, candidate: Tensor, teacher_query: Tensor, teacher_candidate: Tensor) -> Tensor:
    losses = []
    for n in range(query.shape[1]):
        total = torch.zeros((), dtype=torch.float64)
        for b, p in enumerate(POSITIVE.tolist()):
            seen = [j for j in range(len(IDS)) if j == p or IDS[j] not in (IDS[p], PADDING_ID)]
            teacher = torch.stack(
                [teacher_query[b, 0] @ teacher_candidate[j, 0] / 0.3 for j in seen]
            ).softmax(0)
            path = torch.stack([query[b, n] @ candidate[j, n] / 0.3 for j in seen]).softmax(0)
            total = total + (teacher * (teacher / path).log()).sum()
        losses.append(total / len(POSITIVE))
    return torch.stack(losses)


def test_it_is_the_divergence_from_the_teacher_over_what_info_nce_contrasts() -> None:
    sides = unit(4, 3), unit(7, 3), unit(4, 1), unit(7, 1)
    found = score_distillation(*sides, positive=POSITIVE, candidate_ids=IDS, temperature=0.3)
    torch.testing.assert_close(found, loop(*sides))
    assert (found > 0).all()
    found.sum().backward()
    assert sides[0].grad is not None and sides[1].grad is not None  # noqa: PT018
    assert sides[2].grad is None
    assert sides[3].grad is None
    assert sides[1].grad.isfinite().all()
    expected = torch.autograd.grad(loop(*sides).sum(), sides[:2])
    torch.testing.assert_close((sides[0].grad, sides[1].grad), expected)


def test_a_path_that_is_the_aggregate_has_nothing_to_learn() -> None:
    query, candidate = unit(4, 1), unit(7, 1)
    sides = query, candidate, query, candidate
    loss = score_distillation(*sides, positive=POSITIVE, candidate_ids=IDS, temperature=0.3)
    torch.testing.assert_close(loss, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-12)
