"""The texts that a model reads: MMEB's written prompts, those of split columns, those of a user's items."""

import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from numbers import Real
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RawInput, Template
from parallel_decoupling.data.images import as_picture, as_video, is_array, names_picture
from parallel_decoupling.data.unusable import one_row

INPUT_KEYS = ("text", "image", "images", "video", "instruction")


@dataclass(frozen=True)
class PromptRules:
    """How a task's prompts are put together; all but ``query_image`` for split columns only.

    Attributes:
        query_image: False for queries that never show an image. The placeholder that MMEB writes into some
            of them all the same (WebQA, EDIS) is dropped (ours; VLM2Vec leaves a lone image token).
        own_line: the query's instruction always starts a line; otherwise only where it is written so.
        query_end: what ends a query.
        candidate_end: what ends a candidate with an image and no text.
        one_line: placeholder, instruction and text stand on a line that nothing ends, as in MMEB-V2.
    """

    query_image: bool = True
    own_line: bool = False
    query_end: str = "\n"
    candidate_end: str = "\n"
    one_line: bool = False


def written_text(text: str, *, has_image: bool, drop_placeholder: bool = False) -> str:
    """Check a finished prompt, and complete one that forgets its image by a placeholder on its own line.

    With ``drop_placeholder`` one that has no image goes, and the space or newline after it.
    """
    count = text.count(IMAGE_PLACEHOLDER)
    if not has_image:
        if count and drop_placeholder:
            text, count = re.sub(re.escape(IMAGE_PLACEHOLDER) + "[ \n]?", "", text), 0
        if count:
            raise ValueError(f"{IMAGE_PLACEHOLDER} in the text but no image. Remove it or add the image.")
        if not text.strip():
            raise ValueError("neither text nor image. Remove the row from the file or fill it in.")
        return text
    if count > 1:
        raise ValueError(f"{count} placeholders {IMAGE_PLACEHOLDER} for one image. Keep exactly one.")
    return text if count else f"{IMAGE_PLACEHOLDER}\n{text}"


def split_query(instruction: str, text: str, rules: PromptRules, *, has_image: bool) -> str:
    """Put a query together from its instruction and its text.

    With an image every space before a newline goes, and a placeholder and space around the instruction do.
    """
    written = instruction.replace(IMAGE_PLACEHOLDER, "")
    body = " ".join(filter(None, (written.strip(), text)))
    if has_image and body:
        line = "\n" if rules.own_line or written.startswith("\n") else " "
        body = f"{IMAGE_PLACEHOLDER}{line}{body}".replace(" \n", "\n")
    elif has_image:
        body = IMAGE_PLACEHOLDER
    return body + rules.query_end


def split_candidate(instruction: str, text: str, rules: PromptRules, *, has_image: bool) -> str:
    """Put a candidate together; one without an image is its text alone, to the letter.

    The instruction keeps its whitespace, at its end as well: VLM2Vec strips that of queries only.
    """
    if not has_image:
        return text
    written = instruction.replace(IMAGE_PLACEHOLDER, "")
    body = " ".join(filter(None, (written, text if text.strip() else "")))
    start = f"{IMAGE_PLACEHOLDER} {body}".replace(" \n", "\n") if body else IMAGE_PLACEHOLDER
    return start + ("\n" if text.strip() else rules.candidate_end)


def prompt(
    text: str | None = None,
    image: Image.Image | str | None = None,
    instruction: str | None = None,
    *,
    images: Sequence[Image.Image | str] = (),
    video: Sequence[Image.Image | str] = (),
) -> RawInput:
    r"""Write an input the way MMEB's training data is written.

    With images (PIL images or files): ``"<|image_1|>\n{instruction} {text}\n"``, one placeholder line per
    image, then one for a video. Without: ``"{instruction} {text}\n"``. A text alone (MMEB's captions,
    labels and answers) is stripped and gets no newline.

    Relations:
        Equals the written prompts of MMEB-eval's 36 tasks, but for the last newline of four: VisDial's
        queries have two, the crops of MSCOCO, RefCOCO and Visual7W-Pointing none.
    """
    if image is not None and images:
        raise ValueError("Give image or images, not both.")
    pictures = (image,) if image is not None else tuple(images)
    body = " ".join(part.strip() for part in (instruction, text) if part and part.strip())
    if not pictures and not video:
        if not text or not text.strip():
            raise ValueError("An input needs a text or an image, or a video.")
        text = text.strip()
        return RawInput(body if body == text else f"{body}\n", (), len(body) - len(text))
    marks = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + (f"{VIDEO_PLACEHOLDER}\n" if video else "")
    asked = len(instruction.strip()) if instruction else 0
    return RawInput(marks + (f"{body}\n" if body else ""), pictures, len(marks) + asked, tuple(video))


def chat_pattern(processor: Any, num_images: int, num_videos: int = 0) -> str:
    """Return a processor's chat template, up to where the answer begins, as a pattern of ``Template``."""
    parts: Any = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
    parts += [{"type": "text", "text": "{text}"}]
    system: Any = [{"type": "text", "text": "{instruction}"}]
    if not hasattr(processor, "apply_chat_template"):  # a tokenizer's messages are plain texts
        processor, parts, system = processor.tokenizer, "{text}", "{instruction}"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": parts}]
    try:
        pattern: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (ValueError, TemplateError) as error:
        pattern = str(error)
    if [pattern.count(mark) for mark in ("{instruction}", "{text}")] != [1, 1]:
        found = "the processor's chat template does not show a system message and a text, once each"
        raise ValueError(f"{found}: {pattern!r}. Give a pattern.")
    return pattern


def fill(pattern: str, row: RawInput, template: Template, images: str) -> tuple[str, str, str]:
    """Return what a pattern has before the row's text, the text, and what follows; pictures as it says."""
    parts = row.text[: row.fixed], row.text[row.fixed :]
    marks = f"({re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)})[ \n]?"
    instruction, text = (re.sub(marks, "", part).strip() for part in parts)
    before, behind = pattern.split("{text}")
    if "{instruction}" not in pattern:
        before += "{instruction} " if instruction else ""
    else:
        instruction = instruction or template.instruction
        unended = instruction and not unicodedata.category(instruction[-1]).startswith("P")
        instruction += "." if template.full_stop and unended else ""
    values = {"{instruction}": instruction, "{images}": images}
    before = re.sub("{instruction}|{images}", lambda mark: values[mark[0]], before)
    return before, text, behind.replace("{instruction}", instruction)


def is_single(inputs: Any) -> bool:
    """Tell whether ``inputs`` is one item rather than a list of items."""
    kinds = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, RawInput, Mapping)
    return isinstance(inputs, kinds) or (is_array(inputs) and inputs.ndim <= 3)


def listed(inputs: Any) -> list[Any]:
    """Return the items of a list, or of one item; a table or what has no order is a ``ValueError``."""
    if is_single(inputs):
        return [inputs]
    _refuse_table(inputs)
    if hasattr(inputs, "to_pylist"):  # a column of Arrow
        return list(inputs.to_pylist())
    try:
        return list(inputs)
    except (TypeError, RuntimeError) as error:  # arrays and tensors of kinds that have no rows
        if isinstance(inputs, Iterable) and not hasattr(inputs, "ndim"):
            raise
        kind = type(inputs).__name__
        advice = "use a list of texts and pictures"
        raise ValueError(f"an input of type {kind} cannot be embedded; {advice}") from error


def to_raw_inputs(inputs: Any, instruction: str | None = None) -> list[RawInput]:
    """Turn what ``Embedder.encode`` takes into prompts, in order; an error names the index of the item.

    A string is a picture if ``names_picture`` says so, and else a text; a dictionary's own ``instruction``
    wins; to a finished ``RawInput`` no instruction can be added.
    """
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"instruction is a {type(instruction).__name__}; use a string")
    rows = []
    for index, item in enumerate(listed(inputs)):
        with one_row(f"input {index}: "):
            rows.append(to_raw_input(item, instruction))
    return rows


def to_raw_input(item: Any, instruction: str | None = None) -> RawInput:
    """Turn one item into a prompt; see ``to_raw_inputs``."""
    if isinstance(item, RawInput):
        if instruction is not None:
            raise ValueError("a RawInput is a finished prompt; it takes no instruction")
        return item
    if isinstance(item, Mapping):
        return _raw_input_from_mapping(item, instruction)
    if isinstance(item, str) and not names_picture(item):
        return prompt(text=item, instruction=instruction)
    _refuse_table(item)
    if isinstance(item, list | tuple):  # such as a row of iterrows() or itertuples()
        raise ValueError(_no_list(item, "an input"))
    return prompt(image=as_picture(item), instruction=instruction)


def _raw_input_from_mapping(item: Mapping[str, Any], instruction: str | None) -> RawInput:
    item = {key: None if _is_missing(value) else value for key, value in item.items()}
    for key in ("text", "instruction", "image"):
        value = item.get(key)
        if isinstance(value, Sized) and not is_single(value):
            raise ValueError(_no_list(item))
        if key != "image" and not isinstance(value, str | None):
            raise ValueError(f"{key!r} is a {type(value).__name__}; use a string")
    if unknown := sorted(str(key) for key in item if key not in INPUT_KEYS):
        raise ValueError(f"unknown keys {unknown}; use {list(INPUT_KEYS)}")
    text, image, images, video, own = (item.get(key) for key in INPUT_KEYS)
    if images is not None and is_single(images):
        raise ValueError(f"'images' is a single {type(images).__name__}; pass a list or use 'image'")
    image = None if image is None else as_picture(image)
    images = [as_picture(each) for each in (() if images is None else listed(images))]
    frames = () if video is None else as_video(video)
    return prompt(text, image, instruction if own is None else own, images=images, video=frames)


def _is_missing(value: Any) -> bool:
    """Tell whether a value is what pandas has in an empty cell."""
    return (isinstance(value, Real) and value != value) or type(value).__name__ in ("NAType", "NaTType")


def _refuse_table(value: Any) -> None:
    """Raise ``ValueError`` for what would give names of columns, or items in any order, in place of rows."""
    is_table = any(hasattr(value, name) for name in ("columns", "column_names"))
    is_table |= getattr(getattr(value, "dtype", None), "names", None) is not None  # of numpy
    if is_table or isinstance(value, Set | io.IOBase):
        raise ValueError(_no_list(value))
    if hasattr(value, "to_dict") and isinstance(next(iter(value.index), None), str):  # a Series of pandas
        advice = "pass its to_dict() if it is a row of a table, or its to_list() if it is a column"
        raise ValueError(f"a {type(value).__name__} indexed by names is not a list of inputs: {advice}")


def _no_list(value: Any, wanted: str = "a list of inputs") -> str:
    rows = "to_dict('records') of pandas, to_dicts() of polars, to_pylist() of Arrow"
    advice = f"one column, such as list(table['text']), or dictionaries with {', '.join(INPUT_KEYS)} ({rows})"
    return f"a {type(value).__name__} is not {wanted}: pass {advice}"
