"""Run the cells of a study, K processes at a time; skip what is finished and report what fails.

Every run is a process of its own (``studies.worker``) with one thread; its output is in
``runs/studies/<study>/<cell>_seed<k>.log``. A result is in the study's results file once it is scored.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from studies.results import missing_points, read_results, take_over
from studies.study import PROJECT_DIR, Run, Study
from studies.training_log import last_logged_step

POLL_SECONDS = 0.3
PROGRESS_SECONDS = 60.0
STOP_SECONDS = 30.0
"""What a process has to end by itself: Lightning ends a training after the present step."""
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


@dataclass
class Started:
    """A run with its process."""

    run: Run
    process: subprocess.Popen[bytes]
    log: TextIO
    since: float


def run_study(
    study: Study, source: str, *, jobs: int = 1, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[str]:
    """Run what a study lacks.

    Args:
        study: the study.
        source: the name or file it was loaded from, for the processes.
        jobs: processes at a time.
        only: cell names; empty is all.
        seeds: empty is every cell's own.

    Returns:
        Names of the runs that failed; their logs say why.
    """
    console = Console()
    runs = study.runs(only, seeds)
    waiting = [run for run in runs if _open(run, study)]
    console.print(f"study {study.name}: {len(runs)} runs, {len(runs) - len(waiting)} of them finished")
    progress = Progress(console, [work(run) for run in waiting])
    running: list[Started] = []
    failed: list[str] = []
    try:
        while waiting or running:
            while len(running) < jobs and (run := _next(waiting, running)) is not None:
                waiting.remove(run)
                if _open(run, study):
                    running.append(_start(run, source))
                    progress.started(running[-1])
                else:
                    progress.left_out(run, "taken over from a run of the same configuration")
            time.sleep(POLL_SECONDS)
            progress.running(running)
            for started in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(started)
                started.log.close()
                if problem := _problem(study, started):
                    failed.append(started.run.name)
                    progress.left_out(started.run, problem)
                else:
                    progress.finished(started.run, _summary(study, started))
    finally:  # nothing is left running, unless the study is stopped
        _stop(running)
    if failed:
        console.print(f"[red]{len(failed)} failed: {', '.join(failed)}[/red]")
    return failed


def _stop(running: Sequence[Started]) -> None:
    """End the processes, which releases the locks of their runs, and wait until they have ended."""
    for started in running:
        started.process.terminate()
    for started in running:
        try:
            started.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.process.kill()
            started.process.wait()
        started.log.close()


def _open(run: Run, study: Study) -> bool:
    """Tell whether points are missing that no other study or cell has scored."""
    take_over(run, study.results_file)
    return bool(missing_points(run, read_results(study.results_file)))


def _next(waiting: Sequence[Run], running: Sequence[Started]) -> Run | None:
    """Return the first run whose twin (same configuration and seed in another cell) is not running."""
    busy = {(started.run.cell.config_hash, started.run.seed) for started in running}
    return next((run for run in waiting if (run.cell.config_hash, run.seed) not in busy), None)


def work(run: Run) -> float:
    """Estimate the cost of a run in passes of one path, for the time that is left."""
    paths = run.cell.config.get("model", {}).get("num_paths", 4)
    batch = run.cell.config.get("data", {}).get("batch_size", 64)
    return float((1 + paths) * (run.cell.max_steps * batch + 2000 * len(run.cell.points)))


class Progress:
    """Prints lines that read well in a log file, too.

    There is one line for every run that starts or ends, with the time that is left, and one a minute for
    those that are running.
    """

    def __init__(self, console: Console, work_of_runs: Sequence[float]) -> None:
        self._console, self._count, self._left = console, len(work_of_runs), sum(work_of_runs)
        self._done, self._ended, self._start = 0.0, 0, time.monotonic()
        self._shown = self._start

    def started(self, started: Started) -> None:
        """Print where a run's output goes."""
        self._print(f"{started.run.name}: started, log in {started.log.name}")

    def running(self, running: Sequence[Started]) -> None:
        """Print how far the running ones are, once in ``PROGRESS_SECONDS``."""
        if running and time.monotonic() - self._shown >= PROGRESS_SECONDS:
            self._shown = time.monotonic()
            self._print(f"running: {', '.join(_step(started.run) for started in running)}")

    def finished(self, run: Run, summary: str) -> None:
        """Count a run that was trained and scored."""
        self._done += work(run)
        self._end(run, summary)

    def left_out(self, run: Run, reason: str) -> None:
        """Count a run that need not be done any more; it does not enter the estimate of the time."""
        self._end(run, reason)

    def _end(self, run: Run, text: str) -> None:
        self._ended += 1
        self._left -= work(run)
        line = f"[{self._ended}/{self._count}] {run.name}: {text}"
        if self._done:
            line += f"; about {_clock((time.monotonic() - self._start) * self._left / self._done)} left"
        self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _step(run: Run) -> str:
    step = last_logged_step(run.folder)
    return f"{run.name} {'before its first step' if step is None else f'at {step} of {run.cell.max_steps}'}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _start(run: Run, source: str) -> Started:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = open(run.folder.parent / f"{run.name}.log", "a", encoding="utf-8")  # noqa: SIM115
    paths = [str(PROJECT_DIR / "src"), str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **THREADS, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command(run, source), stdout=log, stderr=subprocess.STDOUT, env=environment)
    return Started(run, process, log, time.monotonic())


def command(run: Run, source: str) -> list[str]:
    """Return the command that executes a run in a process of its own."""
    return [sys.executable, "-m", "studies.worker", source, run.cell.name, str(run.seed)]


def _problem(study: Study, started: Started) -> str:
    """Say why a run that has ended has failed; empty if it has not."""
    absent = missing_points(started.run, read_results(study.results_file))
    if not started.process.returncode and not absent:
        return ""
    text = Path(started.log.name).read_text(encoding="utf-8", errors="replace")
    last = (text.strip().splitlines() or ["no output"])[-1]
    if not started.process.returncode:
        last = f"no error, but not scored at {', '.join(map(str, absent))}: {last}"
    return f"FAILED ({last}; {started.log.name})"


def _summary(study: Study, started: Started) -> str:
    run = started.run
    scores = {
        result["step"]: f"{100 * result['means']['overall']['aggregate']:.1f} at {result['step']}"
        for result in read_results(study.results_file)
        if (result["cell"], result["seed"], result["config_hash"])
        == (run.cell.name, run.seed, run.cell.config_hash)
    }
    text = ", ".join(scores[step] for step in run.cell.points)
    return f"overall {text} in {_clock(time.monotonic() - started.since)}"


def status_table(study: Study) -> Table:
    """Return a table of cells with their seeds and steps, and how many of their points are scored."""
    table = Table("cell", "steps", "scored at", "seeds", "finished", title=f"{study.name}: {study.title}")
    results = read_results(study.results_file)
    for cell in study.cells.values():
        runs = [run for run in study.runs([cell.name])]
        finished = sum(not missing_points(run, results) for run in runs)
        points = ", ".join(map(str, cell.points))
        seeds = " ".join(map(str, cell.seeds))
        table.add_row(cell.name, str(cell.max_steps), points, seeds, f"{finished}/{len(runs)}")
    return table
