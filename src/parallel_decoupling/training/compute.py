"""The compute of a run: tokens times paths through the language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel_decoupling.batch import PairBatch
from parallel_decoupling.distributed import gather_objects, world_size
from parallel_decoupling.model.prefixes import prefix_range
from parallel_decoupling.training.grad_cache import LENGTH_GROUPS


def paths_per_layer(settings: Mapping[str, Any], num_layers: int) -> float:
    """Return the rows per input in the average layer."""
    shared = prefix_range(settings["prefix_layers"], num_layers).start / num_layers
    return shared + float(settings["num_paths"]) * (1 - shared)


def forward_passes(settings: Mapping[str, Any], rows: int) -> int:
    """Return the calls of the encoder for one batch of one process, without GradCache's second ones."""
    chunk_size = settings["chunk_size"]
    return math.ceil(rows / chunk_size) if chunk_size else min(rows, LENGTH_GROUPS)


def token_passes(
    settings: Mapping[str, Any], num_layers: int, *, tokens: float, forward_passes: int
) -> float:
    """Return tokens (without padding) times paths through all layers of the language model.

    Shared lower layers count once, shallow prompts in every forward pass; repeated passes (GradCache,
    checkpointing) do not count.
    """
    prompts = 0
    if settings["prefix_type"] == "shallow":
        prompts = settings["num_paths"] * settings["prefix_length"] * forward_passes
    return tokens * paths_per_layer(settings, num_layers) + prompts


@dataclass
class Progress:
    """Main steps, compute (see ``token_passes``) and training rows of a run, kept in its checkpoints."""

    steps_done: int = 0
    token_passes: float = 0.0
    rows_by_subset: dict[str, int] = field(default_factory=dict)

    def count(self, batch: PairBatch, settings: Mapping[str, Any], num_layers: int) -> dict[str, float]:
        """Add the batches of all processes, and return the counters by log key."""
        tokens = cut_texts = 0
        own = batch.subsets, int(batch.inputs.lengths.sum()), batch.inputs.num_cut
        for subsets, count, cut in gather_objects(own):
            tokens, cut_texts = tokens + count, cut_texts + cut
            for subset in subsets:
                self.rows_by_subset[subset] = self.rows_by_subset.get(subset, 0) + 1
        passes = world_size() * forward_passes(settings, len(batch.inputs))
        self.token_passes += token_passes(settings, num_layers, tokens=tokens, forward_passes=passes)
        rows = sum(self.rows_by_subset.values())
        shares = {f"mix/{subset}": count / rows for subset, count in self.rows_by_subset.items()}
        return {**shares, "compute/token_passes": self.token_passes, "mix/cut_texts": cut_texts}
