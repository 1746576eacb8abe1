"""What a user may name as a model: a checkpoint, a run, an exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from parallel_decoupling import cli
from parallel_decoupling.data.tasks import Task
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.evaluation.score import TaskScore
from parallel_decoupling.training.loading import load_embedder, run_of, scores_of
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.prediction_writer import EmbeddingWriter
from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.tiny import noise_image

TEXTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def run_dir(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, a checkpoint and scores of these steps."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, max_steps=2)
    module = small_embedder(tiny_backbone_dir, query_instruction="find")
    trainer.fit(module, small_data(tiny_mmeb_dir))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    write_scores(folder, steps=2)
    return folder


def write_scores(folder: Path, steps: int) -> None:
    hits = {column: torch.tensor([1, 2]) for column in ("aggregate", "path_0", "path_1")}
    score = TaskScore(Task("Sign", "classification", True), hits, torch.zeros(2, 10), 0.1)
    trained = run_of(folder / "checkpoints" / "last.ckpt")
    run = {
        **{key: trained[key] for key in ("seed", "token_passes")},
        "global_step": steps,
        "commit": "c0ffee",
    }
    ScoreReport.from_scores([score], run).to_json_file(folder / "scores.json")


@pytest.fixture(scope="module")
def checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def test_run_folder_is_its_last_checkpoint(run_dir: Path, checkpoint: Path) -> None:
    expected = PDFEmbedder.load_from_checkpoint(checkpoint).eval().encode(TEXTS)
    for path in (run_dir, checkpoint, str(run_dir)):
        embedder = load_embedder(path)
        assert torch.equal(embedder.encode(TEXTS), expected)
        assert embedder.query_instruction == "find"


def test_run_is_known(run_dir: Path, tiny_mmeb_dir: str) -> None:
    run = load_embedder(run_dir).run
    assert run["global_step"] == 2
    assert run["data"]["data_dir"] == tiny_mmeb_dir
    assert sum(run["rows_by_subset"].values()) == 16


def test_scores_of_other_steps_are_not_taken(run_dir: Path, checkpoint: Path) -> None:
    assert scores_of(checkpoint) is not None
    write_scores(run_dir, steps=3)
    assert scores_of(checkpoint) is None
    (run_dir / "scores.json").unlink()
    assert scores_of(checkpoint) is None
    write_scores(run_dir, steps=2)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.ckpt"):
        with pytest.raises(ValueError, match="no checkpoint .* lightning export"):
            load_embedder(path)


def test_other_files_are_no_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_loading\.py: this file is no checkpoint, or a damaged one"):
        load_embedder(__file__)
    content = torch.load(checkpoint, weights_only=True)
    del content["pytorch-lightning_version"]
    for other in (torch.zeros(2), content):
        torch.save(other, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match="no checkpoint of a run, it has no .*pytorch-lightning_version"):
            load_embedder(tmp_path / "other.ckpt")


@pytest.mark.parametrize("source", ["run", "checkpoint", "export"])
def test_export_command(source: str, run_dir: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = {"run": run_dir, "checkpoint": checkpoint, "export": tmp_path / "exported"}[source]
    if source == "export":
        cli.main(["export", str(run_dir), str(model)])
    cli.main(["export", str(model), str(tmp_path / "model"), "--paths", "1", "--include_backbone"])
    embedder = load_embedder(tmp_path / "model")
    expected = load_embedder(run_dir).encode(TEXTS, paths=1)
    assert torch.equal(embedder.encode(TEXTS, paths=0), expected)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| main steps | 2 |" in card
    assert "| commit | c0ffee |" in card
    assert ("mean of classification" in card) == (source != "export")
    assert (tmp_path / "model" / "backbone").is_dir()


def test_export_command_merges_and_takes_several_paths(run_dir: Path, tmp_path: Path) -> None:
    cli.main(["export", str(run_dir), str(tmp_path / "model"), "--paths", "[1,0]", "--merge_adapters"])
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["paths"], config["adapter"]["kind"]) == ([1, 0], "frozen")
    expected = load_embedder(run_dir).encode(TEXTS, paths=[1, 0])
    torch.testing.assert_close(load_embedder(tmp_path / "model").encode(TEXTS), expected)


def test_export_command_says_what_is_wrong(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", str(run_dir), str(tmp_path / "model"), "--paths", "2"])
    assert "paths must name some of 0 to 1" in capsys.readouterr().err


def test_module_has_both_names(checkpoint: Path, tmp_path: Path) -> None:
    module = PDFEmbedder.load_from_checkpoint(checkpoint).eval()
    module.save_pretrained(tmp_path / "model", paths=[1])
    loaded = PDFEmbedder.from_pretrained(tmp_path / "model")
    assert type(loaded) is Embedder
    assert torch.equal(loaded.encode(TEXTS, paths=0), module.encode(TEXTS, paths=1))
    assert loaded.run["global_step"] == 2
    assert sum(loaded.run["rows_by_subset"].values()) == 16
    assert "commit" not in loaded.run, "of the training, which the checkpoint does not say"


def test_pictures_are_those_of_the_training(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    """A checkpoint, its module, the exported folder and what is saved again from it resize alike."""
    data = small_data(tiny_mmeb_dir, image_size="low")
    trainer = make_trainer(tmp_path, max_steps=1)
    module = small_embedder(tiny_backbone_dir)
    picture = noise_image(40, 30)
    square = picture.resize((128, 128), Image.Resampling.BICUBIC)
    as_it_is = module.encode([picture])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    expected = Embedder(module.eval().encoder).encode([square])
    assert not torch.allclose(Embedder(module.encoder).encode([picture]), expected, atol=1e-3)
    loaded = PDFEmbedder.load_from_checkpoint(tmp_path / "one.ckpt").eval()
    loaded.save_pretrained(tmp_path / "exported")
    exported = Embedder.from_pretrained(tmp_path / "exported")
    exported.save_pretrained(tmp_path / "again")
    for model in (
        module,
        loaded,
        load_embedder(tmp_path / "one.ckpt"),
        exported,
        Embedder.from_pretrained(tmp_path / "again"),
    ):
        torch.testing.assert_close(model.encode([picture]), expected, atol=1e-5, rtol=0)
    assert exported.run["data"]["image_size"] == "low"
    (tmp_path / "photos").mkdir()
    picture.save(tmp_path / "photos" / "one.png")
    source = small_data("unused", predict_source=str(tmp_path / "photos"))
    trainer = make_trainer(tmp_path, EmbeddingWriter(str(tmp_path / "embeddings")))
    (batch,) = trainer.predict(loaded, source)
    torch.testing.assert_close(batch["path_1"], expected[:, 1], atol=1e-5, rtol=0)
    loaded.save_pretrained(tmp_path / "after_predict")
    assert Embedder.from_pretrained(tmp_path / "after_predict").run["data"]["image_size"] == "low"
    untrained = small_embedder(tiny_backbone_dir)
    assert torch.equal(untrained.encode([picture]), as_it_is)
