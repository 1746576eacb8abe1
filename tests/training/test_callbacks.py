"""What a run shows of itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID
from parallel_decoupling.evaluation.run import PathPictures
from parallel_decoupling.objective.contrastive import info_nce
from parallel_decoupling.training.callbacks import CollapseAlarm
from parallel_decoupling.training.compute import Progress
from parallel_decoupling.training.terms import GatheredPairs
from tests.support.fit import make_trainer, small_data, small_embedder


def outputs(query: Tensor, contrastive: float) -> dict[str, Any]:
    empty = torch.zeros(len(query), 1, 1)
    ids = torch.arange(len(query))
    return {"pairs": GatheredPairs(query, query, empty, empty, ids, ids), "contrastive": contrastive}


def alarms(alarm: CollapseAlarm, query: Tensor, contrastive: float, steps_done: int) -> list[str]:
    module: Any = SimpleNamespace(progress=Progress(steps_done), symmetric=False, log=lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alarm.on_train_batch_end(None, module, outputs(query, contrastive), None, 0)  # type: ignore[arg-type]
    return [str(warning.message) for warning in caught]


def test_each_kind_of_collapse_is_named_once() -> None:
    alarm = CollapseAlarm(after_steps=20, every_n_steps=20)
    assert not alarms(alarm, torch.randn(64, 2, 32), 1.0, 1)
    one_path = torch.randn(64, 1, 32).expand(-1, 2, -1)
    assert ["nearly one path" in text for text in alarms(alarm, one_path, 1.0, 20)] == [True]
    assert ["constant embedding" in text for text in alarms(alarm, torch.randn(64, 2, 32), 4.15, 40)] == [
        True
    ]
    line = torch.randn(64, 2, 1) * torch.randn(32)
    assert ["effective rank" in text for text in alarms(alarm, line, 1.0, 60)] == [True]
    assert not alarms(alarm, line, 4.15, 80)


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
        labels = {"positive": torch.arange(64), "candidate_ids": ids}
        loss = info_nce(query, candidate, temperature=0.02, symmetric=symmetric, **labels).mean()
        empty = torch.zeros(64, 1, 1)
        pairs = GatheredPairs(query, candidate, empty, empty, *labels.values())
        module: Any = SimpleNamespace(progress=Progress(20), symmetric=symmetric, log=lambda *_: None)
        alarm = CollapseAlarm(after_steps=20, every_n_steps=20)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            alarm.on_train_batch_end(None, module, {"pairs": pairs, "contrastive": loss}, None, 0)  # type: ignore[arg-type]
        return [str(warning.message) for warning in caught]

    unit = torch.nn.functional.normalize(torch.randn(1, 1, 32), dim=-1)
    (message,) = messages(unit.expand(64, -1, -1), unit.expand(len(ids), -1, -1))
    assert "that of a constant embedding" in message
    sides = [torch.nn.functional.normalize(torch.randn(rows, 1, 32), dim=-1) for rows in (64, len(ids))]
    assert not messages(*sides)


def test_the_alarm_remembers_its_start_through_a_checkpoint() -> None:
    first, second = CollapseAlarm(), CollapseAlarm()
    alarms(first, torch.randn(64, 2, 32), 1.0, 1)
    second.load_state_dict(first.state_dict())
    line = torch.randn(64, 2, 1) * torch.randn(32)
    assert ["effective rank" in text for text in alarms(second, line, 1.0, 20)] == [True]


def test_a_run_logs_its_terms_its_speed_and_its_pictures(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = make_trainer(tmp_path, PathPictures(every_n_steps=2), max_steps=4, logger=logger)
    trainer.fit(
        small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir, validation_tasks=["colours_i2t"])
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "train/loss",
        "train/contrastive_path_0",
        "train/contrastive_path_1",
        "train/contrastive_aggregate",
        "train/mi",
        "train/mi_pair_0_1",
        "train/mi_weight",
        "train/estimator_nll",
        "train/estimator_nll_held_out",
        "train/hit_at_1_aggregate",
        "train/hit_at_1_path_1",
        "train/path_cosine",
        "train/effective_rank",
        "train/gradient_norm",
        "train/temperature",
        "lr/adapters",
        "lr/prefixes",
        "lr/estimator",
        "compute/token_passes",
        "throughput/samples_per_second",
        "throughput/tokens_per_second",
        "mix/colours_i2t",
        "mix/colours_t2i",
    }
    assert events.Tags()["images"] == ["paths/cosine"]
    assert len(events.Images("paths/cosine")) == 3
    printed = capsys.readouterr().out
    assert "What trains" in printed
