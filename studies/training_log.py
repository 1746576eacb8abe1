"""What a training has logged, read from TensorBoard's files in its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SERIES = ("path_cosine", "mi", "estimator_nll_held_out", "estimator_nll", "effective_rank")
"""What is kept of all of training, not only its last value."""


def monitored(run_dir: Path, step: int) -> dict[str, float]:
    """Return the last values up to ``step`` of everything that training logged under ``train/``.

    ``path_cosine_first`` is the first logged path cosine. Without TensorBoard's files the result is empty.
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
    """Return ``SERIES`` over all of training, as pairs of step and value with four digits."""
    scalars = _scalars(run_dir)
    return {
        name: [(step, float(f"{value:.4g}")) for step, value in scalars[name]]
        for name in SERIES
        if name in scalars
    }


def last_logged_step(run_dir: Path) -> int | None:
    """Return how far training has come; ``None`` before its first line."""
    return max((points[-1][0] for points in _scalars(run_dir).values()), default=None)


def _scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what training logged under ``train/``, as pairs of step and value in the order of steps.

    A training that was stopped logs the steps after its last checkpoint again; the later value counts.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(run_dir.glob("events.out.tfevents.*")):
        return {}
    events: Any = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {
        tag.removeprefix("train/"): sorted({at.step: at.value for at in events.Scalars(tag)}.items())
        for tag in events.Tags()["scalars"]
        if tag.startswith("train/")
    }
