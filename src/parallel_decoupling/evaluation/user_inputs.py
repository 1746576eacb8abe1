"""From what users pass to ``encode`` (texts, pictures, dictionaries of both) to prompts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import IMAGE_SUFFIXES
from parallel_decoupling.data.prompts import prompt

INPUT_KEYS = ("text", "image", "images", "instruction")


def is_single(inputs: Any) -> bool:
    """Tell whether ``inputs`` is one item rather than a list of items."""
    return isinstance(inputs, (str, Path, Image.Image, RawInput, Mapping))


def to_raw_inputs(inputs: Iterable[Any], instruction: str | None = None) -> list[RawInput]:
    """Turn what ``Embedder.encode`` takes into prompts, in order; an error names the index of the item.

    A string that ends with an image suffix is never taken for a text; a dictionary's own ``instruction``
    wins; to a finished ``RawInput`` no instruction can be added.
    """
    rows = []
    for index, item in enumerate(inputs):
        try:
            rows.append(_raw_input(item, instruction))
        except ValueError as error:
            raise ValueError(f"input {index}: {error}") from error
    return rows


def _raw_input(item: Any, instruction: str | None) -> RawInput:
    if isinstance(item, RawInput):
        if instruction is not None:
            raise ValueError("a RawInput is a finished prompt; it takes no instruction")
        return item
    if isinstance(item, Mapping):
        return _raw_input_from_mapping(item, instruction)
    if isinstance(item, str) and not item.lower().endswith(IMAGE_SUFFIXES):
        return prompt(text=item, instruction=instruction)
    hint = f"; if this is a text, pass {{'text': {item!r}}}" if isinstance(item, str) else ""
    return prompt(image=_image(item, hint), instruction=instruction)


def _raw_input_from_mapping(item: Mapping[str, Any], instruction: str | None) -> RawInput:
    if unknown := sorted(str(key) for key in item if key not in INPUT_KEYS):
        raise ValueError(f"unknown keys {unknown}; use {list(INPUT_KEYS)}")
    text, image, images, own_instruction = (item.get(key) for key in INPUT_KEYS)
    for key, value in (("text", text), ("instruction", own_instruction)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key!r} is a {type(value).__name__}; use a string")
    if isinstance(images, (str, Path, Image.Image)):
        raise ValueError(f"'images' is a single {type(images).__name__}; pass a list or use 'image'")
    image = None if image is None else _image(image)
    images = [_image(each) for each in images or ()]
    return prompt(text, image, instruction if own_instruction is None else own_instruction, images=images)


def _image(image: Any, hint: str = "") -> Image.Image | str:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise ValueError(
            f"a {type(image).__name__} cannot be embedded; use a text, a PIL image, a file or a dictionary"
        )
    if not os.path.isfile(image):
        raise ValueError(f"no image file {str(image)!r}{hint}")
    return str(image)
