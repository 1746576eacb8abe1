"""The compute of a run: tokens times paths through the language model."""

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


@dataclass
class Progress:
    """Main steps, compute and training rows of a run, kept in its checkpoints.

    ``token_passes`` are tokens (without padding) times paths through all layers of the language model. Shared
    lower layers count once, shallow prompts in every forward pass; repeated passes (GradCache, checkpointing)
    do not count.
    """

    steps_done: int = 0
    token_passes: float = 0.0
    rows_by_subset: dict[str, int] = field(default_factory=dict)

    def count(self, batch: PairBatch, settings: Mapping[str, Any], num_layers: int) -> dict[str, float]:
        """Add the batches of all processes, and return the counters by log key."""
        tokens = cut_texts = prompts = 0
        own = batch.subsets, int(batch.inputs.lengths.sum()), batch.inputs.num_cut
        for subsets, count, cut in gather_objects(own):
            tokens, cut_texts = tokens + count, cut_texts + cut
            for subset in subsets:
                self.rows_by_subset[subset] = self.rows_by_subset.get(subset, 0) + 1
        if settings["prefix_type"] == "shallow":
            rows, chunk_size = len(batch.inputs), settings["chunk_size"]
            passes = math.ceil(rows / chunk_size) if chunk_size else min(rows, LENGTH_GROUPS)
            prompts = settings["num_paths"] * settings["prefix_length"] * passes * world_size()
        self.token_passes += tokens * paths_per_layer(settings, num_layers) + prompts
        rows = sum(self.rows_by_subset.values())
        shares = {f"mix/{subset}": count / rows for subset, count in self.rows_by_subset.items()}
        return {**shares, "compute/token_passes": self.token_passes, "mix/cut_texts": cut_texts}
