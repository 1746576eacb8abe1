"""The sampler: a batch is a pure function of (seed, step), and composed as its policy says."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest

from parallel_decoupling.data.mixture import MixtureSampler

SIZES = [50, 7, 123]
POLICIES = [("mixed", None), ("sub_batch", 4), ("homogeneous", None)]
Pairs = list[tuple[int, int]]


def sampler(sizes: list[int] = SIZES, batch_size: int = 8, **options: Any) -> MixtureSampler:
    return MixtureSampler(sizes, batch_size=batch_size, **options)


def epoch(mixture: MixtureSampler, number: int = 0) -> list[Pairs]:
    steps = range(number * mixture.steps_per_epoch, (number + 1) * mixture.steps_per_epoch)
    return [mixture.batch(step) for step in steps]


@pytest.mark.parametrize(("policy", "block"), POLICIES)
def test_batch_depends_on_seed_and_step_only(policy: Any, block: int | None) -> None:
    options = {"policy": policy, "sub_batch_size": block, "weights": [1.0, 1.0, 3.0]}
    steps = 3 * sampler(**options).steps_per_epoch
    forward = [sampler(**options).batch(step) for step in range(steps)]
    used = sampler(**options)
    assert [used.batch(step) for step in reversed(range(steps))] == forward[::-1]
    assert [sampler(**options, seed=1).batch(step) for step in range(steps)] != forward
    assert len({tuple(batch) for batch in forward}) == steps


@pytest.mark.parametrize(("policy", "block"), POLICIES)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_join_to_the_same_global_batches(policy: Any, block: int | None, world_size: int) -> None:
    whole = sampler(policy=policy, sub_batch_size=block)
    ranks = [
        list(sampler(policy=policy, sub_batch_size=block, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == epoch(whole)


def test_every_row_once_per_epoch_without_weights() -> None:
    mixture = sampler(batch_size=10)
    for number in range(3):
        rows = list(chain(*epoch(mixture, number)))
        assert len(rows) == len(set(rows)) == 180 == sum(SIZES)
    assert epoch(mixture, 0) != epoch(mixture, 1)


def test_homogeneous_batch_has_one_subset() -> None:
    batches = epoch(sampler(policy="homogeneous"))
    assert all(len({subset for subset, _ in batch}) == 1 for batch in batches)
    assert Counter(batch[0][0] for batch in batches) == {0: 50 // 8, 1: 1, 2: 123 // 8}


def test_sub_batch_has_blocks_of_one_subset() -> None:
    batches = epoch(sampler(policy="sub_batch", sub_batch_size=4))
    for batch in batches:
        assert all(len({subset for subset, _ in batch[i : i + 4]}) == 1 for i in range(0, 8, 4))
    assert any(len({subset for subset, _ in batch}) > 1 for batch in batches)


@pytest.mark.parametrize(("block", "policy"), [(1, "mixed"), (8, "homogeneous")])
def test_sub_batch_of_extreme_size_equals_the_other_policies(block: int, policy: Any) -> None:
    assert epoch(sampler(policy="sub_batch", sub_batch_size=block)) == epoch(sampler(policy=policy))


def test_weights_are_shares_per_subset() -> None:
    counts = Counter(subset for subset, _ in chain(*epoch(sampler(weights=[2.0, 1.0, 1.0], batch_size=10))))
    assert counts == {0: 90, 1: 45, 2: 45}


@pytest.mark.parametrize(("policy", "block"), POLICIES)
@pytest.mark.parametrize("weights", [None, [5.0, 1.0, 2.0]])
def test_a_batch_repeats_a_row_only_if_it_draws_more_rows_than_the_subset_has(
    policy: Any, block: int | None, weights: list[float] | None
) -> None:
    mixture = sampler([30, 5, 40], batch_size=16, policy=policy, sub_batch_size=block, weights=weights)
    for step in range(200):
        batch = mixture.batch(step)
        drawn = Counter(subset for subset, _ in batch)
        distinct = Counter(subset for subset, _ in set(batch))
        assert all(distinct[subset] == min(drawn[subset], mixture.sizes[subset]) for subset in drawn)


@pytest.mark.parametrize(("policy", "block"), POLICIES)
def test_rows_of_a_subset_come_equally_often(policy: Any, block: int | None) -> None:
    mixture = sampler([100, 60], batch_size=16, policy=policy, sub_batch_size=block, weights=[1.0, 3.0])
    counts = Counter(chain(*(batch for number in range(20) for batch in epoch(mixture, number))))
    for subset, size in enumerate(mixture.sizes):
        times = [counts[subset, row] for row in range(size)]
        mean = sum(times) / size
        assert mean - 3 <= min(times) <= max(times) <= mean + 3  # 20 independent draws spread by far more


@pytest.mark.parametrize("start", [0, 1, 9, 21, 22, 23, 40])
def test_start_step_gives_the_tail_and_then_whole_epochs(start: int) -> None:
    mixture = sampler()
    mixture.start_step = start
    assert mixture.steps_per_epoch == len(mixture) == 22
    epochs = [epoch(sampler(), number) for number in range(3)]
    number, index = divmod(start, 22)
    assert list(mixture) == epochs[number][index:]
    assert list(mixture) == epoch(sampler(), number + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "world_size": 2}, "multiple of the 2 processes"),
        ({"batch_size": 999}, "180 rows do not fill one batch"),
        ({"policy": "sub_batch"}, "needs a sub_batch_size that divides"),
        ({"policy": "sub_batch", "sub_batch_size": 3}, "divides batch_size=8, got 3"),
        ({"policy": "mixed", "sub_batch_size": 4}, "no meaning for policy 'mixed'"),
        ({"weights": [1.0, 2.0]}, "one positive number per subset"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)
