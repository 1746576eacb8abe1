"""Are the paths different? Similarity, probes, attention, contributions and errors of trained checkpoints.

``python -m studies.path_differences RUN_OR_CHECKPOINT ...`` writes
``docs/studies/path_differences/{results.json,table.md,<run>_*.png}``; half a minute per checkpoint. Without
arguments it takes the runs of ``make demo`` and, of the study ``help``, one with the mutual-information term
and one without. The measures are those of ``lightning paths``; here several checkpoints stand side by side.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from parallel_decoupling.analysis.figures import figures
from parallel_decoupling.analysis.study import PathAnalysis
from parallel_decoupling.analysis.tables import Section, as_plain, sections
from parallel_decoupling.commands.paths import analyse_checkpoint, locate
from parallel_decoupling.training.evaluation import git_commit

OUTPUT_DIR = Path("docs/studies/path_differences")
RUNS = (
    "runs/demo_single_path",
    "runs/demo",
    "runs/studies/help/pdf_seed0",
    "runs/studies/help/without_mim_seed0",
)


def run(output_dir: str | Path = OUTPUT_DIR, runs: Sequence[str | Path] = RUNS) -> dict[str, dict[str, Any]]:
    """Analyse checkpoints and write results, tables and pictures.

    Args:
        output_dir: gets ``results.json``, ``table.md`` and PNGs named after the runs.
        runs: run folders or checkpoint files; a folder's name stands for its run.

    Returns:
        What ``lightning paths`` would write, by run name.

    Raises:
        ValueError: no runs, two of one name, or one without a checkpoint.
    """
    found = [locate(path) for path in runs]
    names = [run_dir.resolve().name for run_dir, _ in found]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"the runs' folders need different names, at least one; got {names}")
    folder, start, commit = Path(output_dir), time.perf_counter(), git_commit()
    folder.mkdir(parents=True, exist_ok=True)
    analyses = {}
    for name, (run_dir, checkpoint_file) in zip(names, found, strict=True):
        analyses[name] = analyse_checkpoint(checkpoint_file, _scores_dir(run_dir))
        for picture, figure in figures(analyses[name]).items():
            figure.savefig(folder / f"{name}_{picture}.png")
    results = {
        "study": "path_differences",
        "command": f"python -m studies.path_differences {' '.join(str(path) for path in runs)}",
        "commit": commit,
        "seconds": round(time.perf_counter() - start, 1),
        "runs": {name: as_plain(analysis) for name, analysis in analyses.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(_table(results, analyses), encoding="utf-8")
    return {name: as_plain(analysis) for name, analysis in analyses.items()}


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


def main() -> None:
    """Run on the checkpoints named, or on ``RUNS``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", default=list(RUNS))
    parser.add_argument("--output_dir", default=str(OUTPUT_DIR))
    options = parser.parse_args()
    run(options.output_dir, options.runs)
    Console().print((Path(options.output_dir) / "table.md").read_text(), markup=False, highlight=False)


if __name__ == "__main__":
    main()
