"""The embedding cache: what a key covers, and a test run that goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling.data.readers import read_eval_task
from parallel_decoupling.training.embedding_cache import (
    SHAPING_SETTINGS,
    CachedTask,
    EmbeddingCache,
    model_hash,
)
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.fit import make_trainer, small_data, small_embedder
from tests.support.mmeb import save_tiny_mmeb


class Counting(PDFEmbedder):
    """Counts encoded rows, and can stop at the second batch of a task as if killed."""

    rows = 0
    stop_at: int | None = None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if (dataloader_idx, batch_idx) == (self.stop_at, 1):
            raise KeyError("killed")
        self.rows += len(batch.indices)
        super().validation_step(batch, batch_idx, dataloader_idx)


def run(backbone: str, data_dir: str, folder: Path, stop_at: int | None = None, **settings: Any) -> Counting:
    module = small_embedder(backbone, kind=Counting)
    assert isinstance(module, Counting)
    module.stop_at = stop_at
    make_trainer(folder).test(module, small_data(data_dir, **settings), verbose=False)
    return module


def scores(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "scores.json").read_text())
    return {name: content[name] for name in ("means", "tasks", "metric_means", "hits", "warnings")}


def test_a_stopped_test_goes_on_with_the_tasks_not_done(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path / "plain")
    with pytest.raises(KeyError, match="killed"):
        run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path / "run", stop_at=1, embedding_cache=True)
    assert len(list((tmp_path / "run" / "embeddings").iterdir())) == 1
    again = run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path / "run", embedding_cache=True)
    assert again.rows == 8  # the second task's queries and candidates
    assert scores(tmp_path / "run") == scores(tmp_path / "plain")
    whole = run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path / "run", embedding_cache=True)
    assert whole.rows == 0
    assert scores(tmp_path / "run") == scores(tmp_path / "plain")


def test_a_test_whose_tasks_are_all_cached_still_says_that_it_pools_before_the_norm(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    for rows in (16, 0):
        module = small_embedder(tiny_backbone_dir, kind=Counting)
        module.encoder.backbone.register_forward_hook(lambda _, args, states: states + 1)
        data = small_data(tiny_mmeb_dir, embedding_cache=cache)
        make_trainer(tmp_path).test(module, data, verbose=False)
        assert module.rows == rows
        assert "pre_norm_pooling" in [each["check"] for each in scores(tmp_path)["warnings"]]


def test_another_checkpoint_in_the_same_folder_is_encoded_anew(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path, embedding_cache=cache)
    other = small_embedder(tiny_backbone_dir, kind=Counting)
    with torch.no_grad():
        next(other.encoder.prefix_parameters()).view(-1)[0] += 1e-6
    make_trainer(tmp_path).test(other, small_data(tiny_mmeb_dir, embedding_cache=cache), verbose=False)
    assert other.rows == 16
    assert len(list(Path(cache).iterdir())) == 4


def test_a_cache_is_of_one_test_and_of_its_weights(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    module = run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path, embedding_cache=cache)
    before = {file.name: file.read_bytes() for file in Path(cache).iterdir()}
    with torch.no_grad():
        next(module.encoder.prefix_parameters()).view(-1)[0] += 1
    make_trainer(tmp_path).test(module, small_data(tiny_mmeb_dir), verbose=False)
    assert {file.name: file.read_bytes() for file in Path(cache).iterdir()} == before
    make_trainer(tmp_path).test(module, small_data(tiny_mmeb_dir, embedding_cache=cache), verbose=False)
    assert module.rows == 3 * 16
    assert len(list(Path(cache).iterdir())) == 4
    assert all((Path(cache) / name).read_bytes() == content for name, content in before.items())


def test_what_was_skipped_does_not_serve_a_run_that_skips_nothing(
    tiny_backbone_dir: str, tmp_path: Path
) -> None:
    data_dir, cache = save_tiny_mmeb(tmp_path / "data"), str(tmp_path / "cache")
    (Path(data_dir) / "MMEB-eval" / "red_0.png").write_bytes(b"no picture")
    for rows in (16, 0):
        with pytest.warns(UserWarning, match="1 of 4 rows"):
            skipping = run(
                tiny_backbone_dir, data_dir, tmp_path, embedding_cache=cache, missing_images="skip"
            )
        assert skipping.rows == rows
    with pytest.raises(ValueError, match="Cannot read image .*red_0.png"):
        run(tiny_backbone_dir, data_dir, tmp_path, embedding_cache=cache)


@pytest.mark.parametrize("changed", [{}, *({name: "other"} for name in SHAPING_SETTINGS)], ids=str)
def test_the_model_hash_covers_precision_and_settings(
    tiny_backbone_dir: str, changed: dict[str, Any]
) -> None:
    encoder, fingerprint = small_embedder(tiny_backbone_dir).encoder, {"sha256": "a"}
    found = model_hash(encoder, fingerprint, {"batch_size": 8}, "32-true")
    assert found == model_hash(encoder, fingerprint, {"batch_size": 9}, "32-true")
    precision = "32-true" if changed else "bf16-mixed"
    assert found != model_hash(encoder, fingerprint, changed, precision)


def test_a_broken_file_is_an_error_that_says_what_to_do(tiny_mmeb_dir: str, tmp_path: Path) -> None:
    task = read_eval_task(tiny_mmeb_dir, "colours_i2t")
    cache = EmbeddingCache(tmp_path, "model")
    content = CachedTask(torch.randn(4, 2, 3), torch.randn(4, 2, 3), {"query": [1], "candidate": []})
    cache.save(task, content)
    found = cache.load(task)
    assert torch.equal(found.query, content.query)
    assert found.missing == content.missing
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    cache.file(task).write_bytes(b"half")
    with pytest.raises(ValueError, match="colours_i2t: cannot read the cached embeddings .*Delete the file"):
        cache.load(task)
