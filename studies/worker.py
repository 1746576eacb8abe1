"""One run of a study in a process of its own: one ``fit``, then one ``test`` per scored step.

``python -m studies.worker <study> <cell> <seed>`` runs through the same command line interface as
``lightning fit`` and ``lightning test``, and appends a line to the study's results after every test.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from parallel_decoupling.compress import compress
from parallel_decoupling.evaluation.report import SCORES_FILE, ScoreReport
from parallel_decoupling.lightning_cli import run as run_lightning
from studies.results import (
    Result,
    append_result,
    code_version,
    commit_name,
    missing_points,
    read_results,
)
from studies.study import Run, load_study
from studies.training_log import logged, monitored

SAVE_EVERY = 60
"""Main steps after which ``last.ckpt`` is renewed, from which a stopped training resumes."""
HASH_FILE = "config_hash.txt"
CONFIG_FILE = "study_config.yaml"
FITS_FILE = "fits.json"
"""Of a run's training: commit, start and seconds of every part, a part from one start to the next stop."""


class BusyError(ValueError):
    """Raised when another process executes the run."""


def execute(run: Run, results_file: Path) -> None:
    """Train and score what is missing.

    A stopped training resumes from its last checkpoint; a folder of another configuration is emptied.

    Args:
        run: the run.
        results_file: gets one line per scored step.

    Raises:
        BusyError: if another process executes the run.
    """
    with _only_process(run):
        missing = missing_points(run, read_results(results_file))
        if not missing:
            return
        _own_folder(run)
        commit, dirty = code_version()
        fits = _fit(run) if any(missing) else []
        for step in missing:
            started = time.perf_counter()
            report = _score(run, _checkpoint(run, step) if step else None, _scores_file(run, step))
            trained_as = run.cell.config["model"].get("aggregation")
            side_by_side = step and trained_as == "concat" and "concat" in report.columns
            result = {
                **_identity(run, step),
                "commit": commit,
                "dirty": dirty,
                "torch": torch.__version__,
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "fit_commits": [fit["commit"] for fit in fits],
                **_scores(report, _score_compressed(run, step) if side_by_side else None),
                "token_passes": report.run["token_passes"],
                "fit_seconds": round(sum(fit["seconds"] for fit in fits), 1),
                "test_seconds": round(time.perf_counter() - started, 1),
                "monitored": monitored(run.folder, step),
                "logged": logged(run.folder) if step == run.cell.max_steps else {},
            }
            append_result(results_file, result)


def ensure_scored(run: Run) -> None:
    """Train and score the last step of a run that is missing, or that has another configuration.

    This is for the files in the run's folder; nothing is added to any results.

    Raises:
        BusyError: if another process executes the run.
    """
    step = run.cell.max_steps
    if _is_own(run) and _checkpoint(run, step).is_file() and _scores_file(run, step).is_file():
        return
    sys.stdout.write(f"{run.folder} is missing: training {step} steps, then scoring them\n")
    torch.set_num_threads(1)  # as in the processes of studies.runner, so that the run is the study's
    with _only_process(run):
        _own_folder(run)
        _fit(run)
        _score(run, _checkpoint(run, step) if step else None, _scores_file(run, step))


@contextmanager
def _only_process(run: Run) -> Iterator[None]:
    """Hold the run's lock, which lies beside its folder because the folder may be emptied."""
    lock_file = run.folder.with_name(f"{run.name}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_file, "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"{run.folder}: another process executes this run and holds {lock_file}; "
                "wait until it has ended, or stop it"
            ) from error
        yield


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


def _scores(report: ScoreReport, compressed: ScoreReport | None) -> Result:
    """Return means and tasks by column, as fractions; the aggregate of ``compressed`` is one more column."""
    columns, means = list(report.columns), {name: dict(values) for name, values in report.means.items()}
    tasks = {name: dict(result.hit_at_1) for name, result in report.tasks.items()}
    if compressed:
        columns.append("compressed")
        for name, values in compressed.means.items():
            means[name]["compressed"] = values["aggregate"]
        for name, result in compressed.tasks.items():
            tasks[name]["compressed"] = result.hit_at_1["aggregate"]
    return {"columns": columns, "means": means, "tasks": tasks}


def _is_own(run: Run) -> bool:
    """Tell whether the run's folder exists and has its present configuration."""
    hash_file = run.folder / HASH_FILE
    return hash_file.is_file() and hash_file.read_text().strip() == run.cell.config_hash


def _own_folder(run: Run) -> None:
    """Make the run's folder, with its configuration for ``fit`` and ``test``."""
    if run.folder.exists() and not _is_own(run):
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / HASH_FILE).write_text(run.cell.config_hash + "\n")
    config = run.config
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    (run.folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _checkpoint(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step={step}.ckpt"


def _fit(run: Run) -> list[dict[str, Any]]:
    """Train once, keep a checkpoint at every scored step, and return the parts of the training."""
    wanted = [step for step in run.cell.points if step > 0]
    folder, fits = run.folder / "checkpoints", _fits(run)
    absent = set(wanted) - set(saved_steps(folder))
    if not absent:
        return fits
    last_file = folder / "last.ckpt"
    resumed = last_file.is_file() and _step_of(last_file) < min(absent)
    if resumed:  # a stopped part lasted until its last checkpoint; what it did after that is done again
        fits[-1]["seconds"] = max(0.0, last_file.stat().st_mtime - fits[-1]["started"])
    else:
        fits = []
        shutil.rmtree(folder, ignore_errors=True)
    fits.append({"commit": commit_name(*code_version()), "started": time.time(), "seconds": 0.0})
    _save_fits(run, fits)
    callbacks_file = run.folder / "checkpoints.yaml"
    callbacks_file.write_text(yaml.safe_dump({"trainer": {"callbacks": _callbacks(wanted)}}), "utf-8")
    arguments = ["fit", "--config", str(run.folder / CONFIG_FILE), "--config", str(callbacks_file)]
    arguments += ["--trainer.default_root_dir", str(run.folder)]
    _lightning([*arguments, *(["--ckpt_path", "last"] if resumed else [])])
    fits[-1]["seconds"] = time.time() - fits[-1]["started"]
    _save_fits(run, fits)
    for step in set(saved_steps(folder)) - set(wanted):
        _checkpoint(run, step).unlink()
    return fits


def _callbacks(wanted: Sequence[int]) -> list[dict[str, Any]]:
    """Return callbacks that keep scored steps, some steps between them for a while, and ``last.ckpt``."""
    every = math.gcd(*wanted)
    options = {"auto_insert_metric_name": False, "enable_version_counter": False}
    scored = {"filename": "step={step}", "every_n_train_steps": every, "save_top_k": -1, "save_last": True}
    between = {"filename": "last", "every_n_train_steps": SAVE_EVERY, "save_top_k": 1}
    return [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {**options, **own}}
        for own in ([scored, between] if every > SAVE_EVERY else [scored])
    ]


def _fits(run: Run) -> list[dict[str, Any]]:
    """Return the parts of the training so far."""
    file = run.folder / FITS_FILE
    fits: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return fits


def _save_fits(run: Run, fits: list[dict[str, Any]]) -> None:
    (run.folder / FITS_FILE).write_text(json.dumps(fits, indent=1) + "\n", encoding="utf-8")


def _step_of(checkpoint_file: Path) -> int:
    return int(torch.load(checkpoint_file, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def saved_steps(checkpoint_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint of their own."""
    return sorted(int(file.stem.removeprefix("step=")) for file in checkpoint_dir.glob("step=*.ckpt"))


def _scores_file(run: Run, step: int) -> Path:
    return run.folder / f"step_{step}" / SCORES_FILE


def _score(run: Run, checkpoint: Path | None, scores_file: Path) -> ScoreReport:
    """Score one checkpoint, or the untrained model."""
    arguments = ["test", "--config", str(run.folder / CONFIG_FILE), "--trainer.logger=false"]
    arguments += ["--trainer.default_root_dir", str(scores_file.parent)]
    arguments += ["--ckpt_path", str(checkpoint)] if checkpoint else []
    _lightning(arguments)
    return ScoreReport.from_json_file(scores_file)


def _score_compressed(run: Run, step: int) -> ScoreReport:
    """Score paths that were trained side by side once more, in the bytes of one path."""
    folder = run.folder / f"step_{step}_compressed"
    folder.mkdir(exist_ok=True)
    checkpoint = folder / "compressed.ckpt"
    checkpoint.unlink(missing_ok=True)
    compress(str(_checkpoint(run, step)), str(checkpoint))
    return _score(run, checkpoint, folder / SCORES_FILE)


def _lightning(arguments: list[str]) -> None:
    """Run ``lightning`` in this process, which must have no arguments of its own: LightningCLI warns."""
    sys.argv = sys.argv[:1]
    run_lightning(arguments)


def main(arguments: list[str]) -> None:
    """Execute one run of a study; ``seed`` need not be one of the study's."""
    study_name, cell_name, seed = arguments
    study = load_study(study_name)
    try:
        execute(Run(study.name, study.cells[cell_name], int(seed)), study.results_file)
    except BusyError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
