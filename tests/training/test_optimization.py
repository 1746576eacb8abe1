"""Parameter groups, schedules, and what a step costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from parallel_decoupling.training.compute import forward_passes, token_passes
from parallel_decoupling.training.optimization import (
    OptimizerConfig,
    learning_rate_schedule,
    main_optimizer,
)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2))


def rates(config: OptimizerConfig, total_steps: float, steps: int) -> list[float]:
    optimizer = main_optimizer({"adapters": [parameter()]}, config)
    schedule = learning_rate_schedule(optimizer, config, total_steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_prefixes_have_their_own_rate_and_only_adapters_decay() -> None:
    config = OptimizerConfig(learning_rate=0.1, prefix_learning_rate=0.7, weight_decay=0.3)
    names = ("adapters", "prefixes", "aggregation", "temperature")
    groups = main_optimizer({name: [parameter()] for name in names}, config).param_groups
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "adapters": (0.1, 0.3),
        "prefixes": (0.7, 0.0),
        "aggregation": (0.1, 0.0),
        "temperature": (0.1, 0.0),
    }


def test_constant_schedule_needs_no_end_and_the_others_do() -> None:
    assert rates(OptimizerConfig(learning_rate=1.0, schedule="constant"), math.inf, 3) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        rates(OptimizerConfig(schedule="linear"), math.inf, 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        ("cosine", [0.25, 0.5, 0.75, *((1 + math.cos(math.pi * step / 5)) / 2 for step in range(6))]),
    ],
)
def test_schedules_rise_to_the_peak_and_end_at_zero(schedule: Any, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule=schedule)
    assert rates(config, 8, 9) == pytest.approx(expected)


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
