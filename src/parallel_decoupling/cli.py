"""The ``lightning`` command: a LightningCLI for ``PDFEmbedder`` and ``MMEBDataModule``, and ``commands``.

Here: dispatch, and how errors are shown. Elsewhere on purpose: options and runs (``lightning_cli``).
torch and Lightning are imported only for the subcommand that needs them, so that the help is there at once.
"""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from parallel_decoupling import commands

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAINER_SUBCOMMANDS = {
    "fit": "train (and validate, if data.validation_tasks names tasks)",
    "plan": "what a fit with the same options would need: batch, parameters, memory, work",
    "validate": "score the validation tasks",
    "test": "score the evaluation tasks; writes scores.json and scores.csv",
    "predict": "embed a folder of images or a table as Parquet files, or the evaluation tasks",
}
COMMANDS = {name: getattr(commands, name).__doc__.splitlines()[0] for name in commands.__all__}
"""Subcommands without a Trainer; each is a function of ``commands``."""

WORKER_TRACEBACK = "Original Traceback (most recent call last):"
TRAINER_MODULES = "lightning.pytorch.trainer."
"""Where Lightning checks the options of the Trainer."""

SUBCOMMANDS = TRAINER_SUBCOMMANDS | COMMANDS


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
        if arguments[0] in COMMANDS:
            _run_command(arguments[0], arguments[1:])
        else:
            from parallel_decoupling.lightning_cli import run

            run(arguments)
    except (ValueError, OSError) as error:
        if not _is_the_users(error):
            raise
        _fail(_message(error))


def _help() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    usage = "usage: lightning [-h] [--version] SUBCOMMAND ...    (also: parallel-decoupling)"
    note = "lightning SUBCOMMAND --help lists the options, lightning fit --print_config prints them as YAML."
    return "\n".join([usage, "", "subcommands:", *lines, "", note, ""])


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def _is_the_users(error: ValueError | OSError) -> bool:
    """Whether the error speaks to the user; others keep their traceback.

    Those are: files and folders (``OSError``, whose text names them), what Lightning says of the Trainer's
    options, and this package's ``ValueError``. What a worker of the DataLoader raises, torch raises again
    here with the worker's traceback as its text.
    """
    if isinstance(error, OSError):
        return True
    if WORKER_TRACEBACK in str(error):
        return "parallel_decoupling" in Path(re.findall(r'File "(.+)", line', str(error))[-1]).parts
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith(("parallel_decoupling", TRAINER_MODULES))


def _message(error: Exception) -> str:
    """The error's own words, without a worker's traceback."""
    text = str(error) or type(error).__name__
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if WORKER_TRACEBACK in text else text


def _run_command(name: str, arguments: list[str]) -> None:
    """Parse the command line by the function's signature and docstring, and call it."""
    from docstring_parser import parse
    from jsonargparse import ArgumentParser

    command = getattr(commands, name)
    parser = ArgumentParser(prog=f"lightning {name}", description=COMMANDS[name])
    about = {each.arg_name: each.description for each in parse(command.__doc__).params}
    rest = [
        each.name
        for each in inspect.signature(command).parameters.values()
        if each.kind == each.VAR_POSITIONAL
    ]
    for each in rest:
        parser.add_argument(each, nargs="+", type=str, help=about[each])
    parser.add_function_arguments(command, as_positional=True, as_group=False)
    options = parser.parse_args(arguments).as_dict()
    values = [value for each in rest for value in options.pop(each)]
    command(*values, **options)
