"""Where a backbone is loaded from, and what is checked before and after.

Here: folders and hub ids, optional packages, weights that do not fit. Elsewhere: the loading itself
(``backbone``), the family table (``families``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from parallel_decoupling.model.adapters import AdapterConfig
from parallel_decoupling.model.families import FAMILIES, Family

TINY_BACKBONE_DIR = Path(__file__).parent / "tiny"
"""The trained few-million-parameter Qwen2-VL that the package ships."""

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]


def check_options(dtype: str, attention: str, adapter: AdapterConfig, quantization: str | None) -> None:
    """Refuse what cannot work before anything is read."""
    check_dtype(dtype)
    if attention == "flash_attention_2":
        if find_spec("flash_attn") is None:
            raise ValueError(
                "attention='flash_attention_2' needs a GPU and the package flash-attn "
                "(pip install flash-attn); attention='sdpa' works everywhere"
            )
        if dtype == "float32":
            raise ValueError("attention='flash_attention_2' needs dtype='bfloat16' or 'float16'")
    if quantization is None:
        return
    if quantization != "4bit":
        raise ValueError(f"quantization must be '4bit' or None, got {quantization!r}")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "quantization='4bit' needs bitsandbytes: pip install 'parallel-decoupling[quantized]'"
        )
    if adapter.kind == "full":
        raise ValueError("quantized weights cannot train: set adapter.kind to lora, dora or frozen")


def check_dtype(dtype: str) -> None:
    """Raise a ValueError for a dtype that weights are not loaded in."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")


def vision_attention(attention: Attention) -> str:
    """Which attention the vision tower gets; not every one has flex attention."""
    return "sdpa" if attention == "flex_attention" else attention


def quantized(dtype: Dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for frozen weights in 4 bits, computed with in ``dtype``.

    They are made on this process's GPU. bitsandbytes repacks weights on a CPU in evaluation, after which they
    cannot train there.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    config = cast(Any, BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Return what transformers should load, and how."""
    folder = TINY_BACKBONE_DIR if name == "tiny" else Path(name).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True}
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ValueError(
            f"backbone {name!r}: the folder {folder} does not exist, and it is not a hub id 'owner/model'"
        )
    return name, {"revision": revision}


def model_type(name: str, source: str, options: Mapping[str, Any]) -> str:
    """Read the ``model_type`` of the config, before any weight."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **options)
    except OSError as error:
        raise ValueError(f"backbone {name!r}: no readable model config there ({error})") from error
    if config.get("model_type") is None:
        raise ValueError(f"backbone {name!r}: no config.json with a model_type in {source}")
    return str(config["model_type"])


def family_of(name: str, model_type: str) -> Family:
    """Look up the row of the family table.

    Raises:
        ValueError: for a family that is not there.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"backbone {name!r} has model_type {model_type!r}; known: {', '.join(FAMILIES)}. Another family "
            "needs the option `family` with image_token, language_module, vision_module, layers and "
            "position_ids, or a row in parallel_decoupling.model.families.FAMILIES."
        )
    return FAMILIES[model_type]


def check_weights(name: str, info: Mapping[str, Any], family: Family) -> None:
    """Raise a ValueError when the files and the model do not hold the same weights."""
    missing = sorted(map(str, info["missing_keys"]))
    unexpected = sorted(map(str, set(info["unexpected_keys"]) - set(family.ignored_weights)))
    mismatched = sorted(map(str, info["mismatched_keys"]))
    if missing or unexpected or mismatched:
        raise ValueError(
            f"backbone {name!r} does not fit its config: missing weights {missing}, unexpected {unexpected}, "
            f"wrong shape {mismatched}. Missing ones would be random numbers, so this is an error."
        )
