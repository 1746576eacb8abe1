"""One function from a model's settings to its encoder, whichever kind of backbone is named.

Elsewhere: loading a backbone of each kind (``backbone``, ``dual_backbone``) and its encoder (``encoder``,
``dual_encoder``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel_decoupling.model.backbone import load_backbone
from parallel_decoupling.model.dual_backbone import is_dual_encoder, load_dual_backbone
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder

DUAL_OPTIONS = ("dtype", "adapter", "gradient_checkpointing")
"""What loading an OpenCLIP model takes."""
WITHOUT_MEANING = ("prefix_type", "prefix_init", "seed")
"""Without a prefix and without LoRA weights these change nothing."""
ONLY_VALUES = {
    "num_paths": 1,
    "prefix_length": 0,
    "prefix_layers": 0,
    "aggregation": "mean",
    "attention": "sdpa",
}
"""What the other options must be for an OpenCLIP model, if not None."""


def build_encoder(
    backbone: str, loading: Mapping[str, Any], paths: Mapping[str, Any]
) -> ParallelEncoder | DualEncoder:
    """Load a backbone and put its encoder around it.

    Args:
        backbone: a name of ``load_backbone``, or of ``load_dual_backbone`` (see ``is_dual_encoder``).
        loading: options of ``load_backbone``.
        paths: options of ``ParallelEncoder``.

    Raises:
        ValueError: options that the kind of backbone does not have; what the loaders refuse.
    """
    if not is_dual_encoder(backbone):
        return ParallelEncoder(load_backbone(backbone, **loading), **paths)
    wrong = [
        f"{name}={ONLY_VALUES.get(name, 'null')} (got {value})"
        for name, value in {**loading, **paths}.items()
        if name not in (*DUAL_OPTIONS, *WITHOUT_MEANING) and value != ONLY_VALUES.get(name)
    ]
    if wrong:
        raise ValueError(
            f"backbone {backbone!r} is an OpenCLIP model, which has one path and no prefix: "
            f"set {', '.join(wrong)}. lightning_configs/openclip.yaml has all it needs."
        )
    return DualEncoder(load_dual_backbone(backbone, **{name: loading[name] for name in DUAL_OPTIONS}))
