"""GradCache: the gradient of one big contrastive batch at the activation memory of a chunk.

The loss needs the embeddings of all rows at once, the activations behind them only chunk by chunk:

1. forward every chunk without graph; the embeddings become one leaf tensor;
2. the caller builds any loss of that leaf (InfoNCE, aggregate, mutual information) and back-propagates to it;
3. ``backward`` forwards every chunk again, with the same seed and now with graph, and feeds in its part
   of the leaf's gradient.

Here: the chunks. Elsewhere on purpose: the loss (``training.terms``), collectives (``distributed``), seeds
(``training.randomness``). Method: Gao et al. 2021, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.training.randomness import seeded

Encoder = Callable[[EncoderInputs], Tensor]


@dataclass
class Encoding:
    """Embeddings of all rows, and the way from their gradient back to the parameters.

    Attributes:
        embeddings: ``[B, N, D]``. A leaf under GradCache, otherwise part of the encoder's graph.
        replay: yields ``(rows, embeddings of these rows with graph)``; ``None`` for a direct graph.
    """

    embeddings: Tensor
    replay: Callable[[], Iterator[tuple[slice, Tensor]]] | None = None

    def backward(self) -> None:
        """Carry the gradient of ``embeddings`` on to the parameters; nothing to do for a direct graph.

        Call it once, after the loss has been back-propagated. A loss scale is already in the gradient.
        """
        if self.replay is None or self.embeddings.grad is None:
            return
        for rows, chunk_BND in self.replay():
            torch.autograd.backward(chunk_BND, self.embeddings.grad[rows])


def encode_in_chunks(
    encoder: Encoder, inputs: EncoderInputs, *, chunk_size: int | None, seed_parts: tuple[int | str, ...]
) -> Encoding:
    """Encode all rows, with the activations of at most ``chunk_size`` rows alive at a time.

    Args:
        encoder: inputs of b rows to ``[b, N, D]``.
        inputs: ``B`` rows.
        chunk_size: rows per forward pass, at least 1; ``None`` encodes all rows in one graph.
        seed_parts: what the dropout of this call is seeded from, together with a chunk's first row.

    Returns:
        The embeddings ``[B, N, D]``; call ``backward`` on it after the loss.

    Relations:
        ``chunk_size >= B`` gives the embeddings and gradients of ``chunk_size=None``, dropout included.
        Without dropout every ``chunk_size`` gives the gradients of ``chunk_size=None`` (up to rounding).
    """
    device = inputs.tokens["input_ids"].device

    def forward(start: int, stop: int) -> Tensor:
        with seeded(device, *seed_parts, start):
            return encoder(inputs.rows(start, stop))

    if chunk_size is None:
        return Encoding(forward(0, len(inputs)))
    bounds = [(start, min(start + chunk_size, len(inputs))) for start in range(0, len(inputs), chunk_size)]
    with torch.no_grad():
        embeddings_BND = torch.cat([forward(start, stop) for start, stop in bounds])

    def replay() -> Iterator[tuple[slice, Tensor]]:
        for start, stop in bounds:
            yield slice(start, stop), forward(start, stop)

    return Encoding(embeddings_BND.requires_grad_(), replay)
