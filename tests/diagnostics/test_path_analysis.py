"""How paths differ, how alike they err, what probes find in them, and what of an image they depend on."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from scipy.linalg import subspace_angles
from sklearn.metrics import cohen_kappa_score
from torch import Tensor
from transformers import AutoModel

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.tasks import Task
from parallel_decoupling.diagnostics import patch_maps
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
from parallel_decoupling.diagnostics.patch_maps import (
    attention_maps,
    map_agreement,
    patch_contributions,
    recorded_attention,
)
from parallel_decoupling.diagnostics.path_analysis import (
    PATHS_FILE,
    PathAnalysis,
    analyse_paths,
    analyse_world,
    figures,
    table,
    write_json,
)
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import ScoreReport, find_scores
from parallel_decoupling.evaluation.score import TaskResult
from parallel_decoupling.model.backbone import load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.world.questions import questions
from tests.model.test_families import collate, stock_alone
from tests.support.families import save_tiny_family
from tests.support.references import random
from tests.support.stores import table_rows
from tests.support.tiny import noise_image


def encoder(backbone_dir: str, **options: Any) -> ParallelEncoder:
    settings = {"num_paths": 2, "prefix_length": 3, "prefix_init": "random", **options}
    return ParallelEncoder(load_backbone(backbone_dir), **settings).eval()


def scored(num_paths: int) -> ScoreReport:
    hits = {"aggregate": "1100"} | {f"path_{path}": "0110" for path in range(num_paths)}
    margins = (0.25 + 0.75 * torch.eye(num_paths)).tolist()
    result = TaskResult(Task("t", "vqa", True), 4, 0.1, dict.fromkeys(hits, 0.5), hits)
    return ScoreReport({"t": replace(result, margin_correlation=margins)})


@pytest.fixture(scope="module")
def analysis(tiny_backbone_dir: str) -> PathAnalysis:
    return analyse_world(Embedder(encoder(tiny_backbone_dir, num_paths=3)), scored(3), scenes=100)


def test_everything_is_there_for_the_embedded_world(analysis: PathAnalysis, tmp_path: Path) -> None:
    assert set(analysis.probes) == set(FACTORS)
    assert (analysis.num_inputs, analysis.notes) == (200, [])
    write_json(analysis, tmp_path / PATHS_FILE)
    content = json.loads((tmp_path / PATHS_FILE).read_text())
    assert content["similarity"]["cosine"] == analysis.similarity.cosine.tolist()
    assert content["probes"]["color"]["accuracy"].keys() == {"aggregate", "path_0", "path_1", "path_2"}
    assert len(content["attention"]) == len(content["change"]) == 3
    for kind in ("attention", "contributions"):
        assert content["map_correlation"][kind][0][0] == pytest.approx(1)
    assert content["errors"]["scores"]["oracle"] == 0.5


def test_the_table_shows_the_numbers_and_the_figures_draw(analysis: PathAnalysis) -> None:
    shown = table(analysis)
    rows = {name: cells for name, *cells in table_rows(shown)}
    others = [(analysis.similarity.cosine[path].sum() - 1) / 2 for path in range(3)]
    assert rows["cosine"] == [f"{float(mean):.3f}" for mean in others]
    assert rows["misses, kappa"] == ["1.000"] * 3
    assert rows["margins, correlation"] == ["0.250"] * 3
    accuracy = 100 * analysis.probes["shape"].accuracy["path_2"]
    (shape,) = [cells for name, cells in rows.items() if name.startswith("probe of shape")]
    assert shape[2].startswith(f"{accuracy:.1f} ± ")
    assert sum(name.startswith("probe of") for name in rows) == len(FACTORS)
    assert "independent oracle 87.5" in str(shown.caption)
    Console(width=200, quiet=True).print(shown)
    drawn = figures(analysis)
    assert set(drawn) == {"attention", "contributions"}
    for figure in drawn.values():
        figure.canvas.draw()


def test_one_path_and_no_scores_leave_out_what_needs_more(tiny_backbone_dir: str) -> None:
    found = analyse_world(Embedder(encoder(tiny_backbone_dir, num_paths=1)), None, scenes=100)
    assert found.notes == ["errors: the run has no scores.json of this checkpoint; test writes it"]
    assert not {"cosine", "misses, kappa"} & {row[0] for row in table_rows(table(found))}


def test_a_trained_run_is_analysed_with_the_scores_of_its_weights_only(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_run, tmp_path, dirs_exist_ok=True)
    analyse_paths(str(tmp_path))
    printed = capsys.readouterr().out
    for text in ("effective rank", "left out: probes", "left out: errors"):
        assert text in printed
    assert (tmp_path / "paths" / "contributions.png").is_file()
    run = json.loads((tmp_path / "paths" / PATHS_FILE).read_text())["run"]
    assert run["global_step"] == 2
    (tmp_path / "step_2").mkdir()
    for file in (tmp_path / "scores.json", tmp_path / "step_2" / "scores.json"):
        for other, used in (({}, True), ({"global_step": 3}, False), ({"seed": 5}, False)):
            replace(scored(2), run={**run, **other}).to_json_file(file)
            assert (find_scores(tmp_path, run) is not None) == used


def asking(picture: Image.Image, text: str) -> RawInput:
    return RawInput(f"{IMAGE_PLACEHOLDER}\n{text}\n", (picture,))


@pytest.fixture(scope="module")
def inputs() -> list[RawInput]:
    """Two sizes of image, texts of different length."""
    large, small = noise_image(64, 64), noise_image(64, 32, seed=1)
    return [asking(large, "read the word and count"), asking(small, "read"), asking(large, "read")]


def test_weights_are_those_of_a_model_with_one_plain_prefix_cache(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    """Against stock eager attention, whose cache holds the prefix."""
    model = encoder(tiny_backbone_dir)
    with recorded_attention(model) as layers, torch.no_grad():
        model(collate(model, inputs[:1]))
    found_NYK = torch.stack(layers, dim=1)
    assert model.prefixes is not None
    stock, weights = AutoModel.from_pretrained(tiny_backbone_dir, attn_implementation="eager"), list[Tensor]()
    for layer in stock.language_model.layers:
        layer.self_attn.register_forward_hook(lambda *call: weights.append(call[2][1][0, :, -1].mean(dim=0)))
    for path, states in enumerate(model.prefixes.key_values.detach()):
        weights.clear()
        stock_alone(stock, model.processor, "<|image_pad|>", inputs[0], dict(enumerate(states)))
        torch.testing.assert_close(found_NYK[path], torch.stack(weights))


def test_mass_and_patches_are_shares_and_the_encoder_is_left_as_it_was(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    model = encoder(tiny_backbone_dir)
    former = model.backbone.language_model.config._attn_implementation  # type: ignore[union-attr]
    mass_NYG, maps = attention_maps(Embedder(model), inputs)
    assert model.backbone.language_model.config._attn_implementation == former  # type: ignore[union-attr]
    assert all(not layer.self_attn._forward_hooks for layer in model.backbone.layers)  # type: ignore[union-attr]
    assert (mass_NYG > 0).all()
    torch.testing.assert_close(mass_NYG.sum(dim=-1), torch.ones(2, 2))
    assert [tuple(map_NHW.shape) for map_NHW in maps] == [(2, 4, 4), (2, 2, 4), (2, 4, 4)]
    for map_NHW in maps:
        torch.testing.assert_close(map_NHW.sum(dim=(1, 2)), torch.ones(2))


def test_layers_below_the_prefix_are_shared_and_have_none(
    tiny_backbone_dir: str, inputs: list[RawInput]
) -> None:
    mass_NYG, _ = attention_maps(Embedder(encoder(tiny_backbone_dir, prefix_layers=1)), inputs)
    assert (mass_NYG[:, 0, 0] == 0).all()
    assert (mass_NYG[:, 1, 0] > 0).all()
    torch.testing.assert_close(mass_NYG[0, 0], mass_NYG[1, 0])


def test_a_backbone_that_cuts_images_into_tiles_has_masses_but_no_maps(tmp_path: Path) -> None:
    model = encoder(save_tiny_family("llava_next_mistral", tmp_path))
    mass_NYG, maps = attention_maps(Embedder(model), [asking(noise_image(64, 64), "read")])
    assert maps == []
    assert (mass_NYG > 0).all()


class QuadrantEmbedder:
    """Path 0 sees the top left quadrant only, path 1 the bottom right one."""

    def encode(self, inputs: Sequence[Any], **options: Any) -> Tensor:
        rows = []
        for item in inputs:
            pixels = np.asarray(item.convert("L"), float)
            parts = pixels[:4, :4], pixels[4:, 4:]
            rows.append(torch.tensor(np.stack([part.ravel() for part in parts])) + 1)
        return torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1)


def test_each_path_depends_on_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A white dot in the top left and one in the bottom right quadrant, both off the diagonal."""
    embedder: Any = QuadrantEmbedder()
    picture = Image.new("RGB", (8, 8), "black")
    picture.putpixel((2, 1), (255, 255, 255))
    picture.putpixel((5, 7), (255, 255, 255))
    monkeypatch.setattr(patch_maps, "GRID", 4)
    found = patch_contributions(embedder, [picture], "a picture")
    assert found.shape == (1, 2, 4, 4)
    changed = found > 1e-5
    assert changed[0, 0].nonzero().tolist() == [[0, 1]]
    assert changed[0, 1].nonzero().tolist() == [[3, 2]]
    assert map_agreement(list(found))[0, 1] == pytest.approx(-1 / 15)


def test_independent_paths_look_like_chance() -> None:
    found = path_similarity(random(2000, 2, 16, seed=0))
    assert abs(found.cosine[0, 1]) < 0.02
    assert abs(found.centred_cosine[0, 1]) < 0.02
    assert found.cka[0, 1] < 0.02
    assert found.joined_rank == pytest.approx(32, abs=0.5)
    assert found.rank.tolist() == pytest.approx([16, 16], abs=0.2)


def test_cka_equals_the_kernel_formula_and_ignores_rotation_shift_and_scale() -> None:
    x, y = random(30, 6, seed=0), random(30, 6, seed=1) + random(30, 6, seed=0)
    centring = torch.eye(30, dtype=torch.float64) - 1 / 30
    first, second = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    expected = float((first * second).sum() / (first.norm() * second.norm()))
    found = linear_cka(torch.stack((x, y), dim=1))
    assert float(found[0, 1]) == pytest.approx(expected)
    rotation = torch.linalg.qr(random(6, 6, seed=2)).Q
    moved = linear_cka(torch.stack((x, 7 * y @ rotation - 2), dim=1))
    torch.testing.assert_close(moved, found)


def test_principal_angles_equal_scipy() -> None:
    paths = random(50, 3, 8, seed=0)
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
    planted = random(300, 10, seed=0)
    planted[:, :3] += 4 * torch.eye(3)[torch.from_numpy(values)]
    labels = [("red", "green", "blue")[value] for value in values]
    found = probe({"path_0": planted, "path_1": random(300, 10, seed=1)}, labels)
    assert found.accuracy["path_0"] > 0.97
    assert found.accuracy["path_1"] < found.majority + 0.1


def test_rows_that_are_scored_are_not_fitted() -> None:
    """In 200 dimensions any labels of 100 rows can be fitted without an error."""
    labels = [str(index % 2) for index in range(100)]
    found = probe({"path_0": random(100, 200, seed=0)}, labels)
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
