from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel_decoupling.model.prefixes import DeepPrefixes, ShallowPrefixes, init_random, prefix_range


def make(kind: Any, num_paths: int, scale: Any = 1.0, seed: int = 3) -> Any:
    prefixes = kind((num_paths, 2, 2, 4, 50, 8) if kind is DeepPrefixes else (num_paths, 4, 8))
    (parameter,) = prefixes.parameters()
    init_random(parameter, torch.as_tensor(scale), torch.Generator().manual_seed(seed))
    return prefixes


def test_random_paths_differ_and_have_the_asked_scale() -> None:
    scale = torch.tensor([[0.5, 2.0], [8.0, 0.1]])
    prefixes = make(DeepPrefixes, 3, scale[:, :, None, None, None])
    std_NY2 = prefixes.key_values.detach().std(dim=(3, 4, 5))
    torch.testing.assert_close(std_NY2, scale.expand(3, -1, -1), rtol=0.1, atol=0)
    assert not torch.equal(prefixes.key_values[0], prefixes.key_values[1])


@pytest.mark.parametrize("kind", [DeepPrefixes, ShallowPrefixes])
def test_random_path_does_not_depend_on_the_number_of_paths(kind: Any) -> None:
    few, many = (next(make(kind, num_paths).parameters()) for num_paths in (2, 5))
    assert torch.equal(few, many[:2])


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
