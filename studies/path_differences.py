"""Are the paths different? Similarity, probes, attention, contributions and errors of trained checkpoints.

``python -m studies path_differences`` takes three runs of the study ``help``: with the mutual-information
term, without it, and with orthogonality in its place. It trains those that are not there, some minutes each;
the rest takes half a minute per checkpoint. Every run gets a folder with what ``parallel-decoupling paths``
writes; the table sets them side by side.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from parallel_decoupling.diagnostics.path_analysis import PATHS_FILE, analyse_paths
from studies.results import code_version, commit_name
from studies.study import Run, load_study
from studies.worker import ensure_scored

STUDY, CELLS, SEED = "help", ("pdf", "without_mim", "orthogonal"), 4


def run(output_dir: Path) -> None:
    """Train what is missing of the study's runs, analyse all of them, and write ``table.md``.

    Args:
        output_dir: gets the table, and a folder per run.
    """
    study, found = load_study(STUDY), {}
    for cell in CELLS:
        each = Run(STUDY, study.cells[cell], SEED)
        ensure_scored(each)
        analyse_paths(str(each.folder), str(output_dir / each.name))
        found[each.name] = json.loads((output_dir / each.name / PATHS_FILE).read_text(encoding="utf-8"))
    (output_dir / "table.md").write_text(table(found), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """Return all runs as Markdown: means over pairs of paths, and what the paths gain together.

    Args:
        found: content of ``paths.json`` by run.
    """
    headings = ["run", "cosine", "linear CKA", "mean angle", "rank of a path", "rank of all paths"]
    headings += ["misses, kappa", "best path", "aggregate", "oracle"]
    commit = commit_name(*code_version())
    lines = [
        f"Commit {commit}. Means over pairs of paths; hit@1 in percent, mean over tasks.",
        "",
        f"| {' | '.join(headings)} |",
        "| --- |" + " ---: |" * (len(headings) - 1),
    ]
    lines += [f"| {name} | {' | '.join(_cells(content))} |" for name, content in found.items()]
    return "\n".join(lines) + "\n"


def _cells(content: dict[str, Any]) -> list[str]:
    similarity, errors = content["similarity"], content["errors"]

    def over_pairs(matrix: list[list[float]]) -> str:
        return f"{fmean(matrix[i][j] for i, j in similarity['pairs']):.3f}"

    return [
        over_pairs(similarity["cosine"]),
        over_pairs(similarity["cka"]),
        f"{fmean(angle for angles in similarity['angles'] for angle in angles):.0f}",
        f"{fmean(similarity['rank']):.1f}",
        f"{similarity['joined_rank']:.1f}",
        over_pairs(errors["kappa"]),
        *(f"{100 * errors['scores'][name]:.1f}" for name in ("best_path", "aggregate", "oracle")),
    ]
