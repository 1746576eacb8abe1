"""Write one ready config file per row of ``docs/reproduce.md``: ``python -m recipes.ready_configs``.

A row is made of four layers: recipe, backbone, paths and layout; a later one wins. The layers hold the
reasons for their values, so change a layer and run ``make configs``, never a ready file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG_DIR = Path(__file__).parents[1] / "lightning_configs"
READY = "reproduce"
"""The folder of the ready files."""

_V1, _V2 = "recipe/vlm2vec_v1", "recipe/vlm2vec_v2"
_SINGLE, _PDF, _OWN = "paths/single_path", "paths/pdf", "paths/own_adapters"
_DDP = "layout/ddp"
ROWS: dict[str, tuple[str, ...]] = {
    "single_path_qwen2_vl_2b": (_V1, "backbone/qwen2_vl_2b", _SINGLE, _DDP),
    "pdf_qwen2_vl_2b": (_V1, "backbone/qwen2_vl_2b", _PDF, _DDP),
    "own_adapters_qwen2_vl_2b": (_V1, "backbone/qwen2_vl_2b", _OWN, _DDP),
    "pdf_qwen2_vl_2b_half": (_V1, "backbone/qwen2_vl_2b", _PDF, _DDP),
    "single_path_qwen2_vl_7b": (_V1, "backbone/qwen2_vl_7b", _SINGLE, _DDP),
    "pdf_qwen2_vl_7b": (_V1, "backbone/qwen2_vl_7b", _PDF, _DDP),
    "single_path_llava_1_6_low": (_V1, "backbone/llava_1_6_low", _SINGLE, _DDP),
    "pdf_llava_1_6_low": (_V1, "backbone/llava_1_6_low", _PDF, _DDP),
    "single_path_llava_1_6_high": (_V1, "backbone/llava_1_6_high", _SINGLE, _DDP),
    "pdf_llava_1_6_high": (_V1, "backbone/llava_1_6_high", _PDF, _DDP),
    "single_path_qwen2_vl_2b_v2": (_V2, "backbone/qwen2_vl_2b", _SINGLE, _DDP),
    "pdf_qwen2_vl_2b_v2": (_V2, "backbone/qwen2_vl_2b", _PDF, _DDP),
    "single_path_qwen3_vl_2b_v2": (_V2, "backbone/qwen3_vl_2b", _SINGLE, _DDP),
    "pdf_qwen3_vl_2b_v2": (_V2, "backbone/qwen3_vl_2b", _PDF, _DDP),
    "own_adapters_qwen3_vl_2b_v2": (_V2, "backbone/qwen3_vl_2b", _OWN, _DDP),
}
"""Layers of every row, by the name of its run."""
CHANGES: dict[str, dict[str, Any]] = {
    "pdf_qwen2_vl_2b_half": {
        "trainer": {"max_steps": 1000},
        "model": {"optimizer": {"warmup_steps": 100}},
    }
}
"""What a row sets beside its layers."""


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of ``upper`` over those of ``lower``, mapping by mapping."""
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = merged(below, value) if nested else value
    return result


def ready_config(row: str) -> str:
    """Return the text of a row's config file."""
    config: dict[str, Any] = {}
    for layer in ROWS[row]:
        config = merged(config, yaml.safe_load((CONFIG_DIR / f"{layer}.yaml").read_text(encoding="utf-8")))
    config = merged(config, CHANGES.get(row, {}))
    config = merged(config, {"trainer": {"default_root_dir": f"runs/{row}"}})
    changed = ", with changes of its own" if row in CHANGES else ""
    head = (
        f"# Written by `make configs` from {', '.join(ROWS[row])}{changed}.\n"
        "# These files say why each value is what it is. This run has not been made on a GPU yet.\n"
    )
    return head + yaml.safe_dump(config, sort_keys=False)


def main() -> None:
    """Write every row's file, and remove those of rows that are gone."""
    folder = CONFIG_DIR / READY
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.yaml"):
        file.unlink()
    for row in ROWS:
        (folder / f"{row}.yaml").write_text(ready_config(row), encoding="utf-8")


if __name__ == "__main__":
    main()
