"""Scenes of the embedded world with their factors: what probes predict.

Here: drawing them so that every factor has one clear value per picture. Elsewhere: the world itself
(``data.world``), the probes (``probes``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from parallel_decoupling.world.scenes import (
    BACKGROUNDS,
    NUMBERS,
    POSITIONS,
    WORDS,
    Scene,
    render,
    sample_item,
    sample_offsets,
    sample_scene,
)

INSTRUCTION = "Represent the given picture"
"""How the benchmark asks for a picture as a candidate."""
CAPTION_INSTRUCTION = "Find a picture that matches the caption:"
"""How the benchmark asks for a picture by its caption."""
FACTORS = ("shape", "color", "size", "position", "background", "text", "count")


@dataclass(frozen=True)
class FactorScenes:
    """Scenes, their pictures, and one label per scene and factor.

    Attributes:
        scenes: what was drawn.
        pictures: 64 x 64, in the same order.
        labels: by factor, one value per scene.
    """

    scenes: list[Scene]
    pictures: list[Image.Image]
    labels: dict[str, list[str]]


def crowded_scenes(count: int, seed: int = 0) -> FactorScenes:
    """Draw scenes of three objects and one written word, none empty: each factor but ``count`` has one value.

    ``shape``, ``color`` and ``size`` are those of the object at the top left, so a probe has to tell it from
    two others; ``position`` is that of the word. A scene of one object would be too easy to tell paths apart.

    Args:
        count: scenes.
        seed: of the draw.
    """
    rng = np.random.default_rng([seed, 1])
    scenes = []
    labels: dict[str, list[str]] = {factor: [] for factor in FACTORS if factor != "count"}
    for _ in range(count):
        scene = Scene((None,) * 4, str(rng.choice(list(BACKGROUNDS))), sample_offsets(rng))
        items, word, word_place = (
            [sample_item(rng) for _ in range(3)],
            str(rng.choice(WORDS)),
            rng.integers(1, 4),
        )
        places = [place for place in range(4) if place != word_place]
        scene = scene.with_cell(int(word_place), word)
        for place, item in zip(places, items, strict=True):
            scene = scene.with_cell(place, item)
        first = items[0]
        values = (first.shape, first.color, first.size, POSITIONS[word_place], scene.background, word)
        for factor, value in zip(labels, values, strict=True):
            labels[factor].append(value)
        scenes.append(scene)
    return FactorScenes(scenes, [render(scene) for scene in scenes], labels)


def counted_scenes(count: int, seed: int = 0) -> FactorScenes:
    """Draw scenes of one to four objects, equally often, without a word; their factor is ``count``."""
    rng = np.random.default_rng([seed, 2])
    numbers = [1 + index % 4 for index in range(count)]
    scenes = [sample_scene(rng, num_objects=number, word_share=0) for number in numbers]
    labels = {"count": [NUMBERS[number] for number in numbers]}
    return FactorScenes(scenes, [render(scene) for scene in scenes], labels)
