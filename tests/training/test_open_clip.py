"""OpenCLIP models and every other backbone family under the trainer, from settings alone."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.utils import logging

from parallel_decoupling import cli
from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.evaluation.report import ScoreReport
from parallel_decoupling.model.open_clip import OpenCLIPEncoder
from parallel_decoupling.training.module import PDFEmbedder
from tests.model.test_open_clip import by_hand
from tests.model.test_path_lora import OLDER_PATHS, publish
from tests.support.families import TINY_FAMILIES, save_tiny_family
from tests.support.fit import (
    ONE_PATH,
    make_trainer,
    small_data,
    small_embedder,
    trained,
)
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


def fit(folder: Path, backbone: str, data_dir: str, steps: int) -> tuple[PDFEmbedder, Path]:
    """Train to ``steps`` main steps; returns the module and its checkpoint."""
    module = embedder(backbone)
    trainer = make_trainer(folder, max_steps=steps)
    trainer.fit(module, small_data(data_dir))
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module, folder / f"{steps}.ckpt"


@pytest.fixture(scope="module")
def four_steps(tiny_clip_dir: str, tiny_mmeb_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tmp_path_factory.mktemp("fit"), tiny_clip_dir, tiny_mmeb_dir, 4)


def test_a_checkpoint_gives_the_same_embeddings_from_any_folder(
    tiny_clip_dir: str, four_steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, file = four_steps
    monkeypatch.chdir(tmp_path)
    loaded = PDFEmbedder.load_from_checkpoint(file)
    assert isinstance(loaded.encoder, OpenCLIPEncoder)
    inputs = ["a red circle", {"text": "what colour?", "image": noise_image(40, 30)}]
    assert torch.equal(loaded.encode(inputs), module.encode(inputs))
    assert loaded.encode(inputs, paths="aggregate").shape == (2, 24)
    assert not torch.equal(loaded.encode(inputs), embedder(tiny_clip_dir).encode(inputs))
    other = save_tiny_clip(tmp_path / "other", init_logit_scale=1.0)
    with pytest.raises(ValueError, match="trained on backbone"):
        PDFEmbedder.load_from_checkpoint(file, backbone=other)


def test_a_checkpoint_of_a_tower_with_batch_normalisation_is_complete(
    tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    backbone = save_tiny_clip(tmp_path / "resnet", vision_cfg=RESNET)
    module, file = fit(tmp_path, backbone, tiny_mmeb_dir, 2)
    image = [noise_image(40, 30)]
    assert torch.equal(PDFEmbedder.load_from_checkpoint(file).encode(image), module.encode(image))


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


def test_shipped_configs_score_train_resume_and_are_compared_with_pdf(
    tiny_clip_dir: str,
    tiny_backbone_dir: str,
    tiny_mmeb_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_clip_dir, "weights")
    here = ["--data.data_dir", tiny_mmeb_dir, "--data.batch_size", "8", "--data.num_workers", "0"]
    here += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    clip = ["--model.backbone", "weights", *here]
    frozen = ["--model.adapter.kind", "frozen", "--trainer.default_root_dir", "runs/openclip_zero_shot"]
    cli.main(["test", "--config", str(CONFIG_DIR / "openclip.yaml"), *clip, *frozen])
    tuned = ["--config", str(CONFIG_DIR / "openclip.yaml"), *clip]
    cli.main(["fit", *tuned, "--trainer.max_steps", "2"])
    capsys.readouterr()
    cli.main(["fit", *tuned, "--trainer.max_steps", "3", "--ckpt_path", "last"])
    assert "Settings that differ" not in capsys.readouterr().err
    cli.main(["test", *tuned, "--ckpt_path", "last"])
    make_trainer(tmp_path / "runs" / "pdf").test(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir))
    runs = [f"runs/{name}" for name in ("openclip_zero_shot", "openclip", "pdf")]
    reports = [ScoreReport.from_json_file(Path(run) / "scores.json") for run in runs]
    assert [report.run["global_step"] for report in reports] == [0, 3, 0]
    cli.main(["compare", *runs, "--output_dir", "comparison"])
    assert "openclip_zero_shot" in capsys.readouterr().out
    assert Path("comparison/comparison.json").is_file()


UNLISTED = {
    "image_token": "<image>",
    "language_module": "language_model",
    "vision_module": "vision_tower",
    "layers": "language_model.layers",
    "position_ids": "sequential",
}
INPUTS = ["a red circle", noise_image(40, 24), {"image": noise_image(24, 40, 1), "text": "which colour?"}]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_two_steps_in_chunks_then_a_checkpoint(name: str, tiny_mmeb_dir: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"family": UNLISTED} if name == "llava" else {}
    options |= {"adapter": {"scope": "both"}, "chunk_size": 3}
    module = small_embedder(save_tiny_family(name, tmp_path / "backbone"), **options)
    before = trained(module)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, small_data(tiny_mmeb_dir))
    after = trained(module)
    still = [parameter for parameter in after if torch.equal(after[parameter], before[parameter])]
    blocks = {re.sub(r"\.(self_attn|mlp)\..*", "", parameter) for parameter in still}
    # LLaVA reads the last but one layer of its vision tower, so the last one stays as it was
    tower = {"encoder.backbone.base.vision_tower.encoder.layers.1"}
    assert blocks == (tower if name in ("llava", "llava_next_mistral", "llava_next_vicuna") else set())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = PDFEmbedder.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(again.encode(INPUTS), module.encode(INPUTS))


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
