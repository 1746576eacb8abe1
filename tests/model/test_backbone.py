"""Loading a backbone, and what the battery of all families does not ask of language models without vision."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.adapters import adapted_layers, draw_adapters
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.model.test_encoder import FROZEN, OTHER_SIZES, ROWS, join
from tests.model.test_families import ROWS as IMAGES
from tests.model.test_families import TEXTS, collate, stock_alone
from tests.support.embedders import tiny_embedder
from tests.support.families import TEXT_FAMILIES, raw_input, save_tiny_family
from tests.support.tiny import noise_image, tiny_inputs
from tests.test_configs import make_plan


@pytest.mark.parametrize("adapter", [FROZEN, AdapterConfig(kind="lora"), AdapterConfig(kind="dora")])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_prefix_it_is_the_stock_model(
    tiny_backbone_dir: str, attention: str, adapter: AdapterConfig
) -> None:
    backbone = load_backbone(tiny_backbone_dir, attention=attention, adapter=adapter)
    stock = AutoModel.from_pretrained(tiny_backbone_dir, attn_implementation=attention)
    tolerance = 1e-5 if adapter.kind == "dora" else 0  # DoRA divides by the norm and multiplies it back
    for rows in (ROWS, OTHER_SIZES):
        inputs = tiny_inputs(backbone.processor, rows)
        actual = backbone(inputs.tokens, join(inputs))
        expected = stock(**inputs.tokens, **join(inputs), use_cache=False).last_hidden_state
        real = inputs.tokens["attention_mask"].bool()
        torch.testing.assert_close(actual[real], expected[real], rtol=tolerance, atol=tolerance)


def test_adapters_are_fp32_on_a_bfloat16_backbone(tiny_backbone_dir: str) -> None:
    backbone = load_backbone(tiny_backbone_dir, dtype="bfloat16")
    assert backbone.dtype == torch.bfloat16
    for name, parameter in backbone.base.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_unmatched_targets_raise(tiny_backbone_dir: str) -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        load_backbone(tiny_backbone_dir, adapter=AdapterConfig(targets=("qkv",)))
    with pytest.raises(ValueError, match="called .*'k_porj'.*; there are .*k_proj"):
        load_backbone(tiny_backbone_dir, adapter=AdapterConfig(targets=("q_proj", "k_porj")))
    every_family = AdapterConfig(targets=("q_proj", "qkv_proj", "out_proj"))  # as in VLM2Vec's list
    assert len(adapted_layers(load_backbone(tiny_backbone_dir, adapter=every_family).base)) == 2


def test_building_asks_no_gpu_for_its_state(tiny_backbone_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError("a GPU would be initialised in every process")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked)
    draw_adapters(load_backbone(tiny_backbone_dir).base, 3, fresh=True)


def test_unknown_family_raises(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    with pytest.raises(ValueError, match="paligemma.*qwen2_vl"):
        load_backbone(str(tmp_path))


def test_weights_that_do_not_fit_raise(tiny_backbone_dir: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_backbone_dir, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.1.self_attn.q_proj.weight"))
    more, less = {**weights, name.replace("q_proj", "r_proj"): weights[name].clone()}, {**weights}
    del less[name]
    for changed, message in ((less, "q_proj"), (more, "r_proj")):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_backbone(str(folder))


def test_impossible_options_raise(tiny_backbone_dir: str) -> None:
    with pytest.raises(ValueError, match="quantization must be '4bit', got '8bit'"):
        load_backbone(tiny_backbone_dir, quantization="8bit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora, dora or frozen"):
        load_backbone(tiny_backbone_dir, quantization="4bit", adapter=AdapterConfig(kind="full"))


@pytest.mark.parametrize(("attention", "name"), [("flex_attention", "prefix_flex"), ("sdpa", "prefix_sdpa")])
def test_only_the_language_model_gets_prefix_attention(
    tiny_backbone_dir: str, attention: Any, name: str
) -> None:
    config: Any = load_backbone(tiny_backbone_dir, attention=attention).config
    assert config.text_config._attn_implementation == name
    assert config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["frozen", "lora", "dora", "full"])
def test_meta_backbone_has_the_parameters_of_the_loaded_one(tiny_backbone_dir: str, kind: Any) -> None:
    options: dict[str, Any] = {"adapter": AdapterConfig(kind=kind), "dtype": "bfloat16"}

    def described(backbone: Any) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in backbone.named_parameters()}

    meta, loaded = (load_backbone(tiny_backbone_dir, **options, meta=meta) for meta in (True, False))
    assert described(meta) == described(loaded)
    assert [*adapted_layers(meta.base)] == [*adapted_layers(loaded.base)]


@pytest.fixture(params=TEXT_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return save_tiny_family(request.param, tmp_path / "backbone")


@pytest.mark.parametrize("name", [*TEXT_FAMILIES, "qwen3_vl", "llava_next_mistral"])
@torch.no_grad()
def test_a_path_is_exported_as_a_stock_model_and_its_prefix(name: str, tmp_path: Path) -> None:
    folder, rows = save_tiny_family(name, tmp_path / "backbone"), TEXTS if name in TEXT_FAMILIES else IMAGES
    embedder = tiny_embedder(folder, per_path=True)
    before = embedder.encode(rows, paths="all")
    embedder.save_pretrained(tmp_path / "kept", include_backbone=True)
    embedder.save_pretrained(tmp_path / "path_1", paths=[1], merge_adapters=True)
    shutil.rmtree(folder)
    assert torch.equal(Embedder.from_pretrained(tmp_path / "kept").encode(rows, paths="all"), before)
    merged = Embedder.from_pretrained(tmp_path / "path_1").encode(rows)
    torch.testing.assert_close(merged, before[:, 1], rtol=1e-5, atol=1e-5)
    stock: Any = AutoModel.from_pretrained(tmp_path / "path_1" / "backbone")
    processor = AutoProcessor.from_pretrained(tmp_path / "path_1" / "backbone")
    prefix = dict(enumerate(embedder.encoder.prefixes.key_values[1]))
    for row, embedding in zip(rows, before[:, 1], strict=True):
        expected = stock_alone(stock, processor, embedder.encoder.image_token, row, prefix)
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_is_one_error_with_its_place(folder: str) -> None:
    backbone = load_backbone(folder, adapter=AdapterConfig(kind="frozen"))
    rows = [TEXTS[0], raw_input("what is this?", noise_image(20, 20))]
    with pytest.raises(ValueError, match=r"refuses '<\|image_1\|>\\nwhat .*the backbone reads text alone"):
        collate(backbone, rows)
    with pytest.raises(ValueError, match="the backbone reads text alone"):
        Embedder(ParallelEncoder(backbone, num_paths=1)).encode(noise_image(20, 20))


def test_files_that_name_a_processor_are_read_as_a_tokenizers(tmp_path: Path) -> None:
    folder = Path(save_tiny_family("gemma3_text", tmp_path))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["processor_class"] = "Gemma3Processor"  # as in google/gemma-3-270m, without an image processor
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    backbone = load_backbone(str(folder), adapter=AdapterConfig(kind="frozen"))
    assert collate(backbone, TEXTS).tokens.keys() == {"input_ids", "attention_mask"}


@torch.no_grad()
def test_prompts_longer_than_the_window_keep_all_positions(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny_family("gemma3_text", tmp_path), adapter=AdapterConfig(kind="frozen"))
    short, long = (backbone.text_embeddings("count the objects", length) for length in (1, 9))
    states = backbone.prompt_states(long[None])
    assert states.shape[4] == len(long) > backbone.config.sliding_window < len(short)
    torch.testing.assert_close(states[..., : len(short), :], backbone.prompt_states(short[None]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_plan_has_all_parameters_and_no_pictures(folder: str, kind: Any) -> None:
    adapter = AdapterConfig(kind=kind)
    plan = make_plan(
        folder, adapter=adapter, num_paths=2, prefix_init="random", mi_weight=0.0, mi={"kind": "none"}
    )
    encoder = ParallelEncoder(load_backbone(folder, adapter=adapter), num_paths=2)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert sum(numbers for numbers, _, _ in plan.groups.values()) == count
    assert not any("vision" in part for part in plan.groups)
    assert plan.memory["pixels of the batch"] == plan.image.tokens == 0
