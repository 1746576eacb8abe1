from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel_decoupling.batch import PairBatch
from parallel_decoupling.training.module import PDFEmbedder
from studies import prefix_gradients
from studies.estimators import norm_and_variance
from studies.prefix_gradients import gradients, measure, summary, with_network_of, write
from studies.study import Run
from tests.support.fit import RecordingEmbedder, make_trainer, small_data, small_embedder

NO_CLIP = {"clip_norm": 0.0}


def noisy(mean: Tensor, deviation: float, draws: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return mean + deviation * torch.randn(draws, len(mean), generator=generator, dtype=torch.float64)


def test_norm_and_variance_are_those_of_what_the_draws_come_from() -> None:
    mean = torch.zeros(400, dtype=torch.float64)
    mean[:2] = torch.tensor([3.0, 4.0])
    norm, variance = norm_and_variance(noisy(mean, 0.5, 2000))
    assert norm == pytest.approx(5, rel=0.01)
    assert variance == pytest.approx(400 * 0.25, rel=0.01)
    assert norm_and_variance(torch.tensor([[1.0], [-1.0]])) == (0.0, 2.0)


def test_summary_of_known_gradients() -> None:
    mean = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    gradient_SW = {
        "contrastive": noisy(mean, 0.001, 50),
        "against": noisy(-3 * mean, 0.6, 5000)[:50],
        "across": noisy(torch.tensor([0, 2.0, 0, 0], dtype=torch.float64), 0.001, 50),
    }
    against, across = summary("against", gradient_SW), summary("across", gradient_SW)
    assert against["size"] == pytest.approx(3, rel=0.05)
    assert against["noise"] == pytest.approx(math.sqrt(4) * 0.6 / 3, rel=0.15)
    assert against["agreement"] == pytest.approx(-1, abs=0.02)
    assert 0.8 < against["one_against_others"] < 0.99
    assert across["size"] == pytest.approx(2, rel=0.01)
    assert across["agreement"] == pytest.approx(0, abs=0.01)
    assert across["one_against_others"] == pytest.approx(1, abs=1e-3)


def test_a_gradient_without_direction_has_no_noise_ratio_and_no_size() -> None:
    """Batches that cancel."""
    opposite = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    steady = torch.ones(2, 1, dtype=torch.float64)
    assert summary("x", {"contrastive": steady, "x": opposite})["noise"] is None
    assert summary("x", {"contrastive": opposite, "x": steady})["size"] is None


def a_batch(module: PDFEmbedder, tiny_mmeb_dir: str) -> PairBatch:
    data = small_data(tiny_mmeb_dir)
    data.connect(module.encoder.processor, module.encoder.image_token)
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


def test_every_kind_has_a_gradient_of_its_own(tiny_backbone_dir: str, tiny_mmeb_dir: str) -> None:
    module = small_embedder(tiny_backbone_dir)
    estimators = with_network_of(module.mutual_information)
    assert estimators["l1out"].network is module.mutual_information.network
    assert estimators["hsic"].network is None
    found = gradients(module, a_batch(module, tiny_mmeb_dir), estimators)
    assert list(found) == ["contrastive", *prefix_gradients.KINDS]
    for term, gradient in found.items():
        assert gradient.norm() > 0, term
    assert len({float(gradient.norm()) for gradient in found.values()}) == len(found)


def test_the_same_batch_again_has_no_noise(tiny_backbone_dir: str, tiny_mmeb_dir: str) -> None:
    module = small_embedder(tiny_backbone_dir)
    rows = {row["term"]: row for row in measure(module, [a_batch(module, tiny_mmeb_dir)] * 3)}
    assert rows["vclub"]["noise"] == pytest.approx(0, abs=1e-6)
    assert rows["vclub"]["one_against_others"] == pytest.approx(1)
    assert rows["club_sample"]["noise"] > 0.01  # draws its negatives
    assert rows["contrastive"]["size"] == pytest.approx(1)
    assert rows["contrastive"]["agreement"] == pytest.approx(1)


def test_write_measures_checkpoints_on_batches_of_their_own_data(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    write(tmp_path, {"a_run": tmp_path / "last.ckpt"}, num_batches=2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["run"] for row in results["rows"]] == ["a_run"] * (1 + len(prefix_gradients.KINDS))
    assert results["batches"] == 2
    table = (tmp_path / "table.md").read_text()
    assert table.count("| a_run |") == len(results["rows"])
    assert (tmp_path / "gradients.png").stat().st_size > 10_000


def read(batch: PairBatch) -> list[tuple[int, ...]]:
    """Target and tokens of every pair."""
    tokens = batch.query.tokens
    texts = [
        ids[mask.bool()] for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
    ]
    return [(int(target), *ids.tolist()) for target, ids in zip(batch.candidate_ids, texts, strict=False)]


def test_the_batches_are_the_training_rows_of_the_run_in_another_order(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    """``row_limit`` draws the rows by the same seed that orders them."""
    trainer, used = make_trainer(tmp_path, max_steps=1), small_data(tiny_mmeb_dir, row_limit=8, seed=5)
    trainer.fit(small_embedder(tiny_backbone_dir), used)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    used.trainer = None  # which would start after the step that is done
    whole_epoch = list(used.train_dataloader())
    _, batches = prefix_gradients._loaded(tmp_path / "last.ckpt", num_batches=len(whole_epoch))
    first, again = ([row for batch in each for row in read(batch)] for each in (whole_epoch, batches))
    assert sorted(first) == sorted(again)
    assert first != again


def test_the_study_trains_the_runs_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensured: list[Run] = []
    written: dict[str, Path] = {}
    monkeypatch.setattr(prefix_gradients, "ensure_scored", ensured.append)
    monkeypatch.setattr(prefix_gradients, "write", lambda output_dir, files: written.update(files))
    prefix_gradients.run(tmp_path)
    assert [run.name for run in ensured] == ["pdf_seed4", "without_mim_seed4"]
    assert written["pdf_seed4"] == Path("runs/studies/help/pdf_seed4/checkpoints/last.ckpt")
