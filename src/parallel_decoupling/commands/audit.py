"""``lightning audit``: means of score files and published tables, recomputed; exit code 1 for problems."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "path",
        nargs="?",
        type=str,
        help="a leaderboard JSON, a scores.json, a run's folder, a folder of VLM2Vec's *_score.json, a CSV "
        "of published rows; without it the published rows that ship with the package",
    )


def run(options: Any) -> None:
    """Print the recomputed means and what does not fit."""
    from rich.console import Console

    from parallel_decoupling.evaluation import audit
    from parallel_decoupling.evaluation.published import SHIPPED_TABLE, read_table
    from parallel_decoupling.evaluation.score_files import read_scores

    console = Console(width=None if sys.stdout.isatty() else 120)
    path = Path(options.path) if options.path else SHIPPED_TABLE
    if path.suffix == ".csv":
        if not path.is_file():
            raise ValueError(f"no table {str(path)!r}")
        audits = [audit.audit_row(row) for row in read_table(path)]
        console.print(audit.row_table(audits))
        problems = [f"{each.row.model}: {problem}" for each in audits for problem in each.problems]
        notes: list[str] = []
    else:
        scores = read_scores(path)
        found = audit.audit_scores(scores)
        problems, notes = list(found.problems), list(found.notes)
        console.print(f"{path}: {scores.format}, {len(scores.tasks)} tasks", markup=False, highlight=False)
        if found.report is not None:
            console.print(audit.means_table(found.report))
    for line in (*(f"note: {note}" for note in notes), *(f"problem: {problem}" for problem in problems)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise SystemExit(1)
