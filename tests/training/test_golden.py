"""The first 50 steps of the demo keep their losses; ``make golden`` writes them anew.

The tolerance holds on other processors: rounding differences between one and two threads, measured as the
largest relative difference over these 50 steps, stay far below it, a changed objective does not.
"""

import csv
import os
from pathlib import Path

import pytest

from parallel_decoupling.lightning_cli import run
from parallel_decoupling.world.benchmark import ensure_benchmark

ROOT_DIR = Path(__file__).parents[2]
GOLDEN_FILE = ROOT_DIR / "tests/golden/demo_losses.csv"
COLUMNS = (
    "train/loss",
    "train/contrastive_path_0",
    "train/contrastive_aggregate",
    "train/mi",
    "train/estimator_nll",
)
STEPS = 50
BFLOAT16_STEPS = 10
TOLERANCE = 0.02


def losses(run_dir: Path, steps: int, *options: str) -> list[dict[str, float]]:
    """Losses of the demo's first steps on a small copy of its data."""
    data_dir = ensure_benchmark(run_dir / "data", train_rows=200, eval_rows=16)
    run(
        [
            "fit",
            "--config",
            str(ROOT_DIR / "lightning_configs/demo_paper.yaml"),
            f"--trainer.max_steps={steps}",
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={run_dir}",
            f"--trainer.default_root_dir={run_dir}",
            f"--data.data_dir={data_dir}",
            *options,
        ]
    )
    (metrics_file,) = run_dir.glob("lightning_logs/*/metrics.csv")
    with metrics_file.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [{column: float(row[column]) for column in COLUMNS} for row in rows]


def test_demo_losses_are_the_golden_ones(tmp_path: Path) -> None:
    measured = losses(tmp_path, STEPS)
    assert len(measured) == STEPS
    if os.environ.get("UPDATE_GOLDEN"):
        with GOLDEN_FILE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in measured)
    compare_with_golden(measured)


@pytest.mark.slow
def test_frozen_weights_in_bfloat16_keep_the_golden_losses(tmp_path: Path) -> None:
    measured = losses(tmp_path, BFLOAT16_STEPS, "--model.dtype=bfloat16", "--trainer.precision=bf16-mixed")
    assert len(measured) == BFLOAT16_STEPS
    compare_with_golden(measured)


def compare_with_golden(measured: list[dict[str, float]]) -> None:
    """Compare as many steps as were measured."""
    with GOLDEN_FILE.open(newline="") as file:
        golden = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(golden) == STEPS
    for step, (row, expected) in enumerate(zip(measured, golden[: len(measured)], strict=True)):
        for name in COLUMNS:
            assert row[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=TOLERANCE), (step, name)
