"""``python -m studies``: run a study, list them, or write a report of what is there."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

from studies import MODULES
from studies.study import OUTPUT_DIR, load_study, study_files


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(args)
    # so that the runs end with their study
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _list(options) if options.list else _run(options)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("study", nargs="?", help="name of a study, or a YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each")
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="these cells only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="these seeds instead of the study's")
    parser.add_argument("--list", action="store_true", help="list the studies, or the cells of one")
    parser.add_argument("--report", action="store_true", help="write tables and pictures, run nothing")
    return parser


def _list(options: Namespace) -> int:
    from studies.runner import status_table

    console = Console(soft_wrap=True)
    if options.study is None:
        for name in study_files():
            console.print(f"{name:18} {load_study(name).question}", highlight=False)
        for name, module in MODULES.items():
            title, _, _ = (import_module(module).__doc__ or name).partition("\n")
            console.print(f"{name:18} {title}", highlight=False)
    elif options.study not in MODULES:
        console.print(status_table(load_study(options.study)))
    return 0


def _run(options: Namespace) -> int:
    from studies.study_report import write_module_report, write_report

    if options.study is None:
        raise ValueError(f"which study? Choose from {sorted([*study_files(), *MODULES])}, or use --list")
    if options.study in MODULES:
        output_dir = OUTPUT_DIR / options.study
        output_dir.mkdir(parents=True, exist_ok=True)
        module = import_module(MODULES[options.study])
        if not options.report:
            module.run(output_dir)
        write_module_report(output_dir, module.__doc__ or options.study)
        return 0
    from studies.results import newest_results
    from studies.runner import run_study

    study = load_study(options.study)
    study.runs(options.only, options.seeds)  # refuses a cell that is not there
    failed: list[str] = []
    if not options.report:
        failed = run_study(study, options.study, jobs=options.jobs, only=options.only, seeds=options.seeds)
    if failed and not newest_results(study):
        names = ", ".join(failed)
        sys.stderr.write(f"error: no report, nothing is scored yet; failed, as said above: {names}\n")
        return 1
    sys.stdout.write(f"report: {write_report(study)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
