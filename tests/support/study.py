"""A small study on disk and made-up results for it."""

from pathlib import Path
from typing import Any

import yaml

from studies.study import Cell, Study, load_study


def save_study(folder: Path, content: dict[str, Any], base: dict[str, Any] | None = None) -> str:
    """Write ``toy.yaml`` and its base config; returns the study's file."""
    base = base or {"model": {"num_paths": 2, "mi": {"kind": "vclub"}}, "trainer": {"max_steps": 100}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    whole = {"title": "Toy", "question": "Does it?", "config": str(folder / "base.yaml"), **content}
    (folder / "toy.yaml").write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return str(folder / "toy.yaml")


def toy_study(folder: Path, **content: Any) -> Study:
    """Save and load."""
    return load_study(save_study(folder, content))


def made_up_result(cell: Cell, seed: int, step: int, score: float, study: str = "toy") -> dict[str, Any]:
    """A line of a results file; ``score`` of the aggregate in percent, the paths 1 and 3 points below."""
    columns = {"aggregate": score / 100, "path_0": (score - 1) / 100, "path_1": (score - 3) / 100}
    groups = ("overall", "classification", "in_distribution", "mean_of_meta_tasks")
    run = {"study": study, "cell": cell.name, "seed": seed, "step": step, "max_steps": cell.max_steps}
    run |= {"overrides": cell.overrides, "config_hash": cell.config_hash}
    run |= {"commit": "0" * 40, "dirty": False, "fit_commits": ["0" * 40]}
    cost = {"token_passes": 1e6 * step, "fit_seconds": 60.0, "test_seconds": 1.0}
    tasks = {"easy": {"aggregate": 0.9}, "hard": {"aggregate": 0.1}}
    means = {"columns": list(columns), "means": dict.fromkeys(groups, columns), "tasks": tasks}
    return {**run, **means, **cost, "monitored": {"path_cosine": 0.5}}
