from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
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


def test_the_baseline_is_the_share_of_the_most_frequent_value() -> None:
    labels = ["often"] * 80 + ["rarely"] * 20
    found = probe({"path_0": noise(100)}, labels, "size")
    assert found.majority == pytest.approx(0.8)


def test_too_few_labels_are_named() -> None:
    with pytest.raises(ValueError, match="probe of text: .*'GO' comes 2 times"):
        probe({"path_0": noise(12)}, ["GO"] * 2 + ["UP"] * 10, "text")


def test_labels_agree_with_the_questions_that_the_world_asks_about_a_scene() -> None:
    drawn = crowded_scenes(40)
    for index, scene in enumerate(drawn.scenes):
        answers = {question.text: question.answer for question in questions(scene)}
        for factor in ("color", "shape", "size"):
            asked = answers[f"what {factor} is the object at the top left?"]
            assert drawn.labels[factor][index] == asked
        assert drawn.labels["text"][index] == answers["what word is written?"]
        assert drawn.labels["position"][index] == answers[f"where is the word {scene.word}?"]
        assert drawn.labels["background"][index] == answers["what color is the background?"]
    counted = counted_scenes(16)
    for scene, label in zip(counted.scenes, counted.labels["count"], strict=True):
        answers = {question.text: question.answer for question in questions(scene)}
        assert label == answers["how many objects are there?"]
    assert set(Counter(counted.labels["count"]).values()) == {4}
    assert {*drawn.labels, *counted.labels} == set(FACTORS)
