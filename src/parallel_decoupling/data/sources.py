"""Your own data in ``tasks.json``: which file, which columns, which pictures, which instruction.

Here: reading and checking one entry. Elsewhere on purpose: the table of tasks (``tasks``), the files
themselves (``tables``), rows (``readers``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from parallel_decoupling.data.tables import SUFFIXES

TRAIN_ROLES = {
    "query_text": "qry",
    "query_image": "qry_image_path",
    "candidate_text": "pos_text",
    "candidate_image": "pos_image_path",
    "negative_text": "neg_text",
    "negative_image": "neg_image_path",
}
"""What a column can be, and MMEB-train's column of that meaning."""

EVAL_ROLES = {
    "query_text": "qry_text",
    "query_image": "qry_img_path",
    "candidate_text": "tgt_text",
    "candidate_image": "tgt_img_path",
}
"""What a column can be, and MMEB-eval's column of that meaning."""

FILES = ("train_file", "eval_file")
TEXTS = ("query_instruction", "candidate_instruction")
KEYS = ("meta_task", "in_distribution", *FILES, *TEXTS, "image_dir", "columns")


@dataclass(frozen=True)
class Source:
    """Where a task's rows are when they are not in MMEB's layout.

    Attributes:
        train_file: parquet, JSONL or CSV file with one query and its positive per row, if there is one.
        eval_file: the same for evaluation; a candidate cell is a list with the positive first, or the
            positive alone, and then all positives of the file are everybody's candidates.
        image_dir: folder that the image cells are relative to.
        columns: role to column name.
        query_instruction: goes before every query.
        candidate_instruction: goes before every candidate.
    """

    train_file: Path | None = None
    eval_file: Path | None = None
    image_dir: Path = Path()
    columns: dict[str, str] = field(default_factory=dict)
    query_instruction: str = ""
    candidate_instruction: str = ""

    def train_columns(self) -> dict[str, str]:
        """MMEB-train's column names to this file's."""
        return {TRAIN_ROLES[role]: name for role, name in self.columns.items()}

    def eval_columns(self) -> dict[str, str]:
        """MMEB-eval's column names to this file's; negatives have no part in evaluation."""
        return {EVAL_ROLES[role]: name for role, name in self.columns.items() if role in EVAL_ROLES}


def parse_source(row: dict[str, Any], data_dir: Path, where: str) -> Source | None:
    """Check the keys of a ``tasks.json`` entry that describe files; None if it has none of them.

    Args:
        row: the entry without ``meta_task`` and ``in_distribution``.
        data_dir: what relative paths are relative to.
        where: names the file and the entry.

    Raises:
        ValueError: an unknown key or role, a value of the wrong type, or no query or candidate column.
    """
    if not row:
        return None
    for key, value in row.items():
        _check_name(key, KEYS, f"{where}: unknown key")
        if key != "columns" and not isinstance(value, str):
            raise ValueError(f"{where}, {key}: must be a text, got {value!r}.")
    files = {key: data_dir / row[key] for key in FILES if key in row}
    if not files:
        raise ValueError(f"{where}: {', '.join(row)} without a file. Add train_file, eval_file or both.")
    for key, file in files.items():
        if file.suffix not in SUFFIXES:
            raise ValueError(f"{where}, {key}: {file.name} must end with one of {', '.join(SUFFIXES)}.")
    columns = row.get("columns")
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise ValueError(
            f'{where}, columns: must name a column per role, such as {{"query_text": "question"}}, '
            f"got {columns!r}."
        )
    for role in columns:
        _check_name(role, tuple(TRAIN_ROLES), f"{where}, columns: unknown role")
    for side in ("query", "candidate"):
        if not {f"{side}_text", f"{side}_image"} & set(columns):
            raise ValueError(f"{where}, columns: {side}_text or {side}_image is needed, or both.")
    texts = {key: row[key] for key in TEXTS if key in row}
    return Source(image_dir=data_dir / row.get("image_dir", "."), columns=columns, **files, **texts)


def _check_name(name: str, known: tuple[str, ...], message: str) -> None:
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{message} {name!r}.{hint} Known: {', '.join(known)}.")
