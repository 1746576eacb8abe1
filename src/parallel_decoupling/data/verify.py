"""What is in a data folder, what is wrong with it, and how to put it right: ``lightning verify``.

Rows are read with the same code that trains and evaluates. A *problem* stops a run or changes a score and
makes the command fail; a *note* is worth knowing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table as RichTable
from tqdm import tqdm

from parallel_decoupling.data.images import ImageError, ImageFolder, load_image
from parallel_decoupling.data.inputs import NEGATIVE_COLUMNS, TRAIN_COLUMNS
from parallel_decoupling.data.readers import TrainSubset, read_eval_task
from parallel_decoupling.data.tasks import (
    MMEB_TASKS,
    MMEB_TRAIN_SUBSETS,
    EvalTask,
    find_eval_tasks,
    find_train_subsets,
    read_tasks,
)

GHOST = "._"
SPLITS = ("original", "test", "")
"""Those that go without saying."""

QUERIES_PER_TASK = 1000
"""Of every MMEB task."""

NEGATIVES = 100
"""At most so many of a training row are looked at."""


@dataclass
class Check:
    """What one subset or task holds.

    Attributes:
        part: ``train`` or ``eval``.
        name: of the subset or task.
        split: file name prefix.
        rows: rows of its files.
        images: different image files that the rows name.
        missing: those of them that are not there.
        opened: those that were decoded, evenly spaced.
        broken: opened ones that cannot be decoded.
        duplicates: training rows that repeat another one; evaluation rows that list a candidate twice.
        shortest_list: candidates of the row with the fewest, 0 for training.
        longest_list: candidates of the row with the most, 0 for training.
        ghosts: ``._`` files of macOS next to the images.
        problems: what is wrong and what to do.
        notes: what is worth knowing.
    """

    part: str
    name: str
    split: str
    rows: int = 0
    images: int = 0
    missing: int = 0
    opened: int = 0
    broken: int = 0
    duplicates: int = 0
    shortest_list: int = 0
    longest_list: int = 0
    ghosts: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Verification:
    """All subsets and tasks of a folder, and what concerns the folder as a whole."""

    data_dir: str
    checks: list[Check]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def all_problems(self) -> list[str]:
        """Of the folder, then of every subset and task; empty when all is well."""
        return self.problems + [
            f"{check.part} {check.name}: {problem}" for check in self.checks for problem in check.problems
        ]

    @property
    def all_notes(self) -> list[str]:
        """Of the folder, then of every subset and task."""
        return self.notes + [
            f"{check.part} {check.name}: {note}" for check in self.checks for note in check.notes
        ]

    def table(self) -> RichTable:
        """One line per subset and task, 80 columns wide; those with problems are marked."""
        table = RichTable(title=f"data folder {self.data_dir}", box=box.SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        ghosts = any(check.ghosts for check in self.checks)
        heads = ("rows", "images", "missing", "broken", "repeated", "lists", *(["ghosts"] if ghosts else []))
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for check in self.checks:
            name = f"{check.part} {check.name}" + (f" ({check.split})" if check.split not in SPLITS else "")
            lengths = f"{check.shortest_list}-{check.longest_list}" if check.longest_list else ""
            counts = [str(count) for count in (check.rows, check.images, check.missing)]
            counts += [f"{check.broken}/{check.opened}", str(check.duplicates), lengths]
            counts += [str(check.ghosts)] if ghosts else []
            table.add_row(name + " !" * bool(check.problems), *counts, style="red" if check.problems else "")
        table.caption = "broken: of the opened ones; lists: fewest and most candidates of a row"
        return table

    def to_json_file(self, json_file: str | Path) -> None:
        """Write everything."""
        Path(json_file).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def verify(data_dir: str | Path, sample: int = 20, *, show_progress: bool = True) -> Verification:
    """Check every subset and task of a folder.

    Args:
        data_dir: what the data module takes.
        sample: image files to decode per subset and task, and training rows to read.
        show_progress: a bar over subsets and tasks.

    Raises:
        ValueError: no such folder, or a ``tasks.json`` that cannot be used.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder. Give the one that holds MMEB-train/ and MMEB-eval/.")
    jobs: list[tuple[Check, Callable[[Path, Check, int], None]]] = []
    for split in _splits(root):
        jobs += [(Check("train", name, split), _check_train) for name in _subsets(root, split)]
    jobs += [(Check("eval", name, "test"), _check_eval) for name in find_eval_tasks(root)]
    for check, run in tqdm(jobs, desc="verify", unit="set", leave=False, disable=not show_progress):
        try:
            run(root, check, sample)
        except ValueError as error:
            check.problems.append(str(error))
    verification = Verification(str(root), [check for check, _ in jobs])
    _check_folder(root, verification)
    return verification


def _splits(root: Path) -> list[str]:
    """Splits that have files, and one for data in no split."""
    files = (root / "MMEB-train").glob("*/*-*.parquet")
    return sorted({file.name.split("-")[0] for file in files if not file.name.startswith(GHOST)}) or [""]


def _subsets(root: Path, split: str) -> list[str]:
    """Subsets of a split; your own have none and come with the first."""
    own = {name for name, task in read_tasks(root).items() if task.source is not None}
    first = split == _splits(root)[0]
    return [name for name in find_train_subsets(root, split) if first or name not in own]


def _check_folder(root: Path, verification: Verification) -> None:
    if not verification.checks:
        verification.problems.append(
            "Neither training subsets nor evaluation tasks. The folder must hold MMEB-train/<subset>/ and "
            "MMEB-eval/<task>/ with parquet files, or a tasks.json; --data.download true fetches MMEB."
        )
    names = {check.name for check in verification.checks if check.part == "train"}
    for what, there, known in (
        ("training subsets", names, MMEB_TRAIN_SUBSETS),
        ("evaluation tasks", set(find_eval_tasks(root)), tuple(MMEB_TASKS)),
    ):
        lacking = [name for name in known if name not in there]
        if 0 < len(lacking) < len(known):
            verification.notes.append(
                f"{len(known) - len(lacking)} of MMEB's {len(known)} {what}; not here: {', '.join(lacking)}."
            )
    folders = {file.parent.name for file in (root / "MMEB-eval").glob("*/test-*.parquet")}
    for name in sorted(folders - set(read_tasks(root))):
        verification.notes.append(
            f"MMEB-eval/{name} is no task of the table and is not scored; tasks.json can make it one."
        )


def _check_train(root: Path, check: Check, sample: int) -> None:
    subset = TrainSubset(root, check.name, check.split, hard_negatives=NEGATIVES)
    table = subset.table
    check.rows = len(table)
    found = {name: table.column(name) for name in (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS)}
    columns = {name: column for name, column in found.items() if column is not None}
    images: set[str] = set()
    for name in ("qry_image_path", "pos_image_path", "neg_image_path"):
        if name in columns:
            column = columns[name]
            cells = pc.list_flatten(column) if pa.types.is_list(column.type) else column
            images.update(image for image in pc.unique(cells).to_pylist() if image)
    fix = f"Unpack images_zip/{check.name}.zip into MMEB-train/images again"
    if subset.inputs.form == "bare":
        fix = "Put them there or correct image_dir"
    _check_images(check, subset.inputs.folder, sorted(images), sample, fix)
    both = {name: columns[name] for name in TRAIN_COLUMNS if name in columns}
    check.duplicates = check.rows - len(pa.table(both).group_by(list(both)).aggregate([]))
    if subset.blank_rows:
        check.notes.append(f"{subset.blank_rows} rows with neither text nor image on a side are left out.")
    for index in _spread(len(subset), sample):
        try:
            subset[index]
        except ImageError:
            continue  # counted above
        except ValueError as error:
            check.problems.append(str(error))
            break


def _check_eval(root: Path, check: Check, sample: int) -> None:
    task = read_eval_task(root, check.name, must_exist=False)
    lists = task.candidates_of_row
    lengths = [len(row) for row in lists]
    check.rows, check.shortest_list, check.longest_list = len(lists), min(lengths), max(lengths)
    images = {str(image) for entry in (*task.queries, *task.candidates) for image in entry.images}
    fix = "Unpack images.zip into MMEB-eval/images again"
    if task.task.source is not None:
        fix = "Put them there or correct image_dir"
    _check_images(check, ImageFolder(Path()), sorted(images), sample, fix)
    check.duplicates = sum(len(set(row)) < len(row) for row in lists)
    lost = _rows_without_positive(task)
    if lost:
        check.problems.append(
            f"{lost} of {check.rows} rows cannot be scored: no image of the query or of the positive."
        )
    copies = sum(row.count(row[0]) > 1 for row in lists)
    if copies:
        check.notes.append(f"{copies} rows list their positive more than once; copies are no rivals.")
    if task.task.source is None and check.name in MMEB_TASKS and check.rows != QUERIES_PER_TASK:
        check.notes.append(f"{check.rows} rows, where MMEB has {QUERIES_PER_TASK}.")


def _rows_without_positive(task: EvalTask) -> int:
    def gone(row: Sequence[Any]) -> set[int]:
        return {
            index
            for index, entry in enumerate(row)
            if any(isinstance(image, str) and not Path(image).is_file() for image in entry.images)
        }

    queries, candidates = gone(task.queries), gone(task.candidates)
    rows = zip(task.query_of_row, task.candidates_of_row, strict=True)
    return sum(query in queries or row[0] in candidates for query, row in rows)


def _check_images(check: Check, folder: ImageFolder, names: list[str], sample: int, fix: str) -> None:
    """Look for every image, decode a few, and count ghosts next to them."""
    found = {name: folder.find(name) for name in names}
    missing = [name for name, file in found.items() if file is None]
    files = [file for file in found.values() if file is not None]
    check.images, check.missing = len(names), len(missing)
    if missing:
        check.problems.append(
            f"{len(missing)} of {len(names)} images are missing, such as {missing[0]}. {fix}; a truncated "
            "download looks like this. `missing_images: skip` trains and scores without them."
        )
    broken = []
    for index in _spread(len(files), sample):
        check.opened += 1
        try:
            load_image(files[index])
        except ImageError as error:
            broken.append(str(error))
    check.broken = len(broken)
    if broken:
        check.problems.append(f"{len(broken)} of {check.opened} opened images are broken. {broken[0]}")
    check.ghosts = _count_ghosts({Path(file).parent for file in files})
    if check.ghosts:
        check.notes.append(
            f"{check.ghosts} files {GHOST}* of macOS next to the images; harmless, "
            f"`find ... -name '{GHOST}*' -delete` removes them."
        )


def _count_ghosts(folders: Iterable[Path]) -> int:
    return sum(entry.name.startswith(GHOST) for folder in folders for entry in folder.iterdir())


def _spread(count: int, sample: int) -> list[int]:
    """At most ``sample`` places, evenly spaced."""
    return np.linspace(0, count - 1, min(count, sample), dtype=int).tolist() if count else []
