"""Every shipped config file parses and builds its trainer, model and data."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.lightning_cli import RunCLI
from parallel_decoupling.training.embedder import PDFEmbedder

CONFIG_DIR = Path(__file__).parent.parent / "lightning_configs"
CONFIG_FILES = sorted(CONFIG_DIR.glob("*.yaml"))


class BuiltCLI(RunCLI):
    """Builds everything and stops before the run."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.built = subcommand


@pytest.fixture
def on_this_machine(
    tiny_backbone_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Options that put a tiny backbone on one CPU in the place of what a config asks for."""
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


def test_there_are_configs() -> None:
    assert {"demo.yaml", "demo_single_path.yaml"} <= {file.name for file in CONFIG_FILES}


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


def test_unknown_key_in_a_config_is_refused(
    tmp_path: Path, on_this_machine: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config_file = tmp_path / "misspelt.yaml"
    config_file.write_text("model:\n  num_branches: 2\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        BuiltCLI(["fit", "--config", str(config_file), *on_this_machine])
    assert stop.value.code == 2
    assert "num_branches" in capsys.readouterr().err
