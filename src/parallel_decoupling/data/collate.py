"""From raw rows to tensors. Nothing is added to a text, as in VLM2Vec, unless the backbone has a prompt."""

import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from parallel_decoupling.batch import IMAGE_PLACEHOLDER as PLACEHOLDER
from parallel_decoupling.batch import PADDING_ID, EncoderInputs, PairBatch, RawInput, RawPair, TokenLimit
from parallel_decoupling.batch import VIDEO_PLACEHOLDER as VIDEO
from parallel_decoupling.data.images import ImagePolicy, load_image
from parallel_decoupling.data.prompts import chat_pattern, fill
from parallel_decoupling.data.unusable import RowError, attempt, one_row

PADDING = RawInput("-")  # what is encoded in place of a missing hard negative; as short as a text can be
FRAMES_PER_SECOND = 2.0
"""What frames without times count as, as in qwen-vl-utils; Qwen3-VL and Qwen2.5-VL see the time."""
ByRow = tuple[Mapping[str, Tensor], ...]  # image tensors


class Collator:
    """Turns rows into padded tensors with one processor call.

    Each row without its padding equals the processor's output for that row alone, and is made so where image
    tensors cannot be split by row. ``image_token`` stands for an image in the backbone's text, ``template``
    (``batch.Template``) is what stands around that.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_token: str,
        template: Any = None,
        images: ImagePolicy | None = None,
        limit: TokenLimit | None = None,
    ) -> None:
        self.processor, self.image_token, self.limit = processor, image_token, limit or TokenLimit()
        image_processor = getattr(processor, "image_processor", None)
        patch, merge = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
        self.images = images or ImagePolicy()
        if isinstance(patch, int) and isinstance(merge, int):
            self.images = replace(self.images, factor=patch * merge)
        frames = getattr(processor, "video_processor", None)
        takes = "video_grid_thw" in getattr(frames, "model_input_names", ())
        self.video_token: str | None = processor.video_token if takes else None
        self._splits = True  # until the processor's image tensors are seen not to split by row
        self.template, self._patterns = template, dict[tuple[int, int], str]()
        self.text_parts(PADDING)  # a chat template that cannot be used is an error at once

    @classmethod
    def of(cls, model: Any, **options: Any) -> "Collator":
        """Return the collator of an encoder or a backbone."""
        return cls(model.processor, image_token=model.image_token, template=model.template, **options)

    def __call__(self, pairs: Sequence[RawPair]) -> PairBatch:
        """Batch training rows in the order of ``PairBatch``."""
        others = [(*pair.positives, *pair.negatives) for pair in pairs]
        candidates: list[RawInput | None] = [pair.candidate for pair in pairs]
        candidates += [each for of_row in others for each in of_row]
        places = [f"training subset {pair.subset!r}, row {pair.row}: " for pair in pairs]
        repeated = [place for of_row, place in zip(others, places, strict=True) for _ in of_row]
        teachers = [pair.teacher or (math.nan,) * (1 + len(others[0])) for pair in pairs]
        inputs = [*(pair.query for pair in pairs), *(each or PADDING for each in candidates)]
        return PairBatch(
            inputs=self.encode_inputs(inputs, [*places, *places, *repeated]),
            candidate_ids=torch.tensor([identity(each) if each else PADDING_ID for each in candidates]),
            subsets=tuple(pair.subset for pair in pairs),
            num_positives=1 + len(pairs[0].positives),
            teacher=torch.tensor(teachers),
        )

    def encode_inputs(self, inputs: Sequence[RawInput], places: Sequence[str] | None = None) -> EncoderInputs:
        """Tokenise, decode images and pad; ``places`` begin the messages of errors, one per input."""
        encoded, problems = self.encode_usable(inputs)
        for row, error in problems.items():
            with one_row(places[row] if places else ""):
                raise error
        if encoded is None:
            raise ValueError("The list of inputs to encode is empty.")
        return encoded

    def encode_usable(self, inputs: Sequence[RawInput]) -> tuple[EncoderInputs | None, dict[int, RowError]]:
        """Encode the rows that can be embedded, None if there are none; and say why the others cannot."""
        try:
            with one_row():  # which one it is comes out below
                together = self._process(inputs) if inputs else None
        except (RowError, MemoryError, RuntimeError):  # nor may the memory for all of them be there
            together = None
        if together is not None:
            return together, {}
        alone, problems = attempt(lambda row: self._process([inputs[row]]), range(len(inputs)))
        return self._join([*filter(None, alone.values())]) if alone else None, problems

    def check_text(self, row: RawInput) -> None:
        """Raise ``ValueError`` for a text that cannot be tokenised with the row's images."""
        if row.video and self.video_token is None:
            known = "Qwen2-VL, Qwen2.5-VL and Qwen3-VL do. Leave it out, or pass single frames as images"
            raise ValueError(f"the backbone takes no video; {known}.")
        if not row.pictures and not row.text.strip():
            raise ValueError("neither text nor image. Remove the row from the file or fill it in.")
        shown, kinds = reprlib.repr(row.text), ("image", self.image_token, PLACEHOLDER, len(row.images))
        for kind, token, mark, given in (kinds, ("video", self.video_token, VIDEO, int(bool(row.video)))):
            if (count := row.text.count(mark)) != given:
                raise ValueError(f"{given} {kind}s but {count} {mark} in {shown}.")
            if token not in (None, mark) and token in row.text:
                found = f"The text {shown} holds {token!r}, the backbone's own {kind} token"
                raise ValueError(f"{found}. Mark {kind}s with {mark}.")
        row.text.encode()  # half a surrogate pair is not a text

    def text_parts(self, row: RawInput) -> tuple[str, str, str]:
        """Return a row as the backbone reads it: a start that is never cut, what can be cut, and the end."""
        video = self.video_token or ""
        if self.template is None:
            text, start = (
                part.replace(PLACEHOLDER, self.image_token).replace(VIDEO, video)
                for part in (row.text, row.text[: row.fixed])
            )
            return start, text[len(start) :], ""
        count, pattern = (len(row.images), int(bool(row.video))), self.template.pattern
        if pattern == "chat":
            if count not in self._patterns:
                self._patterns[count] = chat_pattern(self.processor, *count)
            pattern = self._patterns[count]
        marks = (self.template.image or self.image_token) * count[0] + video * count[1]
        return fill(pattern, row, self.template, marks)

    def _read(self, row: RawInput) -> tuple[str, list[Image.Image], list[Image.Image]]:
        """Check a row's text, and decode its images and the frames of its video."""
        self.check_text(row)
        turn = self.images.image_size is None
        images = [self.images(load_image(image, turn=turn)) for image in row.images]
        return "".join(self.text_parts(row)), images, self.images.video(row.video) if row.video else []

    def _videos(self, videos: Sequence[list[Image.Image]]) -> dict[str, Any]:
        """Return what a processor is told of the videos of all rows."""
        videos = [frames for frames in videos if frames]
        if not videos:
            return {}
        about = [
            {"fps": FRAMES_PER_SECOND, "total_num_frames": len(each), "frames_indices": [*range(len(each))]}
            for each in videos
        ]
        options = {"videos": videos, "video_metadata": about, "do_sample_frames": False}
        if getattr(self.processor.video_processor, "cap_pixels_per_frame", False) is None:
            options["cap_pixels_per_frame"] = False  # what None means, without a warning
        return options

    def _process(self, inputs: Sequence[RawInput]) -> EncoderInputs | None:
        """Process all rows in one call; return None if the image tensors cannot be told apart by row."""
        is_alone, first = len(inputs) == 1, inputs[0]
        if any(row.pictures for row in inputs) and not self._splits and not is_alone:
            return None
        texts, images, videos = zip(*map(self._read, inputs), strict=True)
        nested = list(images) if any(images) else None  # by row: a family may treat several of a row apart
        options = {**self._videos(videos), "padding": True, "return_tensors": "pt"}
        names, kinds = getattr(self.processor, "model_input_names", ()), "mm_token_type_ids"
        only_texts = kinds in names and nested is None and not any(videos)
        if only_texts:  # their kinds are 0, for which a processor would look at every token
            options[f"return_{kinds}"] = False
        with one_row(f"The processor refuses {reprlib.repr(first.text)} with {_named(first.images)}: "):
            data = self.processor(text=list(texts), images=nested, **options)
        if only_texts:
            data[kinds] = torch.zeros_like(data["input_ids"])
        tokens, pixels = self._separate(data)
        if is_alone:
            return self._limited(EncoderInputs(tokens, (pixels,)), inputs)
        vision = _split(pixels, [len(row) for row in images], [int(bool(row)) for row in videos])
        self._splits = vision is not None
        return None if vision is None else self._limited(EncoderInputs(tokens, vision), inputs)

    def _limited(self, encoded: EncoderInputs, inputs: Sequence[RawInput]) -> EncoderInputs:
        """Cut every row to the most tokens that it may have."""
        if hasattr(self.processor, "cut_rows"):  # OpenCLIP's tokenizers cut by themselves
            cut: list[bool] = self.processor.cut_rows([row.text for row in inputs])
            if any(cut) and self.limit.long_text == "error":
                raise ValueError(self._too_long(inputs[cut.index(True)]))
            return replace(encoded, num_cut=sum(cut))
        if encoded.tokens["input_ids"].shape[1] <= self.limit.max_tokens:
            return encoded
        return self._join([self._cut(encoded.select([number]), row) for number, row in enumerate(inputs)])

    def _cut(self, encoded: EncoderInputs, row: RawInput) -> EncoderInputs:
        """Cut one row, which has no padding, before its last token."""
        ids, most = encoded.tokens["input_ids"][0], self.limit.max_tokens
        if len(ids) <= most:
            return encoded
        if self.limit.long_text == "error":
            raise ValueError(self._too_long(row, len(ids)))
        tokenizer, (start, text, end) = self.processor.tokenizer, self.text_parts(row)
        rest = tokenizer(text + end, add_special_tokens=False)["input_ids"] if start else ids
        marks = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token or self.image_token])
        image = torch.isin(ids, torch.tensor(marks)).nonzero().flatten().tolist()
        needed = max(len(ids) - len(rest), image[-1] + 1 if image else 0)
        last = max(1, len(tokenizer(end)["input_ids"]))
        if needed + last > most:
            what = f"pictures and instruction take {needed} tokens where max_tokens is {most}"
            raise ValueError(f"{what}, with {last} for the end. Use smaller ones, or raise max_tokens.")
        keep = [*range(most - last), *range(len(ids) - last, len(ids))]
        return EncoderInputs({k: v[:, keep] for k, v in encoded.tokens.items()}, encoded.vision, num_cut=1)

    def _too_long(self, row: RawInput, count: int | str = "more") -> str:
        return f"{count} tokens where max_tokens is {self.limit.max_tokens}: {reprlib.repr(row.text)}."

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
            fill = getattr(tokenizer, "pad_token_id", 0) if key == "input_ids" else 0
            tokens[key] = pad_sequence(values, True, fill, getattr(tokenizer, "padding_side", "right"))
        return EncoderInputs(tokens, tuple(row.vision[0] for row in rows), sum(row.num_cut for row in rows))


def _named(images: Sequence[Image.Image | str]) -> str:
    names = [
        each if isinstance(each, str) else f"an image of {each.width} x {each.height}" for each in images
    ]
    return ", ".join(names) or "no image"


def _split(pixels: Mapping[str, Tensor], images: list[int], videos: list[int]) -> ByRow | None:
    """Split the tensors of images and videos by row; None if one cannot be split."""
    of_videos = {key: pixels[key] for key in pixels if "video" in key or key == "second_per_grid_ts"}
    of_images = {key: pixels[key] for key in pixels if key not in of_videos}
    image, video = _split_kind(of_images, images), _split_kind(of_videos, videos, "video_grid_thw")
    if image is None or video is None:
        return None
    return tuple({**one, **other} for one, other in zip(image, video, strict=True))


def _split_kind(
    pixels: Mapping[str, Tensor], counts: list[int], grid: str = "image_grid_thw"
) -> ByRow | None:
    """Split tensors of one entry per image or, counted by ``grid``, per patch; None if one may be neither."""
    total = sum(counts)
    by_image = grid in pixels or "image_sizes" in pixels
    if total == len(counts) and any(count != 1 for count in counts) and not by_image:
        return None
    if not total:
        return tuple({} for _ in counts) if not pixels else None
    by_row: list[dict[str, Tensor]] = [{} for _ in counts]
    for key, value in pixels.items():
        sizes = counts
        if len(value) != total:
            if grid not in pixels:
                return None
            patches = iter(pixels[grid].prod(-1).tolist())
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
    for image in row.pictures:
        digest.update(b"\0")
        if isinstance(image, str):
            file = Path(image)
            digest.update(file.read_bytes() if file.is_file() else os.fsencode(image))
        else:
            digest.update(f"{image.mode} {image.size} {image.getpalette()} ".encode() + image.tobytes())
    return int.from_bytes(digest.digest(), "big", signed=True)
