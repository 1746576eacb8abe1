"""A GPU against the CPU: losses, embeddings, GradCache, checkpoints. ``make gpu`` runs them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling.training.module import PDFEmbedder
from tests.support.fit import Recorder, SaveAll, make_trainer, small_data, small_embedder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def fit(folder: Path, backbone: str, data_dir: str, accelerator: str, **settings: Any) -> Any:
    """Three steps; the module and what every step logged."""
    module, recorder = small_embedder(backbone, **settings), Recorder()
    trainer = make_trainer(folder, recorder, SaveAll(folder), accelerator=accelerator, max_steps=3)
    trainer.fit(module, small_data(data_dir))
    return module, recorder.values


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_gpu_trains_like_the_cpu(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, chunk_size: int | None
) -> None:
    (_, found), (_, wanted) = (
        fit(tmp_path / kind, tiny_backbone_dir, tiny_mmeb_dir, kind, chunk_size=chunk_size)
        for kind in ("gpu", "cpu")
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-2)
        assert ours["train/gradient_norm"] == pytest.approx(theirs["train/gradient_norm"], rel=5e-2)


def test_a_checkpoint_of_a_gpu_embeds_alike_on_both(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    fit(tmp_path, tiny_backbone_dir, tiny_mmeb_dir, "gpu")
    module = PDFEmbedder.load_from_checkpoint(tmp_path / "3.ckpt", map_location="cpu").eval()
    texts = ["a red circle", "two yellow crosses above a green star"]
    wanted = module.encode(texts, paths="all")
    found = module.to("cuda").encode(texts, paths="all")
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
