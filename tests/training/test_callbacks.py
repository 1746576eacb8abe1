"""What a run shows of itself."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from parallel_decoupling.batch import PADDING_ID
from parallel_decoupling.objective.contrastive import info_nce
from parallel_decoupling.training.callbacks import CollapseAlarm
from parallel_decoupling.training.compute import Progress
from parallel_decoupling.training.terms import GatheredPairs
from tests.support.fit import make_trainer, small_data, small_embedder


def alarms(
    alarm: CollapseAlarm, pairs: GatheredPairs, contrastive: Any, steps_done: int, symmetric: bool = False
) -> list[str]:
    module: Any = SimpleNamespace(progress=Progress(steps_done), symmetric=symmetric, log=lambda *_: None)
    outputs = {"pairs": pairs, "contrastive": contrastive}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alarm.on_train_batch_end(None, module, outputs, None, 0)  # type: ignore[arg-type]
    return [str(warning.message) for warning in caught]


def same_sides(query: Tensor) -> GatheredPairs:
    empty, ids = torch.zeros(len(query), 1, 1), torch.arange(len(query))
    return GatheredPairs(query, query, empty, empty, ids, ids)


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
        labels = {"positive": torch.arange(64), "candidate_ids": ids}
        loss = info_nce(query, candidate, temperature=0.02, symmetric=symmetric, **labels).mean()
        empty = torch.zeros(64, 1, 1)
        pairs = GatheredPairs(query, candidate, empty, empty, *labels.values())
        return alarms(CollapseAlarm(after_steps=20, every_n_steps=20), pairs, loss, 20, symmetric)

    unit = torch.nn.functional.normalize(torch.randn(1, 1, 32), dim=-1)
    (message,) = messages(unit.expand(64, -1, -1), unit.expand(len(ids), -1, -1))
    assert "that of a constant embedding" in message
    sides = [torch.nn.functional.normalize(torch.randn(rows, 1, 32), dim=-1) for rows in (64, len(ids))]
    assert not messages(*sides)


def test_a_run_logs_its_terms_and_its_speed(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = make_trainer(tmp_path, max_steps=4, logger=logger)
    trainer.fit(
        small_embedder(tiny_backbone_dir), small_data(tiny_mmeb_dir, validation_tasks=["colours_i2t"])
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "train/loss",
        "train/contrastive_path_1",
        "train/mi_pair_0_1",
        "train/estimator_nll_held_out",
        "train/hit_at_1_aggregate",
        "train/path_cosine",
        "train/effective_rank",
        "train/gradient_norm",
        "lr/estimator",
        "compute/token_passes",
        "throughput/samples_per_second",
        "throughput/tokens_per_second",
        "mix/colours_i2t",
    }
    printed = capsys.readouterr().out
    assert "What trains" in printed
