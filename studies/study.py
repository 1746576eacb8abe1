"""A study as its YAML file says it: cells, seeds, and the configuration of every run.

This module reads and checks the file and resolves a run's configuration. Running it is the part of
``studies.runner`` and ``studies.worker``, and ``studies.results`` holds what came out.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from studies import MODULES

STUDY_DIR = Path(__file__).parent
PROJECT_DIR = STUDY_DIR.parent
OUTPUT_DIR = Path("docs/studies")
RUNS_DIR = Path("runs/studies")
SEED_KEYS = ("seed_everything", "model.seed", "data.seed")
STUDY_KEYS = {
    "title",
    "question",
    "config",
    "overrides",
    "seeds",
    "steps",
    "curve",
    "cells",
    "differences",
    "groups",
}
CELL_KEYS = {"config", "overrides", "seeds", "steps", "curve", "label"}
DIFFERENCE_KEYS = {"name", "of", "over", "of_step", "over_step", "of_column", "over_column", "seeds"}
COLUMN = re.compile(r"aggregate|mean|concat|compressed|maxsim|learned|one_path|path_\d+")
"""What a difference may take of a result."""


@dataclass(frozen=True)
class Cell:
    """One configuration of a study.

    Attributes:
        name: also of its run folders.
        label: in tables and pictures.
        overrides: by dotted key, on top of the base config.
        config: the resolved configuration without seeds, nested.
        config_hash: of ``config``; two cells with the same hash are the same run.
        seeds: one run each.
        max_steps: main steps of a run; 0 builds the model and scores it untrained.
        points: steps that are scored, ascending; the last is ``max_steps``.
        base_steps: what ``1x`` is: ``trainer.max_steps`` of the config files.
    """

    name: str
    label: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    seeds: tuple[int, ...]
    max_steps: int
    points: tuple[int, ...]
    base_steps: int


@dataclass(frozen=True)
class Run:
    """A cell with a seed: one training, scored at the cell's points."""

    study: str
    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """Return ``<cell>_seed<k>``."""
        return f"{self.cell.name}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Return where checkpoints, scores and the log of this run are."""
        return RUNS_DIR / self.study / self.name

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration with this run's seed."""
        config = copy.deepcopy(self.cell.config)
        for key in SEED_KEYS:
            set_dotted(config, key, self.seed)
        return config


@dataclass(frozen=True)
class Difference:
    """A paired difference that the report shows: one point minus another, seed by seed.

    Attributes:
        name: what it compares, in words.
        of: cell name.
        over: cell name.
        of_step: scored step; ``None`` is the cell's last.
        over_step: likewise.
        of_column: what is scored of ``of``: ``aggregate``, ``concat``, ``path_0``, ..., or ``one_path`` for
            the mean score of its single paths.
        over_column: likewise.
        seeds: that are compared; empty is all that both sides have.
    """

    name: str
    of: str
    over: str
    of_step: int | None = None
    over_step: int | None = None
    of_column: str = "aggregate"
    over_column: str = "aggregate"
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Study:
    """A grid of runs.

    Attributes:
        name: of the file.
        title: heading of the report.
        question: one sentence.
        cells: by name, in the order of the file.
        differences: that the report shows.
        groups: further means of the report, by name: lists of tasks.
    """

    name: str
    title: str
    question: str
    cells: dict[str, Cell]
    differences: tuple[Difference, ...] = ()
    groups: dict[str, list[str]] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """Return where results, tables and pictures go."""
        return OUTPUT_DIR / self.name

    @property
    def results_file(self) -> Path:
        """Return the file with one JSON line per scored point."""
        return self.output_dir / "results.jsonl"

    def runs(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
        """Return the runs ordered by seed, then by cell, so that a stopped study has whole seeds.

        Args:
            only: cell names; empty is all.
            seeds: empty is every cell's own.

        Raises:
            ValueError: if a cell is not in the study.
        """
        unknown = sorted(set(only) - set(self.cells))
        if unknown:
            raise ValueError(f"study {self.name} has no cell {unknown}; it has {list(self.cells)}")
        runs = [
            Run(self.name, cell, seed)
            for cell in self.cells.values()
            for seed in (seeds or cell.seeds)
            if not only or cell.name in only
        ]
        return sorted(runs, key=lambda run: run.seed)


def study_files() -> dict[str, Path]:
    """Return the studies of this folder that are YAML files, by name."""
    return {file.stem: file for file in sorted(STUDY_DIR.glob("*.yaml"))}


def load_study(name: str) -> Study:
    """Read a study.

    Args:
        name: of a file in ``studies/``, or the path of a YAML file.

    Raises:
        ValueError: if the study does not exist, or its file asks for something impossible; the message names
            file and key.
    """
    file = Path(name) if name.endswith(".yaml") else study_files().get(name)
    if file is None or not file.is_file():
        raise ValueError(f"there is no study {name!r}; choose from {sorted([*study_files(), *MODULES])}")
    if file.stem in {*study_files(), *MODULES} and file.resolve().parent != STUDY_DIR.resolve():
        raise ValueError(f"{file}: {file.stem!r} is a study of {STUDY_DIR}; give the file another name")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not content:
        raise ValueError(f"{file} is empty; a study needs title, question, config and cells")
    _check_keys(content, STUDY_KEYS, str(file))
    _check_present(content, ("title", "question", "config", "cells"), str(file))
    cells = {cell: _cell(cell, settings or {}, content, file) for cell, settings in content["cells"].items()}
    differences = tuple(_difference(entry, cells, file) for entry in content.get("differences") or ())
    groups = content.get("groups") or {}
    return Study(file.stem, content["title"], content["question"], cells, differences, groups)


def _cell(name: str, settings: Mapping[str, Any], study: Mapping[str, Any], file: Path) -> Cell:
    where = f"{file}: cells.{name}"
    _check_keys(settings, CELL_KEYS, where)
    config = _read_config(settings.get("config", study["config"]), file.parent, where)
    base_steps = config.get("trainer", {}).get("max_steps", -1)
    overrides = {**(study.get("overrides") or {}), **(settings.get("overrides") or {})}
    for key, value in overrides.items():
        set_dotted(config, key, value)
    curve = settings.get("curve", None if "steps" in settings else study.get("curve"))
    if curve is not None:
        if not curve:
            raise ValueError(f"{where}: curve is empty; give steps to score, or leave the key out")
        points = tuple(sorted(_steps(entry, base_steps, where) for entry in curve))
    else:
        points = (_steps(settings.get("steps", study.get("steps", "1x")), base_steps, where),)
    set_dotted(config, "trainer.max_steps", points[-1])
    config["trainer"].pop("default_root_dir", None)  # a run has its own
    for key in ("callbacks", "logger"):
        if config["trainer"].pop(key, None) is not None:
            raise ValueError(f"{where}: remove trainer.{key} from its config; a study's runs have their own")
    for key in SEED_KEYS:
        set_dotted(config, key, 0)
    seeds = tuple(settings.get("seeds", study.get("seeds", [0])))
    if not seeds:
        raise ValueError(f"{where}: seeds is empty; give at least one, or leave the key out for [0]")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    label = settings.get("label", name.replace("_", " "))
    return Cell(name, label, overrides, config, digest, seeds, points[-1], points, base_steps)


def _steps(value: Any, base_steps: int, where: str) -> int:
    """Read steps: a number, or a multiple of the base config's ``trainer.max_steps`` such as ``0.5x``."""
    if isinstance(value, int):
        steps = value
    elif isinstance(value, str) and value.endswith("x") and value[:-1].replace(".", "", 1).isdigit():
        steps = round(float(value[:-1]) * base_steps)
    else:
        raise ValueError(f"{where}: steps are a number or a multiple such as 0.5x, got {value!r}")
    if steps < 0:
        raise ValueError(f"{where}: {value!r} steps need trainer.max_steps in the config, got {base_steps}")
    return steps


def _difference(entry: Mapping[str, Any], cells: Mapping[str, Cell], file: Path) -> Difference:
    where = f"{file}: differences"
    _check_keys(entry, DIFFERENCE_KEYS, where)
    _check_present(entry, ("name", "of", "over"), where)
    steps: dict[str, int] = {}
    for side in ("of", "over"):
        if entry[side] not in cells:
            raise ValueError(f"{where}: there is no cell {entry[side]!r}")
        if f"{side}_step" in entry:
            cell = cells[entry[side]]
            step = steps[f"{side}_step"] = _steps(entry[f"{side}_step"], cell.base_steps, where)
            if step not in cell.points:
                raise ValueError(f"{where}: {entry[side]} is not scored at step {step}")
    columns = {}
    for side in ("of_column", "over_column"):
        columns[side] = column = entry.get(side, "aggregate")
        if not COLUMN.fullmatch(column):
            raise ValueError(
                f"{where}: {side} {column!r} is not scored; take aggregate, mean, concat, maxsim, learned, "
                "compressed (of paths that were trained side by side), "
                "one_path (the mean of single paths), or path_0 and so on"
            )
    seeds = tuple(entry.get("seeds", ()))
    return Difference(entry["name"], entry["of"], entry["over"], **steps, **columns, seeds=seeds)


def _read_config(files: str | Sequence[str], folder: Path, where: str) -> dict[str, Any]:
    """Merge config files, later ones over earlier ones; relative to the study's folder, or to the project."""
    config: dict[str, Any] = {}
    for name in [files] if isinstance(files, str) else files:
        file = next((place / name for place in (folder, PROJECT_DIR) if (place / name).is_file()), None)
        if file is None:
            places = f"in {folder.resolve()} nor in {PROJECT_DIR}"
            raise ValueError(f"{where}: there is no config file {name}, neither {places}")
        _merge(config, yaml.safe_load(file.read_text(encoding="utf-8")))
    return config


def _merge(config: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = copy.deepcopy(value)


def set_dotted(config: dict[str, Any], key: str, value: Any) -> None:
    """Set ``model.mi.kind`` and the like in a nested configuration."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def _check_present(entry: Mapping[str, Any], wanted: Sequence[str], where: str) -> None:
    for key in wanted:
        if entry.get(key) is None:
            raise ValueError(f"{where}: the key {key!r} is missing")


def _check_keys(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown}; known are {sorted(known)}")
