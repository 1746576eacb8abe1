"""Options that cannot work are refused before anything is read, each with what to do instead."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from parallel_decoupling.model import sources
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the optional packages that seem to be there."""
    names: set[str] = set()
    monkeypatch.setattr(sources, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None)
    return names


@pytest.mark.parametrize(
    ("options", "packages", "message"),
    [
        ({"attention": "flash_attention_2", "dtype": "bfloat16"}, (), "flash-attn"),
        ({"attention": "flash_attention_2"}, ("flash_attn",), "dtype='bfloat16'"),
        ({"quantization": "4bit"}, (), r"parallel-decoupling\[quantized\]"),
        ({"dtype": "bf16"}, (), "dtype must be one of float32, bfloat16, float16, got 'bf16'"),
        ({"quantization": "8bit"}, (), "'4bit' or None"),
        (
            {"quantization": "4bit", "adapter": AdapterConfig(kind="full")},
            ("bitsandbytes",),
            "lora, dora or frozen",
        ),
    ],
)
def test_impossible_options_raise_in_one_line(
    tiny_backbone_dir: str, installed: set[str], options: dict[str, Any], packages: Any, message: str
) -> None:
    installed.update(packages)
    with pytest.raises(ValueError, match=message) as error:
        load_backbone(tiny_backbone_dir, **options)
    assert "\n" not in str(error.value)


def test_quantized_weights_are_asked_for_in_four_bits_and_the_runs_dtype() -> None:
    options = sources.quantized("bfloat16")
    config = options["quantization_config"].to_dict()
    assert config["load_in_4bit"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


def test_vision_tower_keeps_sdpa_beside_flex_attention(tiny_backbone_dir: str) -> None:
    config: Any = load_backbone(tiny_backbone_dir, attention="flex_attention").config
    assert config.text_config._attn_implementation == "prefix_flex"
    assert config.vision_config._attn_implementation == "sdpa"
