"""Every shipped config file parses and builds trainer, model and data; every row of the docs plans."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.lightning_cli import PlanCLI, RunCLI
from parallel_decoupling.plan import Plan
from parallel_decoupling.training.module import PDFEmbedder
from recipes.ready_configs import READY, ROWS, ready_config
from tests.support.published_sizes import save_published

PROJECT_DIR = Path(__file__).parent.parent
CONFIG_DIR = PROJECT_DIR / "lightning_configs"
CONFIG_FILES = sorted(CONFIG_DIR.glob("*.yaml"))


class BuiltCLI(RunCLI):
    """Builds everything and stops before the run."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.built = subcommand


class ParsedCLI(RunCLI):
    """Parses and builds nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


@pytest.fixture
def on_this_machine(
    tiny_backbone_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Options that put a tiny backbone on one CPU instead of what a config asks for."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)
    hardware = {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": "32-true",
    }
    options = {f"trainer.{name}": value for name, value in hardware.items()}
    options |= {"trainer.default_root_dir": str(tmp_path), "model.dtype": "float32"}
    options |= {"model.backbone": tiny_backbone_dir, "model.backbone_revision": "null"}
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("config_file", CONFIG_FILES, ids=lambda file: file.stem)
def test_config_parses_and_instantiates(config_file: Path, on_this_machine: list[str]) -> None:
    written = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    cli = BuiltCLI(["fit", "--config", str(config_file), *on_this_machine])
    assert cli.built == "fit"
    assert isinstance(cli.model, PDFEmbedder)
    assert isinstance(cli.datamodule, MMEBDataModule)
    assert cli.trainer.max_steps == written["trainer"]["max_steps"]
    assert cli.model.encoder.num_paths == written["model"]["num_paths"]
    assert cli.datamodule.batch_size == written["data"]["batch_size"]


def test_demo_and_its_baseline_differ_only_in_the_paths() -> None:
    demo, single = (
        yaml.safe_load((CONFIG_DIR / name).read_text(encoding="utf-8"))
        for name in ("demo.yaml", "demo_single_path.yaml")
    )
    for config in (demo, single):
        for name in ("num_paths", "prefix_length", "prefix_init", "aggregate_weight", "mi_weight", "mi"):
            config["model"].pop(name, None)
        config["trainer"].pop("default_root_dir")
    assert demo == single


def test_unknown_key_in_a_config_is_refused(tmp_path: Path, on_this_machine: list[str], mistake: Any) -> None:
    config_file = tmp_path / "misspelt.yaml"
    config_file.write_text("model:\n  num_branches: 2\n", encoding="utf-8")
    assert "num_branches" in mistake(["fit", "--config", str(config_file), *on_this_machine])


REPRODUCE = (PROJECT_DIR / "docs" / "reproduce.md").read_text(encoding="utf-8")


def table_rows() -> dict[str, list[str]]:
    lines = [line for line in REPRODUCE.splitlines() if line.startswith("| `") and line.count("|") == 10]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def ready_file(row: str) -> str:
    return str(CONFIG_DIR / READY / f"{row}.yaml")


class PlannedCLI(PlanCLI):
    """Keeps the plan instead of printing it."""

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand].as_dict()
        with TemporaryDirectory() as folder:
            config["model"]["backbone"] = save_published(config["model"]["backbone"], Path(folder))
            self.plan = Plan(config["model"], config["data"], config["trainer"])


def test_ready_files_are_what_make_configs_writes() -> None:
    there = {file.stem: file.read_text(encoding="utf-8") for file in (CONFIG_DIR / READY).glob("*.yaml")}
    assert there == {row: ready_config(row) for row in ROWS}


def test_every_row_of_the_docs_has_a_ready_file_and_every_layer_a_use() -> None:
    assert list(table_rows()) == list(ROWS)
    command = "parallel-decoupling fit --config lightning_configs/reproduce/"
    assert [row for row in ROWS if f"{command}{row}.yaml\n" not in REPRODUCE] == []
    docs = REPRODUCE + (PROJECT_DIR / "docs" / "layouts.md").read_text(encoding="utf-8")
    layers = [str(file.relative_to(CONFIG_DIR).with_suffix("")) for file in CONFIG_DIR.glob("*/*.yaml")]
    unused = [name for name in layers if not name.startswith(READY) and f"{name}.yaml" not in docs]
    assert set(unused) <= {layer for row in ROWS.values() for layer in row}


def test_a_ready_file_equals_its_layers_on_the_command_line() -> None:
    name = "pdf_qwen2_vl_2b"
    layers = [f"--config={CONFIG_DIR / layer}.yaml" for layer in ROWS[name]]
    options = {"joined": [f"--config={ready_file(name)}"]}
    options["layers"] = [*layers, f"--trainer.default_root_dir=runs/{name}"]
    parsed = {key: ParsedCLI(["fit", *each]).config["fit"].as_dict() for key, each in options.items()}
    for config in parsed.values():
        del config["config"]
    assert parsed["joined"] == parsed["layers"]


@pytest.mark.parametrize("name", ROWS)
def test_row_instantiates_with_a_small_backbone_and_plans_as_documented(
    name: str, on_this_machine: list[str]
) -> None:
    arguments = ["fit", "--config", ready_file(name)]
    built: Any = BuiltCLI([*arguments, *on_this_machine])
    assert built.built == "fit"
    assert built.model.encoder.num_paths == (4 if name.startswith("pdf") else 1)
    plan = PlannedCLI(arguments).plan
    hours, processes = plan.steps * plan.seconds / 3600, plan.processes
    assert table_rows()[name][2:7] == [
        str(processes),
        f"{sum(plan.memory.values()) / 2**30:.0f}",
        f"{hours:.1f}",
        f"{hours * processes:.0f}",
        f"{plan.steps * plan.queries / 1e6:.1f} M",
    ]


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp2"])
def test_a_layout_changes_nothing_that_is_trained(layout: str) -> None:
    arguments = ["fit", "--config", ready_file("pdf_qwen2_vl_2b")]
    plans = [
        PlannedCLI([*arguments, *more]).plan
        for more in ([], ["--config", str(CONFIG_DIR / "layout" / f"{layout}.yaml")])
    ]
    assert plans[1].strategy == layout
    assert plans[0].model | {"backbone": ""} == plans[1].model | {"backbone": ""}
    assert (plans[0].queries, plans[0].image) == (plans[1].queries, plans[1].image)
