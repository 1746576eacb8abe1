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
    table,
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
    margins = (0.25 + 0.75 * torch.eye(num_paths)).tolist()
    result = TaskResult(Task("t", "vqa", True), 4, 0.1, dict.fromkeys(hits, 0.5), hits)
    return ScoreReport({"t": replace(result, margin_correlation=margins)})


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
    assert content["errors"]["scores"]["oracle"] == 0.5


def test_the_table_shows_the_numbers_and_the_figures_draw(analysis: PathAnalysis) -> None:
    grid = table(analysis)
    rows = {row[0]: list(row[1:]) for row in grid.rows}
    others = [(analysis.similarity.cosine[path].sum() - 1) / 2 for path in range(3)]
    assert rows["cosine"] == [f"{float(mean):.3f}" for mean in others]
    assert rows["misses, kappa"] == ["1.000"] * 3
    assert rows["margins, correlation"] == ["0.250"] * 3
    accuracy = 100 * analysis.probes["shape"].accuracy["path_2"]
    (shape,) = [cells for name, cells in rows.items() if name.startswith("probe of shape")]
    assert shape[2].startswith(f"{accuracy:.1f} ± ")
    assert sum(name.startswith("probe of") for name in rows) == len(FACTORS)
    assert "independent oracle 87.5" in grid.caption
    Console(width=200, quiet=True).print(grid.terminal())
    drawn = figures(analysis)
    assert set(drawn) == {"attention", "contributions"}
    for figure in drawn.values():
        figure.canvas.draw()


def test_one_path_and_no_scores_leave_out_what_needs_more(tiny_backbone_dir: str) -> None:
    found = analyse_world(embedder(tiny_backbone_dir, 1), None, scenes=100)
    assert found.notes == ["errors: the run has no scores.json of this checkpoint; test writes it"]
    assert not {"cosine", "misses, kappa"} & {row[0] for row in table(found).rows}


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
