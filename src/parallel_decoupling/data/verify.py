"""What is in a data folder, what is wrong with it, and how to put it right.

Rows are read with the same code that trains and evaluates. A *problem* stops a run or changes a score; a
*note* is worth knowing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parallel_decoupling.data import readers, tasks
from parallel_decoupling.data.images import ImageError, load_image

MMEB_ROWS = 1000
"""Rows of every evaluation task of MMEB."""


@dataclass
class Check:
    """What one subset (``train``), task (``eval``) or the ``folder`` holds, and what is wrong with it.

    Attributes:
        counts: rows; repeated training rows, or evaluation rows that list a candidate twice; candidates of
            an evaluation row; image files that the rows name, and those missing, opened and broken.
    """

    part: str
    name: str
    split: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.part, self.name, self.split)))


def verify(data_dir: str | Path, sample: int = 20) -> list[Check]:
    """Check a folder, then every subset and task with ``sample`` images and training rows of each.

    Raises:
        ValueError: no such folder, or a ``tasks.json`` that cannot be used.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder. Give the one that holds MMEB-train/ and MMEB-eval/.")
    files = (root / "MMEB-train").glob("*/*-*.parquet")
    splits = sorted({file.name.split("-")[0] for file in files if not file.name.startswith("._")}) or [""]
    own = {name for name, task in tasks.read_tasks(root).items() if task.source is not None}
    checks = [
        Check("train", name, split)
        for split in splits
        for name in tasks.find_train_subsets(root, split)
        if split == splits[0] or name not in own
    ]
    checks += [Check("eval", name, "test") for name in tasks.find_eval_tasks(root)]
    for check in tqdm(checks, desc="verify", unit="set", leave=False, disable=not sys.stderr.isatty()):
        try:
            (_check_train if check.part == "train" else _check_eval)(root, check, sample)
        except ValueError as error:
            check.problems.append(str(error))
    return [_check_folder(root, checks), *checks]


def _check_folder(root: Path, checks: Sequence[Check]) -> Check:
    folder = Check("folder", str(root))
    if not checks:
        folder.problems.append(
            "Neither training subsets nor evaluation tasks. The folder must hold MMEB-train/<subset>/ and "
            "MMEB-eval/<task>/ with parquet files, or a tasks.json; --data.download true fetches MMEB."
        )
    for part, known in (("train", tasks.MMEB_TRAIN_SUBSETS), ("eval", tuple(tasks.MMEB_TASKS))):
        found = {check.name for check in checks if check.part == part}
        lacking = [name for name in known if name not in found]
        if 0 < len(lacking) < len(known):
            folder.notes.append(f"MMEB-{part} lacks {len(lacking)} of {len(known)}: {', '.join(lacking)}.")
    names = {file.parent.name for file in (root / "MMEB-eval").glob("*/test-*.parquet")}
    for name in sorted(names - set(tasks.read_tasks(root))):
        folder.notes.append(f"MMEB-eval/{name} is not scored; tasks.json can make it a task.")
    return folder


def _check_train(root: Path, check: Check, sample: int) -> None:
    subset = readers.TrainSubset(root, check.name, check.split, hard_negatives=100)
    sides = (readers.TRAIN_QUERY, readers.TRAIN_CANDIDATE)
    rows = subset.table.rows
    names = [name for side in sides for name in side if name in rows.column_names]
    distinct = rows.select(names).group_by(names).aggregate([])
    check.counts |= {"rows": len(rows), "repeated": len(rows) - len(distinct)}
    _check_images(check, subset.reader, (*sides, readers.NEGATIVES), sample)
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
    read = readers.read_eval_task(root, check.name, must_exist=False)
    reader = readers.open_eval(root, read.task)
    lists = read.candidates_of_row
    check.counts |= {"rows": len(lists), "repeated": sum(len(set(row)) < len(row) for row in lists)}
    lengths = [len(row) for row in lists]
    check.counts |= {"candidates at least": min(lengths), "candidates at most": max(lengths)}
    missing = _check_images(check, reader, (readers.EVAL_QUERY, readers.EVAL_CANDIDATE), sample)
    rows = zip(read.query_of_row, lists, strict=True)
    needed = [(*read.queries[query].images, *read.candidates[row[0]].images) for query, row in rows]
    lost = sum(not missing.isdisjoint(images) for images in needed)
    if lost:
        what = "rows cannot be scored: no image of the query or of the positive"
        check.problems.append(f"{lost} of {len(lists)} {what}.")
    if reader.source is None and check.name in tasks.MMEB_TASKS and len(lists) != MMEB_ROWS:
        check.notes.append(f"{len(lists)} rows, where MMEB has {MMEB_ROWS}.")


def _check_images(
    check: Check, reader: readers.RowReader, sides: Sequence[readers.Columns], sample: int
) -> set[str]:
    """Look for every image, decode a few, and return the names of those that are missing."""
    places: dict[str, tuple[int, str]] = {}
    for _, name in sides:
        column = reader.table.column(name)
        for row, cell in enumerate([] if column is None else column.to_pylist()):
            for image in cell if isinstance(cell, list) else [cell]:
                if image:
                    places.setdefault(image, (row, name))
    files = {image: reader.images.find(image) for image in places}
    missing = [image for image, file in files.items() if file is None]
    there = {image: file for image, file in files.items() if file is not None}
    check.counts |= {"images": len(files), "missing": len(missing)}
    if missing:
        where = reader.table.where(*places[missing[0]])
        check.problems.append(
            f"{len(missing)} of {len(files)} images are missing, first {missing[0]!r} in {where}. Unpack the "
            "archive or correct image_dir, or train and score without them with `missing_images: skip`."
        )
    opened = [list(there)[index] for index in _spread(len(there), sample)]
    errors = []
    for image in opened:
        try:
            load_image(there[image])
        except ImageError as error:
            errors.append(f"{reader.table.where(*places[image])}: {error}")
    check.counts |= {"opened": len(opened), "broken": len(errors)}
    if errors:
        check.problems.append(f"{len(errors)} of {len(opened)} opened images are broken. {errors[0]}")
    return set(missing)


def _spread(count: int, sample: int) -> list[int]:
    """Return at most ``sample`` evenly spaced places."""
    return np.linspace(0, count - 1, min(count, sample), dtype=int).tolist() if count else []


def print_verification(data_dir: str, sample: int = 20, output_file: str | None = None) -> None:
    """Check a data folder; the exit code is 1 if something is wrong.

    Args:
        data_dir: What --data.data_dir takes.
        sample: Images to decode per subset and task.
        output_file: Gets everything as JSON.
    """
    from rich.console import Console

    checks = verify(data_dir, sample)
    if output_file is not None:
        content = json.dumps([asdict(check) for check in checks], indent=1)
        Path(output_file).write_text(content + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for check in checks:
        lines = [", ".join(f"{count} {what}" for what, count in check.counts.items())]
        lines += [f"note: {note}" for note in check.notes]
        lines += [f"problem: {problem}" for problem in check.problems]
        for line in filter(None, lines):
            console.print(f"{check}: {line}", markup=False, highlight=False, soft_wrap=True)
    if any(check.problems for check in checks):
        raise SystemExit(1)
