"""The ``lightning`` command: a LightningCLI for ``PDFEmbedder`` and ``MMEBDataModule``, and two more.

Here: dispatch, and how errors are shown. Elsewhere on purpose: options and runs (``lightning_cli``).
torch and Lightning are imported only for the subcommand that needs them, so that the help is there at once.
"""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

SUBCOMMANDS = {
    "fit": "train (and validate, if data.validation_tasks names tasks)",
    "plan": "what a fit with the same options would need: batch, parameters, memory, work",
    "validate": "score the validation tasks",
    "test": "score the evaluation tasks; writes scores.json and scores.csv",
    "predict": "write the embeddings of the evaluation tasks to predictions/",
    "compare": "several runs side by side: compare RUN_DIR RUN_DIR ... [--output_dir DIR]",
    "verify": "check a data folder: verify DATA_DIR [--sample N] [--output_file FILE]",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand; a user's mistake ends with one message and exit code 2.

    Args:
        args: command line without the program's name; ``None`` takes ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return
    if arguments[0] == "--version":
        from parallel_decoupling import __version__

        sys.stdout.write(f"parallel-decoupling {__version__}\n")
        return
    if arguments[0] not in SUBCOMMANDS:
        _fail(f"there is no subcommand {arguments[0]!r}; choose from {', '.join(SUBCOMMANDS)}")
    try:
        if arguments[0] == "compare":
            _compare(arguments[1:])
        elif arguments[0] == "verify":
            _verify(arguments[1:])
        else:
            from parallel_decoupling.lightning_cli import run

            run(arguments)
    except ValueError as error:
        if not _is_ours(error):
            raise
        _fail(str(error))


def _help() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    usage = "usage: lightning [-h] [--version] SUBCOMMAND ...    (also: parallel-decoupling)"
    note = "lightning SUBCOMMAND --help lists the options, lightning fit --print_config prints them as YAML."
    return "\n".join([usage, "", "subcommands:", *lines, "", note, ""])


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def _is_ours(error: ValueError) -> bool:
    """Whether this package raised the error: then it speaks to the user. Others keep their traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("parallel_decoupling")


def _compare(arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning compare", description=SUBCOMMANDS["compare"])
    parser.add_argument(
        "run_dirs", nargs="+", type=str, help="runs with a scores.json; the first is the baseline"
    )
    parser.add_argument(
        "--output_dir", type=str, help="gets comparison.json and comparison.png; none: the table only"
    )
    options: Any = parser.parse_args(arguments)

    from rich.console import Console

    from parallel_decoupling.retrieval.compare import compare

    comparison = compare(options.run_dirs, options.output_dir)
    Console().print(comparison.means_table(), comparison.task_table())


def _verify(arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning verify", description=SUBCOMMANDS["verify"])
    parser.add_argument("data_dir", type=str, help="what --data.data_dir takes")
    parser.add_argument("--sample", type=int, default=20, help="images to decode per subset and task")
    parser.add_argument("--output_file", type=str, help="gets everything as JSON")
    options: Any = parser.parse_args(arguments)

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
