"""Models on the hub, which is a folder here: the network is never asked."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model import pretrained
from parallel_decoupling.model.identity import encoder_identity, load_trainable_state, trainable_state
from parallel_decoupling.model.model_card import model_card
from tests.support.embedders import mixed_inputs, tiny_embedder


def test_pushed_and_loaded_it_gives_the_same_embeddings(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repositories are folders by name and revision; what a download asks for is neither code nor pickle."""

    def upload(api: Any, *, repo_id: str, folder_path: Path, revision: str) -> Any:
        shutil.copytree(folder_path, tmp_path / repo_id / revision)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert not any(fnmatch(name, each) for name in ("a.bin", "a.pt", "a.py") for each in allow_patterns)
        if not (folder := tmp_path / repo_id / str(revision)).is_dir():
            raise LocalEntryNotFoundError("cannot be reached")
        files = [str(file) for file in folder.rglob("*.*") if file.suffix != ".ckpt"]  # cached by others
        assert all(any(fnmatch(file, each) for each in allow_patterns) for file in files)
        return str(folder)

    created: list[Any] = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda api, *name, **how: created.append((name, how))
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr(pretrained, "snapshot_download", download)
    url = embedder.push_to_hub("me/model", private=True, revision="v1", paths=[2, 0])
    assert url == "https://hub/me/model/commit/1"
    assert created == [(("me/model",), {"private": True, "exist_ok": True})]
    loaded = Embedder.from_pretrained("me/model", revision="v1", device="cpu")
    assert torch.equal(
        loaded.encode(mixed_inputs(), paths="all"), embedder.encode(mixed_inputs(), paths=[2, 0])
    )
    (tmp_path / "other/model/None/checkpoints").mkdir(parents=True)
    (tmp_path / "other/model/None/checkpoints/last.ckpt").touch()
    for name, message in (
        ("runs/none", "here or on the hub: cannot be reached"),
        ("other/model", "of the hub, which has no config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            Embedder.from_pretrained(name)
    with pytest.raises(ValueError, match="is not a model of the hub"):
        Embedder.from_pretrained(tmp_path / "me/model/v1", revision="v1")


def test_a_dtype_is_that_of_the_backbone_alone(tiny_backbone_dir: str, tmp_path: Path) -> None:
    embedder = tiny_embedder(tiny_backbone_dir)
    embedder.save_pretrained(tmp_path / "model")
    half = Embedder.from_pretrained(tmp_path / "model", dtype="bfloat16")
    trained = tiny_embedder(tiny_backbone_dir, loading={"dtype": "bfloat16"})
    load_trainable_state(trained.encoder, trainable_state(embedder.encoder))
    assert torch.equal(half.encode(mixed_inputs()), trained.encode(mixed_inputs()))
    assert encoder_identity(half.encoder)["sha256"] != encoder_identity(embedder.encoder)["sha256"]


def test_the_card_has_base_model_data_licence_and_results(embedder: Embedder, tmp_path: Path) -> None:
    tasks: dict[str, Any] = {
        "VOC2007": {"hit_at_1": {"aggregate": 0.5, "path_0": 0.4, "path_1": 0.25}},
        "Documents": {"metric": "ndcg@5", "hit_at_1": {}, "metrics": {"aggregate": {"ndcg@5": 0.75}}},
    }
    scores = {"means": {"overall": {"aggregate": 0.5}}, "tasks": tasks}
    embedder.save_pretrained(tmp_path, scores=scores, card={"license": "mit", "datasets": ["owner/data"]})
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.datasets, data.base_model) == ("mit", ["owner/data"], None)
    found = {each.dataset_name: (each.metric_type, each.metric_value) for each in data.eval_results}
    assert found == {"VOC2007": ("hit@1", 0.5), "Documents": ("ndcg@5", 0.75)}
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"] = {"name": "owner/base", "sha256": ""}
    bare = model_card(config)
    run = {"model": {"num_paths": 3, "temperature": 0.05}, "rows_by_subset": {"b": 3}, "global_step": 480}
    config |= {"run": run, "query_instruction": "find | it"}
    for title, line in (
        ("Model", "| query instruction | find \\| it |"),
        ("Training data", '| rows seen by subset | {"b": 3} |'),
        ("Hyper-parameters", "| temperature | 0.05 |"),
        ("Compute", "| main steps | 480 |"),
        ("Scores", "| overall | aggregate 50.0 |"),
    ):
        assert line in model_card(config, scores).split(f"\n## {title}")[1].split("\n## ")[0]
        assert (f"## {title}" in bare) == (title in ("Model", "Scores"))
    assert "not evaluated" in bare
    for paths, expected in (([1], [0.25]), ([0, 2], None)):
        data = ModelCard(model_card({**config, "paths": paths}, scores)).data
        assert data.base_model == "owner/base"
        assert (data.eval_results and [each.metric_value for each in data.eval_results]) == expected
