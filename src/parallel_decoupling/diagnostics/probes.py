"""Linear probes: which factor of the embedded world's scenes can be read off which path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from parallel_decoupling.world import scenes as world

FACTORS = ("shape", "color", "size", "position", "background", "text", "count")
FOLDS = 5

Labels = dict[str, list[str]]  # one label per scene, by factor


def crowded_scenes(count: int, seed: int = 0) -> tuple[list[world.Scene], Labels]:
    """Draw scenes of three objects and one written word: each factor but ``count`` has one value.

    ``shape``, ``color`` and ``size`` are those of the object at the top left, ``position`` is the word's.
    """
    rng, scenes = np.random.default_rng([seed, 1]), []
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


def counted_scenes(count: int, seed: int = 0) -> tuple[list[world.Scene], Labels]:
    """Draw scenes of one to four objects, equally often, without a word; their factor is ``count``."""
    rng = np.random.default_rng([seed, 2])
    numbers = [1 + index % 4 for index in range(count)]
    scenes = [world.sample_scene(rng, num_objects=number, word_share=0) for number in numbers]
    return scenes, {"count": [world.NUMBERS[number] for number in numbers]}


@dataclass(frozen=True)
class ProbeResult:
    """By column the accuracy and its deviation over folds, and the share of the most frequent value."""

    accuracy: dict[str, float]
    spread: dict[str, float]
    majority: float


def probe(columns: Mapping[str, Tensor], labels: Sequence[str], factor: str) -> ProbeResult:
    """Predict a factor by logistic regression on standardised dimensions, all columns in the same folds."""
    _, counts = np.unique(list(labels), return_counts=True)
    if counts.min() < FOLDS:  # scikit-learn only warns
        raise ValueError(f"probe of {factor}: a value has {counts.min()} inputs; draw more, {FOLDS} at least")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    accuracy, spread = {}, {}
    for name, embeddings_BD in columns.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        scores = cross_val_score(model, embeddings_BD.double().numpy(), list(labels), cv=folds)
        accuracy[name], spread[name] = float(scores.mean()), float(scores.std())
    return ProbeResult(accuracy, spread, float(counts.max() / len(labels)))
