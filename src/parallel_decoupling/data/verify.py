"""What is in a data folder, and what is wrong with it: a problem stops a run or changes a score."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data import readers, tasks
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.row_reader import CANDIDATE, NEGATIVE, QUERY, RowReader
from parallel_decoupling.data.row_sources import TaskSide
from parallel_decoupling.data.tables import Table
from parallel_decoupling.data.unusable import attempt


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


def verify(data_dir: str | Path, collator: Collator, sample: int | None = 20) -> list[Check]:
    """Check a folder, then every subset and task.

    Of each ``sample`` training rows, queries and candidates, or all for None, are prepared for an embedding:
    those that fail are the rows that a run could not use.
    """
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
            (_check_train if check.part == "train" else _check_eval)(root, check, collator, sample)
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


def _check_train(root: Path, check: Check, collator: Collator, sample: int | None) -> None:
    subset = readers.TrainSubset(root, check.name, check.split, positives=100, hard_negatives=100)
    names = [name for name in (*QUERY, *CANDIDATE) if subset.table.column(name) is not None]
    found = {name: subset.table.rows[name] for name in names}
    lists = {name: column for name, column in found.items() if pa.types.is_list(column.type)}
    rows = pa.table(found | {name: pc.binary_join(column, "\n") for name, column in lists.items()})
    distinct = rows.group_by(list(found)).aggregate([])
    check.counts |= {"rows": len(rows), "repeated": len(rows) - len(distinct)}
    _check_images(check, [subset.reader])
    if subset.blank_rows:
        check.notes.append(f"{subset.blank_rows} rows with neither text nor image on a side are left out.")

    def inputs(index: int) -> list[RawInput]:
        pair = subset[index]
        return [pair.query, pair.candidate, *filter(None, (*pair.positives, *pair.negatives))]

    _try(check, collator, inputs, _spread(len(subset), sample), lambda index: f"row {subset.kept[index]}")


def _check_eval(root: Path, check: Check, collator: Collator, sample: int | None) -> None:
    read = readers.read_eval_task(root, check.name, must_exist=False)
    lists = read.candidates_of_row
    repeated = 0 if read.relevance_of_row else sum(len(set(row)) < len(row) for row in lists)
    check.counts |= {"rows": len(lists), "repeated": repeated}
    check.counts |= {"candidates at least": min(map(len, lists)), "candidates at most": max(map(len, lists))}
    missing = _check_images(check, readers.open_sides(root, read.task))
    queries, candidates = (
        {number for number, each in enumerate(side) if not missing.isdisjoint(each.images)}
        for side in (read.queries, read.candidates)
    )
    rows = enumerate(read.query_of_row)
    if lost := sum(query in queries or candidates >= read.answers(row).keys() for row, query in rows):
        what = "rows cannot be scored: no image of the query or of the positive"
        check.problems.append(f"{lost} of {len(lists)} {what}.")
    if read.task.source is None and check.name in tasks.MMEB_TASKS and len(lists) != 1000:
        check.notes.append(f"{len(lists)} rows, where MMEB has 1000.")

    def picked(side: TaskSide) -> list[tuple[TaskSide, int]]:
        _, refused = attempt(lambda row: collator.check_text(side[row]), range(len(side)))
        return [(side, number) for number in sorted({*refused, *_spread(len(side), sample)})]

    picks = [*picked(TaskSide(read, "query", root)), *picked(TaskSide(read, "candidate", root))]
    chosen, wheres = [[side[number]] for side, number in picks], [side.where(row) for side, row in picks]
    _try(check, collator, chosen.__getitem__, range(len(picks)), wheres.__getitem__)


def _spread(count: int, sample: int | None) -> list[int]:
    """Return that many numbers below ``count``, evenly spaced; all of them for None."""
    number = count if sample is None else min(count, sample)
    return [int(index) for index in np.linspace(0, count - 1, number, dtype=int)]


def _try(
    check: Check,
    collator: Collator,
    inputs: Callable[[int], list[RawInput]],
    numbers: Collection[int],
    where: Callable[[int], str],
) -> None:
    """Prepare rows for an embedding, and name those for which that fails."""

    def num_cut(number: int) -> int:
        return sum(collator.encode_inputs([each]).num_cut for each in inputs(number))

    cut, problems = attempt(num_cut, numbers)
    bad = [f"{where(number)}: {problem}" for number, problem in problems.items()]
    check.counts |= {"tried": len(numbers), "unusable": len(bad)}
    if bad:
        listed = "; ".join(bad[:20]) + (f"; and {len(bad) - 20} more" if len(bad) > 20 else "")
        check.problems.append(f"{len(bad)} of {len(numbers)} rows cannot be embedded: {listed}.")
    if total := sum(cut.values()):
        check.notes.append(f"{total} texts have more than {collator.limit.max_tokens} tokens and are cut.")


def _check_images(check: Check, sides: Sequence[RowReader]) -> set[str]:
    """Look for every image, and return the names of those that are missing."""
    places: dict[str, tuple[Table, int, str]] = {}
    for table, name in product((side.table for side in sides), (QUERY[1], CANDIDATE[1], NEGATIVE[1])):
        column = table.column(name)
        for row, cell in enumerate([] if column is None else column.to_pylist()):
            for image in filter(None, cell if isinstance(cell, list) else [cell]):
                places.setdefault(image, (table, row, name))
    files = {image: sides[0].images.find(image) for image in places}
    missing = [image for image, file in files.items() if file is None]
    if missing:
        table, row, name = places[missing[0]]
        first = f"first {missing[0]!r} in {table.where(row, name)}"
        found = f"{len(missing)} of {len(files)} images are missing, {first}"
        advice = "Unpack the archive or correct image_dir, or train and score without them"
        check.problems.append(f"{found}. {advice} with `missing_images: skip`.")
    check.counts |= {"images": len(files), "missing": len(missing)}
    return set(missing)
