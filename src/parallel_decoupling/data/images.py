"""Image files: finding them, decoding them to 8-bit RGB, and giving them the wanted size."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

SquareSize = Literal["low", "mid", "high"]
SQUARES: dict[str, int] = {"low": 128, "mid": 672, "high": 1344}
"""Side in pixels of VLM2Vec's forced squares."""
IMAGE_SETTINGS = ("image_size", "min_pixels", "max_pixels")
"""Names of the settings behind an ``ImagePolicy``."""
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders raise on damaged files."""


class ImageError(ValueError):
    """An image file that is missing or that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class ImagePolicy:
    """What happens to a picture before the processor sees it (and perhaps resizes it once more).

    Attributes:
        size: forces a square and ignores the EXIF orientation, as VLM2Vec does in its published rows.
        min_pixels: width times height at least; needs no ``size``.
        max_pixels: width times height at most. With either bound, the sides become multiples of ``factor``
            near the aspect ratio, and a picture with a side below it a square of twice that, as in VLM2Vec.
        factor: the processor's patch times merge size; 1 where it has none.
    """

    size: SquareSize | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    factor: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        bounds = [bound for bound in (self.min_pixels, self.max_pixels) if bound is not None]
        if self.size not in (None, *SQUARES):
            raise ValueError(f"image_size must be one of {', '.join(SQUARES)} or null, got {self.size!r}.")
        if self.size is not None and bounds:
            meaning = "forces a square, so min_pixels and max_pixels have no meaning"
            raise ValueError(f"image_size={self.size!r} {meaning}. Set one or the other to null.")
        if min(bounds, default=1) < 1 or bounds != sorted(bounds):
            rule = "must be at least 1, and min_pixels not above max_pixels"
            raise ValueError(f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}: they {rule}.")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImagePolicy:
        """Return the policy of a data module's settings; one that is absent counts as not set."""
        return cls(*(settings.get(name) for name in IMAGE_SETTINGS))  # type: ignore[arg-type]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that ``from_settings`` takes."""
        return dict(zip(IMAGE_SETTINGS, (self.size, self.min_pixels, self.max_pixels), strict=True))

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resize with Pillow's bicubic filter, or return the image itself."""
        size = image.size
        if self.size is not None:
            size = (SQUARES[self.size],) * 2
        elif self.min_pixels is not None or self.max_pixels is not None:
            if min(size) < self.factor:
                size = (2 * self.factor,) * 2
            low, high = self.min_pixels or 1, self.max_pixels or math.inf
            size = smart_size(*size, factor=self.factor, min_pixels=low, max_pixels=high)
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def smart_size(
    width: int, height: int, *, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """Return width and height within a pixel budget, both multiples of ``factor``, near the aspect ratio.

    Relations:
        Equals transformers' ``smart_resize`` of Qwen2-VL wherever that accepts the aspect ratio.
    """
    new_width = max(factor, round(width / factor) * factor)
    new_height = max(factor, round(height / factor) * factor)
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)  # divided by, for the same rounding as there
        new_width = max(factor, math.floor(width / scale / factor) * factor)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
    elif new_width * new_height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        new_width = math.ceil(width * scale / factor) * factor
        new_height = math.ceil(height * scale / factor) * factor
    return new_width, new_height


def load_image(image: Image.Image | str, *, turn: bool = True) -> Image.Image:
    """Decode an image or file to 8-bit RGB or raise ``ImageError``; ``turn`` applies the EXIF orientation."""
    try:
        if not isinstance(image, str):
            return _rgb(ImageOps.exif_transpose(image) if turn else image)
        with Image.open(image) as file:
            if turn:
                ImageOps.exif_transpose(file, in_place=True)
            return _rgb(file)
    except _DAMAGE as error:
        message = f"Cannot read image {image}: {error}. Replace the file or remove its row."
        raise ImageError(message) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which PIL alone would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def image_size(file: str) -> tuple[int, int] | None:
    """Return width and height from the header of an image file, or None if it cannot be read."""
    try:
        with Image.open(file) as image:
            return image.size
    except _DAMAGE:
        return None


class ImageFolder:
    """Finds the files that the image cells of a table name.

    Each root is tried with the cell as it is and with ``images/`` added or taken away: MMEB may be unpacked
    with or without it. Without ``must_exist`` ``get`` returns the cell if there is no such file.
    """

    def __init__(self, *roots: Path, must_exist: bool = True) -> None:
        self.roots, self.must_exist = roots, must_exist
        self._places = [(root, prefix) for root in roots for prefix in ("", "images/", None)]

    def find(self, image: str) -> str | None:
        """Return the file, or None if there is none."""
        for number, (root, prefix) in enumerate(self._places):
            file = root / (image.removeprefix("images/") if prefix is None else prefix + image)
            if file.is_file():
                self._places.insert(0, self._places.pop(number))
                return str(file)
        return None

    def get(self, image: str) -> str:
        """Return the file, or raise ``ImageError`` if there is none and there must be."""
        file = self.find(image)
        if file is None and self.must_exist:
            roots = " or ".join(map(str, self.roots))
            advice = "Unpack the dataset's images there, with or without a folder images/."
            raise ImageError(f"no image file {image!r} under {roots}. {advice}")
        return file or image
