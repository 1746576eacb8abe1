"""Exported folders: the same embeddings, only what belongs to the chosen paths, checked files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.dual_backbone import load_dual_backbone
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.pretrained import is_pretrained, load_encoder, read_config
from parallel_decoupling.model.trained_state import trainable_state
from tests.support.embedders import mixed_inputs, tiny_embedder
from tests.support.families import save_tiny_family
from tests.support.tiny import save_tiny_backbone

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"kind": "dora"},
    "frozen": {"kind": "frozen"},
    "full": {"kind": "full"},
    "learned": {"aggregation": "learned"},
    "concat": {"aggregation": "concat"},
    "upper layers": {"prefix_layers": 1},
    "plain": {"num_paths": 1, "prefix_length": 0},
    "bfloat16": {"loading": {"dtype": "bfloat16"}},
    "eager": {"loading": {"attention": "eager"}},
}


def both(embedder: Embedder) -> tuple[torch.Tensor, torch.Tensor]:
    """All paths and the aggregate."""
    return embedder.encode(mixed_inputs()), embedder.encode(mixed_inputs(), paths="aggregate")


@pytest.fixture(scope="module")
def embedder(tiny_backbone_dir: str) -> Embedder:
    return tiny_embedder(tiny_backbone_dir)


@pytest.fixture
def folder(embedder: Embedder, tmp_path: Path) -> Path:
    embedder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("included", [False, True], ids=["referred to", "included"])
@pytest.mark.parametrize("name", SETTINGS)
def test_embeddings_are_equal_bit_for_bit(
    name: str, included: bool, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    embedder = tiny_embedder(tiny_backbone_dir, **SETTINGS[name])
    before = both(embedder)
    embedder.save_pretrained(tmp_path / "model", include_backbone=included)
    loaded = Embedder.from_pretrained(tmp_path / "model")
    for old, new in zip(before, both(loaded), strict=True):
        assert torch.equal(old, new)
    assert (loaded.query_instruction, loaded.candidate_instruction) == ("find", "show")
    assert loaded.encoder.aggregate_dim == embedder.encoder.aggregate_dim
    assert (tmp_path / "model" / "backbone").exists() == (included or name == "full")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_adapters_are_close_and_leave_the_model_as_it_was(
    kind: str, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    embedder = tiny_embedder(tiny_backbone_dir, kind=kind)
    weights = {name: value.clone() for name, value in embedder.encoder.state_dict().items()}
    before = both(embedder)
    embedder.save_pretrained(tmp_path / "model", merge_adapters=True)
    for name, value in embedder.encoder.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for old, again in zip(before, both(embedder), strict=True):
        assert torch.equal(old, again)
    loaded = Embedder.from_pretrained(tmp_path / "model")
    for old, new in zip(before, both(loaded), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
    assert list(load_file(tmp_path / "model" / "model.safetensors")) == ["prefixes.key_values"]
    assert not any("lora_" in name for name in loaded.encoder.state_dict())


def test_adapters_matter(embedder: Embedder, tiny_backbone_dir: str) -> None:
    """Without them the merged export would differ far more than the tolerance above."""
    plain = tiny_embedder(tiny_backbone_dir, kind="frozen")
    assert (embedder.encode(mixed_inputs()) - plain.encode(mixed_inputs())).abs().max() > 1e-2


def test_one_path_has_only_its_own_parameters(embedder: Embedder, tmp_path: Path) -> None:
    embedder.save_pretrained(tmp_path / "one", paths=[2])
    state, whole = load_file(tmp_path / "one" / "model.safetensors"), trainable_state(embedder.encoder)
    assert state.keys() == whole.keys()
    assert torch.equal(state["prefixes.key_values"], whole["prefixes.key_values"][2:3])
    loaded = Embedder.from_pretrained(tmp_path / "one")
    assert loaded.encoder.num_paths == 1
    expected = embedder.encode(mixed_inputs(), paths=2)
    assert torch.equal(loaded.encode(mixed_inputs(), paths=0), expected)
    torch.testing.assert_close(loaded.encode(mixed_inputs(), paths="aggregate"), expected)


@pytest.mark.parametrize("aggregation", ["mean", "concat", "learned"])
def test_some_paths_keep_their_order_and_have_their_own_aggregate(
    aggregation: str, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    embedder = tiny_embedder(tiny_backbone_dir, aggregation=aggregation)
    embedder.save_pretrained(tmp_path / "two", paths=[2, 0])
    loaded = Embedder.from_pretrained(tmp_path / "two")
    chosen = embedder.encode(mixed_inputs(), paths=[2, 0])
    assert torch.equal(loaded.encode(mixed_inputs()), chosen)
    logits = embedder.encoder.path_logits
    weight = torch.ones(2) if logits is None else logits.detach()[[2, 0]].softmax(0)
    expected = chosen.flatten(1) if aggregation == "concat" else (chosen * weight[:, None]).sum(1)
    aggregate = loaded.encode(mixed_inputs(), paths="aggregate")
    torch.testing.assert_close(aggregate, F.normalize(expected, dim=-1))
    config = read_config(tmp_path / "two")
    assert config["paths"] == [2, 0]
    assert config["aggregate_dim"] == aggregate.shape[1]


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next_mistral"])
def test_other_families_come_with_their_backbone(name: str, tmp_path: Path) -> None:
    embedder = tiny_embedder(save_tiny_family(name, tmp_path / "source"), num_paths=2)
    before = embedder.encode(mixed_inputs())
    embedder.save_pretrained(tmp_path / "kept", include_backbone=True)
    embedder.save_pretrained(tmp_path / "merged", merge_adapters=True)
    shutil.rmtree(tmp_path / "source")
    assert torch.equal(Embedder.from_pretrained(tmp_path / "kept").encode(mixed_inputs()), before)
    merged = Embedder.from_pretrained(tmp_path / "merged").encode(mixed_inputs())
    torch.testing.assert_close(merged, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["frozen", "full"])
def test_openclip_models_too(kind: str, tiny_clip_dir: str, tmp_path: Path) -> None:
    backbone = load_dual_backbone(tiny_clip_dir, adapter=AdapterConfig(kind=kind))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    embedder = Embedder(DualEncoder(backbone).eval())
    embedder.save_pretrained(tmp_path / "clip")
    loaded = Embedder.from_pretrained(tmp_path / "clip")
    texts = ["a red circle", "a blue square"]
    assert torch.equal(loaded.encode(texts), embedder.encode(texts))
    with pytest.raises(ValueError, match="referred to by its name"):
        embedder.save_pretrained(tmp_path / "other", include_backbone=True)


def test_export_of_an_export(folder: Path, tmp_path: Path, embedder: Embedder) -> None:
    loaded = Embedder.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again", paths=[1])
    again = Embedder.from_pretrained(tmp_path / "again")
    assert torch.equal(again.encode(mixed_inputs(), paths=0), embedder.encode(mixed_inputs(), paths=1))


def test_shipped_backbone_is_named(tmp_path: Path) -> None:
    tiny_embedder("tiny", num_paths=1).save_pretrained(tmp_path / "model")
    config = read_config(tmp_path / "model")
    assert config["backbone"]["name"] == "tiny"
    assert Embedder.from_pretrained(tmp_path / "model").encode(["a red circle"]).shape == (1, 1, 160)


def test_folder_holds_no_pickle(folder: Path) -> None:
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".jinja", ".txt"}


SCRIPT = """
import pickle, socket, sys
sys.modules.update(dict.fromkeys(("lightning", "pytorch_lightning")))
def refuse(*arguments, **options):
    raise AssertionError("no network, no pickle")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
import torch
torch.load = refuse
from parallel_decoupling import Embedder
torch.set_num_threads(1)
print(Embedder.from_pretrained(sys.argv[1]).encode(["a red circle"], paths=1).double().tolist())
"""


@pytest.mark.slow
def test_loads_without_lightning_network_and_pickle(folder: Path, embedder: Embedder) -> None:
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = embedder.encode(["a red circle"], paths=1).double().tolist()
    torch.set_num_threads(threads)
    assert json.loads(result.stdout) == expected


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_not_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no exported model"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert not is_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_pretrained(tmp_path)
    edit(folder, format=2)
    with pytest.raises(ValueError, match="format 2"):
        load_encoder(folder)


def test_missing_and_changed_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="its hash differs"):
        load_encoder(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_encoder(folder)
    weights.write_bytes(content)
    shutil.rmtree(folder / "processor")
    with pytest.raises(ValueError, match="processor is missing"):
        load_encoder(folder)


def test_settings_that_do_not_fit_the_weights(folder: Path) -> None:
    edit(folder, paths=[0, 1])
    with pytest.raises(ValueError, match=r"model\.safetensors.*wrong shape"):
        load_encoder(folder)


def test_another_backbone(tmp_path: Path) -> None:
    source = save_tiny_backbone(tmp_path / "source")
    tiny_embedder(source).save_pretrained(tmp_path / "model")
    save_tiny_backbone(tmp_path / "source", seed=1)
    with pytest.raises(ValueError, match="frozen weights differ; load the backbone"):
        load_encoder(tmp_path / "model")
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="does not exist"):
        load_encoder(tmp_path / "model")


def test_a_folder_of_another_transformers_version(folder: Path, embedder: Embedder) -> None:
    backbone = read_config(folder)["backbone"]
    fingerprint = backbone["fingerprint"]
    vision = fingerprint["config"]["vision_config"]
    fingerprint |= {"transformers_version": "5.22.2", "sha256": "0" * 64}
    vision["vision_use_head"] = True
    edit(folder, backbone=backbone)
    with pytest.warns(UserWarning, match="vision_config.vision_use_head"):
        loaded = Embedder.from_pretrained(folder)
    assert torch.equal(loaded.encode(["a red circle"]), embedder.encode(["a red circle"]))
    vision["hidden_act"] = "relu"
    edit(folder, backbone=backbone)
    with pytest.raises(ValueError, match="vision_config.hidden_act was 'relu' and is 'quick_gelu'"):
        load_encoder(folder)


def test_backbone_of_the_hub_is_not_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = read_config(folder)
    edit(folder, backbone={**config["backbone"], "name": "owner/model", "revision": "abc"})
    with pytest.raises(ValueError, match="hf download owner/model --revision abc"):
        load_encoder(folder)


def test_what_is_not_exported(embedder: Embedder, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already holds a model"):
        embedder.save_pretrained(folder)
    for paths in ([3], [], [0, 0]):
        with pytest.raises(ValueError, match="paths must name some of 0 to 2"):
            embedder.save_pretrained(tmp_path / "other", paths=paths)
    assert not (tmp_path / "other").exists()
