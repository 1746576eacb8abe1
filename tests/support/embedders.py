"""Tiny untrained embedders whose paths, adapters and aggregation weights are all off their start."""

from typing import Any

import torch

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.support.tiny import noise_image


def tiny_embedder(
    backbone: str,
    *,
    kind: str = "lora",
    num_paths: int = 3,
    per_path: bool = False,
    loading: dict[str, Any] | None = None,
    **encoder: Any,
) -> Embedder:
    """Every trainable number is moved, so that one that gets lost changes the embeddings."""
    adapter = AdapterConfig(kind=kind, rank=2, alpha=4, per_path=per_path)  # type: ignore[arg-type]
    loaded = load_backbone(backbone, adapter=adapter, **(loading or {}))
    options = {"prefix_length": 3, "prefix_init": "random", **encoder}
    parallel = ParallelEncoder(loaded, num_paths=num_paths, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parallel.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.1 * noise).to(parameter.dtype))
    parallel.eval()
    return Embedder(parallel, "find", "show")


def mixed_inputs() -> list[Any]:
    """A text, an image, both, and a longer text."""
    return [
        "a red circle",
        noise_image(32, 48, seed=1),
        {"image": noise_image(64, 32, seed=2), "text": "what colour is it?"},
        "a green star above two yellow crosses, left of a small blue square",
    ]
