"""The ``lightning`` command: a LightningCLI for ``PDFEmbedder`` and ``MMEBDataModule``, and ``commands``.

torch and Lightning are imported only for the subcommand that needs them, so that the help is there at once.
"""

import inspect
import os
import re
import signal
import sys
import threading
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parallel_decoupling.data.names import printable
from parallel_decoupling.files import expand_paths

TRAINER_SUBCOMMANDS = {
    "fit": "train (and validate, if data.validation_tasks names tasks)",
    "plan": "what a fit with the same options would need: batch, parameters, memory, work",
    "validate": "score the validation tasks",
    "test": "score the evaluation tasks; writes scores.json",
    "predict": "embed a folder of images or a table as Parquet files, or the evaluation tasks",
}
COMMANDS = {
    "app": ("commands.app", "show a page to search embeddings by text and image"),
    "compare": ("evaluation.compare.compare_runs", "compare one or several tested runs side by side"),
    "compress": ("compress.compress", "make the aggregate of several paths as small as one path"),
    "export": ("commands.export", "write a model as a folder to share"),
    "index": ("lance_index.write_lance_index", "make a LanceDB index of embeddings"),
    "mine": ("mining.mine", "write hard negatives for training rows"),
    "paths": ("diagnostics.path_analysis.analyse_paths", "show how the paths of a trained model differ"),
    "search": ("commands.search", "search embeddings by a text, an image or both"),
    "serve": ("serve.serve", "serve embeddings over HTTP in OpenAI's form"),
    "verify": ("commands.verify", "check a data folder"),
}
"""Subcommands without a Trainer: the function that makes the options, and a line of help."""
EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "gradio": "app", "lancedb": "search"}

SUBCOMMANDS = TRAINER_SUBCOMMANDS | {name: text for name, (_, text) in COMMANDS.items()}
WORKER_TRACEBACK = "Original Traceback (most recent call last):"


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand (``sys.argv`` by default); a mistake ends with one message and exit code 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return
    if arguments[0] == "--version":
        sys.stdout.write(f"parallel-decoupling {version('parallel-decoupling')}\n")
        return
    if arguments[0] not in SUBCOMMANDS:
        _fail(f"the subcommand {arguments[0]!r} does not exist; choose from {', '.join(SUBCOMMANDS)}")
    # A scheduler's warning ends nothing that cannot save yet; on SLURM it is Lightning's.
    on_slurm = "SLURM_NTASKS" in os.environ
    unheard = nullcontext() if on_slurm else _handling(signal.SIGUSR1, signal.SIG_DFL, signal.SIG_IGN)
    try:
        with unheard:
            _run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _fail(f"this needs {error.name}: pip install 'parallel-decoupling[{EXTRAS[error.name]}]'")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, OSError, ArgumentError) as error:
        if not _is_the_users(error):
            raise
        _fail(_message(error))


def _run(arguments: list[str]) -> None:
    if arguments[0] in COMMANDS:
        _run_command(arguments[0], arguments[1:])
        return
    with _stopped_at_once():
        from parallel_decoupling.lightning_cli import run
    run(arguments)


@contextmanager
def _handling(number: int, usual: Any, handler: Any) -> Iterator[None]:
    """Let a signal do something else for a while, unless it does not do the usual any more."""
    change = threading.current_thread() is threading.main_thread() and signal.getsignal(number) == usual
    if change:
        signal.signal(number, handler)
    try:
        yield
    finally:
        if change:
            signal.signal(number, usual)


def _stopped_at_once() -> AbstractContextManager[None]:
    """Let Ctrl+C end the process while packages are imported, which may swallow what Python raises for it."""
    return _handling(signal.SIGINT, signal.default_int_handler, signal.SIG_DFL)


def _help() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    usage = "usage: lightning [-h] [--version] SUBCOMMAND ...    (also: parallel-decoupling)"
    note = "lightning SUBCOMMAND --help lists the options, lightning fit --print_config prints them as YAML."
    return "\n".join([usage, "", "subcommands:", *lines, "", note, ""])


def _fail(message: str) -> None:
    shown = message if len(message) < 4000 else f"{message[:2000]} ... {message[-2000:]}"
    sys.stderr.write(f"error: {printable(shown)}\n")
    raise SystemExit(2)


def _is_the_users(error: ValueError | OSError | ArgumentError) -> bool:
    """Tell whether an error is about files or options, or raised here; others keep their traceback.

    What a worker of the DataLoader raises, torch raises again with the worker's traceback as its text.
    """
    if isinstance(error, OSError | ArgumentError):
        return True
    if WORKER_TRACEBACK in str(error):
        return "parallel_decoupling" in Path(re.findall(r'File "(.+)", line', str(error))[-1]).parts
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__", ""))
    return module.startswith(("parallel_decoupling", "lightning.pytorch.trainer."))


def _message(error: Exception) -> str:
    """Return the error's own words, without a worker's traceback."""
    text = str(error) or type(error).__name__
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if WORKER_TRACEBACK in text else text


def _run_command(name: str, arguments: list[str]) -> None:
    from docstring_parser import parse
    from jsonargparse import ArgumentParser

    module, _, function = COMMANDS[name][0].rpartition(".")
    with _stopped_at_once():
        command: Callable[..., None] = getattr(import_module(f"parallel_decoupling.{module}"), function)
    about = parse(command.__doc__ or "")
    options: dict[str, Any] = {"description": about.short_description, "exit_on_error": False}
    parser = ArgumentParser(prog=f"lightning {name}", **options)
    parameters = inspect.signature(command).parameters.values()
    several = {each.name for each in parameters if each.annotation == list[str]}
    for each in (each for each in about.params if each.arg_name in several):
        parser.add_argument(each.arg_name, nargs="+", type=str, help=each.description)
    parser.add_function_arguments(command, as_positional=True, as_group=False, skip={*several})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before 4.49
    command(**instantiate(expand_paths(parser.parse_args(arguments))).as_dict())
