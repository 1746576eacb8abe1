"""The results file of a study: one JSON line per scored point, appended as it is scored."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studies.study import OUTPUT_DIR, Run, Study

Result = dict[str, Any]
"""A line: study, cell, seed, step, overrides, config_hash, commit, scores and costs (docs/studies.md)."""


def read_results(results_file: Path) -> list[Result]:
    """All lines, oldest first; none if there is no file.

    Raises:
        ValueError: for a line that is not JSON, with its number.
    """
    if not results_file.is_file():
        return []
    results = []
    for number, line in enumerate(results_file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{results_file}, line {number} is not JSON ({error}); remove it") from error
    return results


def append_result(results_file: Path, result: Result) -> None:
    """Add one line; safe from several processes at once."""
    results_file.parent.mkdir(parents=True, exist_ok=True)
    with open(results_file, "a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps(result) + "\n")


def missing_points(run: Run, results: Iterable[Result]) -> list[int]:
    """Steps of a run without a line of the run's present configuration."""
    scored = {
        result["step"]
        for result in results
        if (result["cell"], result["seed"], result["config_hash"])
        == (run.cell.name, run.seed, run.cell.config_hash)
    }
    return [step for step in run.cell.points if step not in scored]


def take_over(run: Run, results_file: Path) -> None:
    """Copy missing points that another study or cell has scored with the same configuration and seed.

    A copied line says so under ``copied_from``.
    """
    missing = missing_points(run, read_results(results_file))
    for file in sorted(OUTPUT_DIR.glob("*/results.jsonl")):
        for result in read_results(file):
            same = (result["config_hash"], result["seed"]) == (run.cell.config_hash, run.seed)
            if same and result["step"] in missing:
                missing.remove(result["step"])
                names = {"study": run.study, "cell": run.cell.name, "overrides": run.cell.overrides}
                origin = result.get("copied_from", f"{result['study']}/{result['cell']}")
                append_result(results_file, {**result, **names, "copied_from": origin})


def newest_results(study: Study) -> list[Result]:
    """The last line of every cell, seed and step that the study has now."""
    newest: dict[tuple[str, int, int], Result] = {}
    for result in read_results(study.results_file):
        cell = study.cells.get(result["cell"])
        if cell is not None and result["step"] in cell.points:
            newest[result["cell"], result["seed"], result["step"]] = result
    order = list(study.cells)
    return sorted(newest.values(), key=lambda line: (order.index(line["cell"]), line["seed"], line["step"]))


def outdated(study: Study, results: Iterable[Result]) -> list[str]:
    """Cells with results of another configuration than the one they have now."""
    names = {
        result["cell"]
        for result in results
        if result["config_hash"] != study.cells[result["cell"]].config_hash
    }
    return [name for name in study.cells if name in names]
