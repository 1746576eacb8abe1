"""What is in a data folder, and what is wrong with it: a problem stops a run or changes a score."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parallel_decoupling.data import readers, tasks
from parallel_decoupling.data.images import ImageError, load_image
from parallel_decoupling.data.names import printable


@dataclass
class Check:
    """What one subset (``train``), task (``eval``) or the ``folder`` holds, and what is wrong with it."""

    part: str
    name: str
    split: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.part, self.name, self.split)))


def verify(data_dir: str | Path, sample: int = 20) -> list[Check]:
    """Check a folder, then every subset and task with ``sample`` images and training rows of each."""
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder. Give the one that holds MMEB-train/ and MMEB-eval/.")
    files = (root / "MMEB-train").glob("*/[!.]*-*.parquet")
    splits = sorted({file.name.split("-")[0] for file in files}) or [""]
    names = [(split, name) for split in splits for name in tasks.find_train_subsets(root, split)]
    own = {name for name, task in tasks.read_tasks(root).items() if task.source is not None}
    kept = [(split, name) for split, name in names if split == splits[0] or name not in own]
    checks = [Check("train", name, split) for split, name in kept]
    scored = (name for name in tasks.find_eval_tasks(root) if name != tasks.NOT_IN_MMEB)
    checks += [Check("eval", name, "test") for name in scored]
    for check in tqdm(checks, desc="verify", leave=False, disable=None):
        try:
            (_check_train if check.part == "train" else _check_eval)(root, check, sample)
        except ValueError as error:
            check.problems.append(str(error))
    folder = Check("folder", str(root))
    if not checks:
        layout = "MMEB-train/<subset>/ and MMEB-eval/<task>/ with parquet files, or a tasks.json"
        advice = f"The folder must hold {layout}; --data.download true fetches MMEB."
        folder.problems.append(f"Neither training subsets nor evaluation tasks. {advice}")
    for part, known in (("train", tasks.MMEB_TRAIN_SUBSETS), ("eval", tuple(tasks.MMEB_TASKS))):
        lacking = [name for name in known if name not in {each.name for each in checks if each.part == part}]
        if 0 < len(lacking) < len(known):
            folder.notes.append(f"MMEB-{part} lacks {len(lacking)} of {len(known)}: {', '.join(lacking)}.")
    return [folder, *checks]


def _check_train(root: Path, check: Check, sample: int) -> None:
    subset = readers.TrainSubset(root, check.name, check.split, hard_negatives=100)
    rows = subset.table.rows
    names = [name for name in (*readers.QUERY, *readers.CANDIDATE) if name in rows.column_names]
    distinct = rows.select(names).group_by(names).aggregate([])
    check.counts |= {"rows": len(rows), "repeated": len(rows) - len(distinct)}
    _check_images(check, subset.reader, sample)
    if subset.blank_rows:
        check.notes.append(f"{subset.blank_rows} rows with neither text nor image on a side are left out.")
    for index in np.linspace(0, len(subset) - 1, min(len(subset), sample), dtype=int):
        with suppress(ImageError):  # counted above
            subset[index]


def _check_eval(root: Path, check: Check, sample: int) -> None:
    read = readers.read_eval_task(root, check.name, must_exist=False)
    lists = read.candidates_of_row
    check.counts |= {"rows": len(lists), "repeated": sum(len(set(row)) < len(row) for row in lists)}
    check.counts |= {"candidates at least": min(map(len, lists)), "candidates at most": max(map(len, lists))}
    missing = _check_images(check, readers.open_eval(root, read.task), sample)
    rows = zip(read.query_of_row, lists, strict=True)
    needed = [(*read.queries[query].images, *read.candidates[row[0]].images) for query, row in rows]
    if lost := sum(not missing.isdisjoint(images) for images in needed):
        what = "rows cannot be scored: no image of the query or of the positive"
        check.problems.append(f"{lost} of {len(lists)} {what}.")
    if read.task.source is None and check.name in tasks.MMEB_TASKS and len(lists) != 1000:
        check.notes.append(f"{len(lists)} rows, where MMEB has 1000.")


def _check_images(check: Check, reader: readers.RowReader, sample: int) -> set[str]:
    """Look for every image, decode a few, and return the names of those that are missing."""
    places: dict[str, tuple[int, str]] = {}
    for name in ("query_image", "candidate_image", "negative_image"):
        column = reader.table.column(name)
        for row, cell in enumerate([] if column is None else column.to_pylist()):
            for image in filter(None, cell if isinstance(cell, list) else [cell]):
                places.setdefault(image, (row, name))
    files = {image: reader.images.find(image) for image in places}
    missing = [image for image, file in files.items() if file is None]
    if missing:
        first = f"first {missing[0]!r} in {reader.table.where(*places[missing[0]])}"
        found = f"{len(missing)} of {len(files)} images are missing, {first}"
        advice = "Unpack the archive or correct image_dir, or train and score without them"
        check.problems.append(f"{found}. {advice} with `missing_images: skip`.")
    there = [(image, file) for image, file in files.items() if file is not None]
    opened, errors = np.linspace(0, len(there) - 1, min(len(there), sample), dtype=int), []
    for image, file in map(there.__getitem__, opened):
        try:
            load_image(file)
        except ImageError as error:
            errors.append(f"{reader.table.where(*places[image])}: {error}")
    if errors:
        check.problems.append(f"{len(errors)} of {len(opened)} opened images are broken. {errors[0]}")
    check.counts |= {"images": len(files), "missing": len(missing)}
    check.counts |= {"opened": len(opened), "broken": len(errors)}
    return set(missing)


def print_verification(data_dir: str, sample: int = 20) -> None:
    """Check a data folder, and exit with 1 if something is wrong.

    Args:
        data_dir: the folder, in MMEB's layout or with a tasks.json.
        sample: rows per table whose pictures are decoded.
    """
    checks = verify(data_dir, sample)
    for check in checks:
        lines = [", ".join(f"{count} {what}" for what, count in check.counts.items())]
        lines += [f"note: {note}" for note in check.notes]
        lines += [f"problem: {problem}" for problem in check.problems]
        sys.stdout.writelines(printable(f"{check}: {line}\n") for line in lines if line)
    if any(check.problems for check in checks):
        raise SystemExit(1)
