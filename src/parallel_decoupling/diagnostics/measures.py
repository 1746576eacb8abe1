"""How alike the paths are: their embedding spaces, the queries they miss, and what can be read off them.

Shapes: ``B`` inputs, ``N`` paths, ``M`` path pairs (i < j), ``D`` embedding dim, ``S`` subspace dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.objective.statistics import effective_rank, path_cosine
from parallel_decoupling.objective.vclub import path_pairs
from parallel_decoupling.world import scenes as world

SUBSPACE_DIM = 10  # directions per path whose angles are compared (ours), or fewer if there are fewer

FACTORS = ("shape", "color", "size", "position", "background", "text", "count")
FOLDS = 5
Labels = dict[str, list[str]]  # one label per scene, by factor


@dataclass(frozen=True)
class PathSimilarity:
    """All measures of ``path_similarity``."""

    cosine: Tensor  # [N, N], mean cosine between paths of one input
    centred_cosine: Tensor  # the same after each path's mean embedding, which all inputs share, is subtracted
    cka: Tensor  # [N, N], linear CKA
    shuffled_cka: Tensor  # the same with the inputs of the second path in another order, as if unrelated
    angles: Tensor  # [M, S], principal angles in degrees, smallest first
    chance_angles: Tensor  # [S], their mean for random subspaces
    pairs: Tensor  # [M, 2], the paths of each row of angles
    rank: Tensor  # [N], effective rank of each path
    joined_rank: float  # effective rank of the paths side by side


def path_similarity(embeddings_BND: Tensor) -> PathSimilarity:
    """Compute every measure on the embeddings ``[B, N, D]`` of the same inputs, at least 3."""
    count, num_paths, dim = embeddings_BND.shape
    value_BND = embeddings_BND.double()
    subspace_dim = min(SUBSPACE_DIM, count - 1, dim)
    generator = torch.Generator().manual_seed(0)
    order_B = torch.randperm(count, generator=generator)
    noise = torch.randn(2, 20, dim, subspace_dim, generator=generator, dtype=torch.float64)
    return PathSimilarity(
        cosine=path_cosine(value_BND),
        centred_cosine=path_cosine(value_BND - value_BND.mean(dim=0)),
        cka=linear_cka(value_BND),
        shuffled_cka=linear_cka(torch.cat((value_BND, value_BND[order_B]), dim=1))[:num_paths, num_paths:],
        angles=principal_angles(value_BND, subspace_dim),
        chance_angles=_angles(*torch.linalg.qr(noise).Q.mT.unbind(0)).mean(dim=0),
        pairs=path_pairs(num_paths),
        rank=torch.stack([effective_rank(value_BD) for value_BD in value_BND.unbind(1)]),
        joined_rank=float(effective_rank(value_BND.flatten(1))),
    )


def linear_cka(embeddings_BND: Tensor) -> Tensor:
    """Compute the linear centred kernel alignment ``[N, N]`` of all paths (Kornblith et al. 2019).

    Independent embeddings do not reach 0 but about ``D / (B + D)``, so compare runs at equal B and D.
    """
    centred_NBD = (embeddings_BND - embeddings_BND.mean(dim=0)).transpose(0, 1)
    cross_NN = torch.einsum("nbd,mbe->nmde", centred_NBD, centred_NBD).square().sum(dim=(2, 3))
    own_N = cross_NN.diagonal().sqrt().clamp_min(torch.finfo(cross_NN.dtype).tiny)
    return cross_NN / (own_N[:, None] * own_N[None, :])


def principal_angles(embeddings_BND: Tensor, subspace_dim: int) -> Tensor:
    """Compute the angles ``[M, S]`` between the subspaces of most variance, in degrees, smallest first."""
    centred_NBD = (embeddings_BND - embeddings_BND.mean(dim=0)).transpose(0, 1)
    directions_NSD = torch.linalg.svd(centred_NBD, full_matrices=False).Vh[:, :subspace_dim]
    first_M, second_M = path_pairs(len(directions_NSD)).unbind(1)
    return _angles(directions_NSD[first_M], directions_NSD[second_M])


def _angles(first_MSD: Tensor, second_MSD: Tensor) -> Tensor:
    cosine_MS: Tensor = torch.linalg.svdvals(first_MSD @ second_MSD.mT).clamp(max=1)
    return cosine_MS.acos().rad2deg()


@dataclass(frozen=True)
class ErrorAgreement:
    """How the errors of a run's paths relate."""

    kappa: NDArray[np.float64]  # [N, N] of the misses: 0 what chance gives, 1 the same misses
    margins: NDArray[np.float64]  # [N, N], correlation of the margins within tasks, their mean over rows
    scores: dict[str, float]  # hit@1, mean over tasks


def error_agreement(report: ScoreReport) -> ErrorAgreement:
    """Compare the hits of a report's paths row by row.

    ``oracle`` counts a query if any path is right; in ``independent_oracle`` the paths miss independently.
    """
    paths, headline = report.path_columns, report.columns[0]
    tasks = report.tasks.values()
    if not paths or not all(result.hits and result.margin_correlation for result in tasks):
        raise ValueError("the score report has no single paths, or no hits or margins; run the test again")
    hits = [np.array([list(result.hits[path]) for path in paths]) == "1" for result in tasks]
    rates = [hits_NR.mean(axis=1) for hits_NR in hits]
    scores = {
        headline: report.means[report.headline][headline],
        "best_path": max(report.means[report.headline][path] for path in paths),
        "oracle": fmean(hits_NR.any(axis=0).mean() for hits_NR in hits),
        "independent_oracle": fmean(1 - (1 - rate_N).prod() for rate_N in rates),
    }
    weights = [result.num_queries for result in tasks]
    margins = np.average([result.margin_correlation for result in tasks], axis=0, weights=weights)
    return ErrorAgreement(stratified_kappa([~hits_NR for hits_NR in hits]), margins, scores)


def stratified_kappa(misses: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """Compute Cohen's kappa ``[N, N]`` of all pairs of paths, with chance agreement counted within each task.

    Pooled rows would call paths alike that only find the same tasks hard.
    """
    rows = sum(miss_NR.shape[1] for miss_NR in misses)
    observed_NN, chance_NN = np.zeros((2, len(misses[0]), len(misses[0])))
    for miss_NR in misses:
        for each_NR in (miss_NR.astype(float), (~miss_NR).astype(float)):
            rate_N = each_NR.mean(axis=1)
            observed_NN += each_NR @ each_NR.T
            chance_NN += each_NR.shape[1] * np.outer(rate_N, rate_N)
    room_NN = rows - chance_NN
    kappa_NN: NDArray[np.float64] = np.ones(room_NN.shape)
    np.divide(observed_NN - chance_NN, room_NN, out=kappa_NN, where=room_NN > 1e-9 * rows)
    return kappa_NN


def crowded_scenes(count: int) -> tuple[list[world.Scene], Labels]:
    """Draw scenes of three objects and one written word: each factor but ``count`` has one value.

    ``shape``, ``color`` and ``size`` are those of the object at the top left, ``position`` is the word's.
    """
    rng, scenes = np.random.default_rng([0, 1]), []
    labels: Labels = {factor: [] for factor in FACTORS if factor != "count"}
    for _ in range(count):
        background, offsets = str(rng.choice(list(world.BACKGROUNDS))), world.sample_offsets(rng)
        items = [world.sample_item(rng) for _ in range(3)]
        word, place = str(rng.choice(world.WORDS)), int(rng.integers(1, 4))
        scenes.append(world.Scene((*items[:place], word, *items[place:]), background, offsets))
        values = (*vars(items[0]).values(), world.POSITIONS[place], background, word)
        for factor, value in zip(labels, values, strict=True):
            labels[factor].append(value)
    return scenes, labels


def counted_scenes(count: int) -> tuple[list[world.Scene], Labels]:
    """Draw scenes of one to four objects, equally often, without a word; their factor is ``count``."""
    rng = np.random.default_rng([0, 2])
    numbers = [1 + index % 4 for index in range(count)]
    scenes = [world.sample_scene(rng, num_objects=number, word_share=0) for number in numbers]
    return scenes, {"count": [world.NUMBERS[number] for number in numbers]}


@dataclass(frozen=True)
class ProbeResult:
    """By column the accuracy and its deviation over folds, and the share of the most frequent value."""

    accuracy: dict[str, float]
    spread: dict[str, float]
    majority: float


def probe(columns: Mapping[str, Tensor], labels: Sequence[str]) -> ProbeResult:
    """Predict a factor by logistic regression on standardised dimensions, all columns in the same folds."""
    _, counts = np.unique(list(labels), return_counts=True)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    accuracy, spread = {}, {}
    for name, embeddings_BD in columns.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        scores = cross_val_score(model, embeddings_BD.double().numpy(), list(labels), cv=folds)
        accuracy[name], spread[name] = float(scores.mean()), float(scores.std())
    return ProbeResult(accuracy, spread, float(counts.max() / len(labels)))
