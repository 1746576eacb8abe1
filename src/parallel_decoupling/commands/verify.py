"""The command ``verify``, which checks a data folder."""

from __future__ import annotations

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
    from parallel_decoupling.data.verify import print_verification

    print_verification(options.data_dir, options.sample, options.output_file)
