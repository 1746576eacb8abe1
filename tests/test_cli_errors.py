"""Whose errors are one message and exit code 2, besides this package's own: ``test_cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from parallel_decoupling import cli, lightning_cli


def message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accelerator": "cpu", "devices": 0}, "not a valid input"),  # Lightning's MisconfigurationException
        ({"accelerator": "cpu", "strategy": "ddpp"}, "invalid strategy name"),
        ({"accelerator": "cpu", "strategy": "fsdp"}, "requires a GPU"),
    ],
)
def test_what_lightning_says_of_the_trainers_options(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lightning_cli, "RunCLI", lambda _: Trainer(logger=False, **options))
    shown = message(["fit"], capsys)
    assert shown.startswith("error: ")
    assert words in shown


def test_any_error_of_building_the_trainer_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.devices=-3", f"--trainer.default_root_dir={tmp_path / 'run'}"]  # a TypeError
    shown = message(["fit", "--config", "demo.yaml", "--trainer.accelerator=cpu", *options], capsys)
    assert "one of the trainer's options cannot be used: `devices`" in shown


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = message(["verify", str(tmp_path / "no")], capsys)
    assert shown.startswith("error: ")
    assert str(tmp_path / "no") in shown
