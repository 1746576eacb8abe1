"""Two gloo processes with different rows against one process with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling.distributed import rank, world_size
from parallel_decoupling.training.embedder import PDFEmbedder
from tests.support.fit import make_trainer, small_data

pytestmark = pytest.mark.slow


class SavingEmbedder(PDFEmbedder):
    """Writes the gradients that each main step uses."""

    folder: Path

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        torch.save(gradients, self.folder / f"{world_size()}_{rank()}_{self.steps_done}.pt")


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_two_processes_train_like_one(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, chunk_size: int | None
) -> None:
    for processes in (1, 2):
        still = {"learning_rate": 0.0, "prefix_learning_rate": 0.0, "clip_norm": 0.0, "schedule": "constant"}
        module = SavingEmbedder(
            backbone=tiny_backbone_dir,
            num_paths=2,
            prefix_length=3,
            aggregation="learned",
            learn_temperature=True,
            temperature=0.2,
            adapter={"scope": "both"},  # type: ignore[arg-type]
            mi={"hidden_size": 8, "warmup_steps": 0, "ramp_steps": 0},  # type: ignore[arg-type]
            optimizer=still,  # type: ignore[arg-type]
            query_chunk_size=chunk_size if processes == 2 else None,
            candidate_chunk_size=chunk_size if processes == 2 else None,
        )
        module.folder = tmp_path
        options: dict[str, Any] = {"devices": processes, "max_steps": 3}
        if processes == 2:
            options["strategy"] = "ddp_fork"
        make_trainer(tmp_path, **options).fit(module, small_data(tiny_mmeb_dir))
    for step in range(3):
        one, first, second = (
            torch.load(tmp_path / f"{name}_{step}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1")
        )
        assert {"log_temperature", "encoder.path_logits", "encoder.prefixes.key_values"} <= one.keys()
        for name, gradient in one.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], gradient, rtol=2e-3, atol=2e-5)


def test_two_processes_score_like_one(tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path) -> None:
    scores = []
    for processes in (1, 2):
        module = PDFEmbedder(backbone=tiny_backbone_dir, num_paths=2, prefix_length=3)
        options: dict[str, Any] = {"devices": processes}
        if processes == 2:
            options["strategy"] = "ddp_fork"
        trainer = make_trainer(tmp_path / str(processes), **options)
        trainer.test(module, small_data(tiny_mmeb_dir, eval_batch_size=3), verbose=False)
        scores.append((tmp_path / str(processes) / "scores.csv").read_text())
    assert scores[0] == scores[1]
