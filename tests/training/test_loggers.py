"""A logger of another package by class path, offline; the shipped config of best checkpoint and early end."""

import csv
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel_decoupling import cli
from parallel_decoupling.model.run_checkpoint import read_checkpoint
from tests.support.fit import small_config

BEST = Path(__file__).parents[2] / "lightning_configs" / "callbacks" / "best.yaml"


def test_the_best_checkpoint_is_kept_the_run_stops_and_mlflow_gets_every_value(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rates at which no score changes, the first validation stays the best one."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    kinds = {"CSVLogger": {"save_dir": str(tmp_path), "version": "csv"}}
    if has_mlflow := find_spec("mlflow") is not None:
        kinds["MLFlowLogger"] = {"tracking_uri": f"file:{tmp_path / 'logs'}"}
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": kinds[name]} for name in kinds
    ]
    settings: dict[str, Any] = {"max_steps": 20, "log_every_n_steps": 1, "logger": loggers}
    content = small_config(tiny_backbone_dir, tiny_mmeb_dir, **settings)
    content["data"]["validation_tasks"] = ["colours_i2t"]
    content["model"]["optimizer"] = {"learning_rate": 1e-12, "prefix_learning_rate": 1e-12}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ["--config", str(BEST), "--trainer.val_check_interval", "1"]
    options += ["--trainer.default_root_dir", str(tmp_path / "run")]
    cli.main(["fit", "--config", str(tmp_path / "config.yaml"), *options])
    files = {name: next(tmp_path.rglob(f"{name}.ckpt")) for name in ("best", "last")}
    steps = {name: read_checkpoint(file)["progress"]["steps_done"] for name, file in files.items()}
    assert steps == {"best": 1, "last": 6}
    with next(tmp_path.rglob("csv/metrics.csv")).open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(losses) == 6
    if has_mlflow:
        client = import_module("mlflow").MlflowClient(f"file:{tmp_path / 'logs'}")
        (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
        assert [each.value for each in client.get_metric_history(run.info.run_id, "train/loss")] == losses
