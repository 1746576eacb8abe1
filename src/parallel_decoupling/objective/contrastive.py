"""InfoNCE over paths, and the in-batch hit@1 that goes with it.

Shapes: ``B`` queries, ``G`` candidates (``G >= B`` with gathered or hard negatives), ``N`` paths,
``D`` embedding dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel_decoupling.batch import PADDING_ID


def info_nce(
    query: Tensor,
    candidate: Tensor,
    *,
    positive: Tensor,
    candidate_ids: Tensor,
    temperature: float | Tensor,
    symmetric: bool = False,
) -> Tensor:
    """Contrast every query with all candidates, path by path.

    For path n: ``loss_n = mean_b -log( exp(s_bp / t) / sum_j exp(s_bj / t) )`` with
    ``s_bj = <query_bn, candidate_jn>`` and p the positive of query b. The sum over j leaves out
    padding and every other candidate with the positive's id: the same target is not a negative (ours;
    labels repeat inside a batch in each classification task). Path n of a query never meets another
    path of a candidate. Computed in fp32 (fp64 for fp64 inputs), also under autocast.

    Gathering: where gradient reaches only the local rows, a candidate must still meet the queries
    of the other ranks. Pass ALL gathered queries and ALL gathered candidates, local rows with
    gradient; the sum over ranks of the gradients is then that of one process.

    Args:
        query: ``[B, N, D]``, unit norm for a cosine score. Not detached here.
        candidate: ``[G, N, D]``, unit norm. Not detached here.
        positive: ``[B]`` int64, index into ``candidate`` of each query's positive.
        candidate_ids: ``[G]`` int64; equal ids are the same target, ``PADDING_ID`` is none.
        temperature: divides the scores, above 0; a 0-dim tensor receives gradient.
        symmetric: also contrast each of the B positives with the B queries, duplicates left out
            the same way, and return the mean of both directions.

    Returns:
        ``[N]``, the mean over B of each path.

    Raises:
        ValueError: if the shapes do not fit together, or a float temperature is not above 0.

    Relations:
        ``N`` paths equal ``N`` calls with one path each.
        The loss of the aggregate is a call with ``[B, 1, D]`` and ``[G, 1, D]``.
        A further copy of a query's own target among the candidates leaves its loss as it is.
        Padding among the candidates leaves every loss as it is.
        ``symmetric`` without extra candidates does not change if query and candidate swap roles.
    """
    _check_shapes(query, candidate, positive, candidate_ids)
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature divides the scores and must be above 0, got {temperature}.")
    score_NBG = _scores(query, candidate) / temperature
    left_out_BG = _left_out(positive, candidate_ids)
    loss_N = _cross_entropy(score_NBG, left_out_BG, positive)
    if not symmetric:
        return loss_N
    reverse_NBB = score_NBG[:, :, positive].transpose(1, 2)  # [n, b, c]: positive of b, query c
    own_B = torch.arange(len(positive), device=positive.device)
    left_out_BB = _left_out(own_B, candidate_ids[positive])
    return (loss_N + _cross_entropy(reverse_NBB, left_out_BB, own_B)) / 2


@torch.no_grad()
def in_batch_hit_at_1(query: Tensor, candidate: Tensor, *, positive: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return the share ``[N]`` of queries whose positive scores strictly above all other targets.

    The arguments are those of ``info_nce``. A tie is a miss, so collapsed embeddings do not look perfect.
    """
    margin_NB = in_batch_margins(query, candidate, positive=positive, candidate_ids=candidate_ids)
    return (margin_NB > 0).to(margin_NB.dtype).mean(dim=1)


@torch.no_grad()
def in_batch_margins(query: Tensor, candidate: Tensor, *, positive: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return by how much each query's positive scores above the best other target, ``[N, B]``.

    The arguments are those of ``info_nce``. Duplicates of the positive and padding are left out as there;
    infinite where nothing is left.
    """
    _check_shapes(query, candidate, positive, candidate_ids)
    score_NBG = _scores(query, candidate)
    own_B = torch.arange(len(positive), device=positive.device)
    left_out_BG = _left_out(positive, candidate_ids)
    left_out_BG[own_B, positive] = True
    best_other_NB = score_NBG.masked_fill(left_out_BG, -torch.inf).amax(dim=2)
    return score_NBG[:, own_B, positive] - best_other_NB


def candidate_logits(query: Tensor, candidate: Tensor, positive: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return the scores ``[N, B, G]`` that ``info_nce`` contrasts, minus infinity where one is left out."""
    _check_shapes(query, candidate, positive, candidate_ids)
    return _scores(query, candidate).masked_fill(_left_out(positive, candidate_ids), -torch.inf)


def _scores(query: Tensor, candidate: Tensor) -> Tensor:
    """Return the inner products per path in full precision, ``[N, B, G]``."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        return torch.einsum("bnd,gnd->nbg", query.to(dtype), candidate.to(dtype))


def _left_out(positive: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return ``[B, G]``, True at padding and at the positive's target unless it is the positive itself."""
    same_BG = candidate_ids[positive].unsqueeze(1) == candidate_ids.unsqueeze(0)
    left_out_BG = same_BG | (candidate_ids == PADDING_ID)
    return left_out_BG.scatter(1, positive.unsqueeze(1), False)


def _cross_entropy(score_NBG: Tensor, left_out_BG: Tensor, positive: Tensor) -> Tensor:
    num_paths, num_queries, _ = score_NBG.shape
    logit_NBG = score_NBG.masked_fill(left_out_BG, -torch.inf)
    loss = nn.functional.cross_entropy(logit_NBG.flatten(0, 1), positive.repeat(num_paths), reduction="none")
    return loss.view(num_paths, num_queries).mean(dim=1)


def _check_shapes(query: Tensor, candidate: Tensor, positive: Tensor, candidate_ids: Tensor) -> None:
    if query.ndim != 3 or candidate.ndim != 3 or query.shape[1:] != candidate.shape[1:]:
        raise ValueError(
            "query [B, N, D] and candidate [G, N, D] must share N and D, got "
            f"{tuple(query.shape)} and {tuple(candidate.shape)}; an aggregate is [B, 1, D]."
        )
    if positive.shape != query.shape[:1]:
        raise ValueError(
            f"positive must be [{len(query)}], one index per query, got {tuple(positive.shape)}."
        )
    if candidate_ids.shape != candidate.shape[:1]:
        raise ValueError(
            f"candidate_ids must be [{len(candidate)}], one per candidate, got {tuple(candidate_ids.shape)}."
        )
