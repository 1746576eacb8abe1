"""Loggers by class path, offline; the best checkpoint and early stopping by a shipped config."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel_decoupling import cli
from parallel_decoupling.model.run_checkpoint import read_checkpoint
from tests.support.fit import small_config

BEST = Path(__file__).parents[2] / "lightning_configs" / "callbacks" / "best.yaml"


def fit(folder: Path, content: dict[str, Any], *options: str) -> None:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    cli.main(["fit", "--config", str(file), *options, "--trainer.default_root_dir", str(folder / "run")])


def test_the_best_checkpoint_is_kept_and_the_run_stops(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    """With rates at which no score changes, the first validation stays the best one."""
    content = small_config(tiny_backbone_dir, tiny_mmeb_dir, max_steps=20)
    content["data"]["validation_tasks"] = ["colours_i2t"]
    content["model"]["optimizer"] = {"learning_rate": 1e-12, "prefix_learning_rate": 1e-12}
    fit(tmp_path, content, "--config", str(BEST), "--trainer.val_check_interval", "1")
    folder = tmp_path / "run" / "checkpoints"
    steps = {
        name: read_checkpoint(folder / f"{name}.ckpt")["progress"]["steps_done"] for name in ("best", "last")
    }
    assert steps == {"best": 1, "last": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_of_another_package_gets_every_value(
    name: str, tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    kinds = {"wandb": ("WandbLogger", {"save_dir": str(tmp_path / "logs"), "offline": True})}
    kinds["mlflow"] = ("MLFlowLogger", {"tracking_uri": f"file:{tmp_path / 'logs'}"})
    names = [kinds[name], ("CSVLogger", {"save_dir": str(tmp_path / "csv"), "name": "", "version": ""})]
    loggers = [{"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": args} for kind, args in names]
    content = small_config(tiny_backbone_dir, tiny_mmeb_dir, max_steps=3, log_every_n_steps=1, logger=loggers)
    (tmp_path / "logs").mkdir()
    fit(tmp_path, content)
    with (tmp_path / "csv" / "metrics.csv").open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(losses) == 3
    if name == "mlflow":
        import mlflow

        client = mlflow.MlflowClient(f"file:{tmp_path / 'logs'}")
        (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
        assert [each.value for each in client.get_metric_history(run.info.run_id, "train/loss")] == losses
        assert run.data.params["model/num_paths"] == str(content["model"]["num_paths"])
    else:
        import wandb

        assert wandb.run is not None
        assert wandb.run.summary["train/loss"] == losses[-1]
        wandb.finish()
        assert list((tmp_path / "logs").glob("wandb/offline-run-*/*.wandb"))
