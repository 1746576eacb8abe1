"""InfoNCE over paths with one or several positives, a teacher's ranking, and the in-batch margins.

Shapes: ``B`` queries, ``G`` candidates (``G >= B`` with gathered or hard negatives), ``N`` paths,
``D`` embedding dim, ``A`` positives and ``K`` candidates of a query's own row.
"""

import math

import torch
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID


def info_nce(
    query: Tensor,
    candidate: Tensor,
    *,
    positive: Tensor,
    candidate_ids: Tensor,
    temperature: float | Tensor,
    symmetric: bool = False,
    false_negative_margin: float | None = None,
) -> Tensor:
    """Contrast every query with all candidates, path by path.

    For path n: ``loss_n = mean_b -log( exp(s_bp / t) / sum_j exp(s_bj / t) )`` with
    ``s_bj = <query_bn, candidate_jn>`` and p the positive of query b. The sum over j leaves out
    padding and every other candidate with the positive's id: the same target is not a negative (ours;
    labels repeat inside a batch in each classification task). Path n of a query never meets another
    path of a candidate. Computed in fp32 (fp64 for fp64 inputs), also under autocast.

    Several positives: the loss of a query is the mean over its positives of that term, where the sum over j
    leaves out all targets of the query but p. That is SupCon's "out" form (arXiv 2004.11362: the mean over
    positives stands outside of the logarithm), except that positives do not push each other away.

    Args:
        query: ``[B, N, D]``, unit norm for a cosine score. Not detached here.
        candidate: ``[G, N, D]``, unit norm. Not detached here.
        positive: ``[B]`` int64, index into ``candidate`` of each query's positive, or ``[B, A]`` of several;
            padding fills up rows with fewer than A, but is never the first.
        candidate_ids: ``[G]`` int64; equal ids are the same target, ``PADDING_ID`` is none.
        temperature: divides the scores, above 0; a 0-dim tensor receives gradient.
        symmetric: also contrast each positive with the B queries, without those that have the same target,
            and return the mean of both directions.
        false_negative_margin: leave out, path by path, what scores above the positive by more than this.

    Returns:
        ``[N]``, the mean over B of each path.

    Relations:
        ``N`` paths equal ``N`` calls with one path each.
        The loss of the aggregate is a call with ``[B, 1, D]`` and ``[G, 1, D]``.
        A further copy of a query's own target among the candidates leaves its loss as it is.
        Padding among the candidates or the positives leaves every loss as it is.
        ``symmetric`` without extra candidates does not change if query and candidate swap roles.
    """
    _check_shapes(query, candidate, positive, candidate_ids)
    score_NBG = _scores(query, candidate) / temperature
    positive_BA = positive.view(len(positive), -1)
    ids_BA = candidate_ids[positive_BA]
    share_BA = (ids_BA != PADDING_ID).to(score_NBG.dtype)
    share_BA = share_BA / share_BA.sum(dim=1, keepdim=True)
    left_out_BG = _left_out(positive, candidate_ids)
    own_B = torch.arange(len(positive), device=positive.device)
    above = (math.inf if false_negative_margin is None else false_negative_margin) / temperature
    losses = []
    for positive_B, ids_B in zip(positive_BA.unbind(1), ids_BA.unbind(1), strict=True):
        loss_NB = _cross_entropy(score_NBG, left_out_BG, positive_B, above)
        if symmetric:
            reverse_NBB = score_NBG[:, :, positive_B].transpose(1, 2)  # [n, b, c]: positive of b, query c
            same_BB = (ids_B[:, None, None] == ids_BA).any(dim=2)
            loss_NB = (loss_NB + _cross_entropy(reverse_NBB, same_BB, own_B, above)) / 2
        losses.append(loss_NB)
    return (torch.stack(losses, dim=2) * share_BA).sum(dim=2).mean(dim=1)


def own_candidates_kl(
    query: Tensor, candidate: Tensor, *, own: Tensor, teacher: Tensor, temperature: float | Tensor
) -> Tensor:
    """Compare how path and teacher spread a query over the candidates of its own row.

    ``loss_n = mean_b KL(softmax_k(teacher_bk) || softmax_k(s_bk / t))`` with ``s_bk`` as in ``info_nce``. A
    candidate whose teacher's score is not finite is left out; a query without any counts as 0.

    ``own`` ``[B, K]`` are the indices of the row's positives and hard negatives among the candidates,
    ``teacher`` ``[B, K]`` logits: a softmax is taken of them as they are. Returns ``[N]``.
    """
    known_BK = teacher.isfinite()
    rows = known_BK.any(dim=1)
    score_NBG = _scores(query[rows], candidate) / temperature
    score_NBK = score_NBG.gather(2, own[rows].expand(len(score_NBG), -1, -1))
    return _divergence(teacher[rows], score_NBK, ~known_BK[rows]).sum(dim=1) / len(query)


@torch.no_grad()
def in_batch_margins(query: Tensor, candidate: Tensor, *, positive: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return by how much each query's best positive scores above the best other target, ``[N, B]``.

    The arguments are those of ``info_nce``. Duplicates of the positives and padding are left out as there;
    infinite where nothing is left. A hit is above 0: a tie is a miss, so collapsed embeddings have none.
    """
    _check_shapes(query, candidate, positive, candidate_ids)
    score_NBG = _scores(query, candidate)
    positive_BA = positive.view(len(positive), -1)
    best_other_NB = score_NBG.masked_fill(_left_out(positive, candidate_ids), -torch.inf).amax(dim=2)
    score_NBA = score_NBG.gather(2, positive_BA.expand(len(score_NBG), -1, -1))
    padding_BA = candidate_ids[positive_BA] == PADDING_ID
    return score_NBA.masked_fill(padding_BA, -torch.inf).amax(dim=2) - best_other_NB


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
    others_BG = _left_out(positive, candidate_ids).scatter(1, positive.view(len(positive), -1), False)
    left_out_BG = others_BG | (candidate_ids == PADDING_ID)
    with torch.no_grad():
        teacher_1BG = _scores(teacher_query, teacher_candidate) / temperature
    path_NBG = _scores(query, candidate) / temperature
    return _divergence(teacher_1BG, path_NBG, left_out_BG).mean(dim=1)


def _scores(query: Tensor, candidate: Tensor) -> Tensor:
    """Return the inner products per path in full precision, ``[N, B, G]``."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        return torch.einsum("bnd,gnd->nbg", query.to(dtype), candidate.to(dtype))


def _divergence(teacher: Tensor, score: Tensor, left_out: Tensor) -> Tensor:
    """Return ``KL(softmax(teacher) || softmax(score))`` over the last dim, without what is left out."""
    wanted, found = (each.masked_fill(left_out, -torch.inf).log_softmax(dim=-1) for each in (teacher, score))
    return (wanted.exp() * (wanted - found)).masked_fill(left_out, 0).sum(dim=-1)


def _left_out(positive: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return ``[B, G]``, True at padding and at the targets of all positives of a query."""
    ids_BA = candidate_ids[positive.view(len(positive), -1)]
    return (ids_BA.unsqueeze(2) == candidate_ids).any(dim=1) | (candidate_ids == PADDING_ID)


def _cross_entropy(score_NBG: Tensor, left_out_BG: Tensor, positive: Tensor, above: float | Tensor) -> Tensor:
    """Return ``[N, B]``; the positive itself is never left out, what scores more than ``above`` higher is."""
    own_NB1 = positive.view(1, -1, 1).expand(len(score_NBG), -1, -1)
    above_NBG = score_NBG > score_NBG.gather(2, own_NB1) + above
    out_NBG = left_out_BG.scatter(1, positive.unsqueeze(1), False) | above_NBG
    return -score_NBG.masked_fill(out_NBG, -torch.inf).log_softmax(dim=2).gather(2, own_NB1).squeeze(2)


def _check_shapes(query: Tensor, candidate: Tensor, positive: Tensor, candidate_ids: Tensor) -> None:
    assert query.ndim == 3, "an aggregate is [B, 1, D]"
    assert query.shape[1:] == candidate.shape[1:], "[B, N, D] and [G, N, D]"
    assert positive.shape[0] == len(query), "[B] or [B, A]"
    assert candidate_ids.shape == candidate.shape[:1], "[G]"
