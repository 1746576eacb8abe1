"""What a run shows of itself, logs and keeps, when it stops, what steps cost, and the rates of parameters."""

import csv
import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
import wandb
import yaml
from torch import Tensor, nn

from parallel_decoupling import cli
from parallel_decoupling.batch import PADDING_ID, EncoderInputs, PairBatch
from parallel_decoupling.model.run_checkpoint import read_checkpoint
from parallel_decoupling.objective.contrastive import info_nce
from parallel_decoupling.training.callbacks import CollapseAlarm, ProgressLines
from parallel_decoupling.training.compute import LENGTH_GROUPS, Progress
from parallel_decoupling.training.optimization import OptimizerConfig, learning_rate_schedule, main_optimizer
from parallel_decoupling.training.terms import GatheredPairs
from tests.support.fit import make_trainer, small_config, small_data, small_embedder

CONFIG_DIR = Path(__file__).parents[2] / "lightning_configs"


def alarms(
    alarm: CollapseAlarm, pairs: GatheredPairs, contrastive: Any, steps_done: int, symmetric: bool = False
) -> list[str]:
    module: Any = SimpleNamespace(
        progress=Progress(steps_done), hparams={"symmetric": symmetric}, log=lambda *_: None
    )
    outputs = {"pairs": pairs, "contrastive": contrastive}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alarm.on_train_batch_end(None, module, outputs, None, 0)  # type: ignore[arg-type]
    return [str(warning.message) for warning in caught]


def same_sides(query: Tensor) -> GatheredPairs:
    empty, ids = torch.zeros(len(query), 1, 1), torch.arange(len(query))
    return GatheredPairs(query, query, empty, empty, ids[:, None], ids)


def test_each_kind_of_collapse_is_named_once_and_the_start_is_kept_in_checkpoints() -> None:
    alarm, resumed = (CollapseAlarm(after_steps=20, every_n_steps=20) for _ in range(2))
    different = same_sides(torch.randn(64, 2, 32))
    assert not alarms(alarm, different, 4.15, 1), "too early to look at the loss"
    resumed.load_state_dict(alarm.state_dict())
    one_path = same_sides(torch.randn(64, 1, 32).expand(-1, 2, -1))
    line = same_sides(torch.randn(64, 2, 1) * torch.randn(32))
    for pairs, contrastive, step, words in (
        (one_path, 1.0, 20, "nearly one path"),
        (different, 4.15, 40, "constant embedding"),
        (line, 1.0, 60, "effective rank"),
    ):
        (message,) = alarms(alarm, pairs, contrastive, step)
        assert words in message
    assert not alarms(alarm, line, 4.15, 80)
    assert "effective rank" in alarms(resumed, line, 1.0, 20)[0]


def test_batches_that_teach_nothing_are_named() -> None:
    pairs = same_sides(torch.randn(4, 2, 8))
    negative, padding = torch.tensor([9]), torch.tensor([PADDING_ID])
    for ids, found in (
        (torch.zeros(4), 1),
        (torch.cat([torch.zeros(4), padding]), 1),
        (torch.cat([torch.zeros(4), negative]), 0),
        (torch.arange(4), 0),
    ):
        messages = alarms(CollapseAlarm(), replace(pairs, candidate_ids=ids), 0.0, 7)
        assert len(messages) == found
        assert all("every query of a batch has one candidate" in each for each in messages)


LABELS = torch.arange(64) % 8
NEGATIVES = torch.arange(64, 128)
PADDED = NEGATIVES.masked_fill(NEGATIVES % 2 == 0, PADDING_ID)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "ids",
    [torch.arange(64), LABELS, torch.cat([torch.arange(64), NEGATIVES]), torch.cat([LABELS, PADDED])],
    ids=["all different", "8 labels", "hard negatives", "labels and padding"],
)
def test_a_constant_embedding_raises_the_alarm_and_random_ones_do_not(ids: Tensor, symmetric: bool) -> None:
    def messages(query: Tensor, candidate: Tensor) -> list[str]:
        empty = torch.zeros(64, 1, 1)
        pairs = GatheredPairs(query, candidate, empty, empty, torch.arange(64)[:, None], ids)
        loss = info_nce(query, candidate, temperature=0.02, symmetric=symmetric, **pairs.labels).mean()
        return alarms(CollapseAlarm(after_steps=20, every_n_steps=20), pairs, loss, 20, symmetric)

    unit = torch.nn.functional.normalize(torch.randn(1, 1, 32), dim=-1)
    (message,) = messages(unit.expand(64, -1, -1), unit.expand(len(ids), -1, -1))
    assert "that of a constant embedding" in message
    sides = [torch.nn.functional.normalize(torch.randn(rows, 1, 32), dim=-1) for rows in (64, len(ids))]
    assert not messages(*sides)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2))


def rates(config: OptimizerConfig, total_steps: float, steps: int) -> list[float]:
    optimizer = main_optimizer({"adapters": [parameter()]}, config)
    schedule = learning_rate_schedule(optimizer, config, total_steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_prefixes_have_their_own_rate_and_only_adapters_decay() -> None:
    config = OptimizerConfig(learning_rate=0.1, prefix_learning_rate=0.7, weight_decay=0.3)
    names = ("adapters", "prefixes", "aggregation", "temperature")
    groups = main_optimizer({name: [parameter()] for name in names}, config).param_groups
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {"adapters": (0.1, 0.3), "prefixes": (0.7, 0.0), **dict.fromkeys(names[2:], (0.1, 0.0))}


def test_constant_schedule_needs_no_end_and_the_others_do() -> None:
    assert rates(OptimizerConfig(learning_rate=1.0, schedule="constant"), math.inf, 3) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        rates(OptimizerConfig(schedule="linear"), math.inf, 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        ("cosine", [0.25, 0.5, 0.75, *((1 + math.cos(math.pi * step / 5)) / 2 for step in range(6))]),
    ],
)
def test_schedules_rise_to_the_peak_and_end_at_zero(schedule: Any, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule=schedule)
    assert rates(config, 8, 9) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 1280),
        ({"prefix_layers": 5}, 800),  # half of the layers see an input once
        ({"prefix_layers": [0, 2]}, 1280),  # layers above a range run for every path
        ({"prefix_type": "shallow"}, 1280 + LENGTH_GROUPS * 4 * 5),  # prompts run once in every forward pass
        ({"prefix_type": "shallow", "chunk_size": 5}, 1280 + 7 * 4 * 5),
    ],
)
def test_token_passes(changed: dict[str, Any], expected: float) -> None:
    """32 rows of 10 tokens through four paths."""
    settings = {"num_paths": 4, "prefix_length": 5, "prefix_layers": 0, "prefix_type": "deep"}
    settings = {**settings, "chunk_size": None, **changed}
    inputs = EncoderInputs({"attention_mask": torch.ones(32, 10, dtype=torch.long)}, ({},) * 32)
    progress = Progress()
    progress.count(PairBatch(inputs, torch.zeros(16), ("a",) * 16), settings, 10)
    assert progress.token_passes == expected


@pytest.mark.parametrize("bar", [True, False])
def test_progress_is_written_in_lines_where_no_bar_can_be_drawn(
    bar: bool,
    tiny_backbone_dir: str,
    tiny_mmeb_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ProgressLines, "SECONDS", 0.0)
    trainer = make_trainer(tmp_path, max_steps=3, enable_progress_bar=bar)
    trainer.callbacks.append(ProgressLines())
    with caplog.at_level("INFO"):
        data = small_data(tiny_mmeb_dir, eval_tasks=["colours_i2t"])
        trainer.fit(module := small_embedder(tiny_backbone_dir), data)
        trainer.test(module, data, verbose=False)
        trainer.predict(module, data, return_predictions=False)
    lines = [record.message for record in caplog.records if record.message.startswith(("step ", "batch "))]
    sides = [len(loader) for loader in data.predict_dataloader()]
    expected = [f"step {step} of 3" for step in (1, 2, 3)]
    expected += [f"batch {number + 1} of {sum(sides)}" for number in range(sum(sides))] * 2
    assert len(sides) == 2
    assert [line.partition(",")[0] for line in lines] == expected * bar
    assert all(line.endswith("0:00:00 left") for line in lines[2 :: sum(sides)])


def test_the_best_checkpoint_is_kept_the_run_stops_and_loggers_by_class_get_every_value(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rates at which no score changes, the first validation stays the best one."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    kinds: dict[str, dict[str, Any]] = {
        "CSVLogger": {"save_dir": str(tmp_path), "version": "csv"},
        "MLFlowLogger": {"tracking_uri": f"file:{tmp_path / 'logs'}"},
        "WandbLogger": {"save_dir": str(tmp_path), "offline": True},
    }
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": kinds[name]} for name in kinds
    ]
    settings: dict[str, Any] = {"max_steps": 20, "log_every_n_steps": 1, "logger": loggers}
    content = small_config(tiny_backbone_dir, tiny_mmeb_dir, **settings)
    content["data"]["validation_tasks"] = ["colours_i2t"]
    content["model"]["optimizer"] = {"learning_rate": 1e-12, "prefix_learning_rate": 1e-12}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ["--config", str(CONFIG_DIR / "callbacks" / "best.yaml"), "--trainer.val_check_interval", "1"]
    options += ["--trainer.default_root_dir", str(tmp_path / "run")]
    cli.main(["fit", "--config", str(tmp_path / "config.yaml"), *options])
    files = {name: next(tmp_path.rglob(f"{name}.ckpt")) for name in ("best", "last")}
    steps = {name: read_checkpoint(file)["progress"]["steps_done"] for name, file in files.items()}
    assert steps == {"best": 1, "last": 6}
    with next(tmp_path.rglob("csv/metrics.csv")).open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(losses) == 6
    client = mlflow.MlflowClient(f"file:{tmp_path / 'logs'}")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [each.value for each in client.get_metric_history(run.info.run_id, "train/loss")] == losses
    assert (wandb.run.offline, wandb.run.summary["train/loss"]) == (True, losses[-1])
    wandb.teardown()
