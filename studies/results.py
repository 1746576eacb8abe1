"""The results file of a study: one JSON line per scored point, appended as it is scored."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from studies.study import OUTPUT_DIR, PROJECT_DIR, Run, Study

Result = dict[str, Any]
"""A line: study, cell, seed, step, overrides, config_hash, commit, scores and costs (docs/studies.md)."""
CODE = ("src", "studies", "lightning_configs", "setup.cfg")
"""What a result depends on: changes elsewhere, such as in docs/, do not make a commit dirty."""


def read_results(results_file: Path) -> list[Result]:
    """Return all lines, oldest first; the list is empty if the file does not exist.

    A last line that ends in the middle is an interrupted write: it is left out, with a warning.

    Raises:
        ValueError: if any other line is not JSON; the message has its number.
    """
    if not results_file.is_file():
        return []
    with open(results_file, encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        lines = stream.readlines()
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ValueError(f"{results_file}, line {number} is not JSON ({error}); remove it") from error
            warnings.warn(
                f"{results_file}, line {number} is the start of an interrupted write; left out", stacklevel=2
            )
    return results


def append_result(results_file: Path, result: Result) -> None:
    """Add one line; this is safe from several processes at once, and after an interrupted write."""
    results_file.parent.mkdir(parents=True, exist_ok=True)
    with open(results_file, "a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        _end_the_last_line(stream)
        stream.write(json.dumps(result).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _end_the_last_line(stream: BinaryIO) -> None:
    """Add the newline that a whole last line lacks; cut off a torn line, which never was a result."""
    stream.seek(0)
    content = stream.read()
    start = content.rfind(b"\n") + 1
    if not content[start:]:
        return
    try:
        json.loads(content[start:])
    except ValueError:  # not JSON, or not even UTF-8
        stream.truncate(start)
    else:
        stream.write(b"\n")


def code_version() -> tuple[str | None, bool]:
    """Return the commit of the project and whether the code differs from it; ``None`` outside git."""
    git = ["git", "-C", str(PROJECT_DIR)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None, False
    status = [*git, "status", "--porcelain", "--", *CODE]
    changes = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    return head.stdout.strip(), bool(changes.strip())


def commit_name(commit: str | None, dirty: bool) -> str:
    """Return a version of the code as the report names it."""
    return f"{commit or 'no commit'}{' with changes' if dirty else ''}"


def commits_of(result: Result) -> set[str]:
    """Return the versions of the code that trained and scored it."""
    return {commit_name(result["commit"], result["dirty"]), *result.get("fit_commits", ())}


def missing_points(run: Run, results: Iterable[Result]) -> list[int]:
    """Return the steps of a run that lack a line of its present configuration."""
    scored = {
        result["step"]
        for result in results
        if (result["cell"], result["seed"], result["config_hash"])
        == (run.cell.name, run.seed, run.cell.config_hash)
    }
    return [step for step in run.cell.points if step not in scored]


def take_over(run: Run, results_file: Path) -> None:
    """Copy missing points that another study or cell has scored with this commit, configuration and seed.

    Runs of other commits stay where they are: code, torch and machine move a seed by a point and more. A
    copied line says so under ``copied_from``.
    """
    commit, _ = code_version()
    missing = missing_points(run, read_results(results_file))
    for file in sorted(OUTPUT_DIR.glob("*/results.jsonl")):
        for result in read_results(file):
            same = (result["config_hash"], result["seed"]) == (run.cell.config_hash, run.seed)
            same = same and result["commit"] == commit
            if same and result["step"] in missing:
                missing.remove(result["step"])
                names = {"study": run.study, "cell": run.cell.name, "overrides": run.cell.overrides}
                origin = result.get("copied_from", f"{result['study']}/{result['cell']}")
                append_result(results_file, {**result, **names, "copied_from": origin})


def newest_results(study: Study) -> list[Result]:
    """Return the last line of every cell, seed and step that the study has now, of its configuration."""
    newest: dict[tuple[str, int, int], Result] = {}
    for result in read_results(study.results_file):
        cell = study.cells.get(result["cell"])
        if (
            cell is not None
            and result["config_hash"] == cell.config_hash
            and result["seed"] in cell.seeds
            and result["step"] in cell.points
        ):
            newest[cell.name, result["seed"], result["step"]] = result
    order = list(study.cells)
    return sorted(newest.values(), key=lambda line: (order.index(line["cell"]), line["seed"], line["step"]))


def outdated(study: Study) -> list[str]:
    """Return cells of which an earlier configuration has results that the present one lacks."""
    results = read_results(study.results_file)
    earlier = {
        (result["cell"], result["seed"])
        for result in results
        if (cell := study.cells.get(result["cell"])) is not None and result["config_hash"] != cell.config_hash
    }
    names = [
        run.cell.name
        for run in study.runs()
        if (run.cell.name, run.seed) in earlier and missing_points(run, results)
    ]
    return [name for name in study.cells if name in names]
