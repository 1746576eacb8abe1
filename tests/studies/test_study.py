"""What a study's YAML file means, and that every shipped study means something."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.objective.vclub import Kind
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig
from parallel_decoupling.world.rows import WORLD_TASKS
from studies.study import PROJECT_DIR, load_study, study_files
from tests.support.study import save_study, toy_study


def test_steps_are_numbers_or_multiples_of_the_base_config(tmp_path: Path) -> None:
    cells = {
        "base": None,
        "half": {"steps": "0.5x"},
        "seven": {"steps": 7},
        "untrained": {"steps": 0},
        "curve": {"curve": ["1x", 10, "0.25x"]},
    }
    found = toy_study(tmp_path, cells=cells).cells
    assert [cell.points for cell in found.values()] == [(100,), (50,), (7,), (0,), (10, 25, 100)]
    assert [cell.max_steps for cell in found.values()] == [100, 50, 7, 0, 100]
    assert found["half"].config["trainer"]["max_steps"] == 50


def test_the_hash_tells_configurations_apart_and_not_names(tmp_path: Path) -> None:
    cells = {
        "one": None,
        "same": {"overrides": {"model.num_paths": 2}, "label": "another", "seeds": [3]},
        "other": {"overrides": {"model.num_paths": 3}},
        "longer": {"steps": 101},
        "curve": {"curve": ["0.5x", "1x"]},
    }
    hashes = {name: cell.config_hash for name, cell in toy_study(tmp_path, cells=cells).cells.items()}
    assert hashes["one"] == hashes["same"] == hashes["curve"]
    assert len({hashes["one"], hashes["other"], hashes["longer"]}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cells": {"a": {"step": 3}}}, r"cells\.a: unknown key \['step'\]"),
        ({"cells": {"a": {"steps": "half"}}}, "a multiple such as 0.5x, got 'half'"),
        (
            {"cells": {"a": {"config": "nowhere.yaml"}}},
            rf"cells\.a: there is no config file nowhere\.yaml, neither in .* nor in {PROJECT_DIR}",
        ),
        ({"cells": {"a": {"overrides": {"trainer.callbacks": []}}}}, r"cells\.a: remove trainer\.callbacks"),
        ({"cells": {"a": None}, "differences": [{"name": "d", "of": "a", "over": "b"}]}, "no cell 'b'"),
        (
            {"cells": {"a": None}, "differences": [{"name": "d", "of": "a", "over": "a", "of_step": 7}]},
            "a is not scored at step 7",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_study(save_study(tmp_path, content))


@pytest.mark.parametrize("name", study_files())
def test_every_shipped_study_sets_options_that_exist(name: str) -> None:
    options = {
        "model": set(inspect.signature(PDFEmbedder).parameters),
        "data": set(inspect.signature(MMEBDataModule).parameters),
        "mi": set(MIConfig.__dataclass_fields__),
        "optimizer": set(OptimizerConfig.__dataclass_fields__),
        "adapter": set(AdapterConfig.__dataclass_fields__),
    }
    study, tasks = load_study(name), {task.name for task in WORLD_TASKS}
    for cell in study.cells.values():
        parts = {"model": cell.config["model"], "data": cell.config["data"]}
        parts |= {part: cell.config["model"].get(part, {}) for part in ("mi", "optimizer", "adapter")}
        for part, values in parts.items():
            assert set(values) <= options[part], f"{cell.name}: {part}"
        assert parts["mi"].get("kind", "none") in get_args(Kind)
        assert set(cell.config["data"].get("eval_tasks") or ()) <= tasks
        assert set(cell.config["data"].get("train_subsets") or ()) <= tasks
    assert {task for group in study.groups.values() for task in group} <= tasks
