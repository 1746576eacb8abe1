from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel_decoupling.model.matryoshka import nested_dims, truncate


def test_truncated_paths_are_first_coordinates_of_unit_norm() -> None:
    paths = torch.nn.functional.normalize(torch.randn(4, 3, 8), dim=-1)
    short = truncate(paths, 5)
    for row in range(4):
        for path in range(3):
            torch.testing.assert_close(short[row, path], paths[row, path, :5] / paths[row, path, :5].norm())
    torch.testing.assert_close(truncate(paths, 8), paths)
    torch.testing.assert_close(truncate(short, 2), truncate(paths, 2))


def test_nested_dims_are_those_below_the_full_one() -> None:
    assert nested_dims(None, 8) == nested_dims([], 8) == nested_dims([8], 8) == ()
    assert nested_dims([2, 8, 4, 2], 8) == (4, 2)


@pytest.mark.parametrize("dim", [0, 9, -1, 2.0, True])
def test_dimensions_that_do_not_exist_raise(dim: Any) -> None:
    with pytest.raises(ValueError, match="matryoshka_dims.*8 dimensions"):
        nested_dims([4, dim], 8)
