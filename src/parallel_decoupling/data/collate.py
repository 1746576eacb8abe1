"""From raw rows to tensors; no chat template, system prompt or end token is added, as in VLM2Vec."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from parallel_decoupling.batch import IMAGE_PLACEHOLDER as PLACEHOLDER
from parallel_decoupling.batch import PADDING_ID, EncoderInputs, PairBatch, RawInput, RawPair
from parallel_decoupling.data.images import ImageError, ImagePolicy, load_image

PADDING = RawInput("-")
"""What is encoded in place of a missing hard negative; as short as a text can be."""


class Collator:
    """Turns rows into padded tensors with one processor call per side.

    Where the image tensors of a Hugging Face ``processor`` cannot be split by row, every row is processed
    alone, which gives the same rows more slowly. ``image_token`` stands for an image in the backbone's text.

    Relations:
        Each row without its padding equals the processor's output for that row alone.
    """

    def __init__(self, processor: Any, *, image_token: str, images: ImagePolicy | None = None) -> None:
        self.processor, self.image_token = processor, image_token
        image_processor = getattr(processor, "image_processor", None)
        patch, merge = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
        self.images = images or ImagePolicy()
        if isinstance(patch, int) and isinstance(merge, int):
            self.images = replace(self.images, factor=patch * merge)
        self._splits = True  # until the processor's image tensors are seen not to split by row

    def __call__(self, pairs: Sequence[RawPair]) -> PairBatch:
        """Batch training rows: the positives in query order, then all hard negatives row by row."""
        candidates: list[RawInput | None] = [pair.candidate for pair in pairs]
        candidates += [negative for pair in pairs for negative in pair.negatives]
        places = [f"training subset {pair.subset!r}, row {pair.row}: " for pair in pairs]
        negatives = [place for pair, place in zip(pairs, places, strict=True) for _ in pair.negatives]
        return PairBatch(
            query=self.encode_inputs([pair.query for pair in pairs], places),
            candidate=self.encode_inputs([each or PADDING for each in candidates], places + negatives),
            candidate_ids=torch.tensor([identity(each) if each else PADDING_ID for each in candidates]),
            subsets=tuple(pair.subset for pair in pairs),
        )

    def encode_inputs(self, inputs: Sequence[RawInput], places: Sequence[str] | None = None) -> EncoderInputs:
        """Tokenise, decode images and pad; ``places`` begin the messages of errors, one per input."""
        if not inputs:
            raise ValueError("There are no inputs to encode.")
        places = places or [""] * len(inputs)
        texts, images, turn = [], [], self.images.size is None
        for row, place in zip(inputs, places, strict=True):
            with _naming(place):
                count, shown = row.text.count(PLACEHOLDER), reprlib.repr(row.text)
                if count != len(row.images):
                    raise ValueError(f"{len(row.images)} images but {count} {PLACEHOLDER} in {shown}.")
                if self.image_token != PLACEHOLDER and self.image_token in row.text:
                    found = f"The text {shown} holds {self.image_token!r}, the backbone's own image token"
                    raise ValueError(f"{found}. Mark images with {PLACEHOLDER}.")
                texts.append(row.text.replace(PLACEHOLDER, self.image_token))
                images.append([self.images(load_image(image, turn=turn)) for image in row.images])
        try:
            together = self._process(texts, images)
        except ValueError:  # one by one, to find out which row it is
            together = None
        if together is not None:
            return together
        rows = []
        for row, text, pictures, place in zip(inputs, texts, images, places, strict=True):
            with _naming(f"{place}The processor refuses {reprlib.repr(row.text)} with images {row.images}: "):
                nested = [pictures] if pictures else None
                data = self.processor(text=[text], images=nested, return_tensors="pt")
            tokens, pixels = self._separate(data)
            rows.append(EncoderInputs(tokens, (pixels,)))
        return self._join(rows)

    def _process(self, texts: list[str], images: list[list[Image.Image]]) -> EncoderInputs | None:
        """Process all rows in one call; return None if the image tensors cannot be told apart by row."""
        if any(images) and not self._splits:
            return None
        nested = images if any(images) else None  # by row: a family may treat several images of a row apart
        data = self.processor(text=texts, images=nested, padding=True, return_tensors="pt")
        tokens, pixels = self._separate(data)
        vision = _split(pixels, [len(row) for row in images])
        self._splits = vision is not None
        return None if vision is None else EncoderInputs(tokens, vision)

    def _separate(self, data: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Separate what has one entry per token from image tensors, whose shape may be the same by chance."""
        images = getattr(getattr(self.processor, "image_processor", None), "model_input_names", ())
        shape = data["input_ids"].shape
        tokens = {key: value for key, value in data.items() if value.shape == shape and key not in images}
        return tokens, {key: value for key, value in data.items() if key not in tokens}

    def _join(self, rows: list[EncoderInputs]) -> EncoderInputs:
        """Pad rows that were processed alone; a key that a row lacks is zero there."""
        tokenizer = self.processor.tokenizer
        tokens: dict[str, Tensor] = {}
        for key in dict.fromkeys(key for row in rows for key in row.tokens):
            values = [row.tokens.get(key, torch.zeros_like(row.tokens["input_ids"]))[0] for row in rows]
            fill = tokenizer.pad_token_id if key == "input_ids" else 0
            tokens[key] = pad_sequence(values, True, fill, tokenizer.padding_side)
        return EncoderInputs(tokens, tuple(row.vision[0] for row in rows))


@contextmanager
def _naming(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise (ImageError if isinstance(error, ImageError) else ValueError)(f"{place}{error}") from error


def _split(pixels: Mapping[str, Tensor], counts: list[int]) -> tuple[Mapping[str, Tensor], ...] | None:
    """Split image tensors by row: those of one entry per image, and those of one entry per patch.

    Patches are counted by ``image_grid_thw``. None if a tensor is neither, or could have one entry per row.
    """
    total = sum(counts)
    by_image = "image_grid_thw" in pixels or "image_sizes" in pixels
    if total == len(counts) and any(count != 1 for count in counts) and not by_image:
        return None
    if not total:
        return tuple({} for _ in counts) if not pixels else None
    by_row: list[dict[str, Tensor]] = [{} for _ in counts]
    for key, value in pixels.items():
        sizes = counts
        if len(value) != total:
            if "image_grid_thw" not in pixels:
                return None
            patches = iter(pixels["image_grid_thw"].prod(-1).tolist())
            sizes = [sum(next(patches) for _ in range(count)) for count in counts]
            if sum(sizes) != len(value):
                return None
        for row, count, part in zip(by_row, counts, torch.split(value, sizes), strict=True):
            if count:
                row[key] = part
    return tuple(by_row)


def identity(row: RawInput) -> int:
    """Return a 64-bit signed number that is equal for equal targets: same text, same bytes or pixels.

    White space around the text does not count, its case does. A file that is not there counts by its name.
    """
    text = PLACEHOLDER.join(part.strip() for part in row.text.split(PLACEHOLDER))
    digest = blake2b(text.encode(), digest_size=8)
    for image in row.images:
        digest.update(b"\0")
        if isinstance(image, str):
            file = Path(image)
            digest.update(file.read_bytes() if file.is_file() else os.fsencode(image))
        else:
            digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
    return int.from_bytes(digest.digest(), "big", signed=True)
