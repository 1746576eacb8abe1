from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from parallel_decoupling.batch import RawInput
from parallel_decoupling.cli import main
from parallel_decoupling.commands.paths import analyse_checkpoint
from parallel_decoupling.data.tasks import Task
from parallel_decoupling.diagnostics.contributions import agreement
from parallel_decoupling.diagnostics.figures import angles_figure, figures, maps_figure, probes_figure
from parallel_decoupling.diagnostics.similarity import path_similarity
from parallel_decoupling.diagnostics.study import (
    PathAnalysis,
    analyse_inputs,
    analyse_world,
    benchmark_inputs,
)
from parallel_decoupling.diagnostics.tables import sections, write_json
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult
from parallel_decoupling.model.backbone import load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.pretrained import run_of
from tests.support.fit import make_trainer, small_data, small_embedder

FACTORS = ["shape", "color", "size", "position", "background", "text", "count"]


def embedder(backbone_dir: str, num_paths: int) -> Embedder:
    encoder = ParallelEncoder(
        load_backbone(backbone_dir), num_paths=num_paths, prefix_length=2, prefix_init="random"
    )
    encoder.eval()
    return Embedder(encoder)


def report(num_paths: int) -> ScoreReport:
    hits = {"aggregate": "1100"} | {f"path_{path}": "0110" for path in range(num_paths)}
    return ScoreReport({"t": TaskResult(Task("t", "vqa", True), 4, 0.1, dict.fromkeys(hits, 0.5), hits)})


@pytest.fixture(scope="module")
def analysis(tiny_backbone_dir: str) -> PathAnalysis:
    return analyse_world(embedder(tiny_backbone_dir, 3), report(3), scenes=100)


def test_everything_is_there_for_the_embedded_world(analysis: PathAnalysis, tmp_path: Path) -> None:
    assert list(analysis.probes) == FACTORS
    assert analysis.num_inputs == 200
    assert analysis.notes == []
    write_json(analysis, tmp_path / "paths.json")
    content = json.loads((tmp_path / "paths.json").read_text())
    assert content["similarity"]["cosine"] == analysis.similarity.cosine.tolist()
    assert content["probes"]["color"]["accuracy"].keys() == {"aggregate", "path_0", "path_1", "path_2"}
    assert len(content["attention"]["mass_by_path_and_layer"]) == 3
    assert content["similarity"]["shuffled_linear_cka"] == analysis.similarity.shuffled_cka.tolist()
    assert content["contributions"]["score_patch_correlation"][0][0] == pytest.approx(1)
    for part in ("attention", "contributions"):
        assert content[part]["patch_correlation_different_pictures"][0][0] < 1
    assert content["errors"]["hit_at_1"]["oracle"] == 0.5


def test_tables_show_the_numbers(analysis: PathAnalysis) -> None:
    titles = [section.title for section in sections(analysis)]
    assert len(titles) == 5
    _, pairs, maps, _, errors = sections(analysis)
    assert [row[0] for row in pairs.rows] == ["0 and 1", "0 and 2", "1 and 2"]
    assert pairs.rows[0][1] == f"{float(analysis.similarity.cosine[0, 1]):.3f}"
    assert pairs.rows[2][pairs.headings.index("misses, kappa")] == "1.000"
    same, different = (float(matrix[0, 2]) for matrix in agreement(list(analysis.contributions.change)))
    assert maps.rows[1][-2:] == [f"{same:.3f}", f"{different:.3f}"]
    shuffled = float(analysis.similarity.shuffled_cka[0, 2])
    assert pairs.rows[1][pairs.headings.index("linear CKA, shuffled")] == f"{shuffled:.3f}"
    assert (
        pairs.rows[1][pairs.headings.index("mean angle")]
        == f"{float(analysis.similarity.angles[1].mean()):.0f}"
    )
    assert errors.headings[-2:] == ["oracle", "oracle if independent"]
    assert errors.rows[0][-2:] == ["50.0", "87.5"]
    for section in sections(analysis):
        assert all(len(row) == len(section.headings) for row in section.rows)
        lines = section.markdown().splitlines()
        assert {line.count("|") for line in lines if line.startswith("|")} == {len(section.headings) + 1}
        Console(width=200, quiet=True).print(section.terminal())


def test_figures_draw(analysis: PathAnalysis) -> None:
    drawn = figures(analysis)
    names = ["similarity", "principal_angles", "probes", "attention_mass", "attention_maps"]
    names += ["attention_differences", "contributions", "score_contributions", "errors"]
    assert list(drawn) == names
    for figure in drawn.values():
        figure.canvas.draw()
    cells = [text.get_text() for text in probes_figure(analysis.probes).axes[0].texts]
    assert cells[0] == f"{100 * analysis.probes['shape'].majority:.0f}"
    assert len(cells) == len(FACTORS) * 5


def test_maps_of_one_figure_share_their_colours_and_long_titles_are_wrapped(analysis: PathAnalysis) -> None:
    """A picture without negative values beside one with them."""
    maps = [torch.rand(1, 4, 4), torch.randn(1, 4, 4)]
    figure = maps_figure(analysis.pictures[:2], maps, "a title of many words " * 4)
    overlays = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    assert {overlay.get_cmap().name for overlay in overlays} == {"RdBu_r"}
    for overlay, map_NHW in zip(overlays, maps, strict=True):
        limit = float(map_NHW.abs().max())
        assert overlay.get_clim() == pytest.approx((-limit, limit))
    assert "\n" in figure.get_suptitle()


def test_many_pairs_have_one_entry_in_the_legend() -> None:
    similarity = path_similarity(torch.randn(20, 5, 8))
    figure = angles_figure(similarity)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["mean of 10 pairs", "random subspaces"]


def test_one_path_and_no_scores_leave_out_what_needs_more(tiny_backbone_dir: str) -> None:
    found = analyse_world(embedder(tiny_backbone_dir, 1), None, scenes=100)
    assert found.notes == ["errors: the run has no scores.json of this checkpoint; lightning test writes it"]
    assert [section.title for section in sections(found)] == [
        "Each path",
        "Linear probes, accuracy in percent",
    ]
    assert "similarity" not in figures(found)


def test_other_data_has_no_probes_and_says_so(tiny_backbone_dir: str, tiny_mmeb_dir: str) -> None:
    inputs = benchmark_inputs(tiny_mmeb_dir)
    assert len(inputs) >= 3
    assert all(isinstance(item, RawInput) and len(item.images) == 1 for item in inputs)
    found = analyse_inputs(embedder(tiny_backbone_dir, 2), inputs, report(2))
    assert found.probes == {}
    assert found.contributions.score is None
    assert "not the embedded world" in found.notes[0]
    assert found.num_inputs == len(inputs)
    assert torch.isfinite(found.similarity.cka).all()


def test_command_on_a_checkpoint_of_other_data(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir))
    trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    main(["paths", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Pairs of paths" in printed
    assert "left out: probes" in printed
    assert (tmp_path / "paths" / "paths.json").is_file()
    assert (tmp_path / "paths" / "contributions.png").is_file()
    assert "left out: errors" in printed


def test_scores_of_other_weights_are_not_used(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir))
    checkpoint_file = tmp_path / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(checkpoint_file)
    run = run_of(checkpoint_file)
    for other, used in (({}, True), ({"global_step": 2}, False), ({"seed": 5}, False)):
        replace(report(2), run={**run, **other}).to_json_file(tmp_path / "scores.json")
        found = analyse_checkpoint(checkpoint_file, tmp_path)
        assert (found.errors is not None) == used
        assert (found.run["global_step"], found.run["checkpoint"]) == (1, "last.ckpt")
        assert found.run["model"]["num_paths"] == found.num_paths


def test_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["paths", str(tmp_path)])
    assert "no checkpoints/last.ckpt" in capsys.readouterr().err
