from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from parallel_decoupling.model.adapters import draw_adapters
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from tests.model.test_attention import FROZEN, OTHER_SIZES, ROWS, join
from tests.support.tiny import tiny_inputs


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
    assert len(load_backbone(tiny_backbone_dir, adapter=every_family).adapted_modules) == 2


@pytest.mark.parametrize("options", [{"kind": "LoRA"}, {"dropout": math.nan}, {"alpha": 0}])
def test_adapter_settings_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"adapter\..*{next(iter(options))}"):
        AdapterConfig(**options)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "8bit"}, "'4bit' or None"),
        ({"quantization": "4bit", "adapter": AdapterConfig(kind="full")}, "lora, dora or frozen"),
    ],
)
def test_impossible_options_raise(tiny_backbone_dir: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(tiny_backbone_dir, **options)


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
    assert meta.adapted_modules == loaded.adapted_modules
