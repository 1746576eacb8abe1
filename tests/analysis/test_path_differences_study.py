from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from studies.path_differences import run
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
    for step in (0, 1):  # as a study leaves them
        (tmp_path / "two" / f"step_{step}").mkdir()
        shutil.copy(scores_file, tmp_path / "two" / f"step_{step}")
    scores_file.unlink()
    folder = tmp_path / "study"
    run(folder, [tmp_path / "one", tmp_path / "two" / "checkpoints" / "last.ckpt"])
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
        run(tmp_path / "study", [tmp_path / "a" / "run", tmp_path / "b" / "run"])
