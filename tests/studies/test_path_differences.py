from __future__ import annotations

import json
from pathlib import Path

import pytest

from studies import path_differences
from studies.path_differences import compare_runs
from studies.study import Run, load_study
from tests.support.fit import make_trainer, small_data, small_embedder


def test_runs_stand_side_by_side(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path) -> None:
    for name, options in (("one", {"num_paths": 1, "mi_weight": 0.0, "aggregate_weight": 0.0}), ("two", {})):
        trainer = make_trainer(tmp_path / name, max_steps=1)
        trainer.fit(small_embedder(tiny_backbone_dir, **options), small_data(tiny_mmeb_dir))
        trainer.save_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
    data = small_data(tiny_mmeb_dir)
    trainer.test(
        small_embedder(tiny_backbone_dir), data, ckpt_path=tmp_path / "two" / "checkpoints" / "last.ckpt"
    )
    scores_file = next((tmp_path / "two").rglob("scores.json"))
    (tmp_path / "two" / "step_1").mkdir()  # as a study leaves it
    scores_file.rename(tmp_path / "two" / "step_1" / "scores.json")
    folder = tmp_path / "study"
    compare_runs(folder, [tmp_path / "one", tmp_path / "two" / "checkpoints" / "last.ckpt"])
    results = json.loads((folder / "results.json").read_text())
    assert {name: content["num_paths"] for name, content in results["runs"].items()} == {"one": 1, "two": 2}
    assert results["runs"]["one"]["errors"] is None
    assert results["runs"]["two"]["errors"] is not None
    table = (folder / "table.md").read_text()
    assert "### one: Each path\n" in table
    assert "### two: Pairs of paths\n" in table
    pictures = {file.name for file in folder.glob("*.png")}
    assert "two_similarity.png" in pictures
    assert "one_similarity.png" not in pictures


def test_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / parent / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match="different names"):
        compare_runs(tmp_path / "study", [tmp_path / "a" / "run", tmp_path / "b" / "run"])


def test_a_run_s_scores_are_those_of_its_last_step(tmp_path: Path) -> None:
    assert path_differences._scores_dir(tmp_path) == tmp_path
    for step in (9, 10, 2):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / "scores.json").touch()
    assert path_differences._scores_dir(tmp_path) == tmp_path / "step_10"


def test_the_study_trains_the_runs_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[Run] = []
    compared: list[list[Path]] = []
    monkeypatch.setattr(path_differences, "train_and_score", trained.append)
    monkeypatch.setattr(path_differences, "is_scored", lambda run: run.cell.name != "without_mim")
    monkeypatch.setattr(path_differences, "compare_runs", lambda output_dir, runs: compared.append(runs))
    path_differences.run(tmp_path)
    assert [(run.name, run.cell) for run in trained] == [
        ("without_mim_seed4", load_study("help").cells["without_mim"])
    ]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "runs/studies/help/without_mim_seed4 is missing: training 480 steps, then scoring them"
    names = ["pdf_seed4", "without_mim_seed4", "orthogonal_seed4"]
    assert [path.name for path in compared[0]] == names
    assert compared[0][0] == Path("runs/studies/help/pdf_seed4")
