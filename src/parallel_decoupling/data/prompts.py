r"""The texts that a model reads: MMEB's written prompts, and the same prompts from split columns.

Two published formats give the same prompts. MMEB-train and MMEB-eval hold finished texts, which are
kept to the letter: the trailing newline of a prompt is the token that last-token pooling reads.
MMEB_Test_Instruct splits instructions off, and the whitespace is put back by the rules that VLM2Vec's
second version has per kind of task, here a column of the task table. Images stand in a text as
``IMAGE_PLACEHOLDER``; the collator swaps in the backbone's own token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput


@dataclass(frozen=True)
class PromptRules:
    r"""How a task's prompts are put together.

    Attributes:
        query_image: False for queries that never show an image. MMEB writes the placeholder into some
            of them all the same (WebQA, EDIS); it is dropped (ours; VLM2Vec leaves a lone image token).
        own_line: split columns only: the query's instruction starts a line of its own. Otherwise it
            does if it is written so, and follows the placeholder after a space if not.
        query_end: split columns only: what ends a query.
        candidate_end: split columns only: what follows the instruction of a candidate with an image and no
            text. With a text it is a newline; a candidate without an image is its text alone.
    """

    query_image: bool = True
    own_line: bool = False
    query_end: str = "\n"
    candidate_end: str = "\n"


def written_text(text: str, *, has_image: bool, drop_placeholder: bool = False) -> str:
    """Check a finished prompt, and complete one that forgets its image.

    Args:
        text: the prompt, kept to the letter.
        has_image: whether an image belongs to it. If the text has no placeholder, one goes before it
            on a line of its own, the form of MMEB's templates.
        drop_placeholder: remove a placeholder (and the space or newline after it) if there is no image.

    Raises:
        ValueError: neither text nor image, or placeholders that do not fit.
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
    r"""Put a query together from its instruction and its text.

    With an image: placeholder, newline or space, instruction, space, text, where every space before a
    newline goes, then ``query_end``. Without: instruction, space, text, ``query_end``. A placeholder in
    the instruction is a mark of the old format and goes, as does space around the instruction.

    Relations:
        Equals the written prompt of the same row in MMEB-eval.
    """
    if not has_image:
        return _joined(_bare(instruction), text) + rules.query_end
    return _with_image(instruction, text, own_line=rules.own_line) + rules.query_end


def split_candidate(instruction: str, text: str, rules: PromptRules, *, has_image: bool) -> str:
    """Put a candidate together; one without an image is its text alone, to the letter.

    With an image: placeholder, space, instruction, space, text, where every space before a newline goes, then
    a newline or, without a text, ``candidate_end``. The instruction keeps its whitespace, at its end as well:
    VLM2Vec strips that of queries only.

    Relations:
        Equals the written prompt of the same candidate in MMEB-eval.
    """
    if not has_image:
        return text
    body = _joined(instruction.replace(IMAGE_PLACEHOLDER, ""), text if text.strip() else "")
    start = f"{IMAGE_PLACEHOLDER} {body}".replace(" \n", "\n") if body else IMAGE_PLACEHOLDER
    return start + ("\n" if text.strip() else rules.candidate_end)


def _with_image(instruction: str, text: str, *, own_line: bool) -> str:
    body = _joined(_bare(instruction), text)
    if not body:
        return IMAGE_PLACEHOLDER
    on_a_line = own_line or instruction.replace(IMAGE_PLACEHOLDER, "").startswith("\n")
    return f"{IMAGE_PLACEHOLDER}{chr(10) if on_a_line else ' '}{body}".replace(" \n", "\n")


def _bare(instruction: str) -> str:
    return instruction.replace(IMAGE_PLACEHOLDER, "").strip()


def _joined(instruction: str, text: str) -> str:
    return " ".join(part for part in (instruction, text) if part)


def prompt(
    text: str | None = None,
    image: Image.Image | str | None = None,
    instruction: str | None = None,
    *,
    images: Sequence[Image.Image | str] = (),
) -> RawInput:
    r"""Write an input the way MMEB's training data is written.

    With images: ``"<|image_1|>\n{instruction} {text}\n"``, one placeholder line per image. Without:
    ``"{instruction} {text}\n"``. A text alone (MMEB's captions, labels and answers) is stripped and ends as
    it is; the newline of all others is the token that last-token pooling reads.

    Args:
        text: the text; None for an image alone.
        image: a PIL image or an image file.
        instruction: what is asked of the input; goes before the text.
        images: several images instead of ``image``.

    Raises:
        ValueError: neither text nor image, or both ``image`` and ``images``.

    Relations:
        Equals the written prompts of MMEB-eval's 36 tasks, but for the last newline of four: VisDial's
        queries have two, the crops of MSCOCO, RefCOCO and Visual7W-Pointing none.
    """
    if image is not None and images:
        raise ValueError("Give image or images, not both.")
    pictures = (image,) if image is not None else tuple(images)
    body = " ".join(part.strip() for part in (instruction, text) if part and part.strip())
    if not pictures:
        if not text or not text.strip():
            raise ValueError("An input needs a text or an image.")
        return RawInput(body if body == text.strip() else f"{body}\n")
    lines = [IMAGE_PLACEHOLDER] * len(pictures) + ([body] if body else [])
    return RawInput("".join(f"{line}\n" for line in lines), pictures)
