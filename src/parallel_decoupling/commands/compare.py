"""``lightning compare``: one or several tested runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "run_dirs",
        nargs="+",
        type=str,
        help="runs with a scores.json, or such files; the first is the baseline",
    )
    parser.add_argument(
        "--output_dir", type=str, help="gets comparison.json, .png and .html; none: the tables only"
    )


def run(options: Any) -> None:
    """Print the tables and write the files."""
    from parallel_decoupling.evaluation.compare import compare_runs

    compare_runs(options.run_dirs, options.output_dir)
