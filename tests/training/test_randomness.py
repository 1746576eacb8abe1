"""Seeds are a pure function of their parts."""

from __future__ import annotations

import torch

from parallel_decoupling.training.randomness import derive_seed, seeded

CPU = torch.device("cpu")


def test_seeds_differ_by_every_part_and_by_nothing_else() -> None:
    parts = [(0, 1), (1, 0), (0, 1, 0), (0, 1, "query"), (0, 1, "candidate"), (0, 11), (0, 1, 1)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*part) for part in parts]


def test_a_seeded_block_repeats_itself_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    with seeded(CPU, 1, 2):
        first = torch.rand(3)
        with seeded(CPU, 9):
            torch.rand(100)
        inner = torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    with seeded(CPU, 1, 2):
        assert torch.equal(first, torch.rand(3))
        assert torch.equal(inner, torch.rand(3))
