from __future__ import annotations

import numpy as np
import pytest
import torch

from parallel_decoupling.index.quantization import QUANTIZERS
from tests.index.brute_force import embeddings, unit

VECTORS = torch.from_numpy(unit(embeddings(40, paths=1, dim=70)[:, 0].numpy()))
QUERY = torch.from_numpy(unit(embeddings(3, paths=1, dim=70, seed=1)[:, 0].numpy()))


def test_float32_is_exact() -> None:
    quantizer = QUANTIZERS["float32"]
    assert torch.equal(quantizer.similarity(QUERY, quantizer.encode(VECTORS)), QUERY @ VECTORS.T)


def test_int8_is_at_most_half_a_step_off() -> None:
    numbers, steps = QUANTIZERS["int8"].encode(VECTORS)
    assert numbers.dtype == torch.int8
    assert numbers.abs().amax(dim=1).tolist() == [127] * len(VECTORS)
    decoded = numbers.float() * steps.unsqueeze(1)
    assert bool(((decoded - VECTORS).abs() <= steps.unsqueeze(1) * 0.501).all())
    similarity = QUANTIZERS["int8"].similarity(QUERY, (numbers, steps))
    assert similarity.numpy() == pytest.approx((QUERY @ decoded.T).numpy(), abs=1e-6)


def test_binary_counts_equal_signs() -> None:
    codes = QUANTIZERS["binary"].encode(VECTORS)
    assert codes[0].shape == (40, 2)  # 70 signs in two words of 64
    signs, query_signs = np.where(VECTORS > 0, 1, -1), np.where(QUERY > 0, 1, -1)
    similarity = QUANTIZERS["binary"].similarity(QUERY, codes)
    assert similarity.numpy() == pytest.approx(query_signs @ signs.T / 70, abs=1e-6)


def test_bytes_per_vector() -> None:
    sizes = {
        name: sum(part.nbytes for part in quantizer.encode(VECTORS[:, :64])) / len(VECTORS)
        for name, quantizer in QUANTIZERS.items()
    }
    assert sizes == {"float32": 256, "int8": 68, "binary": 8}
