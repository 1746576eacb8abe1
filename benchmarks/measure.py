"""How contenders take turns, and how their ratios are printed."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn


def rounds_of(
    contenders: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the processor time of every contender in every round, and what it returned in the first.

    The order rotates, and a round before the first is not measured.
    """
    names, seconds = list(contenders), {name: list[float]() for name in contenders}
    results: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                result = contenders[name]()
            if number:
                seconds[name].append(time.process_time() - start)
            results.setdefault(name, result)
    return seconds, results


def report(seconds: Mapping[str, list[float]], own: str, goals: Mapping[str, float]) -> None:
    """Print, for every other contender, its time over that of ``own``, with the spread over rounds."""
    print(f"  {own}: {statistics.median(seconds[own]):.3f} s of processor time")
    for name in [name for name in seconds if name != own]:
        ratios = sorted(other / mine for other, mine in zip(seconds[name], seconds[own], strict=True))
        goal = f", goal {goals[name]:.2f}" if name in goals else ""
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"  {name} / {own}: {statistics.median(ratios):.2f} ({spread}){goal}", flush=True)


def forward_seconds(module: nn.Module) -> list[float]:
    """Return a list that gets the processor time of each forward pass of ``module``: the floor of a run."""
    seconds: list[float] = []

    def start(*args: Any) -> None:
        seconds.append(-time.process_time())

    def stop(*args: Any) -> None:
        seconds[-1] += time.process_time()

    module.register_forward_pre_hook(start)
    module.register_forward_hook(stop)
    return seconds


def command_seconds(checkout: Path, *arguments: str) -> tuple[float, float]:
    """Run a command of a checkout in a run folder of its own.

    Returns its seconds by the clock and of the processor.
    """
    with tempfile.TemporaryDirectory() as run_dir:
        used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "parallel_decoupling", *arguments),
                *("--trainer.default_root_dir", run_dir),
            ],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
            check=True,
            capture_output=True,
        )
        clock, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
