"""``lightning verify``: check a data folder; exit code 1 when something is wrong."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("data_dir", type=str, help="what --data.data_dir takes")
    parser.add_argument("--sample", type=int, default=20, help="images to decode per subset and task")
    parser.add_argument("--output_file", type=str, help="gets everything as JSON")


def run(options: Any) -> None:
    """Print the table, the notes and the problems."""
    from rich.console import Console

    from parallel_decoupling.data.verify import verify

    result = verify(options.data_dir, options.sample, show_progress=sys.stderr.isatty())
    if options.output_file is not None:
        result.to_json_file(options.output_file)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(result.table())
    for title, lines in (("note", result.all_notes), ("problem", result.all_problems)):
        for line in lines:
            console.print(f"{title}: {line}", markup=False, highlight=False, soft_wrap=True)
    if result.all_problems:
        raise SystemExit(1)
