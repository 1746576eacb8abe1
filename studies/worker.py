"""One run of a study in a process of its own: one ``fit``, then one ``test`` per scored step.

``python -m studies.worker <study> <cell> <seed>`` runs through the same command line interface as
``lightning fit`` and ``lightning test``, and appends a line to the study's results after every test.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from parallel_decoupling.lightning_cli import run as run_lightning
from parallel_decoupling.retrieval.report import SCORES_FILE, ScoreReport
from studies.results import Result, append_result, missing_points, read_results
from studies.study import PROJECT_DIR, Run, load_study

CODE = ("src", "studies", "lightning_configs", "setup.cfg")
"""What a result depends on: changes elsewhere, such as in docs/, do not make a commit dirty."""
HASH_FILE = "config_hash.txt"
CONFIG_FILE = "study_config.yaml"


def execute(run: Run, results_file: Path) -> None:
    """Train what is missing, score what is missing.

    A stopped training goes on from its last checkpoint; a folder of another configuration is emptied.

    Args:
        run: the run.
        results_file: gets one line per scored step.
    """
    missing = missing_points(run, read_results(results_file))
    if not missing:
        return
    _own_folder(run)
    commit, dirty = code_version()
    fit_seconds, resumed = _fit(run) if any(missing) else (0.0, False)
    for step in missing:
        started = time.perf_counter()
        report = _score(run, step)
        result = {
            **_identity(run, step),
            "commit": commit,
            "dirty": dirty,
            **_scores(report),
            "token_passes": report.run["token_passes"],
            "fit_seconds": round(fit_seconds, 1),
            "test_seconds": round(time.perf_counter() - started, 1),
            "resumed": resumed,
            "monitored": monitored(run.folder, step),
            "logged": logged(run.folder) if step == run.cell.max_steps else {},
        }
        append_result(results_file, result)


def _identity(run: Run, step: int) -> Result:
    return {
        "study": run.study,
        "cell": run.cell.name,
        "seed": run.seed,
        "step": step,
        "max_steps": run.cell.max_steps,
        "overrides": run.cell.overrides,
        "config_hash": run.cell.config_hash,
    }


def _scores(report: ScoreReport) -> Result:
    """Means and tasks by column, fractions."""
    return {
        "columns": report.columns,
        "means": report.means,
        "tasks": {name: result.hit_at_1 for name, result in report.tasks.items()},
    }


def _own_folder(run: Run) -> None:
    """Make the run's folder, with its configuration for ``fit`` and ``test``."""
    hash_file = run.folder / HASH_FILE
    if run.folder.exists() and (
        not hash_file.is_file() or hash_file.read_text().strip() != run.cell.config_hash
    ):
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    hash_file.write_text(run.cell.config_hash + "\n")
    config = run.config
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    (run.folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _checkpoint(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step={step}.ckpt"


def _fit(run: Run) -> tuple[float, bool]:
    """Train once, keeping a checkpoint at every scored step; returns seconds and whether it went on."""
    wanted = [step for step in run.cell.points if step > 0]
    absent = [step for step in wanted if not _checkpoint(run, step).is_file()]
    if not absent:
        return 0.0, True
    folder = run.folder / "checkpoints"
    saved = [int(file.stem.removeprefix("step=")) for file in folder.glob("step=*.ckpt")]
    resumed = bool(saved) and max(saved) < min(absent) and (folder / "last.ckpt").is_file()
    if not resumed and folder.exists():
        shutil.rmtree(folder)
    options = {
        "filename": "step={step}",
        "auto_insert_metric_name": False,
        "every_n_train_steps": math.gcd(*wanted),
        "save_top_k": -1,
        "save_last": True,
        "enable_version_counter": False,
    }
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    callbacks_file = run.folder / "checkpoints.yaml"
    callbacks_file.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}), encoding="utf-8")
    arguments = ["fit", "--config", str(run.folder / CONFIG_FILE), "--config", str(callbacks_file)]
    arguments += ["--trainer.default_root_dir", str(run.folder)]
    started = time.perf_counter()
    run_lightning([*arguments, *(["--ckpt_path", "last"] if resumed else [])])
    seconds = time.perf_counter() - started
    for step in set(saved_steps(folder)) - set(wanted):
        _checkpoint(run, step).unlink()
    return seconds, resumed


def saved_steps(checkpoint_dir: Path) -> list[int]:
    """Steps that have a checkpoint of their own."""
    return sorted(int(file.stem.removeprefix("step=")) for file in checkpoint_dir.glob("step=*.ckpt"))


def _score(run: Run, step: int) -> ScoreReport:
    """Score one checkpoint; step 0 is the untrained model."""
    folder = run.folder / f"step_{step}"
    arguments = ["test", "--config", str(run.folder / CONFIG_FILE), "--trainer.logger=false"]
    arguments += ["--trainer.default_root_dir", str(folder)]
    arguments += ["--ckpt_path", str(_checkpoint(run, step))] if step else []
    run_lightning(arguments)
    return ScoreReport.from_json_file(folder / SCORES_FILE)


SERIES = ("path_cosine", "mi", "estimator_nll_held_out", "estimator_nll", "effective_rank")
"""What is kept of all of training, not only its last value."""


def monitored(run_dir: Path, step: int) -> dict[str, float]:
    """Last values up to ``step`` of everything that training logged under ``train/``.

    ``path_cosine_first`` is the first logged path cosine; empty without TensorBoard's files.
    """
    values = {}
    for name, points in _scalars(run_dir).items():
        before = [value for at, value in points if at <= step]
        if before:
            values[name] = before[-1]
            if name == "path_cosine":
                values["path_cosine_first"] = before[0]
    return values


def logged(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """``SERIES`` over all of training: pairs of step and value, four digits; empty if none is."""
    scalars = _scalars(run_dir)
    return {
        name: [(step, float(f"{value:.4g}")) for step, value in scalars[name]]
        for name in SERIES
        if name in scalars
    }


def _scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What training logged under ``train/``, as pairs of step and value in TensorBoard's order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(run_dir.glob("events.out.tfevents.*")):
        return {}
    events: Any = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {
        tag.removeprefix("train/"): [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("train/")
    }


def code_version() -> tuple[str | None, bool]:
    """Commit of the project and whether its code differs from it; ``None`` outside git."""
    git = ["git", "-C", str(PROJECT_DIR)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None, False
    status = [*git, "status", "--porcelain", "--", *CODE]
    changes = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    return head.stdout.strip(), bool(changes.strip())


def main(arguments: list[str]) -> None:
    """Execute one run of a study; ``seed`` need not be one of the study's."""
    study_name, cell_name, seed = arguments
    study = load_study(study_name)
    sys.argv = sys.argv[:1]  # LightningCLI takes arguments from its caller only
    execute(Run(study.name, study.cells[cell_name], int(seed)), study.results_file)


if __name__ == "__main__":
    main(sys.argv[1:])
