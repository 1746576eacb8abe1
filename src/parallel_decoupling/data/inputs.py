"""From the cells of a table to inputs: which table and pictures a name stands for, one side at a time.

Here: MMEB's folders and columns, and those of your own data. Elsewhere on purpose: whole rows (``readers``),
whitespace and placeholders (``prompts``), mapping files into memory (``tables``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import ImageFolder
from parallel_decoupling.data.prompts import prompt, split_candidate, split_query, written_text
from parallel_decoupling.data.tables import Table
from parallel_decoupling.data.tasks import Task, read_tasks, task_of_subset

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
CANDIDATE_COLUMNS = ("tgt_text", "tgt_img_path")
INSTRUCTION_COLUMNS = ("qry_inst", "tgt_inst")
"""Of MMEB_Test_Instruct, which splits instructions off."""

Form: TypeAlias = Literal["written", "split", "bare"]
"""Whether texts are finished prompts, have their instructions split off, or are bare."""

Side: TypeAlias = tuple[str, str]
"""Text and image cell of a query or candidate, "" for none."""


class Inputs:
    """Turns cells into ``RawInput``s.

    Args:
        task: its prompt rules and, for your own data, its instructions; None is MMEB's layout without rules.
        folder: where the pictures are.
        form: of the texts.
        must_exist: False keeps the name of an image file that is not there.
    """

    def __init__(
        self, task: Task | None, folder: ImageFolder, form: Form, *, must_exist: bool = True
    ) -> None:
        self.task, self.folder, self.form, self.must_exist = task, folder, form, must_exist

    def query(self, side: Side, where: str, instruction: str = "") -> RawInput:
        """One query; ``instruction`` is the split-off one, ``where`` names the cell in errors."""
        text, has_image = side[0], bool(side[1])
        drop = False
        if self.task is not None:
            drop = not self.task.prompt.query_image
            if self.form == "split":
                text = split_query(instruction, text, self.task.prompt, has_image=has_image)
            elif self.task.source is not None:
                instruction = self.task.source.query_instruction
        return self._input((text, side[1]), where, instruction, drop)

    def candidate(self, side: Side, where: str, instruction: str = "") -> RawInput:
        """One candidate; ``instruction`` is the split-off one, ``where`` names the cell in errors."""
        text, has_image = side[0], bool(side[1])
        if self.task is not None:
            if self.form == "split":
                text = split_candidate(instruction, text, self.task.prompt, has_image=has_image)
            elif self.task.source is not None:
                instruction = self.task.source.candidate_instruction
        return self._input((text, side[1]), where, instruction, False)

    def _input(self, side: Side, where: str, instruction: str, drop_placeholder: bool) -> RawInput:
        text, image = side
        try:
            if self.form == "bare":
                text = prompt(text, image or None, instruction).text
            else:
                text = written_text(text, has_image=bool(image), drop_placeholder=drop_placeholder)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not image:
            return RawInput(text)
        file = self.folder.get(image, where) if self.must_exist else self.folder.find(image)
        return RawInput(text, (file or image,))


def aligned_sides(texts: Any, images: Any, where: str) -> list[Side]:
    """Pair two cells that hold lists, or one list and one value for all of its entries.

    Raises:
        ValueError: two lists of different lengths.
    """
    if not isinstance(texts, list):
        texts = [texts] * (len(images) if isinstance(images, list) else 1)
    if not isinstance(images, list):
        images = [images] * len(texts)
    if len(texts) != len(images):
        raise ValueError(
            f"{where}: {len(texts)} texts but {len(images)} image paths. "
            "The lists must be index-aligned; use '' for no text or no image."
        )
    return [(text or "", image or "") for text, image in zip(texts, images, strict=True)]


def train_table(data_dir: Path, subset: str, split: str, task: Task | None) -> tuple[Table, ImageFolder]:
    """The rows of a training subset under MMEB-train's column names, and where its pictures are.

    Raises:
        ValueError: no file, a missing column, a list where one value belongs, or something else than a list
            among lists.
    """
    owner = f"training subset {subset!r}"
    source = None if task is None else task.source
    if source is None or source.train_file is None:
        root = data_dir / "MMEB-train"
        names = (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS)
        table = Table(owner, _files(owner, root / subset, split), dict(zip(names, names, strict=True)))
        table.require(TRAIN_COLUMNS)
        return table, ImageFolder(root)
    table = Table(owner, [source.train_file], source.train_columns(), NEGATIVE_COLUMNS)
    table.require(table.columns)
    _check_no_lists(
        table,
        TRAIN_COLUMNS,
        "a training row has one query and one positive. Put further candidates into columns of the roles "
        "negative_text and negative_image.",
    )
    return table, ImageFolder(source.image_dir)


def eval_table(data_dir: Path, task: Task) -> tuple[Table, ImageFolder, Form]:
    """The rows of an evaluation task under MMEB-eval's column names, its pictures, and its form.

    Both published formats are recognised by their columns; pictures are looked for in ``MMEB-eval``,
    ``MMEB-eval/images`` and ``image-tasks`` (of either folder).

    Raises:
        ValueError: no file, a missing column, a list where one value belongs, or something else than a list
            among lists.
    """
    owner = f"evaluation task {task.name!r}"
    if task.source is not None and task.source.eval_file is not None:
        table = Table(owner, [task.source.eval_file], task.source.eval_columns(), CANDIDATE_COLUMNS)
        table.require(table.columns)
        _check_no_lists(table, ("qry_text", "qry_img_path"), "a row has one query. Give every query a row.")
        return table, ImageFolder(task.source.image_dir), "bare"
    root = data_dir / "MMEB-eval"
    names = (*EVAL_COLUMNS, *INSTRUCTION_COLUMNS)
    table = Table(owner, _files(owner, root / task.name, "test"), dict(zip(names, names, strict=True)))
    folder = ImageFolder(root, root / "image-tasks", data_dir / "image-tasks")
    if table.column("qry_inst") is not None:
        table.require(("qry_text", "tgt_text"))
        return table, folder, "split"
    table.require(EVAL_COLUMNS)
    return table, folder, "written"


def prepare_tables(data_dir: Path, subsets: Sequence[str], split: str, tasks: Sequence[str]) -> None:
    """Write the copies that are mapped into memory, so that no process has to do it at the same time."""
    known = read_tasks(data_dir)
    for subset in subsets:
        train_table(data_dir, subset, split, task_of_subset(known, subset))
    for task in tasks:
        if task in known:
            eval_table(data_dir, known[task])


def _check_no_lists(table: Table, names: Sequence[str], advice: str) -> None:
    for name in names:
        column = table.column(name)
        if column is not None and pa.types.is_list(column.type):
            raise ValueError(f"{table.where(0, name)}: holds a list; {advice}")


def _files(owner: str, folder: Path, split: str) -> Sequence[Path]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        others = ", ".join(sorted(file.name for file in folder.glob("*.parquet"))) or "no parquet file"
        raise ValueError(
            f"{owner}: no file {folder / split}-*.parquet; the folder holds {others}. "
            "Check data_dir, the name and the split."
        )
    return files
