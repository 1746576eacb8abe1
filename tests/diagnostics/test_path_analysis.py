"""The analysis of the paths of a run, and what of an image each of them attends to and depends on."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.tasks import Task
from parallel_decoupling.diagnostics import patch_maps
from parallel_decoupling.diagnostics.measures import FACTORS
from parallel_decoupling.diagnostics.patch_maps import (
    attention_maps,
    map_agreement,
    patch_contributions,
    recorded_attention,
)
from parallel_decoupling.diagnostics.path_analysis import (
    PATHS_FILE,
    PathAnalysis,
    analyse_data,
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
from tests.support.families import save_tiny_family
from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.stores import table_rows
from tests.support.tiny import noise_image


def encoder(backbone_dir: str, **options: Any) -> ParallelEncoder:
    settings = {"num_paths": 2, "prefix_length": 3, "prefix_init": "random", **options}
    return ParallelEncoder(load_backbone(backbone_dir), **settings).eval()


def report(num_paths: int) -> ScoreReport:
    hits = {"aggregate": "1100"} | {f"path_{path}": "0110" for path in range(num_paths)}
    margins = (0.25 + 0.75 * torch.eye(num_paths)).tolist()
    result = TaskResult(Task("t", "vqa", True), 4, 0.1, dict.fromkeys(hits, 0.5), hits)
    return ScoreReport({"t": replace(result, margin_correlation=margins)})


@pytest.fixture(scope="module")
def analysis(tiny_backbone_dir: str) -> PathAnalysis:
    return analyse_world(Embedder(encoder(tiny_backbone_dir, num_paths=3)), report(3), scenes=100)


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


def test_other_data_has_no_probes_and_says_so(tiny_backbone_dir: str, tiny_mmeb_dir: str) -> None:
    found = analyse_data(Embedder(encoder(tiny_backbone_dir)), tiny_mmeb_dir, report(2))
    assert found.probes == {}
    assert "not the embedded world" in found.notes[0]
    assert found.num_inputs >= 3
    assert torch.isfinite(found.similarity.cka).all()


def test_a_trained_run_is_analysed_with_the_scores_of_its_weights_only(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir))
    trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    analyse_paths(str(tmp_path))
    printed = capsys.readouterr().out
    for text in ("effective rank", "left out: probes", "left out: errors"):
        assert text in printed
    assert (tmp_path / "paths" / "contributions.png").is_file()
    run = json.loads((tmp_path / "paths" / PATHS_FILE).read_text())["run"]
    assert run["global_step"] == 1
    (tmp_path / "step_1").mkdir()
    for file in (tmp_path / "scores.json", tmp_path / "step_1" / "scores.json"):
        for other, used in (({}, True), ({"global_step": 2}, False), ({"seed": 5}, False)):
            replace(report(2), run={**run, **other}).to_json_file(file)
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
    from transformers import DynamicCache

    model = encoder(tiny_backbone_dir)
    collator = Collator(model.processor, image_token=model.image_token)
    tokenised = collator.encode_inputs(inputs[:1])
    with recorded_attention(model) as layers, torch.no_grad():
        model(tokenised)
    found_NYK = torch.stack(layers, dim=1)
    assert model.prefixes is not None
    stock = load_backbone(tiny_backbone_dir).eval().base
    stock.language_model.set_attn_implementation("eager")  # type: ignore[operator,union-attr]
    vision = dict(tokenised.vision[0])
    positions = model.backbone.position_ids(tokenised.tokens, vision)
    for path, states in enumerate(model.prefixes.key_values.detach()):
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states):
            cache.update(keys[None], values[None], layer)
        mask = torch.nn.functional.pad(tokenised.tokens["attention_mask"], (3, 0), value=1)
        tokens = {**tokenised.tokens, "attention_mask": mask}
        with torch.no_grad():
            output = stock(
                **tokens, **vision, position_ids=positions, past_key_values=cache, output_attentions=True
            )
        expected = torch.stack([weights[0, :, -1].mean(dim=0) for weights in output.attentions])
        torch.testing.assert_close(found_NYK[path], expected)


def test_mass_and_patches_are_shares(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    mass_NYG, maps = attention_maps(Embedder(encoder(tiny_backbone_dir)), inputs)
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


def test_the_encoder_is_left_as_it_was(tiny_backbone_dir: str, inputs: list[RawInput]) -> None:
    model = encoder(tiny_backbone_dir)
    former = copy.copy(model.backbone.language_model.config._attn_implementation)  # type: ignore[union-attr]
    attention_maps(Embedder(model), inputs[:1])
    assert model.backbone.language_model.config._attn_implementation == former  # type: ignore[union-attr]
    layers = model.backbone.base.get_submodule(model.backbone.family.layers)
    assert all(not layer.self_attn._forward_hooks for layer in layers)  # type: ignore[union-attr]


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
