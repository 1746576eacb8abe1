"""Are the paths different? Similarity, probes, attention, contributions and errors of trained checkpoints.

``python -m studies path_differences`` takes three runs of the study ``help``: with the mutual-information
term, without it, and with orthogonality in its place. It trains those that are not there, some minutes each;
the rest takes half a minute per checkpoint. The measures are those of ``lightning paths``, which takes any
checkpoint; here several stand side by side.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from parallel_decoupling.commands import analyse_checkpoint, locate
from parallel_decoupling.diagnostics.figures import figures
from parallel_decoupling.diagnostics.study import PathAnalysis
from parallel_decoupling.diagnostics.tables import Section, as_plain, sections
from parallel_decoupling.training.evaluation import git_commit
from studies.plots import DPI
from studies.study import Run, load_study
from studies.worker import is_scored, train_and_score

STUDY, CELLS, SEED = "help", ("pdf", "without_mim", "orthogonal"), 4


def run(output_dir: Path) -> None:
    """Train what is missing of the study's runs, then compare them.

    Args:
        output_dir: gets ``results.json``, ``table.md`` and PNGs named after the runs.
    """
    study = load_study(STUDY)
    study_runs = [Run(STUDY, study.cells[cell], SEED) for cell in CELLS]
    for each in study_runs:
        ensure_scored(each)
    compare_runs(output_dir, [each.folder for each in study_runs])


def ensure_scored(run: Run) -> None:
    """Train and score a run that is not there, or is of another configuration."""
    if is_scored(run):
        return
    text = f"{run.folder} is missing: training {run.cell.max_steps} steps, then scoring them"
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    torch.set_num_threads(1)  # as in the processes of studies.runner, so that the run is the study's
    train_and_score(run)


def compare_runs(output_dir: Path, runs: Sequence[Path]) -> None:
    """Analyse checkpoints and write results, tables and pictures.

    Args:
        output_dir: gets ``results.json``, ``table.md`` and PNGs named after the runs.
        runs: run folders or checkpoint files; a folder's name stands for its run.

    Raises:
        ValueError: no runs, two of one name, or one without a checkpoint.
    """
    found = [locate(path) for path in runs]
    names = [run_dir.resolve().name for run_dir, _ in found]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"the runs' folders need different names, at least one; got {names}")
    start, commit = time.perf_counter(), git_commit()
    output_dir.mkdir(parents=True, exist_ok=True)
    analyses = {}
    for name, (run_dir, checkpoint_file) in zip(names, found, strict=True):
        analyses[name] = analyse_checkpoint(checkpoint_file, _scores_dir(run_dir))
        for picture, figure in figures(analyses[name]).items():
            figure.savefig(output_dir / f"{name}_{picture}.png", dpi=DPI)
    results = {
        "study": "path_differences",
        "command": "python -m studies path_differences",
        "commit": commit,
        "seconds": round(time.perf_counter() - start, 1),
        "runs": {name: as_plain(analysis) for name, analysis in analyses.items()},
    }
    content = json.dumps(results, indent=1, default=str) + "\n"
    (output_dir / "results.json").write_text(content, encoding="utf-8")
    (output_dir / "table.md").write_text(_table(results, analyses), encoding="utf-8")


def _scores_dir(run_dir: Path) -> Path:
    """A run of a study keeps its scores by step; those of the last step belong to its last checkpoint."""
    scored = [file.parent for file in run_dir.glob("step_*/scores.json")]
    return max(scored, key=lambda folder: int(folder.name.removeprefix("step_")), default=run_dir)


def overview(analyses: dict[str, PathAnalysis]) -> Section:
    """All runs in one table: means over pairs of paths, and what the paths gain together."""
    rows = [[name, *_overview_cells(analysis)] for name, analysis in analyses.items()]
    headings = ["run", "paths", "cosine", "linear CKA", "mean angle", "rank of a path", "rank of all paths"]
    return Section(
        "Overview",
        [*headings, "misses, kappa", "best path", "aggregate", "oracle"],
        rows,
        "Means over pairs of paths; hit@1 in percent, mean over tasks. One path has no pairs.",
    )


def _overview_cells(analysis: PathAnalysis) -> list[str]:
    similarity, errors, several = analysis.similarity, analysis.errors, analysis.num_paths > 1
    pairs = [(i, j) for i, j in similarity.pairs.tolist()]

    def over_pairs(matrix: Any) -> str:
        return f"{fmean(float(matrix[i][j]) for i, j in pairs):.3f}" if several else ""

    return [
        str(analysis.num_paths),
        over_pairs(similarity.cosine),
        over_pairs(similarity.cka),
        f"{float(similarity.angles.mean()):.0f}" if several else "",
        f"{float(similarity.rank.mean()):.1f}",
        f"{similarity.joined_rank:.1f}",
        over_pairs(errors.kappa) if errors else "",
        *(
            f"{100 * errors.scores[key]:.1f}" if errors else ""
            for key in ("best_path", errors.headline if errors else "", "oracle")
        ),
    ]


def _table(results: dict[str, Any], analyses: dict[str, PathAnalysis]) -> str:
    parts = [
        f"`{results['command']}`, commit {results['commit']}, {results['seconds']} s.",
        overview(analyses).markdown(),
    ]
    for name, analysis in analyses.items():
        titled = [replace(part, title=f"{name}: {part.title}") for part in sections(analysis)]
        parts += [part.markdown() for part in titled]
        parts += [f"{name}, left out: {note}" for note in analysis.notes]
    return "\n\n".join(part.strip() for part in parts) + "\n"
