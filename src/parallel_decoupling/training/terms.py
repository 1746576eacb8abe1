"""The terms of the objective for one batch: gather over ranks, then call ``objective``.

Every rank computes the SAME terms, of all ranks' rows; gradient reaches its own rows only, and of parameters
used after the gather ``1 / world_size`` of it (``shared``), so that the sum over ranks is one process's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decoupling.distributed import gather_with_grad, world_size
from parallel_decoupling.model.encoder import truncate
from parallel_decoupling.objective import contrastive
from parallel_decoupling.objective.statistics import margin_correlation, path_cosine, target_entropy
from parallel_decoupling.objective.vclub import MutualInformation, path_pairs


@dataclass(frozen=True)
class GatheredPairs:
    """The embeddings of one batch, of all ranks: queries ``[G, N, D]``, candidates ``[C, N, D]``.

    Aggregates are ``[G, A, D']`` and ``[C, A, D']``: that of all paths, and with ``nested_paths`` those of
    the first N - 1 to 2 of them. ``own`` ``[G, K]`` are the candidates of each row, the first
    ``num_positives`` its positives, and ``teacher`` ``[G, K]`` their scores, NaN where there are none.
    ``candidate_ids`` are ``PADDING_ID`` where a hard negative is missing; ``nested`` are the same rows at
    each smaller dimension of Matryoshka training.
    """

    query: Tensor
    candidate: Tensor
    query_aggregate: Tensor
    candidate_aggregate: Tensor
    own: Tensor
    candidate_ids: Tensor
    nested: "tuple[GatheredPairs, ...]" = ()
    num_positives: int = 1
    teacher: Tensor | None = None

    @property
    def positive(self) -> Tensor:
        """The first positive of each row, ``[G]``, as an index into the candidates."""
        return self.own[:, 0]

    @property
    def labels(self) -> dict[str, Any]:
        """Return what ``info_nce`` and ``in_batch_margins`` compare candidates by."""
        return {"positive": self.own[:, : self.num_positives], "candidate_ids": self.candidate_ids}

    def detach(self) -> "GatheredPairs":
        """The same rows without graph, and without nested ones."""
        changed: dict[str, Any] = {"nested": ()}
        changed |= {name: each.detach() for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **changed)


def gather_pairs(
    query: Tensor,
    candidate: Tensor,
    candidate_ids: Tensor,
    aggregate: Callable[[Tensor], Tensor],
    dims: Sequence[int] = (),
    *,
    nested_paths: bool = False,
    num_positives: int = 1,
    teacher: Tensor | None = None,
) -> GatheredPairs:
    """Bring the rows of all ranks together; candidates are ``[B + B J, N, D]`` per rank, as in ``PairBatch``.

    ``aggregate`` is applied before the gather, so that its parameters get this rank's part of their gradient;
    at smaller ``dims`` it is that of truncated paths. ``teacher`` is ``[B, 1 + J]``.
    """
    first_of_rank = torch.arange(world_size(), device=query.device) * len(candidate)
    rows = torch.arange(len(query), device=query.device).unsqueeze(1)
    others = torch.arange(len(candidate) // len(query) - 1, device=query.device)
    own_BK = torch.cat([rows, len(query) + rows * len(others) + others], dim=1)
    own = (first_of_rank[:, None, None] + own_BK).flatten(0, 1)
    labels: dict[str, Any] = {"own": own, "candidate_ids": gather_with_grad(candidate_ids)}
    labels["teacher"] = None if teacher is None else gather_with_grad(teacher)
    num_paths = query.shape[1]
    sizes = (num_paths, *(range(num_paths - 1, 1, -1) if nested_paths else ()))

    def aggregates(paths_BND: Tensor) -> Tensor:
        of_sizes = [aggregate(paths_BND[:, :size]) for size in sizes]  # zeros at the end change no cosine
        width = of_sizes[0].shape[1]
        return torch.stack([F.pad(each, (0, width - each.shape[1])) for each in of_sizes], dim=1)

    def gathered(query: Tensor, candidate: Tensor, nested: tuple[GatheredPairs, ...] = ()) -> GatheredPairs:
        rows = {"query": query, "candidate": candidate}
        rows |= {"query_aggregate": aggregates(query), "candidate_aggregate": aggregates(candidate)}
        of_all: dict[str, Any] = {name: gather_with_grad(each) for name, each in rows.items()}
        return GatheredPairs(**of_all, **labels, num_positives=num_positives, nested=nested)

    with torch.autocast(device_type=query.device.type, enabled=False):
        nested = tuple(gathered(truncate(query, dim), truncate(candidate, dim)) for dim in dims)
        return gathered(query, candidate, nested)


def shared(parameter: Tensor) -> Tensor:
    """Return ``parameter`` itself, with ``1 / world_size`` of its gradient; for use after a gather."""
    if world_size() == 1:
        return parameter
    return parameter.detach() + (parameter - parameter.detach()) / world_size()


def contrastive_terms(
    pairs: GatheredPairs,
    temperature: Tensor | float,
    *,
    symmetric: bool,
    with_aggregate: bool,
    teacher_weight: float = 0.0,
    false_negative_margin: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE of every path ``[N]`` and of the aggregates (0-dim), means over nested dimensions.

    ``teacher_weight`` adds that much of ``own_candidates_kl`` to each of them.
    """
    arguments: dict[str, Any] = {"temperature": temperature, "symmetric": symmetric, **pairs.labels}
    arguments["false_negative_margin"] = false_negative_margin

    def contrast(query: Tensor, candidate: Tensor) -> Tensor:
        loss_N = contrastive.info_nce(query, candidate, **arguments)
        if teacher_weight > 0 and pairs.teacher is not None:
            taught = {"own": pairs.own, "teacher": pairs.teacher}
            kl_N = contrastive.own_candidates_kl(query, candidate, temperature=temperature, **taught)
            loss_N = loss_N + teacher_weight * kl_N
        return loss_N

    of_dims = (pairs, *pairs.nested)
    path_N = torch.stack([contrast(each.query, each.candidate) for each in of_dims]).mean(dim=0)
    with torch.set_grad_enabled(with_aggregate and torch.is_grad_enabled()):
        aggregates = [contrast(each.query_aggregate, each.candidate_aggregate) for each in of_dims]
    return path_N, torch.stack(aggregates).mean()


def distillation_term(pairs: GatheredPairs, temperature: Tensor | float) -> Tensor:
    """Return how far the paths' scores are from those of the aggregate of all: 0-dim, the mean over paths."""
    teacher = pairs.query_aggregate[:, :1].detach(), pairs.candidate_aggregate[:, :1].detach()
    labels: dict[str, Any] = {"temperature": temperature, **pairs.labels}
    return contrastive.score_distillation(pairs.query, pairs.candidate, *teacher, **labels).mean()


def matched_sides(pairs: GatheredPairs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return queries with their positives, and positives with their queries."""
    positive = pairs.candidate[pairs.positive]
    return (pairs.query, positive), (positive, pairs.query)


def estimator_nll(estimator: MutualInformation, pairs: GatheredPairs) -> Tensor:
    """Return the NLL of one path given another, detached: 0-dim, the mean over pairs and both sides."""
    query_M, candidate_M = (estimator.nll(*side) for side in matched_sides(pairs.detach()))
    return (query_M + candidate_M).mean() / 2


def mutual_information_terms(estimator: MutualInformation, pairs: GatheredPairs) -> Tensor:
    """Return the bound of every path pair ``[M]``, the mean of query side and candidate side."""
    query_M, candidate_M = (estimator(*side) for side in matched_sides(pairs))
    return cast(Tensor, query_M + candidate_M) / 2


def mean_over_pairs(value_NN: Tensor) -> Tensor:
    """Return the mean of a symmetric matrix over the pairs of at least two paths: 0-dim."""
    return value_NN[tuple(path_pairs(len(value_NN)).T)].mean()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Give no parameter of ``module`` a gradient within the block; its inputs get theirs."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


@torch.no_grad()
def monitored_values(
    pairs: GatheredPairs, terms: Mapping[str, Any], path_loss: Tensor, pair_mi: Tensor
) -> dict[str, Any]:
    """Return what is worth a curve, without graph; ``path_loss`` is ``[N]``, ``pair_mi`` ``[M]``."""
    margin_NB = contrastive.in_batch_margins(pairs.query, pairs.candidate, **pairs.labels)
    aggregates = pairs.query_aggregate[:, :1], pairs.candidate_aggregate[:, :1]
    hit_1B, hit_NB = contrastive.in_batch_margins(*aggregates, **pairs.labels) > 0, margin_NB > 0
    values = {f"train/{name}": value for name, value in terms.items()}
    values["train/hit_at_1_aggregate"] = hit_1B.float().mean()
    values |= {f"train/hit_at_1_path_{path}": value for path, value in enumerate(hit_NB.float().mean(dim=1))}
    values |= {f"train/contrastive_path_{path}": value for path, value in enumerate(path_loss)}
    pair_numbers = path_pairs(len(path_loss)).tolist()
    values |= {f"train/mi_pair_{i}_{j}": mi for (i, j), mi in zip(pair_numbers, pair_mi, strict=True)}
    if len(path_loss) > 1:
        values["train/path_cosine"] = mean_over_pairs(path_cosine(pairs.query))
        values["train/margin_correlation"] = mean_over_pairs(margin_correlation(margin_NB))
        # what two paths share at the least, in nats: no penalty goes below it without raising their losses
        entropy = target_entropy(pairs.candidate_ids[pairs.positive])
        values["train/shared_nats_floor"] = entropy - 2 * path_loss.mean()
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
