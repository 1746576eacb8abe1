from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, DynamicCache

from parallel_decoupling.model import backbone as backbones
from parallel_decoupling.model.adapters import reset_adapters
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from tests.model.test_attention import FROZEN, OTHER_SIZES, ROWS, join
from tests.support.tiny import tiny_inputs

LANGUAGE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def test_positions_of_images_follow_the_grid_and_text_starts_at_zero(tiny_backbone_dir: str) -> None:
    backbone = load_backbone(tiny_backbone_dir, adapter=FROZEN)
    inputs = tiny_inputs(backbone.processor, ROWS)
    positions = backbone.position_ids(inputs.tokens, join(inputs))
    real = inputs.tokens["attention_mask"].bool()
    assert positions[:, 0, real[0]][:, :16].tolist() == [
        [0] * 16,
        [row for row in range(4) for _ in range(4)],
        [column for _ in range(4) for column in range(4)],
    ]
    length = int(real[1].sum())
    assert positions[:, 1, real[1]].tolist() == [list(range(length))] * 3
    without_types = {key: value for key, value in inputs.tokens.items() if key != "mm_token_type_ids"}
    assert torch.equal(backbone.position_ids(without_types, join(inputs)), positions)


def test_text_states_equal_the_cache_of_the_stock_model(tiny_backbone_dir: str) -> None:
    backbone = load_backbone(tiny_backbone_dir)
    stock = AutoModel.from_pretrained(tiny_backbone_dir, attn_implementation="sdpa")
    ids = backbone.processor.tokenizer("read the word read the word", return_tensors="pt")["input_ids"]
    cache = DynamicCache(config=stock.config.get_text_config())
    stock(input_ids=ids, past_key_values=cache, use_cache=True)
    single = backbone.processor.tokenizer("read the word")["input_ids"]
    states = backbone.text_states("read the word", min_length=len(single) + 1)
    assert states.shape == (2, 2, 2, ids.shape[1], 8)
    for layer in range(2):
        torch.testing.assert_close(states[layer, 0], cache.layers[layer].keys[0], rtol=0, atol=0)
        torch.testing.assert_close(states[layer, 1], cache.layers[layer].values[0], rtol=0, atol=0)
    assert backbone.base.training


def test_adapters_are_fp32_on_a_bfloat16_backbone(tiny_backbone_dir: str) -> None:
    backbone = load_backbone(tiny_backbone_dir, dtype="bfloat16")
    assert backbone.dtype == torch.bfloat16
    for name, parameter in backbone.base.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_adapter_weights_depend_on_the_seed_only(tiny_backbone_dir: str) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 1)
        before = torch.get_rng_state()
        backbone = load_backbone(tiny_backbone_dir)
        reset_adapters(backbone.base, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return [p.detach() for name, p in backbone.named_parameters() if "lora_A" in name]

    for first, second, other in zip(weights(0), weights(0), weights(1), strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


def test_unmatched_targets_raise(tiny_backbone_dir: str) -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        load_backbone(tiny_backbone_dir, adapter=AdapterConfig(targets=("qkv",)))
    with pytest.raises(ValueError, match="called .*'k_porj'.*; there are .*k_proj"):
        load_backbone(tiny_backbone_dir, adapter=AdapterConfig(targets=("q_proj", "k_porj")))
    every_family = AdapterConfig(targets=("q_proj", "qkv_proj", "out_proj"))  # as in VLM2Vec's list
    assert len(load_backbone(tiny_backbone_dir, adapter=every_family).adapted_modules) == 2


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.5}, {"dropout": math.nan}])
def test_adapter_numbers_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"adapter\.{next(iter(options))} must be"):
        AdapterConfig(**options)


@pytest.mark.parametrize("options", [{"kind": "LoRA"}, {"scope": "text"}])
def test_another_kind_or_scope_of_adapter_is_named_with_those_there_are(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    there_are = {"kind": "frozen, lora, dora or full", "scope": "language, vision or both"}
    with pytest.raises(ValueError, match=rf"adapter\.{name} must be {there_are[name]}, got '{value}'"):
        AdapterConfig(**options)


def test_building_asks_no_gpu_for_its_state(tiny_backbone_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError("a GPU would be initialised in every process")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked)
    reset_adapters(load_backbone(tiny_backbone_dir).base, 3)


def test_unknown_family_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no config that can be read.*config.json"):
        load_backbone(str(tmp_path))
    for model_type, message in (("paligemma", "paligemma.*qwen2_vl"), ("novel_vl", "novel_vl")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match=message):
            load_backbone(str(tmp_path))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_raise(tiny_backbone_dir: str, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_backbone_dir, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.1.self_attn.q_proj.weight"))
    tensor = weights.pop(name) if change == "missing" else weights[name].clone()
    if change == "unexpected":
        weights[name.replace("q_proj", "r_proj")] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="q_proj" if change == "missing" else "r_proj"):
        load_backbone(str(folder))


def test_tiny_names_the_shipped_folder(tiny_backbone_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "TINY_BACKBONE_DIR", Path(tiny_backbone_dir))
    assert load_backbone("tiny").hidden_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash_attention_2", "dtype": "bfloat16"}, "FlashAttention2 .*installed"),
        ({"quantization": "4bit"}, "bitsandbytes"),
        ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16, float16, got 'bf16'"),
        ({"quantization": "8bit"}, "'4bit' or None"),
        ({"quantization": "4bit", "adapter": AdapterConfig(kind="full")}, "lora, dora or frozen"),
    ],
)
def test_impossible_options_raise(tiny_backbone_dir: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(tiny_backbone_dir, **options)


def test_quantized_weights_are_asked_for_in_four_bits_and_the_runs_dtype() -> None:
    options = backbones._quantized("bfloat16")
    config = options["quantization_config"].to_dict()
    assert config["load_in_4bit"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


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

    meta, loaded = (
        load_backbone(tiny_backbone_dir, **options, meta=True),
        load_backbone(tiny_backbone_dir, **options),
    )
    assert described(meta) == described(loaded)
    assert meta.adapted_modules == loaded.adapted_modules
    assert meta.is_meta
    assert not loaded.is_meta
