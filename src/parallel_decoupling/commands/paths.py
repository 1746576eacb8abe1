"""``lightning paths``: how the paths of a trained model differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from parallel_decoupling.diagnostics.study import PathAnalysis


PATHS_DIR = "paths"
PATHS_FILE = "paths.json"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run_or_checkpoint", type=str, help="a run folder, or a checkpoint file")
    parser.add_argument(
        "--output_dir", type=str, help="gets paths.json and pictures; none: the folder paths of the run"
    )
    parser.add_argument(
        "--data_dir", type=str, help="pictures to look at; none: the data that the model was trained on"
    )


def run(options: Any) -> None:
    """Print the tables, write the files."""
    import sys

    from rich.console import Console

    from parallel_decoupling.diagnostics.tables import sections

    run_dir, checkpoint_file = locate(options.run_or_checkpoint)
    analysis = analyse_checkpoint(checkpoint_file, run_dir, options.data_dir)
    folder = Path(options.output_dir) if options.output_dir else run_dir / PATHS_DIR
    write(analysis, folder)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for section in sections(analysis):
        console.print(section.terminal())
    for note in analysis.notes:
        console.print(f"left out: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {folder}", markup=False, highlight=False, soft_wrap=True)


def locate(run_or_checkpoint: str | Path) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint that a user means.

    Raises:
        ValueError: neither a checkpoint nor a folder with ``checkpoints/last.ckpt``.
    """
    path = Path(run_or_checkpoint)
    if path.is_file():
        return path.parent.parent if path.parent.name == "checkpoints" else path.parent, path
    checkpoint_file = path / "checkpoints" / "last.ckpt"
    if not checkpoint_file.is_file():
        raise ValueError(
            f"{path} is no checkpoint and has no checkpoints/last.ckpt; name a run or a checkpoint"
        )
    return path, checkpoint_file


def analyse_checkpoint(checkpoint_file: Path, run_dir: Path, data_dir: str | None = None) -> PathAnalysis:
    """Load a checkpoint and analyse it on the data it was trained on, or on another folder.

    Args:
        checkpoint_file: of ``PDFEmbedder``.
        run_dir: may hold the ``scores.json`` of that checkpoint; one of another step is not used.
        data_dir: as ``--data.data_dir``.

    Returns:
        With the checkpoint's step and name in ``run``.

    Raises:
        ValueError: the checkpoint does not say on what data it was trained.
    """
    import torch

    from parallel_decoupling.data.datamodule import EMBEDDED
    from parallel_decoupling.diagnostics.study import analyse_inputs, analyse_world, benchmark_inputs
    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.evaluation.report import SCORES_FILE, ScoreReport, progress

    embedder = Embedder.from_pretrained(checkpoint_file)
    embedder.to("cuda" if torch.cuda.is_available() else "cpu")
    embedder.run = {**embedder.run, "checkpoint": checkpoint_file.name}
    if data_dir is None:
        data_dir = embedder.run["data"].get("data_dir")
    if data_dir is None:
        raise ValueError(f"{checkpoint_file} does not name its data; pass --data_dir")
    scores_file = run_dir / SCORES_FILE
    report = ScoreReport.from_json_file(scores_file) if scores_file.is_file() else None
    if report is not None and progress(report.run) != progress(embedder.run):
        report = None
    if data_dir == EMBEDDED or Path(data_dir).name.startswith(f"{EMBEDDED}-"):
        return analyse_world(embedder, report)
    return analyse_inputs(embedder, benchmark_inputs(data_dir), report)


def write(analysis: PathAnalysis, folder: Path) -> None:
    """Write ``paths.json`` and one PNG per figure."""
    from parallel_decoupling.diagnostics.figures import DPI, figures
    from parallel_decoupling.diagnostics.tables import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(analysis, folder / PATHS_FILE)
    for name, figure in figures(analysis).items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
