"""``lightning compare``: several runs side by side."""

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
        help="runs with a scores.json, or such files; or without intervals what lightning audit reads of "
        "others: a leaderboard JSON, a folder of VLM2Vec's *_score.json; the first is the baseline",
    )
    parser.add_argument(
        "--output_dir",
        type=str,
        help="gets comparison.json, .png and .html (the best run against the first); none: the tables only",
    )


def run(options: Any) -> None:
    """Print the tables and write the files."""
    from dataclasses import replace
    from pathlib import Path

    from rich.console import Console

    from parallel_decoupling.evaluation.compare import compare, scores_source
    from parallel_decoupling.evaluation.html_report import Baseline, PageParts, write_html_report
    from parallel_decoupling.evaluation.report import SCORES_FILE

    comparison = compare(options.run_dirs, options.output_dir)
    if options.output_dir is not None:
        typed = dict(zip(comparison.reports, options.run_dirs, strict=True))[comparison.best]
        run_dir = scores_source(typed)
        if run_dir.name == SCORES_FILE:
            run_dir = run_dir.parent
        parts = replace(PageParts.read(run_dir), baseline=Baseline(*next(iter(comparison.reports.items()))))
        page = Path(options.output_dir) / "comparison.html"
        write_html_report(comparison.reports[comparison.best], run_dir, parts, page)
    Console().print(comparison.means_table(), comparison.task_table())
