from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from parallel_decoupling.data.tasks import Task
from parallel_decoupling.diagnostics.path_analysis import (
    PATHS_FILE,
    PathAnalysis,
    analyse_data,
    analyse_paths,
    analyse_world,
    figures,
    find_scores,
    tables,
    write_json,
)
from parallel_decoupling.diagnostics.probes import FACTORS
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import ScoreReport, TaskResult
from parallel_decoupling.model.backbone import load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.support.fit import make_trainer, small_data, small_embedder


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
    assert set(analysis.probes) == set(FACTORS)
    assert (analysis.num_inputs, analysis.notes) == (200, [])
    write_json(analysis, tmp_path / PATHS_FILE)
    content = json.loads((tmp_path / PATHS_FILE).read_text())
    assert content["similarity"]["cosine"] == analysis.similarity.cosine.tolist()
    assert content["probes"]["color"]["accuracy"].keys() == {"aggregate", "path_0", "path_1", "path_2"}
    assert len(content["attention"]["mass_by_path_and_layer"]) == 3
    for part in ("attention", "contributions"):
        assert content[part]["map_correlation"][0][0] == pytest.approx(1)
        assert content[part]["map_correlation_of_different_pictures"][0][0] < 1
    assert content["errors"]["scores"]["oracle"] == 0.5


def test_tables_show_the_numbers(analysis: PathAnalysis) -> None:
    _, pairs, probes, errors = found = tables(analysis)
    assert [row[0] for row in pairs.rows] == ["0 and 1", "0 and 2", "1 and 2"]
    cells = [dict(zip(pairs.headings, row, strict=True)) for row in pairs.rows]
    assert cells[0]["cosine"] == f"{float(analysis.similarity.cosine[0, 1]):.3f}"
    assert cells[1]["linear CKA, shuffled"] == f"{float(analysis.similarity.shuffled_cka[0, 2]):.3f}"
    assert cells[1]["mean angle"] == f"{float(analysis.similarity.angles[1].mean()):.0f}"
    assert cells[2]["misses, kappa"] == "1.000"
    assert len(probes.rows) == len(FACTORS)
    assert dict(zip(errors.headings, errors.rows[0], strict=True))["independent_oracle"] == "87.5"
    for table in found:
        Console(width=200, quiet=True).print(table.terminal())


def test_figures_draw(analysis: PathAnalysis) -> None:
    drawn = figures(analysis)
    names = {"similarity", "principal_angles", "probes", "attention_mass", "attention_maps", "contributions"}
    assert set(drawn) == names
    for figure in drawn.values():
        figure.canvas.draw()
    cells = [text.get_text() for text in drawn["probes"].axes[0].texts]
    assert cells[0] == f"{100 * analysis.probes['shape'].majority:.0f}"
    assert len(cells) == len(FACTORS) * 5


def test_one_path_and_no_scores_leave_out_what_needs_more(tiny_backbone_dir: str) -> None:
    found = analyse_world(embedder(tiny_backbone_dir, 1), None, scenes=100)
    assert found.notes == ["errors: the run has no scores.json of this checkpoint; test writes it"]
    titles = [table.title for table in tables(found)]
    assert titles == ["Each path", "Linear probes, accuracy in percent"]
    assert "similarity" not in figures(found)


def test_other_data_has_no_probes_and_says_so(tiny_backbone_dir: str, tiny_mmeb_dir: str) -> None:
    found = analyse_data(embedder(tiny_backbone_dir, 2), tiny_mmeb_dir, report(2))
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
    for text in ("Pairs of paths", "left out: probes", "left out: errors"):
        assert text in printed
    assert (tmp_path / "paths" / "contributions.png").is_file()
    run = json.loads((tmp_path / "paths" / PATHS_FILE).read_text())["run"]
    assert run["global_step"] == 1
    (tmp_path / "step_1").mkdir()
    for file in (tmp_path / "scores.json", tmp_path / "step_1" / "scores.json"):
        for other, used in (({}, True), ({"global_step": 2}, False), ({"seed": 5}, False)):
            replace(report(2), run={**run, **other}).to_json_file(file)
            assert (find_scores(tmp_path, run) is not None) == used
