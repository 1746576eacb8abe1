"""How the cells of a table's row become a query or a candidate."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import ImageFolder, frame_files
from parallel_decoupling.data.prompts import PromptRules, prompt, split_candidate, split_query, written_text
from parallel_decoupling.data.tables import Table
from parallel_decoupling.data.tasks import ROLES, Source, Task
from parallel_decoupling.data.unusable import RowError, one_row

Side: TypeAlias = tuple[str, str]
"""Text and image file of a query or candidate, "" for none; or the names of the columns that hold them."""

QUERY, CANDIDATE, NEGATIVE = zip(ROLES[::2], ROLES[1::2], strict=True)
"""Columns of a table, named by their roles."""


@dataclass(frozen=True)
class RowReader:
    """A table with columns by role, and how its cells become inputs; ``source`` is None in MMEB's layout."""

    table: Table
    images: ImageFolder
    rules: PromptRules = PromptRules()
    source: Source | None = None

    def input(self, row: int, columns: Side, side: Side, instruction: str | None = None) -> RawInput:
        """Return one query or candidate; ``instruction`` is the row's own, in a column of its own.

        A picture that is a folder is a video.
        """
        is_query = columns == QUERY
        try:
            with one_row(f"{self.table.where(row, *columns)}: "):
                text, fixed = self._text(side, is_query, instruction)
            with one_row(f"{self.table.where(row, *columns[::-1])}: "):
                file = self.images.get(side[1]) if side[1] else ""
                frames = frame_files(file) if os.path.isdir(file) else ()
        except RowError:
            if self.images.must_exist:
                raise
            return RawInput(side[0], side[1:] if side[1] else ())  # what uses it finds out, as with images
        if frames:
            text = text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)  # as long as the other
        return RawInput(text, (file,) if file and not frames else (), fixed, frames)

    def _text(self, side: Side, is_query: bool, instruction: str | None) -> tuple[str, int]:
        """Return the text of an input, and how much of it is its instruction."""
        (text, image), fixed = side, 0
        if self.source is not None:
            own = self.source.query_instruction if is_query else self.source.candidate_instruction
            own = instruction or own
            if self.rules.one_line:
                start = " ".join([IMAGE_PLACEHOLDER] * bool(image) + [own] * bool(own))
                text, fixed = " ".join(filter(None, (start, text))), len(start)
            else:
                made = prompt(text, image or None, own)
                text, fixed = made.text, made.fixed
        else:
            if instruction is not None:
                join = split_query if is_query else split_candidate
                text = join(instruction, text, self.rules, has_image=bool(image))
            drop = is_query and not self.rules.query_image
            text = written_text(text, has_image=bool(image), drop_placeholder=drop)
        return text, fixed

    def sides(self, row: int, columns: Side, cells: Mapping[str, Any]) -> list[Side]:
        """Pair two cells that hold lists of one length, or one list and one value for all of its entries."""
        both: list[Any] = [cells.get(column) for column in columns]
        lengths = {len(cell) for cell in both if isinstance(cell, list)} or {1}
        if len(lengths) > 1:
            found = f"{len(both[0])} texts but {len(both[1])} image paths"
            rule = "The lists must be index-aligned; use '' for no text or no image."
            raise ValueError(f"{self.table.where(row, *columns)}: {found}. {rule}")
        texts, images = (cell if isinstance(cell, list) else [cell] * max(lengths) for cell in both)
        return [(text or "", image or "") for text, image in zip(texts, images, strict=True)]

    def filled(self, row: int, columns: Side, cells: Mapping[str, Any]) -> list[Side]:
        """Return the sides that are not blank."""
        return [side for side in self.sides(row, columns, cells) if side[0].strip() or side[1]]


def side_of(cells: Mapping[str, Any], columns: Side) -> Side:
    """Return text and image of one side that has one value."""
    return cells.get(columns[0]) or "", cells.get(columns[1]) or ""


def target(task: Task, side: Side) -> Side:
    """Return what makes a candidate the same as another one; quotes around a caption do not."""
    text, image = side
    if task.identity == "text":
        return side
    return ("" if image else text, image) if task.identity == "image" else (text.strip('"'), image)
