"""The aggregate of D numbers against principal components found by numpy, and through the command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parallel_decoupling import PDFEmbedder, cli
from parallel_decoupling.compress import principal_maps
from parallel_decoupling.evaluation.embedder import Embedder
from tests.support.fit import make_trainer, small_data, small_embedder

TEXTS = ["a red circle", "two blue squares", "green", "what colour is it?"]


def test_maps_sum_to_the_principal_components_of_the_concatenation() -> None:
    rows_RND = torch.randn(50, 3, 4, dtype=torch.float64)
    concat_RE = rows_RND.flatten(1)
    maps_NDD = principal_maps(concat_RE.T @ concat_RE, 3)
    _, _, directions = np.linalg.svd(concat_RE.numpy(), full_matrices=False)
    for row in rows_RND:
        together = sum(path @ each for path, each in zip(row.float(), maps_NDD, strict=True))
        expected = np.abs(directions[:4] @ row.flatten().numpy())  # up to the sign of each coordinate
        np.testing.assert_allclose(together.abs().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_cosines_are_kept_where_the_paths_span_no_more_than_d_directions() -> None:
    basis, parts = torch.randn(4, 12, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    concat_RE = F.normalize(parts @ basis, dim=-1)
    maps_NDD = principal_maps(concat_RE.T @ concat_RE, 3)
    small_RD = torch.einsum("rnd,nde->re", concat_RE.float().unflatten(1, (3, 4)), maps_NDD)
    torch.testing.assert_close(small_RD @ small_RD.T, (concat_RE @ concat_RE.T).float())


def save_run(backbone: str, data_dir: str, folder: Path, **settings: Any) -> Path:
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(small_embedder(backbone, **settings), small_data(data_dir))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


def test_only_the_aggregate_changes_an_export_has_it_and_training_does_not_resume_from_it(
    tiny_backbone_dir: str,
    tiny_mmeb_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mistake: Any,
) -> None:
    run_dir = save_run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path / "run", aggregation="concat")
    file = tmp_path / "small.ckpt"
    cli.main(["compress", str(run_dir), str(file)])
    assert "32 numbers instead of 64" in capsys.readouterr().out
    before, after = Embedder.from_pretrained(run_dir), Embedder.from_pretrained(file)
    assert torch.equal(before.encode(TEXTS, paths="all"), after.encode(TEXTS, paths="all"))
    concat_BE, small_BD = before.encode(TEXTS), after.encode(TEXTS)
    assert (concat_BE.shape[1], small_BD.shape[1]) == (64, 32)
    cut_Bd = after.encode(TEXTS, truncate_dim=8)
    torch.testing.assert_close(cut_Bd, F.normalize(small_BD[:, :8], dim=-1))
    after.save_pretrained(tmp_path / "shared")
    torch.testing.assert_close(Embedder.from_pretrained(tmp_path / "shared").encode(TEXTS), small_BD)
    module = PDFEmbedder.load_from_checkpoint(file)
    assert module.hparams["aggregation"] == "linear"
    with pytest.raises(ValueError, match="compress"):
        make_trainer(tmp_path, max_steps=3).fit(
            module, small_data(tiny_mmeb_dir), ckpt_path=file, weights_only=True
        )
    assert "exists; name another file" in mistake(["compress", str(run_dir), str(file)])
    new = str(tmp_path / "new.ckpt")
    assert "is an exported folder" in mistake(["compress", str(tmp_path / "shared"), new])


def test_one_path_has_nothing_to_compress(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, mistake: Any
) -> None:
    run_dir = save_run(tiny_backbone_dir, tiny_mmeb_dir, tmp_path, num_paths=1, aggregate_weight=0.0)
    assert "one path" in mistake(["compress", str(run_dir), str(tmp_path / "small.ckpt")])
