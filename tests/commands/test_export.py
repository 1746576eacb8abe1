"""``lightning export``, from what a training left to a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parallel_decoupling import cli
from parallel_decoupling.evaluation.embedder import Embedder
from tests.model.test_pretrained import checkpoint_of, every_path, save_run
from tests.support.embedders import tiny_embedder


@pytest.fixture(scope="module")
def run_dir(tiny_backbone_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the scores of its steps."""
    embedder = tiny_embedder(tiny_backbone_dir)
    folder = save_run(tmp_path_factory.mktemp("run"), checkpoint_of(embedder, tiny_backbone_dir))
    hits = {column: "10" for column in ("aggregate", "path_0", "path_1", "path_2")}
    scores = {
        "means": {"overall": dict.fromkeys(hits, 0.5)},
        "tasks": {"Sign": {"num_queries": 2}},
        "hits": {"Sign": hits},
        "run": {"seed": 0, "token_passes": 9.0, "global_step": 2, "commit": "c0ffee"},
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.mark.parametrize("source", ["run", "checkpoint", "export"])
def test_one_path_with_its_backbone(source: str, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    model = {"run": run_dir, "checkpoint": checkpoint, "export": tmp_path / "exported"}[source]
    if source == "export":
        cli.main(["export", str(run_dir), str(model)])
    cli.main(["export", str(model), str(tmp_path / "model"), "--paths", "1", "--include_backbone"])
    expected = every_path(Embedder.from_pretrained(run_dir), 1)
    assert torch.equal(every_path(Embedder.from_pretrained(tmp_path / "model"), 0), expected)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| main steps | 2 |" in card
    assert "| commit | c0ffee |" in card
    assert ("| overall | 50.0 |" in card) == (source != "export")
    assert (tmp_path / "model" / "backbone").is_dir()


def test_several_paths_with_merged_adapters(run_dir: Path, tmp_path: Path) -> None:
    cli.main(["export", str(run_dir), str(tmp_path / "model"), "--paths", "[1,0]", "--merge_adapters"])
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["paths"], config["adapter"]["kind"]) == ([1, 0], "frozen")
    expected = every_path(Embedder.from_pretrained(run_dir), [1, 0])
    torch.testing.assert_close(every_path(Embedder.from_pretrained(tmp_path / "model")), expected)


def test_a_path_that_does_not_exist(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", str(run_dir), str(tmp_path / "model"), "--paths", "3"])
    assert "paths must name some of 0 to 2" in capsys.readouterr().err
