from __future__ import annotations

from pathlib import Path

import torch

from parallel_decoupling.batch import PairBatch
from parallel_decoupling.training.module import PDFEmbedder
from studies.prefix_gradients import gradients, with_network_of
from tests.support.fit import RecordingEmbedder, make_trainer, small_data, small_embedder

NO_CLIP = {"clip_norm": 0.0}


def a_batch(module: PDFEmbedder, tiny_mmeb_dir: str) -> PairBatch:
    data = small_data(tiny_mmeb_dir)
    data.connect(module)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_gradients_are_the_parts_of_that_of_a_training_step(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    options = {"mi_weight": 0.3, "aggregate_weight": 0.7, "optimizer": NO_CLIP}
    options |= {"mi": {"fit_steps": 1, "learning_rate": 1e-12, "warmup_steps": 0, "ramp_steps": 0}}
    module = small_embedder(tiny_backbone_dir, kind=RecordingEmbedder, **options)
    batch = a_batch(module, tiny_mmeb_dir)
    found = gradients(module, batch, with_network_of(module.mutual_information))
    prefixes = [name for name, _ in module.named_parameters() if "prefix" in name]
    make_trainer(tmp_path, max_steps=1).fit(module, small_data(tiny_mmeb_dir))
    assert isinstance(module, RecordingEmbedder)
    expected = torch.cat([module.gradients[name].flatten() for name in prefixes])
    torch.testing.assert_close(found["contrastive"] + 0.3 * found["vclub"], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["contrastive"], expected, rtol=1e-2)
