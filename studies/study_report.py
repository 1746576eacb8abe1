"""``docs/studies/<name>/``: table.md, pictures, and the README.md that puts them together.

``conclusion.md`` next to them is written by hand and taken into the README.
"""

from __future__ import annotations

import re
from pathlib import Path

from studies.paired_statistics import at_point
from studies.results import commits_of, newest_results, outdated
from studies.study import Study
from studies.study_plots import DPI, study_figures
from studies.study_tables import study_tables

CONCLUSION_FILE, TABLE_FILE, README_FILE = "conclusion.md", "table.md", "README.md"


def write_report(study: Study) -> Path:
    """Write tables, pictures and README of what is in the results file.

    Returns:
        The README.

    Raises:
        ValueError: if there is no result yet.
    """
    results = newest_results(study)
    if not results:
        raise ValueError(
            f"study {study.name} has no results of its present cells in {study.results_file}; run it first"
        )
    folder = study.output_dir
    (folder / TABLE_FILE).write_text(study_tables(study, results), encoding="utf-8")
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = []
    for name, figure in study_figures(study, results).items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        pictures.append(f"{name}.png")
    commits = {_short(commit) for line in results for commit in commits_of(line)}
    notes = [
        f"Made by `python -m studies {study.name}` at commits {', '.join(sorted(commits))}; "
        "docs/studies.md says how to read it."
    ]
    if absent := _unfinished(study, results):
        notes.append(f"Not finished: {', '.join(absent)}.")
    if old_cells := outdated(study):
        notes.append(f"**Results of an earlier configuration**, run the study again: {', '.join(old_cells)}.")
    return write_readme(folder, study.title, study.question, pictures, notes)


def _short(commit: str) -> str:
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit)


def _unfinished(study: Study, results: list[dict[str, object]]) -> list[str]:
    absent = []
    for cell in study.cells.values():
        done = len(at_point(results, cell.name, cell.points[-1]))
        if done < len(cell.seeds):
            absent.append(f"{cell.label} ({done} of {len(cell.seeds)} seeds)")
    return absent


def write_module_report(output_dir: Path, description: str) -> Path:
    """Write the README of a study that is a Python module, from what it left in its folder.

    Args:
        output_dir: holds ``table.md`` and pictures.
        description: docstring of the module; its first line is the title.
    """
    title, _, text = description.strip().partition("\n")
    pictures = sorted(str(file.relative_to(output_dir)) for file in output_dir.rglob("*.png"))
    notes = [f"Made by `python -m studies {output_dir.name}`."]
    return write_readme(output_dir, title.rstrip("."), text.strip(), pictures, notes)


def write_readme(output_dir: Path, title: str, question: str, pictures: list[str], notes: list[str]) -> Path:
    """Put conclusion, pictures and table of a study's folder into its README.md.

    Args:
        output_dir: holds ``table.md`` and perhaps ``conclusion.md``.
        title: heading.
        question: one sentence.
        pictures: file names in ``output_dir``.
        notes: paragraphs before the pictures.
    """
    parts = [f"# {title}", question]
    conclusion = output_dir / CONCLUSION_FILE
    if conclusion.is_file():
        parts += ["## Conclusion", conclusion.read_text(encoding="utf-8").strip()]
    parts += ["## Results", *notes]
    parts += [f"![{re.sub('[_/]', ' ', name.removesuffix('.png'))}]({name})" for name in pictures]
    table = output_dir / TABLE_FILE
    if table.is_file():
        parts.append(table.read_text(encoding="utf-8").strip())
    readme = output_dir / README_FILE
    readme.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return readme
