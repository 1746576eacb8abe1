"""``paths``: how the paths of a trained model differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options: the arguments of ``analyse_paths``."""
    from parallel_decoupling.diagnostics.path_analysis import analyse_paths

    parser.add_function_arguments(analyse_paths, as_positional=True)


def run(options: Any) -> None:
    """Print the tables, write the files."""
    from parallel_decoupling.diagnostics.path_analysis import analyse_paths

    analyse_paths(options.run, options.output_dir, options.data_dir)
