"""Tables of published MMEB rows: means in percent as their authors printed them, and the one that ships.

Sources in the shipped table: L the leaderboard's ``results.csv`` and its pull requests 29, 30 and 33 (self:
sent in by the authors); R the VLM2Vec repository's score files, averaged; Q the README of Qwen3-VL-Embedding;
O the model cards of Ops-MM-embedding; P VLM2Vec's pull request 213. Here: reading tables. Elsewhere on
purpose: verdicts (``audit``).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from parallel_decoupling.evaluation.report import META_TASKS

SHIPPED_TABLE = Path(__file__).with_name("published_mmeb.csv")
MEANS = (*META_TASKS, "in_distribution", "out_of_distribution", "overall")
_HEADINGS = {
    **{name: name for name in MEANS},
    "ind": "in_distribution",
    "ood": "out_of_distribution",
    "cls": "classification",
    "ret": "retrieval",
    "vg": "grounding",
    "all": "overall",
    "model": "model",
    "models": "model",
    "source": "source",
    "data source": "source",
}
"""Headings in lower case, of this package's table and of the leaderboard's."""


@dataclass(frozen=True)
class PublishedRow:
    """One row of a results table.

    Attributes:
        model: as printed.
        means: some of ``MEANS``, in percent as printed.
        source: where it was printed; "" if the table does not say.
    """

    model: str
    means: dict[str, float]
    source: str = ""


def read_table(csv_file: str | Path = SHIPPED_TABLE) -> list[PublishedRow]:
    """Read a CSV with a heading per mean, such as the leaderboard's.

    Args:
        csv_file: with the columns ``model`` (or ``Models``) and some of ``classification``, ``vqa``,
            ``retrieval``, ``grounding``, ``IND``, ``OOD``, ``overall``; cells in percent, empty (or ``-``) if
            not known. Other columns are ignored.

    Raises:
        ValueError: no text, no such columns, a line of another length, or a cell that is no percentage;
            names line and column.
    """
    try:
        with open(csv_file, newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.reader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{csv_file} is no CSV file in UTF-8: {error}") from error
    headings = [_HEADINGS.get(cell.strip().lower(), "") for cell in lines[0]] if lines else []
    twice = [name for name in set(headings) - {""} if headings.count(name) > 1]
    if "model" not in headings or "overall" not in headings or twice:
        raise ValueError(
            f"{csv_file} is no table of results: its first line must have a column model (or Models) and a "
            f"column overall, each once, beside {', '.join(META_TASKS)}, IND, OOD; found {lines[:1]}"
        )
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cells):
            continue
        if len(cells) != len(headings):
            raise ValueError(
                f"{csv_file}, line {number}: {len(cells)} cells under {len(headings)} headings; leave a cell "
                "empty (two commas) where nothing is known"
            )
        rows.append(_row(dict(zip(headings, cells, strict=True)), f"{csv_file}, line {number}"))
    return rows


def _row(cells: dict[str, str], where: str) -> PublishedRow:
    means = {}
    for name in MEANS:
        text = cells.get(name, "").strip().removesuffix("%")
        if text in ("", "-"):
            continue
        try:
            means[name] = float(text)
        except ValueError as error:
            raise ValueError(f"{where}, column {name}: {text!r} is no number") from error
        if not 0 <= means[name] <= 100:
            raise ValueError(f"{where}, column {name}: {text} is no percentage between 0 and 100")
    return PublishedRow(cells["model"].strip(), means, cells.get("source", "").strip())
