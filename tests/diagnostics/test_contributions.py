from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.diagnostics.contributions import agreement, occluded, patch_contributions


class QuadrantEmbedder:
    """Path 0 sees the top left quadrant only, path 1 the bottom right one; a text is the white picture."""

    def encode(self, inputs: Sequence[Any], **options: Any) -> Tensor:
        rows = []
        for item in inputs:
            pixels = (
                np.full((8, 8), 255.0) if isinstance(item, RawInput) else np.asarray(item.convert("L"), float)
            )
            parts = pixels[:4, :4], pixels[4:, 4:]
            rows.append(torch.tensor(np.stack([part.ravel() for part in parts])) + 1)
        return torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1)


@pytest.fixture
def picture() -> Image.Image:
    """Black with a white dot in the top left and in the bottom right quadrant, both off the diagonal."""
    picture = Image.new("RGB", (8, 8), "black")
    picture.putpixel((2, 1), (255, 255, 255))
    picture.putpixel((5, 7), (255, 255, 255))
    return picture


def test_each_path_depends_on_what_it_sees(picture: Image.Image) -> None:
    embedder: Any = QuadrantEmbedder()
    found = patch_contributions(embedder, [picture], grid=4)
    assert found.score is None
    assert found.change.shape == (1, 2, 4, 4)
    changed = found.change > 1e-5
    assert changed[0, 0].nonzero().tolist() == [[0, 1]]
    assert changed[0, 1].nonzero().tolist() == [[3, 2]]
    same, _ = agreement(list(found.change))
    assert same[0, 1] == pytest.approx(-1 / 15)


def test_the_score_loses_what_the_text_asks_for(picture: Image.Image) -> None:
    embedder: Any = QuadrantEmbedder()
    found = patch_contributions(embedder, [picture, picture], grid=4, texts=["Find: white\n"] * 2)
    assert found.score is not None
    whole, text = embedder.encode([picture]), embedder.encode([RawInput("Find: white\n")])
    without = embedder.encode([occluded(picture, 4)[1]])
    expected = float((whole[0, 0] * text[0, 0]).sum() - (without[0, 0] * text[0, 0]).sum())
    assert float(found.score[1, 0, 0, 1]) == pytest.approx(expected)
    assert float(found.score[1, 0, 3, 3]) == pytest.approx(0, abs=1e-6)


def test_patches_cover_the_picture_once(picture: Image.Image) -> None:
    white = Image.new("RGB", (10, 7), "white")
    white.paste("black", (0, 0, 10, 3))  # the median is white
    changed = np.zeros((7, 10), dtype=int)
    for copy in occluded(white, 3):
        changed += (np.asarray(copy) != np.asarray(white)).any(axis=2)
    expected = np.zeros((7, 10), dtype=int)
    expected[:3] = 1
    assert (changed == expected).all()


def test_agreement_of_equal_and_constant_maps() -> None:
    maps = torch.rand(3, 1, 4, 4)
    found, _ = agreement(list(torch.cat((maps, maps, torch.ones_like(maps)), dim=1)))
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] == pytest.approx(0)


def test_agreement_on_different_pictures_is_the_mean_over_all_pairs_of_one_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 4, generator=generator) for _ in range(3)]
    maps += [torch.rand(2, 2, 2, generator=generator) for _ in range(2)]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 4), (4, 3)]
    same, different = agreement(maps)
    for i in range(2):
        for j in range(2):
            expected = [correlation(picture[i], picture[j]) for picture in maps]
            assert same[i, j] == pytest.approx(np.mean(expected))
            expected = [correlation(maps[k][i], maps[m][j]) for k, m in pairs]
            assert different[i, j] == pytest.approx(np.mean(expected))
    assert torch.isnan(agreement(maps[:1])[1]).all()


def test_maps_that_ignore_the_picture_agree_on_different_ones_as_well() -> None:
    place, generator = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.Generator()
    fixed_same, fixed_different = agreement([place] * 5)
    torch.testing.assert_close(fixed_different, fixed_same)
    seen = torch.rand(40, 1, 4, 4, generator=generator.manual_seed(2)).expand(-1, 2, -1, -1)
    same, different = agreement(list(seen))
    assert same[0, 1] == pytest.approx(1)
    assert abs(different[0, 1]) < 0.1


def correlation(first: Tensor, second: Tensor) -> float:
    return float(np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1])


def test_small_pictures_and_missing_texts_are_named(picture: Image.Image) -> None:
    embedder: Any = QuadrantEmbedder()
    with pytest.raises(ValueError, match="8 x 8 pixels has no 9 x 9"):
        patch_contributions(embedder, [picture], grid=9)
    with pytest.raises(ValueError, match="1 texts for 2 pictures"):
        patch_contributions(embedder, [picture, picture], texts=["white"])
