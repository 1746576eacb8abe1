"""Parameter groups and schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from parallel_decoupling.training.optimization import (
    MIConfig,
    OptimizerConfig,
    apply_config,
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


def test_linear_schedule_rises_to_the_peak_and_ends_at_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule="linear")
    assert rates(config, 8, 9) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_cosine_schedule_is_half_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine")
    expected = [1 + math.cos(math.pi * step / 4) for step in range(5)]
    assert rates(config, 4, 5) == pytest.approx(expected)


def test_constant_schedule_needs_no_end_and_the_others_do() -> None:
    assert rates(OptimizerConfig(learning_rate=1.0, schedule="constant"), math.inf, 3) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        rates(OptimizerConfig(schedule="linear"), math.inf, 1)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="Nothing to train"):
        main_optimizer({"adapters": [], "prefixes": []}, OptimizerConfig())


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": -1.0}, {"prefix_learning_rate": math.nan}, {"schedule": "step"}, {"clip_norm": -1.0}],
)
def test_numbers_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimizerConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"fit_steps": 0}, {"warmup_steps": -1}, {"learning_rate": 0.0}, {"learning_rate": math.nan}]
)
def test_estimator_numbers_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MIConfig(**options)  # type: ignore[arg-type]


def test_a_resumed_run_takes_the_rates_and_the_decay_that_are_asked_for() -> None:
    """Restoring puts the old ones into optimizer and schedule."""

    def pair(config: OptimizerConfig, rate: float) -> tuple[list[Any], Any]:
        torch.manual_seed(0)
        groups = {name: [torch.nn.Parameter(torch.ones(2))] for name in ("adapters", "prefixes")}
        main = main_optimizer(groups, config)
        estimator = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=rate)
        return [main, estimator], learning_rate_schedule(main, config, 20)

    old = OptimizerConfig(1e-3, 1e-2, weight_decay=0.1, warmup_steps=2)
    new = OptimizerConfig(1e-5, 1e-4, weight_decay=0.2, warmup_steps=2)
    before, schedule = pair(old, 1e-3)
    for _ in range(7):
        before[0].step()
        schedule.step()
    for config, mi in ((old, MIConfig(learning_rate=1e-3)), (new, MIConfig(learning_rate=1e-4))):
        after, resumed = pair(config, mi.learning_rate)
        for optimizer, other in zip(after, before, strict=True):
            optimizer.load_state_dict(other.state_dict())
        resumed.load_state_dict(schedule.state_dict())
        apply_config(after, resumed, config, mi)
        fresh, expected = pair(config, mi.learning_rate)
        for _ in range(7):
            fresh[0].step()
            expected.step()
        for _ in range(3):
            for mine, theirs in zip(after, fresh, strict=True):
                for group, other in zip(mine.param_groups, theirs.param_groups, strict=True):
                    assert group["lr"] == other["lr"]
                    assert group["weight_decay"] == other["weight_decay"]
            fresh[0].step()
            after[0].step()
            expected.step()
            resumed.step()
