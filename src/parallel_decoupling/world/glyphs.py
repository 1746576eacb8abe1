"""Pictures that are not scenes: rendered characters with their Unicode names, handwritten digits."""

import unicodedata
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from parallel_decoupling.world.scenes import IMAGE_SIZE, Rng, font

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZΓΔΘΛΞΠΣΦΨΩαβλμ←↑→↓♠♣♥♦★☎☀☂♩♫"
"""Characters of the glyph family: digits, Latin and Greek letters, symbols."""

UNSEEN_CHARACTERS = CHARACTERS[10::3]
"""Every third letter or symbol: characters whose pictures no training row of the benchmark shows."""

TRAINING_FONTS = ("DejaVuSans", "DejaVuSans-Bold")
HELD_OUT_FONT = "DejaVuSans-BoldOblique"
"""The face of the evaluation pictures, which the tiny backbone never saw."""


def unicode_name(character: str) -> str:
    """Return the Unicode name in lower case, such as ``digit five``."""
    return unicodedata.name(character).lower()


def render_glyph(character: str, font_name: str, rng: Rng, *, coarse: bool = False) -> Image.Image:
    """Draw one character, dark on light, 64 x 64 RGB; with ``coarse`` as a low-resolution scan."""
    face = font(font_name, int(rng.integers(48, 58)))
    picture = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    dx, dy = rng.integers(-2, 3, size=2)
    ImageDraw.Draw(picture).text((32 + dx, 32 + dy), character, font=face, fill=255, anchor="mm")
    picture = picture.rotate(float(rng.uniform(-6, 6)), Image.Resampling.BILINEAR)
    if coarse:
        side = int(rng.integers(8, 13))
        picture = picture.resize((side, side), Image.Resampling.BOX)
        picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    ink = np.asarray(picture, dtype=np.float32)[..., None] / 255
    dark, light = int(rng.integers(0, 60)), int(rng.integers(200, 256))
    pixels = dark * ink + light * (1 - ink)
    return Image.fromarray(np.repeat(pixels.round().astype(np.uint8), 3, axis=2))


@cache
def handwritten_digits() -> tuple[tuple[Image.Image, ...], tuple[int, ...]]:
    """Return scikit-learn's 1,797 handwritten digits as 64 x 64 pictures, dark on light, with values."""
    digits = load_digits()
    pictures = []
    for pixels in digits.images:
        small = Image.fromarray((255 - pixels * (255 / 16)).round().astype(np.uint8))
        pictures.append(small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB"))
    return tuple(pictures), tuple(int(value) for value in digits.target)
