from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel_decoupling.model.prefixes import DeepPrefixes, ShallowPrefixes, prefix_range


def make(num_paths: int = 3, prefix_length: int = 50) -> DeepPrefixes:
    return DeepPrefixes(
        num_paths=num_paths, num_layers=2, num_key_value_heads=4, prefix_length=prefix_length, head_dim=8
    )


def test_random_paths_differ_and_have_the_asked_scale() -> None:
    prefixes, scale = make(), torch.tensor([[0.5, 2.0], [8.0, 0.1]])
    prefixes.init_random(scale, torch.Generator().manual_seed(0))
    std_NY2 = prefixes.key_values.detach().std(dim=(3, 4, 5))
    torch.testing.assert_close(std_NY2, scale.expand(3, -1, -1), rtol=0.1, atol=0)
    assert not torch.equal(prefixes.key_values[0], prefixes.key_values[1])


def test_random_path_does_not_depend_on_the_number_of_paths() -> None:
    few, many = make(2), make(5)
    for prefixes in (few, many):
        prefixes.init_random(torch.ones(2, 2), torch.Generator().manual_seed(3))
    assert torch.equal(few.key_values, many.key_values[:2])


def test_states_pick_paths_in_order_and_carry_gradient() -> None:
    prefixes = make()
    prefixes.init_random(torch.ones(2, 2), torch.Generator().manual_seed(0))
    states = prefixes.states([2, 0], 1, torch.float32)
    keys, values = states.layer(2)
    assert torch.equal(keys, prefixes.key_values[[2, 0], 1, 0])
    assert torch.equal(values, prefixes.key_values[[2, 0], 1, 1])
    (keys.sum() + values.sum()).backward()
    used = prefixes.key_values.grad.flatten(2).abs().sum(-1) > 0
    assert used.tolist() == [[False, True], [False, False], [False, True]]


@pytest.mark.parametrize(
    ("prefix_layers", "layers"),
    [(0, [0, 1, 2]), (2, [2]), ([0, 3], [0, 1, 2]), ([0, 1], [0]), ((1, 2), [1]), ([1, 3], [1, 2])],
)
def test_layers_with_a_prefix(prefix_layers: Any, layers: list[int]) -> None:
    assert list(prefix_range(prefix_layers, 3)) == layers


@pytest.mark.parametrize("prefix_layers", [3, -1, [1, 1], [2, 1], [0, 4], [-1, 2], [1], [0, 1, 2], [0.5, 2]])
def test_layers_that_do_not_exist_raise(prefix_layers: Any) -> None:
    with pytest.raises(ValueError, match=r"0 to 2 .* stop <= 3; got"):
        prefix_range(prefix_layers, 3)


def test_prompts_pick_paths_in_order_and_do_not_depend_on_their_number() -> None:
    few, many = (ShallowPrefixes(num_paths=n, prefix_length=4, hidden_size=8) for n in (2, 5))
    for prompts in (few, many):
        prompts.init_random(torch.tensor(3.0), torch.Generator().manual_seed(3))
    assert torch.equal(few.embeddings, many.embeddings[:2])
    assert 2 < many.embeddings.std() < 4
    assert torch.equal(many.prompts([3, 0], torch.bfloat16), many.embeddings[[3, 0]].bfloat16())
