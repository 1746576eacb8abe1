"""Models on the hub, which is a folder here: the network is never asked."""

from __future__ import annotations

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
from tests.support.embedders import mixed_inputs, tiny_embedder


class Hub:
    """Repositories are folders by name and revision; what was downloaded is remembered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.created = folder, list[tuple[str, Any]]()

    def create_repo(self, api: Any, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.created.append((repo_id, private))

    def upload_folder(self, api: Any, *, repo_id: str, folder_path: Path, revision: str | None) -> Any:
        shutil.copytree(folder_path, self.folder / repo_id / (revision or "main"))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        source, copy = self.folder / repo_id / (revision or "main"), self.folder / "cache" / repo_id
        if not source.is_dir():
            raise LocalEntryNotFoundError("cannot be reached")

        def unwanted(folder: str, names: list[str]) -> list[str]:
            files = [name for name in names if (Path(folder) / name).is_file()]
            return [name for name in files if not any(fnmatch(name, each) for each in allow_patterns)]

        return str(shutil.copytree(source, copy, ignore=unwanted, dirs_exist_ok=True))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **o: fake.create_repo(*a, **o))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *a, **o: fake.upload_folder(*a, **o))
    monkeypatch.setattr(pretrained, "snapshot_download", fake.snapshot_download)
    return fake


def test_pushed_and_loaded_it_gives_the_same_embeddings(hub: Hub, embedder: Embedder) -> None:
    url = embedder.push_to_hub("me/model", private=True, revision="v1", paths=[2, 0], card={"license": "mit"})
    assert url == "https://hub/me/model/commit/1"
    assert hub.created == [("me/model", True)]
    (hub.folder / "me/model/v1/weights.bin").write_bytes(b"a pickle")
    (hub.folder / "me/model/v1/modeling.py").write_text("raise SystemExit")
    loaded = Embedder.from_pretrained("me/model", revision="v1", device="cpu")
    assert torch.equal(
        loaded.encode(mixed_inputs(), paths="all"), embedder.encode(mixed_inputs(), paths=[2, 0])
    )
    assert not list((hub.folder / "cache").rglob("*.bin"))
    assert not list((hub.folder / "cache").rglob("*.py"))
    assert ModelCard.load(hub.folder / "me/model/v1/README.md").data.license == "mit"


def test_what_the_hub_does_not_have(hub: Hub, embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model at 'runs/none', here or on the hub: cannot be reached"):
        Embedder.from_pretrained("runs/none")
    (hub.folder / "other/model/main").mkdir(parents=True)
    with pytest.raises(ValueError, match="no model at"):
        Embedder.from_pretrained("other/model")
    embedder.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is not a model of the hub"):
        Embedder.from_pretrained(tmp_path / "model", revision="v1")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_dtype_is_that_of_the_backbone_alone(kind: str, tiny_backbone_dir: str, tmp_path: Path) -> None:
    embedder = tiny_embedder(tiny_backbone_dir, kind=kind)
    embedder.save_pretrained(tmp_path / "model")
    half = Embedder.from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert half.encoder.backbone.dtype == torch.bfloat16
    assert {p.dtype for n, p in half.encoder.named_parameters() if "lora_" in n} <= {torch.float32}
    cosine = (half.encode(mixed_inputs()) * embedder.encode(mixed_inputs())).sum(dim=1)
    assert 0.98 < cosine.min() < 0.999999
    assert encoder_identity(half.encoder)["sha256"] != encoder_identity(embedder.encoder)["sha256"]
    if kind == "lora":
        trained = tiny_embedder(tiny_backbone_dir, kind=kind, loading={"dtype": "bfloat16"})
        load_trainable_state(trained.encoder, trainable_state(embedder.encoder))
        assert torch.equal(half.encode(mixed_inputs()), trained.encode(mixed_inputs()))


def test_the_card_has_base_model_data_licence_and_results(embedder: Embedder, tmp_path: Path) -> None:
    tasks: dict[str, Any] = {
        "VOC2007": {"hit_at_1": {"aggregate": 0.5, "path_0": 0.4, "path_1": 0.25}},
        "Documents": {"metric": "ndcg@5", "hit_at_1": {}, "metrics": {"aggregate": {"ndcg@5": 0.75}}},
    }
    scores = {"means": {"overall": {"aggregate": 0.5}}, "tasks": tasks}
    about = {"license": "apache-2.0", "datasets": ["owner/data"]}
    embedder.save_pretrained(tmp_path / "all", scores=scores, card=about)
    data = ModelCard.load(tmp_path / "all" / "README.md").data
    assert (data.license, data.datasets, data.base_model) == ("apache-2.0", ["owner/data"], None)
    found = {each.dataset_name: (each.metric_type, each.metric_value) for each in data.eval_results}
    assert found == {"VOC2007": ("hit@1", 0.5), "Documents": ("ndcg@5", 0.75)}
    embedder.save_pretrained(tmp_path / "one", [1], scores=scores)
    (only,) = ModelCard.load(tmp_path / "one" / "README.md").data.eval_results
    assert only.metric_value == 0.25
    config = {"settings": {}, "run": {"model": {"num_paths": 3}}, "paths": [0, 2], "embed_dim": 1}
    config |= {"backbone": {"name": "owner/base", "sha256": ""}, "backbone_included": False}
    config |= {"aggregate_dim": 1, "query_instruction": "", "candidate_instruction": ""}
    card = ModelCard(pretrained.model_card(config, scores)).data
    assert (card.base_model, card.eval_results) == ("owner/base", None), "some of the paths have no score"
