"""Small codes of unit vectors, and their cosine with a float32 query.

A code is a tuple of tensors whose first dimension counts vectors, so that it can be sliced and stored.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_decoupling.index.settings import Precision

Codes: TypeAlias = tuple[Tensor, ...]


class Quantizer(Protocol):
    """Makes codes and compares them with queries."""

    def encode(self, vectors_BD: Tensor) -> Codes:
        """Codes of unit vectors."""

    def similarity(self, query_QD: Tensor, codes: Codes) -> Tensor:
        """Cosines ``[Q, B]``, as near as the codes allow."""


class Float32:
    """The vectors themselves: 4 D bytes."""

    def encode(self, vectors_BD: Tensor) -> Codes:
        """Return the vectors."""
        return (vectors_BD.contiguous(),)

    def similarity(self, query_QD: Tensor, codes: Codes) -> Tensor:
        """Exact cosines."""
        return query_QD @ codes[0].T


class Int8:
    """Each vector divided by its largest magnitude, in 127 steps: D + 4 bytes.

    Relations:
        A decoded number is at most half a step, ``max|v| / 254``, from the original.
    """

    def encode(self, vectors_BD: Tensor) -> Codes:
        """Int8 ``[B, D]`` and the step of each vector, float32 ``[B]``."""
        step_B = vectors_BD.abs().amax(dim=1) / 127
        return (vectors_BD / step_B.unsqueeze(1)).round().to(torch.int8), step_B

    def similarity(self, query_QD: Tensor, codes: Codes) -> Tensor:
        """Dot products with the decoded vectors."""
        numbers_BD, step_B = codes
        return (query_QD @ numbers_BD.float().T) * step_B


class Binary:
    """The signs, 64 to a word: D / 8 bytes, rounded up to whole words.

    Relations:
        The similarity is ``1 - 2 * (differing signs) / D``: the cosine of the vectors of signs.
    """

    def encode(self, vectors_BD: Tensor) -> Codes:
        """Int64 words ``[B, ceil(D / 64)]``."""
        return (torch.from_numpy(_words(vectors_BD).view(np.int64)),)

    def similarity(self, query_QD: Tensor, codes: Codes) -> Tensor:
        """Compare signs; the query is reduced to its signs as well."""
        words_BW = codes[0].numpy().view(np.uint64)
        rows = []
        for query_W in _words(query_QD):
            differing_B = np.zeros(len(words_BW), np.int32)
            for word, query_word in enumerate(query_W):  # few words: faster than a sum over a short axis
                differing_B += np.bitwise_count(words_BW[:, word] ^ query_word)
            rows.append(torch.from_numpy(differing_B))
        return 1 - torch.stack(rows).float() * (2 / query_QD.shape[1])


def _words(vectors_BD: Tensor) -> np.ndarray:
    signs = F.pad((vectors_BD > 0).to(torch.uint8), (0, -vectors_BD.shape[1] % 64))
    return np.packbits(signs.numpy(), axis=1).view(np.uint64)


QUANTIZERS: dict[Precision, Quantizer] = {"float32": Float32(), "int8": Int8(), "binary": Binary()}
