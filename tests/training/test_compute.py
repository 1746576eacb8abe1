"""Token passes and forward passes, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from parallel_decoupling.training.compute import forward_passes, token_passes


def settings(**changed: Any) -> dict[str, Any]:
    plain = {"num_paths": 4, "prefix_length": 5, "prefix_layers": 0, "prefix_type": "deep"}
    return {**plain, "query_chunk_size": None, "candidate_chunk_size": None, **changed}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 400),
        ({"prefix_layers": 5}, 250),  # half of the layers see an input once
        ({"prefix_layers": [0, 2]}, 400),  # layers above a range run for every path
        ({"prefix_type": "shallow"}, 400 + 3 * 4 * 5),  # prompts run once in every forward pass
    ],
)
def test_token_passes(changed: dict[str, Any], expected: float) -> None:
    assert token_passes(settings(**changed), 10, tokens=100, forward_passes=3) == expected


def test_forward_passes_are_chunks_or_length_groups() -> None:
    assert forward_passes(settings(), 16, 16) == 4 + 4
    assert forward_passes(settings(query_chunk_size=3, candidate_chunk_size=4), 16, 16) == 6 + 4
