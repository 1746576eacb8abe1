"""``lightning compare``: several runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "run_dirs", nargs="+", type=str, help="runs with a scores.json; the first is the baseline"
    )
    parser.add_argument(
        "--output_dir", type=str, help="gets comparison.json and comparison.png; none: the table only"
    )


def run(options: Any) -> None:
    """Print the tables and write the files."""
    from rich.console import Console

    from parallel_decoupling.retrieval.compare import compare

    comparison = compare(options.run_dirs, options.output_dir)
    Console().print(comparison.means_table(), comparison.task_table())
