"""How paths differ, how alike they err, and what probes find in them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from parallel_decoupling.data.tasks import Task
from parallel_decoupling.diagnostics.measures import (
    FACTORS,
    counted_scenes,
    crowded_scenes,
    error_agreement,
    linear_cka,
    path_similarity,
    principal_angles,
    probe,
    stratified_kappa,
)
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import TaskResult
from parallel_decoupling.world.questions import questions


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_independent_paths_look_like_chance() -> None:
    found = path_similarity(normal(2000, 2, 16))
    assert abs(found.cosine[0, 1]) < 0.02
    assert abs(found.centred_cosine[0, 1]) < 0.02
    assert found.cka[0, 1] < 0.02
    assert found.joined_rank == pytest.approx(32, abs=0.5)
    assert found.rank.tolist() == pytest.approx([16, 16], abs=0.2)


def test_cka_equals_the_kernel_formula_and_ignores_rotation_shift_and_scale() -> None:
    x, y = normal(30, 6), normal(30, 6, seed=1) + normal(30, 6)
    centring = torch.eye(30, dtype=torch.float64) - 1 / 30
    first, second = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    expected = float((first * second).sum() / (first.norm() * second.norm()))
    found = linear_cka(torch.stack((x, y), dim=1))
    assert float(found[0, 1]) == pytest.approx(expected)
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    moved = linear_cka(torch.stack((x, 7 * y @ rotation - 2), dim=1))
    torch.testing.assert_close(moved, found)


def test_principal_angles_equal_scipy() -> None:
    paths = normal(50, 3, 8)
    found = principal_angles(paths, 4)
    bases = [np.linalg.svd(path - path.mean(0))[2][:4].T for path in paths.transpose(0, 1).numpy()]
    for row, (i, j) in zip(found, ((0, 1), (0, 2), (1, 2)), strict=True):
        expected = np.rad2deg(subspace_angles(bases[i], bases[j]))[::-1]
        assert row.numpy() == pytest.approx(expected)


Misses = NDArray[np.bool_]


def report(*tasks: dict[str, str]) -> ScoreReport:
    results = {}
    for number, hits in enumerate(tasks):
        scores = {column: row.count("1") / len(row) for column, row in hits.items()}
        name = f"task_{number}"
        result = TaskResult(Task(name, "vqa", True), len(hits["aggregate"]), 0.1, scores, hits)
        margins = [[1.0, 0.1 * number], [0.1 * number, 1.0]]
        results[name] = replace(result, margin_correlation=margins)
    return ScoreReport(results)


def report_of_misses(*tasks: Misses) -> ScoreReport:
    """Each ``[2, R]``; the aggregate is path 0."""
    rows = [["".join("10"[miss] for miss in line) for line in task.astype(int).tolist()] for task in tasks]
    return report(*({"aggregate": first, "path_0": first, "path_1": second} for first, second in rows))


def test_identical_paths_err_alike_and_the_oracle_gains_nothing() -> None:
    tasks = ({"aggregate": hits, "path_0": hits, "path_1": hits} for hits in ("0110", "1000"))
    found = error_agreement(report(*tasks))
    assert found.kappa == pytest.approx(np.ones((2, 2)))
    independent = (0.75 + 1 - 0.75**2) / 2
    expected = {"aggregate": 0.375, "best_path": 0.375, "oracle": 0.375, "independent_oracle": independent}
    assert found.scores == pytest.approx(expected)


def test_kappa_of_one_task_equals_sklearn() -> None:
    rng = np.random.default_rng(1)
    misses = rng.random((3, 50)) < 0.4
    misses[1] ^= misses[0] & (rng.random(50) < 0.5)
    expected = [[cohen_kappa_score(first, second) for second in misses] for first in misses]
    assert stratified_kappa([misses]) == pytest.approx(np.array(expected))


def test_kappa_of_several_tasks_by_hand() -> None:
    """Agreement 2 of 4 and 1 of 2, as by chance (path 0 misses all of the second), and then 8 of 8."""
    first = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=bool)
    second = np.array([[1, 1], [1, 0]], dtype=bool)
    third = np.array([[1] + [0] * 7] * 2, dtype=bool)
    chance = 2 + 1 + 8 * (1 / 64 + 49 / 64)
    found = error_agreement(report_of_misses(first, second, third)).kappa
    assert found[0, 1] == found[1, 0] == pytest.approx((11 - chance) / (14 - chance))
    assert found[0, 1] != pytest.approx((0 + 0 + 1) / 3), "a mean over tasks"


def test_correlations_of_margins_are_averaged_over_rows() -> None:
    found = error_agreement(report_of_misses(*(np.zeros((2, rows), dtype=bool) for rows in (4, 2, 4))))
    assert found.margins == pytest.approx(np.array([[1, 0.1], [0.1, 1]]))


def test_reports_without_paths_or_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no single paths"):
        error_agreement(report({"aggregate": "10"}))
    result = TaskResult(Task("bare", "vqa", True), 2, 0.1, {"aggregate": 0.5, "path_0": 0.5})
    with pytest.raises(ValueError, match="no hits or margins"):
        error_agreement(ScoreReport({"bare": result}))


def test_a_planted_factor_is_found_in_the_path_that_has_it_and_nowhere_else() -> None:
    values = np.random.default_rng(0).integers(0, 3, 300)
    planted = normal(300, 10)
    planted[:, :3] += 4 * torch.eye(3)[torch.from_numpy(values)]
    labels = [("red", "green", "blue")[value] for value in values]
    found = probe({"path_0": planted, "path_1": normal(300, 10, seed=1)}, labels)
    assert found.accuracy["path_0"] > 0.97
    assert found.accuracy["path_1"] < found.majority + 0.1


def test_rows_that_are_scored_are_not_fitted() -> None:
    """In 200 dimensions any labels of 100 rows can be fitted without an error."""
    labels = [str(index % 2) for index in range(100)]
    found = probe({"path_0": normal(100, 200)}, labels)
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
