"""OpenCLIP models, a family that is not listed and a published adapter, from settings alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parallel_decoupling import cli
from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.model.open_clip import OpenCLIPEncoder
from parallel_decoupling.training.module import PDFEmbedder
from tests.model.test_open_clip import by_hand
from tests.model.test_path_lora import OLDER_PATHS, publish
from tests.support.families import save_tiny_family
from tests.support.fit import ONE_PATH, make_trainer, small_data, small_embedder
from tests.support.tiny import noise_image
from tests.support.tiny_clip import RESNET, save_tiny_clip
from tests.test_configs import BuiltCLI

CONFIG_DIR = Path(__file__).parent.parent.parent / "lightning_configs"
TASKS = ("colours_i2t", "colours_t2i")
SETTINGS: dict[str, Any] = {
    **ONE_PATH,
    "mi": {"kind": "none"},
    "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
}


def embedder(backbone: str, kind: str = "full", **settings: Any) -> PDFEmbedder:
    return PDFEmbedder(backbone, **{**SETTINGS, "adapter": {"kind": kind}, **settings})


def hit(folder: str, query: RawInput, candidates: list[RawInput]) -> bool:
    """Whether the first candidate has a higher cosine than each of the others, by open_clip's own calls."""
    scores = [by_hand(folder, query) @ by_hand(folder, each) for each in candidates]
    return all(bool(scores[0] > other) for other in scores[1:])


def test_zero_shot_scores_are_those_of_open_clip_itself(
    tiny_clip_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    module = embedder(tiny_clip_dir, "frozen")
    make_trainer(tmp_path).test(module, small_data(tiny_mmeb_dir, eval_batch_size=3))
    report = ScoreReport.from_json_file(tmp_path / "scores.json")
    assert report.columns == ["aggregate", "path_0"]
    found, expected = [], []
    for name in TASKS:
        task = read_eval_task(tiny_mmeb_dir, name)
        hits = [
            hit(tiny_clip_dir, task.queries[query], [task.candidates[each] for each in row])
            for query, row in zip(task.query_of_row, task.candidates_of_row, strict=True)
        ]
        expected.append("".join("01"[hit] for hit in hits))
        assert report.tasks[name].hits["path_0"] == report.tasks[name].hits["aggregate"]
        found.append(report.tasks[name].hits["aggregate"])
    assert found == expected
    assert 0 < "".join(expected).count("1") < 8, "all hits or none would prove little"
    assert report.run["model"]["backbone"] == tiny_clip_dir


@pytest.mark.parametrize("model", [{}, {"vision_cfg": RESNET}], ids=["transformer", "batch normalisation"])
def test_a_checkpoint_is_complete_and_fits_its_backbone_alone(
    model: dict[str, Any], tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    backbone, file = save_tiny_clip(tmp_path / "clip", **model), tmp_path / "two.ckpt"
    module, trainer = embedder(backbone), make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, small_data(tiny_mmeb_dir))
    trainer.save_checkpoint(file)
    loaded = PDFEmbedder.load_from_checkpoint(file)
    assert isinstance(loaded.encoder, OpenCLIPEncoder)
    inputs = ["a red circle", {"text": "what colour?", "image": noise_image(40, 30)}]
    assert torch.equal(loaded.encode(inputs), module.encode(inputs))
    assert loaded.encode(inputs, paths="aggregate").shape == (2, 24)
    assert not torch.equal(loaded.encode(inputs), embedder(backbone).encode(inputs))
    other = save_tiny_clip(tmp_path / "other", **model, init_logit_scale=1.0)
    with pytest.raises(ValueError, match="trained on backbone"):
        PDFEmbedder.load_from_checkpoint(file, backbone=other)


def test_what_is_made_for_multimodal_llms_is_refused(
    tiny_clip_dir: str, tiny_backbone_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = embedder(tiny_clip_dir)
    shallow = small_embedder(tiny_backbone_dir, prefix_type="shallow")
    for refused in (module, shallow):
        refused._device_mesh = {"data_parallel": None}  # type: ignore[assignment]
        with pytest.raises(ValueError, match="use strategy ddp"):
            refused.configure_model()
    with pytest.raises(SystemExit):
        cli.main(["plan", "--config", str(CONFIG_DIR / "openclip.yaml")])
    assert "is an OpenCLIP model, which has no plan" in capsys.readouterr().err


def test_the_shipped_config_trains_scores_and_is_compared_with_pdf(
    tiny_clip_dir: str,
    tiny_backbone_dir: str,
    tiny_mmeb_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_clip_dir, "weights")
    here = ["--data.data_dir", tiny_mmeb_dir, "--data.batch_size", "8", "--data.num_workers", "0"]
    here += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    tuned = ["--config", str(CONFIG_DIR / "openclip.yaml"), "--model.backbone", "weights", *here]
    cli.main(["fit", *tuned, "--trainer.max_steps", "2"])
    cli.main(["test", *tuned, "--ckpt_path", "last"])
    make_trainer(tmp_path / "runs" / "pdf").test(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir))
    reports = [ScoreReport.from_json_file(Path(f"runs/{name}/scores.json")) for name in ("openclip", "pdf")]
    assert [report.run["global_step"] for report in reports] == [2, 0]
    cli.main(["compare", "runs/openclip", "runs/pdf", "--output_dir", "comparison"])
    assert Path("comparison/comparison.json").is_file()


UNLISTED = {
    "image_token": "<image>",
    "language_module": "language_model",
    "vision_module": "vision_tower",
    "layers": "language_model.layers",
    "position_ids": "sequential",
}


def test_unlisted_family_and_published_adapter_come_from_yaml(tmp_path: Path) -> None:
    folder = save_tiny_family("llava", tmp_path / "backbone")
    publish(folder, tmp_path / "adapter", OLDER_PATHS["llava_next_mistral"], use_dora=True)
    settings = {
        "backbone": folder,
        "family": UNLISTED,
        "adapter": {"kind": "dora"},
        "initial_adapter": str(tmp_path / "adapter"),
        "num_paths": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": settings}), encoding="utf-8")
    model = BuiltCLI(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.accelerator=cpu"]).model
    assert model.encoder.backbone.adapter.rank == 4
    assert model.encoder.backbone.family.image_token == "<image>"
    assert model.hparams["family"]["layers"] == "language_model.layers"
