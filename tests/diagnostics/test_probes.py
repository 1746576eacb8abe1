from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from parallel_decoupling.diagnostics.probes import FACTORS, counted_scenes, crowded_scenes, probe
from parallel_decoupling.world.questions import questions


def noise(count: int, dim: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_a_planted_factor_is_found_in_the_path_that_has_it_and_nowhere_else() -> None:
    values = np.random.default_rng(0).integers(0, 3, 300)
    planted = noise(300)
    planted[:, :3] += 4 * torch.eye(3)[torch.from_numpy(values)]
    labels = [("red", "green", "blue")[value] for value in values]
    found = probe({"path_0": planted, "path_1": noise(300, seed=1)}, labels, "color")
    assert found.accuracy["path_0"] > 0.97
    assert found.accuracy["path_1"] < found.majority + 0.1


def test_rows_that_are_scored_are_not_fitted() -> None:
    """In 200 dimensions any labels of 100 rows can be fitted without an error."""
    labels = [str(index % 2) for index in range(100)]
    found = probe({"path_0": noise(100, dim=200)}, labels, "count")
    assert found.accuracy["path_0"] < 0.7


def test_labels_agree_with_the_questions_that_the_world_asks_about_a_scene() -> None:
    scenes, labels = crowded_scenes(40)
    for index, scene in enumerate(scenes):
        answers = {question.text: question.answer for question in questions(scene)}
        asked = {f: answers[f"what {f} is the object at the top left?"] for f in ("color", "shape", "size")}
        asked |= {
            "text": answers["what word is written?"],
            "background": answers["what color is the background?"],
        }
        asked["position"] = answers[f"where is the word {scene.word}?"]
        assert {factor: values[index] for factor, values in labels.items()} == asked
    scenes, counted = counted_scenes(16)
    for scene, label in zip(scenes, counted["count"], strict=True):
        answers = {question.text: question.answer for question in questions(scene)}
        assert label == answers["how many objects are there?"]
    assert set(Counter(counted["count"]).values()) == {4}
    assert {*labels, *counted} == set(FACTORS)
