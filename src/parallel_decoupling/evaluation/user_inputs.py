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
    """Turn texts, images and dictionaries into prompts, in order.

    Args:
        inputs: items, each a text; a PIL image; an image file, as ``Path`` or as a string that ends with an
            image suffix (which is never taken for a text); a dictionary with ``text``, ``image`` or
            ``images``, and optionally its own ``instruction``; or a finished ``RawInput``.
        instruction: put before every text and after the placeholder of every image; a dictionary's own
            instruction wins. Not with a ``RawInput``.

    Raises:
        ValueError: the instruction is not a text, or an item cannot be used; names its index.
    """
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"instruction is a {type(instruction).__name__}; use a string, or None for none")
    return [_raw_input(item, instruction, f"input {index}") for index, item in enumerate(inputs)]


def _raw_input(item: Any, instruction: str | None, where: str) -> RawInput:
    if isinstance(item, RawInput):
        if instruction is not None:
            raise ValueError(f"{where} is a RawInput, a finished prompt; it takes no instruction")
        return item
    if isinstance(item, Mapping):
        return _raw_input_from_mapping(item, instruction, where)
    if isinstance(item, str) and not item.lower().endswith(IMAGE_SUFFIXES):
        if not item.strip():
            raise ValueError(f"{where} is an empty text")
        return prompt(text=item, instruction=instruction)
    if not isinstance(item, (str, Path, Image.Image)):
        raise ValueError(
            f"{where} is a {type(item).__name__}; use a text, a PIL image, an image file or a dictionary"
        )
    hint = f"; if this is a text, pass {{'text': {item!r}}}" if isinstance(item, str) else ""
    return prompt(images=[_image(item, where, hint)], instruction=instruction)


def _raw_input_from_mapping(item: Mapping[str, Any], instruction: str | None, where: str) -> RawInput:
    if unknown := sorted(str(key) for key in item if key not in INPUT_KEYS):
        raise ValueError(f"{where} has unknown keys {unknown}; use {list(INPUT_KEYS)}")
    text, image, images, own_instruction = (item.get(key) for key in INPUT_KEYS)
    if image is not None and images is not None:
        raise ValueError(f"{where} has both 'image' and 'images'; use one of them")
    for key, value in (("text", text), ("instruction", own_instruction)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where} has a {type(value).__name__} as {key!r}; use a string")
    if isinstance(images, (str, Path, Image.Image)):
        raise ValueError(
            f"{where} has a single {type(images).__name__} as 'images'; pass a list or use 'image'"
        )
    images = [each for each in (image,) if each is not None] if images is None else images
    if not images and not (text or "").strip():
        raise ValueError(f"{where} has neither text nor image")
    return prompt(
        text=text,
        images=[_image(each, where) for each in images],
        instruction=instruction if own_instruction is None else own_instruction,
    )


def _image(image: Any, where: str, hint: str = "") -> Image.Image | str:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise ValueError(f"{where} has a {type(image).__name__} as image; use a PIL image or an image file")
    if not os.path.isfile(image):
        raise ValueError(f"{where}: no image file {str(image)!r}{hint}")
    return str(image)
