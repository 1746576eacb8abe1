"""Several requests in as few forward passes as possible."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.retrieval.embedder import Embedder
from parallel_decoupling.retrieval.encode import encode, to_raw_inputs
from parallel_decoupling.serving.requests import EmbeddingRequest, Selection


class CountingCollator(Collator):
    """A collator that remembers every row's number of tokens, image tokens included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_tokens: dict[int, int] = {}

    def encode_inputs(self, inputs: Sequence[RawInput], places: Sequence[str] | None = None) -> EncoderInputs:
        """Tokenise as ``Collator`` does."""
        encoded = super().encode_inputs(inputs, places)
        for row, count in zip(inputs, encoded.tokens["attention_mask"].sum(dim=1).tolist(), strict=True):
            self.num_tokens[id(row)] = int(count)
        return encoded


def embed_requests(
    embedder: Embedder, requests: Sequence[EmbeddingRequest], batch_rows: int
) -> list[tuple[Tensor, int]]:
    """Embed the inputs of several requests together.

    Args:
        embedder: the model.
        requests: for any mix of paths.
        batch_rows: inputs per forward pass.

    Returns:
        For every request, in order, embeddings ``[B, D]`` and the number of tokens.

    Relations:
        The embeddings are those of ``Embedder.encode`` on the request's inputs alone.
    """
    collator = CountingCollator(embedder.encoder.processor, image_token=embedder.encoder.image_token)
    rows = [to_raw_inputs(request.inputs) for request in requests]
    groups: dict[Selection, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        groups[request.selection].append(number)
    results: dict[int, Tensor] = {}
    for selection, numbers in groups.items():
        inputs = [row for number in numbers for row in rows[number]]
        embeddings = encode(
            embedder.encoder, collator, inputs, paths=selection, batch_size=batch_rows, show_progress=False
        )
        sizes = [len(rows[number]) for number in numbers]
        results.update(zip(numbers, torch.split(embeddings, sizes), strict=True))
    counts = [sum(collator.num_tokens[id(row)] for row in request_rows) for request_rows in rows]
    return [(results[number], counts[number]) for number in range(len(requests))]
