"""Slow, obvious forms of the objective: one loop per index of the equation, float64.

Each reads like its equation and shares no code with ``parallel_decoupling.objective``. Gradients
come from autograd through the loops.
"""

import math

import torch
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def info_nce_loop(
    query: Tensor,
    candidate: Tensor,
    positive: list[int],
    candidate_ids: list[int],
    temperature: float | Tensor,
    symmetric: bool = False,
    margin: float = math.inf,
) -> Tensor:
    """``[N]``: InfoNCE of ``query [B, N, D]`` against ``candidate [G, N, D]``, path by path."""
    positives = [[p] for p in positive]
    return several_positives_loop(query, candidate, positives, candidate_ids, temperature, symmetric, margin)


def several_positives_loop(
    query: Tensor,
    candidate: Tensor,
    positives: list[list[int]],
    candidate_ids: list[int],
    temperature: float | Tensor,
    symmetric: bool = False,
    margin: float = math.inf,
) -> Tensor:
    """``[N]``: the mean over a query's positives of -log p, its other targets left out of the denominator."""
    losses = []
    for n in range(query.shape[1]):
        terms = []
        for b, of_query in enumerate(positives):
            given = [p for p in of_query if candidate_ids[p] != PADDING_ID]
            targets = {candidate_ids[p] for p in given}
            for p in given:
                highest = (query[b, n] * candidate[p, n]).sum() + margin
                scores = [
                    (query[b, n] * candidate[j, n]).sum() / temperature
                    for j in range(len(candidate))
                    if j == p or candidate_ids[j] not in targets | {PADDING_ID}
                    if (query[b, n] * candidate[j, n]).sum() <= highest
                ]
                own = (query[b, n] * candidate[p, n]).sum() / temperature
                term = torch.stack(scores).logsumexp(0) - own
                if symmetric:
                    scores = [
                        (query[c, n] * candidate[p, n]).sum() / temperature
                        for c, others in enumerate(positives)
                        if c == b or candidate_ids[p] not in {candidate_ids[other] for other in others}
                        if (query[c, n] * candidate[p, n]).sum() <= highest
                    ]
                    term = (term + torch.stack(scores).logsumexp(0) - own) / 2
                terms.append(term / len(given))
        losses.append(torch.stack(terms).sum() / len(positives))
    return torch.stack(losses)


def own_candidates_kl_loop(
    query: Tensor, candidate: Tensor, own: list[list[int]], teacher: Tensor, temperature: float
) -> Tensor:
    """``[N]``: KL from a teacher's shares of a row's own candidates to a path's, the mean over rows."""
    losses = []
    for n in range(query.shape[1]):
        total = torch.zeros((), dtype=query.dtype)
        for b, of_query in enumerate(own):
            known = [k for k in range(len(of_query)) if not teacher[b, k].isnan()]
            wanted = [teacher[b, k].exp() for k in known]
            found = [((query[b, n] * candidate[of_query[k], n]).sum() / temperature).exp() for k in known]
            for x, y in zip(wanted, found, strict=True):
                total = total + x / sum(wanted) * ((x / sum(wanted)).log() - (y / sum(found)).log())
        losses.append(total / len(own))
    return torch.stack(losses)


def hit_at_1_loop(
    query: Tensor, candidate: Tensor, positives: list[list[int]], candidate_ids: list[int]
) -> Tensor:
    """``[N]``: share of queries of which one positive beats each other target strictly."""
    shares = []
    for n in range(query.shape[1]):
        hits = 0
        for b, of_query in enumerate(positives):
            targets = {candidate_ids[p] for p in of_query} - {PADDING_ID}
            scores = [(query[b, n] * row).sum() for row in candidate[:, n]]
            own = [scores[p] for p in of_query if candidate_ids[p] != PADDING_ID]
            others = [j for j in range(len(candidate)) if candidate_ids[j] not in targets | {PADDING_ID}]
            hits += all(max(own) > scores[j] for j in others)
        shares.append(hits / len(positives))
    return torch.tensor(shares, dtype=query.dtype)


def log_density(y: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Scalar: log-density of the vector ``y`` under a diagonal Gaussian."""
    total = torch.zeros((), dtype=y.dtype)
    for d in range(len(y)):
        variance = log_variance[d].exp()
        total = total - (y[d] - mean[d]) ** 2 / (2 * variance) - (2 * math.pi * variance).log() / 2
    return total


def gaussian_nll_loop(y: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Scalar, per dimension; all arguments ``[B, D]``."""
    terms = [-log_density(y[b], mean[b], log_variance[b]) for b in range(len(y))]
    return torch.stack(terms).mean() / y.shape[1]


def vclub_quadratic(y: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Scalar, per dimension: vCLUB as written, with all ``B * B`` negatives. Arguments ``[B, D]``."""
    terms = []
    for b in range(len(y)):
        positive = log_density(y[b], mean[b], log_variance[b])
        negatives = [log_density(y[c], mean[b], log_variance[b]) for c in range(len(y))]
        terms.append(positive - torch.stack(negatives).mean())
    return torch.stack(terms).mean() / y.shape[1]


def unbiased_hsic_loop(x: Tensor, y: Tensor) -> Tensor:
    """Scalar: the U-statistic of HSIC as sums over distinct rows (Song et al. 2012). ``[B, D]``."""
    num_rows, embed_dim = x.shape

    def kernel(value: Tensor) -> list[list[Tensor]]:
        return [
            [
                (-((a - b) ** 2).sum() / (2 * embed_dim)).exp() if i != j else 0 * a.sum()
                for j, b in enumerate(value)
            ]
            for i, a in enumerate(value)
        ]

    k, m = kernel(x), kernel(y)
    rows = range(num_rows)
    both = sum(k[i][j] * m[i][j] for i in rows for j in rows)
    total = sum(k[i][j] for i in rows for j in rows) * sum(m[i][j] for i in rows for j in rows)
    chained = sum(k[i][j] * m[j][c] for i in rows for j in rows for c in rows)
    value = both + total / ((num_rows - 1) * (num_rows - 2)) - 2 * chained / (num_rows - 2)
    return torch.as_tensor(value / (num_rows * (num_rows - 3)))


def normalised_hsic_loop(x: Tensor, y: Tensor) -> Tensor:
    """Scalar: unbiased HSIC over the geometric mean of both self-terms."""
    return unbiased_hsic_loop(x, y) / (unbiased_hsic_loop(x, x) * unbiased_hsic_loop(y, y)).sqrt()


def cross_covariance_loop(x: Tensor, y: Tensor) -> Tensor:
    """Scalar: mean over all pairs of dimensions of the squared covariance. ``[B, D]``."""
    terms = []
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            covariance = (x[:, i] * y[:, j]).mean() - x[:, i].mean() * y[:, j].mean()
            terms.append(covariance**2)
    return torch.stack(terms).mean()


def squared_cosine_loop(x: Tensor, y: Tensor) -> Tensor:
    """Scalar: mean over rows of the squared cosine between a row of x and the same row of y. ``[B, D]``."""
    terms = []
    for a, b in zip(x, y, strict=True):
        dot = sum(a[d] * b[d] for d in range(len(a)))
        terms.append(dot**2 / (sum(a**2) * sum(b**2)))
    return torch.stack(terms).mean()


def unexplained_loop(paths: Tensor, target: Tensor, share: float) -> Tensor:
    """``[B, N, D]``: rows minus what ridge regression on the target ``[B, D]`` of OTHER rows predicts."""
    ridge = share * target.var(dim=0, correction=0).sum() * torch.eye(target.shape[1], dtype=target.dtype)
    left = []
    for b in range(len(paths)):
        others = [c for c in range(len(paths)) if c != b]
        mean, paths_mean = target[others].mean(dim=0), paths[others].mean(dim=0)
        gram = sum(torch.outer(target[c] - mean, target[c] - mean) for c in others)
        cross = sum((target[c] - mean)[:, None, None] * (paths[c] - paths_mean) for c in others)
        weight = torch.linalg.inv(gram + ridge) @ (target[b] - mean)
        left.append(paths[b] - paths_mean - torch.einsum("t,tnd->nd", weight, cross))
    return torch.stack(left)


def standardise_loop(paths: Tensor) -> Tensor:
    """``[B, N, D]``: each path and dimension minus its batch mean over its batch deviation."""
    columns = []
    for n in range(paths.shape[1]):
        for d in range(paths.shape[2]):
            value = paths[:, n, d]
            center = sum(value) / len(value)
            variance = sum((value - center) ** 2) / len(value)
            columns.append((value - center) / variance**0.5)
    return torch.stack(columns, dim=1).view(paths.shape)
