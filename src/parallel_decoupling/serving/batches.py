"""Several requests in as few forward passes as possible."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode, to_raw_inputs
from parallel_decoupling.serving.requests import EmbeddingRequest, RequestError, Selection


class CountingCollator(Collator):
    """A collator that remembers every row's number of tokens, image tokens included, and cuts no text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_tokens: dict[int, int] = {}

    def encode_inputs(self, inputs: Sequence[RawInput], places: Sequence[str] | None = None) -> EncoderInputs:
        """Tokenise as ``Collator`` does.

        Raises:
            ValueError: also for a text that the model (OpenCLIP's text towers) would cut.
        """
        encoded = super().encode_inputs(inputs, places)
        if "truncated" in encoded.tokens and encoded.tokens["truncated"].any():
            length = encoded.tokens["input_ids"].shape[1]
            raise ValueError(f"a text has more than the {length} tokens that this model takes; shorten it")
        for row, count in zip(inputs, encoded.tokens["attention_mask"].sum(dim=1).tolist(), strict=True):
            self.num_tokens[id(row)] = int(count)
        return encoded


def embed_requests(
    embedder: Embedder, requests: Sequence[EmbeddingRequest], batch_rows: int
) -> list[tuple[Tensor, int] | RequestError]:
    """Embed the inputs of several requests together.

    Args:
        embedder: the model.
        requests: for any mix of paths.
        batch_rows: inputs per forward pass.

    Returns:
        For every request, in order, embeddings ``[B, D]`` and the number of tokens, or the error that it
        causes. Where a batch fails, its requests are embedded one by one.

    Relations:
        The embeddings are those of ``Embedder.encode`` on the request's inputs alone, with its
        ``truncate_dim``.
    """
    try:
        return list(_embed_together(embedder, requests, batch_rows))
    except ValueError as error:
        if len(requests) == 1:
            return [RequestError(str(error), param="input")]
    return [embed_requests(embedder, [request], batch_rows)[0] for request in requests]


def _embed_together(
    embedder: Embedder, requests: Sequence[EmbeddingRequest], batch_rows: int
) -> list[tuple[Tensor, int]]:
    processor, image_token = embedder.encoder.processor, embedder.encoder.image_token
    collator = CountingCollator(processor, image_token=image_token, images=embedder.images)
    rows = [to_raw_inputs(request.inputs) for request in requests]
    groups: dict[tuple[Selection, int | None], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        groups[request.selection, request.truncate_dim].append(number)
    results: dict[int, Tensor] = {}
    for (selection, dim), numbers in groups.items():
        inputs = [row for number in numbers for row in rows[number]]
        options: dict[str, Any] = {"paths": selection, "truncate_dim": dim, "batch_size": batch_rows}
        embeddings = encode(embedder.encoder, collator, inputs, show_progress=False, **options)
        sizes = [len(rows[number]) for number in numbers]
        results.update(zip(numbers, torch.split(embeddings, sizes), strict=True))
    counts = [sum(collator.num_tokens[id(row)] for row in request_rows) for request_rows in rows]
    return [(results[number], counts[number]) for number in range(len(requests))]
