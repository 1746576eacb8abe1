"""One function from a model's settings to its encoder, whichever kind of backbone is named.

Elsewhere: loading a backbone of each kind (``backbone``, ``dual_backbone``) and its encoder (``encoder``,
``dual_encoder``).
"""

from __future__ import annotations

from typing import Literal

from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.dual_backbone import is_dual_encoder, load_dual_backbone
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder


def build_encoder(
    backbone: str,
    *,
    revision: str | None,
    dtype: Literal["float32", "bfloat16", "float16"],
    attention: Literal["sdpa", "eager"],
    adapter: AdapterConfig,
    gradient_checkpointing: bool,
    num_paths: int,
    prefix_length: int,
    prefix_layers: int,
    prefix_init: Literal["meta", "random"],
    aggregation: Literal["mean", "concat", "learned"],
    seed: int,
) -> ParallelEncoder | DualEncoder:
    """Load a backbone and put its encoder around it.

    Args:
        backbone: a name of ``load_backbone`` or of ``load_dual_backbone``; see ``is_dual_encoder``.
        revision: see ``load_backbone``, as the following up to ``gradient_checkpointing``.
        dtype: of the backbone's weights.
        attention: of the language model.
        adapter: what trains.
        gradient_checkpointing: recompute layers in the backward pass.
        num_paths: see ``ParallelEncoder``, as all that follow.
        prefix_length: tokens per prefix.
        prefix_layers: first layer with a prefix.
        prefix_init: how prefixes start.
        aggregation: of the paths.
        seed: of prefixes and adapters.

    Raises:
        ValueError: settings that the kind of backbone does not have, or see the loaders.
    """
    if is_dual_encoder(backbone):
        wrong = [
            f"{name}={only} (got {given})"
            for name, only, given in (
                ("num_paths", 1, num_paths),
                ("prefix_length", 0, prefix_length),
                ("prefix_layers", 0, prefix_layers),
                ("aggregation", "mean", aggregation),
                ("attention", "sdpa", attention),
                ("backbone_revision", None, revision),
            )
            if given != only
        ]
        if wrong:
            raise ValueError(
                f"backbone {backbone!r} is an OpenCLIP model, which has one path and no prefix: "
                f"set {', '.join(wrong)}. lightning_configs/openclip.yaml has all it needs."
            )
        towers = load_dual_backbone(
            backbone, dtype=dtype, adapter=adapter, gradient_checkpointing=gradient_checkpointing
        )
        return DualEncoder(towers)
    loaded = load_backbone(
        backbone,
        revision=revision,
        dtype=dtype,
        attention=attention,
        adapter=adapter,
        gradient_checkpointing=gradient_checkpointing,
    )
    return ParallelEncoder(
        loaded,
        num_paths=num_paths,
        prefix_length=prefix_length,
        prefix_layers=prefix_layers,
        prefix_init=prefix_init,
        aggregation=aggregation,
        seed=seed,
    )
