"""Encoders on disk: the same embeddings, only what belongs to the chosen paths, checked files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.identity import path_hashes, sealed, trainable_state, weights_hash
from parallel_decoupling.model.open_clip import load_open_clip
from parallel_decoupling.model.pretrained import is_pretrained, load_encoder
from parallel_decoupling.model.run_checkpoint import checkpoint_file, read_checkpoint
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.embedders import mixed_inputs, tiny_embedder
from tests.support.families import save_tiny_backbone
from tests.support.tiny import noise_image

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"kind": "dora"},
    "frozen": {"kind": "frozen"},
    "full": {"kind": "full"},
    "learned": {"aggregation": "learned"},
    "concat": {"aggregation": "concat"},
    "own adapters": {"per_path": True, "prefix_length": 0},
    "own adapters above": {"per_path": True, "prefix_layers": 1},
    "upper layers": {"prefix_layers": 1},
    "plain": {"num_paths": 1, "prefix_length": 0},
    "bfloat16": {"loading": {"dtype": "bfloat16"}},
    "eager": {"loading": {"attention": "eager"}},
}


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def both(embedder: Embedder) -> tuple[torch.Tensor, torch.Tensor]:
    """All paths and the aggregate."""
    return every_path(embedder), embedder.encode(mixed_inputs())


def every_path(embedder: Embedder, paths: Any = "all") -> torch.Tensor:
    return embedder.encode(mixed_inputs(), paths=paths)


@pytest.fixture
def folder(embedder: Embedder, tmp_path: Path) -> Path:
    embedder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("included", [False, True], ids=["referred to", "included"])
@pytest.mark.parametrize("name", SETTINGS)
def test_embeddings_are_equal_bit_for_bit(
    name: str, included: bool, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    """A folder beside the new one is referred to; see ``test_a_backbone_that_is_elsewhere_is_included``."""
    source = shutil.copytree(tiny_backbone_dir, tmp_path / "source")
    embedder = tiny_embedder(str(source), **SETTINGS[name])
    before = both(embedder)
    embedder.save_pretrained(tmp_path / "model", include_backbone=included)
    loaded = Embedder.from_pretrained(tmp_path / "model")
    for old, new in zip(before, both(loaded), strict=True):
        assert torch.equal(old, new)
    assert (loaded.query_instruction, loaded.candidate_instruction) == ("find", "show")
    assert loaded.encoder.aggregate_dim == embedder.encoder.aggregate_dim
    assert (tmp_path / "model" / "backbone").exists() == (included or name == "full")
    kinds = {file.suffix for file in (tmp_path / "model").rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".jinja", ".txt"}, "no pickle"


def test_a_backbone_that_is_elsewhere_is_included(
    tiny_backbone_dir: str, tiny_clip_dir: str, tmp_path: Path
) -> None:
    """Its folder is not named; what cannot be included is refused."""
    embedder = tiny_embedder(tiny_backbone_dir)
    embedder.save_pretrained(tmp_path / "model")
    assert config_of(tmp_path / "model")["settings"]["backbone"] is None
    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert torch.equal(every_path(Embedder.from_pretrained(tmp_path / "moved")), every_path(embedder))
    clip = Embedder(load_open_clip(tiny_clip_dir, adapter=AdapterConfig(kind="frozen")))
    with pytest.raises(ValueError, match="beside its folder if it is a local one"):
        clip.save_pretrained(tmp_path / "clip")


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


@pytest.mark.parametrize("per_path", [False, True])
@pytest.mark.parametrize("aggregation", ["mean", "concat", "learned", "linear"])
def test_some_paths_keep_their_order_and_have_their_own_parameters_and_aggregate(
    aggregation: str, per_path: bool, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    embedder = tiny_embedder(tiny_backbone_dir, aggregation=aggregation, per_path=per_path)
    embedder.save_pretrained(tmp_path / "two", paths=[2, 0])
    loaded = Embedder.from_pretrained(tmp_path / "two")
    chosen = embedder.encode(mixed_inputs(), paths=[2, 0])
    assert torch.equal(every_path(loaded), chosen)
    hashes, state = path_hashes(embedder.encoder), load_file(tmp_path / "two" / "model.safetensors")
    assert path_hashes(loaded.encoder) == [hashes[2], hashes[0]]
    assert {len(value) for name, value in state.items() if per_path or "lora" not in name} == {2}
    logits, maps = (
        value if value is None else value.detach()[[2, 0]]
        for value in (embedder.encoder.path_logits, embedder.encoder.path_maps)
    )
    weight = torch.ones(2) if logits is None else logits.softmax(0)
    mapped = chosen if maps is None else torch.einsum("bnd,nde->bne", chosen, maps)
    expected = chosen.flatten(1) if aggregation == "concat" else (mapped * weight[:, None]).sum(1)
    aggregate = loaded.encode(mixed_inputs())
    torch.testing.assert_close(aggregate, F.normalize(expected, dim=-1))
    config = config_of(tmp_path / "two")
    assert config["paths"] == [2, 0]
    assert config["aggregate_dim"] == aggregate.shape[1]


@pytest.mark.parametrize("kind", ["frozen", "full"])
def test_openclip_models_too(kind: Any, tiny_clip_dir: str, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_clip_dir, tmp_path / "source")
    encoder = load_open_clip(str(source), adapter=AdapterConfig(kind=kind))
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    embedder = Embedder(encoder.eval())
    embedder.save_pretrained(tmp_path / "clip")
    loaded = Embedder.from_pretrained(tmp_path / "clip")
    texts = ["a red circle", "a blue square"]
    assert torch.equal(loaded.encode(texts), embedder.encode(texts))
    with pytest.raises(ValueError, match="referred to by its name"):
        embedder.save_pretrained(tmp_path / "other", include_backbone=True)


SCRIPT = """
import sys
BLOCKED = {"lightning", "pytorch_lightning", "matplotlib", "sklearn", "tensorboard", "torchmetrics", "rich"}
BLOCKED |= {"open_clip"}
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, *arguments)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Hidden, sys.meta_path)
def refuse(*arguments, **options):
    raise AssertionError("no pickle")
import torch
from parallel_decoupling import Embedder
from parallel_decoupling.model.identity import encoder_identity
from parallel_decoupling.model.pretrained import load_encoder
if "export" in sys.argv[1]:
    torch.load = refuse
print(encoder_identity(load_encoder(sys.argv[1])[0])["weights_sha256"])
assert Embedder.from_pretrained(sys.argv[1]).encode("a", paths="all").shape[1] == 32
assert not BLOCKED & set(sys.modules)
"""


@pytest.mark.parametrize("source", ["export", "run"])
def test_needs_neither_lightning_nor_the_packages_of_reports(
    source: str, embedder: Embedder, run_dir: Path, tmp_path: Path
) -> None:
    """As if they were not installed; nor for an exported folder pickle."""
    folder = run_dir
    if source == "export":
        folder = tmp_path / "export"
        embedder.save_pretrained(folder)
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == weights_hash(trainable_state(load_encoder(folder)[0]))


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(sealed({**config_of(folder), **values})))


def test_not_a_model(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.ckpt"):
        with pytest.raises(ValueError, match="no model at .* lightning export"):
            load_encoder(path)
    for content, problem in (('{"model_type": "bert"}', "model_type: .*paths: "), ("[" * 100_000, "damaged")):
        (tmp_path / "config.json").write_text(content)
        assert not is_pretrained(tmp_path)
        with pytest.raises(ValueError, match=problem):
            load_encoder(tmp_path)


def test_an_export_goes_to_what_a_link_means_and_not_into_the_working_folder(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    embedder.save_pretrained(tmp_path / "link")
    load_encoder(tmp_path / "there")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="is the working folder"):
        embedder.save_pretrained(".")


def test_a_config_that_was_sealed_with_other_keys_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    embedder.save_pretrained(tmp_path / "model")
    for values in ({"more": 1}, {"paths": "0"}, {"files": None}):
        edit(tmp_path / "model", **values)
        with pytest.raises(ValueError, match=f"save_pretrained wrote; .*{[*values][0]}: "):
            load_encoder(tmp_path / "model")


def test_a_file_that_was_added_to_the_backbone_is_refused(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    embedder.save_pretrained("~/model")
    load_encoder("~/model")
    (tmp_path / "model" / "backbone" / "special_tokens_map.json").write_text('{"pad_token": "a"}')
    with pytest.raises(ValueError, match="special_tokens_map.json are missing, .* changed or added after"):
        load_encoder(tmp_path / "model")


def test_another_backbone(tmp_path: Path) -> None:
    source = save_tiny_backbone(tmp_path / "source")
    tiny_embedder(source).save_pretrained(tmp_path / "model")
    save_tiny_backbone(tmp_path / "source", seed=1)
    with pytest.raises(ValueError, match="frozen weights differ; load the backbone"):
        load_encoder(tmp_path / "model")


def test_backbone_of_the_hub_is_not_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = config_of(folder)
    settings = {**config["settings"], "backbone": "owner/model", "revision": "abc"}
    edit(folder, settings=settings, backbone_included=False)
    with pytest.raises(ValueError, match="backbone 'owner/model' has no config"):
        load_encoder(folder)


def test_what_is_not_exported(embedder: Embedder, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already holds a model"):
        embedder.save_pretrained(folder)
    for paths in ([3], [], [0, 0]):
        with pytest.raises(ValueError, match="paths must name"):
            embedder.save_pretrained(tmp_path / "other", paths=paths)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def test_an_export_of_a_run_knows_the_run(run_dir: Path, tmp_path: Path) -> None:
    loaded = Embedder.from_pretrained(run_dir)
    loaded.save_pretrained(tmp_path / "export", paths=[1])
    exported = Embedder.from_pretrained(tmp_path / "export")
    model, data = loaded.run["model"] | {"backbone": None}, loaded.run["data"] | {"data_dir": None}
    assert exported.run == loaded.run | {"model": model, "data": data}, "without absolute paths"
    assert exported.images.settings == loaded.images.settings
    assert path_hashes(exported.encoder) == path_hashes(loaded.encoder)[1:2]
    assert "| main steps | 2 |" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")


def test_other_files_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_pretrained\.py is not a checkpoint, or is damaged"):
        read_checkpoint(__file__)
    torch.save(torch.zeros(2), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt is not a checkpoint of a run; "):
        read_checkpoint(tmp_path / "other.ckpt")


def test_what_a_training_writes_is_read_as_by_its_own_class(
    trained_run: Path, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    """The module, its checkpoint, the exported folder and what is saved again from it: one picture size."""
    inputs = ["a red circle", noise_image(40, 30)]
    module = PDFEmbedder.load_from_checkpoint(checkpoint_file(trained_run)).eval()
    expected = module.encode(inputs, paths="all")
    loaded = Embedder.from_pretrained(trained_run)
    assert not loaded.encoder.training
    loaded.save_pretrained(tmp_path / "export")
    exported = Embedder.from_pretrained(tmp_path / "export")
    exported.save_pretrained(tmp_path / "again")
    again = Embedder.from_pretrained(tmp_path / "again")
    for model in (loaded, exported, again, Embedder.from_pretrained(checkpoint_file(trained_run))):
        assert torch.equal(model.encode(inputs, paths="all"), expected)
        assert torch.equal(model.encode(inputs), module.encode(inputs))
    square = noise_image(40, 30).resize((128, 128), Image.Resampling.BICUBIC)
    torch.testing.assert_close(Embedder(loaded.encoder).encode(square, paths="all"), expected[1])
    assert not torch.allclose(Embedder(loaded.encoder).encode(inputs[1], paths="all"), expected[1], atol=1e-3)
    assert loaded.query_instruction == exported.query_instruction == "find"
    assert loaded.run["global_step"] == exported.run["global_step"] == 2
    assert loaded.run["data"]["data_dir"] == tiny_mmeb_dir
    assert sum(loaded.run["rows_by_subset"].values()) == 16
