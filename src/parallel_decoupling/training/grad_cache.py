"""GradCache (arXiv 2101.06983): the gradient of a big contrastive batch at the activation memory of a chunk.

A pass without graph gives embeddings as one leaf; after the loss's backward pass to it, every chunk runs
again with the same seed and now with graph. Rows of similar length share a chunk, so that little is padding.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs

Encoder = Callable[[EncoderInputs], Tensor]
LENGTH_GROUPS = 6
"""Forward passes of a batch in one graph, the same on every rank: each pads to its own longest row."""


@contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Run the block with torch's generators (CPU and ``device``) seeded from ``parts``, then restore them."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=accelerators, device_type=device.type if accelerators else "cuda"):
        digest = hashlib.sha256(repr(parts).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield


def length_groups(lengths: Tensor, count: int) -> list[list[int]]:
    """Split rows ``[B]`` into ``count`` groups of similar length, so that as little as possible is padding.

    Shortest first; exact, by dynamic programming over the rows in order of length, B rows of memory squared.
    """
    order_B = lengths.cpu().argsort(stable=True)
    end_B = torch.arange(len(order_B))
    tokens_BB = (end_B - end_B[:, None] + 1) * lengths.cpu()[order_B].double()  # of a group [start, end]
    tokens_BB[end_B[:, None] > end_B] = math.inf
    best_B, starts = tokens_BB[0], []
    for _ in range(min(count, len(order_B)) - 1):  # the best of one group more up to every end
        best_B, before_B = (best_B[:-1, None] + tokens_BB[1:]).min(dim=0)
        starts.append(before_B + 1)
    bounds = [len(order_B)]
    for start_B in reversed(starts):
        bounds.insert(0, int(start_B[bounds[0] - 1]))
    return [rows.tolist() for rows in order_B.tensor_split(bounds[:-1])]


@dataclass
class Encoding:
    """Embeddings of all rows, and the way from their gradient back to the parameters.

    ``embeddings`` ``[B, N, D]`` are a leaf if ``replay`` yields row numbers and their embeddings with graph.
    """

    embeddings: Tensor
    replay: Callable[[], Iterator[tuple[list[int], Tensor]]] | None = None

    def backward(self) -> None:
        """Carry the gradient of ``embeddings`` on to the parameters; nothing to do for a direct graph."""
        if self.replay is None or self.embeddings.grad is None:
            return
        for rows, chunk_BND in self.replay():
            if chunk_BND.requires_grad:  # not texts, when vision adapters alone train
                torch.autograd.backward(chunk_BND, self.embeddings.grad[rows])


def encode_in_chunks(
    encoder: Encoder, inputs: EncoderInputs, *, chunk_size: int | None, seed_parts: tuple[int | str, ...]
) -> Encoding:
    """Encode all rows by length, with the activations of at most ``chunk_size`` rows alive at a time.

    ``chunk_size=None`` keeps one graph of all rows, made in ``LENGTH_GROUPS`` forward passes. Dropout is
    seeded from ``seed_parts`` and a chunk's number.

    Relations:
        Without dropout every ``chunk_size`` gives the same embeddings and gradients (up to rounding).
    """
    device = inputs.tokens["input_ids"].device
    if chunk_size is None:
        chunks = length_groups(inputs.lengths, LENGTH_GROUPS)
    else:
        by_length = inputs.lengths.argsort(stable=True)
        chunks = [rows.tolist() for rows in torch.split(by_length, chunk_size)]
    in_order = torch.tensor([row for rows in chunks for row in rows], device=device).argsort()

    def forward() -> Iterator[Tensor]:
        for number, rows in enumerate(chunks):
            with seeded(device, *seed_parts, number):
                chunk_BND = encoder(inputs.select(rows))
            yield chunk_BND

    if chunk_size is None:
        return Encoding(torch.cat(list(forward()))[in_order])
    with torch.no_grad():
        embeddings_BND = torch.cat(list(forward()))[in_order]
    torch.clear_autocast_cache()  # torch 2.9 would give the replay weights cast without graph (PR 165068)
    return Encoding(embeddings_BND.requires_grad_(), lambda: zip(chunks, forward(), strict=True))
