"""A real run on every backbone family: data, chunks, estimator, checkpoint, `encode`, from settings alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.utils import logging

from parallel_decoupling.training.module import PDFEmbedder
from tests.model.test_adapters import OLDER_PATHS, publish
from tests.support.families import TINY_FAMILIES, save_tiny_family
from tests.support.fit import make_trainer, small_data, small_embedder, trained
from tests.support.tiny import noise_image
from tests.test_configs import BuiltCLI

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
    options |= {"adapter": {"scope": "both"}, "query_chunk_size": 3, "candidate_chunk_size": 5}
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
