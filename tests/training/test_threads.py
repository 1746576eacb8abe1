"""Threads that encode while a training runs, or while others encode."""

import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

import torch
from lightning.pytorch import Callback

from tests.support.embedders import mixed_inputs
from tests.support.fit import Recorder, make_trainer, small_data, small_embedder

DROPOUT: dict[str, Any] = {"adapter": {"dropout": 0.2, "per_path": True}}


def test_a_thread_that_encodes_changes_nothing_of_a_training(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    values, finite = [], []
    for disturbed in (False, True):
        module, recorder, done = small_embedder(tiny_backbone_dir, **DROPOUT), Recorder(), Event()

        def disturb(module: Any = module, done: Event = done) -> int:
            calls = 0
            while not done.is_set():
                finite.append(bool(module.encode(mixed_inputs(), paths=calls % 2).isfinite().all()))
                calls += 1
            return calls

        with ThreadPoolExecutor(1) as threads:
            calls = threads.submit(disturb) if disturbed else None
            options = {"max_steps": 6, "val_check_interval": 2}
            data = small_data(tiny_mmeb_dir, validation_tasks=["colours_i2t"])
            make_trainer(tmp_path / str(disturbed), recorder, **options).fit(module, data)
            done.set()
            assert calls is None or calls.result() > 3
        values.append(recorder.values)
        assert all(each.training for each in module.modules())
    assert values[0] == values[1]
    assert all(finite)


class EncodesInTheStep(Callback):
    """Encodes while the training step has the model for itself."""

    def __init__(self) -> None:
        self.embeddings: list[torch.Tensor] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.embeddings.append(pl_module.encode(["a red circle"]))
        assert pl_module.encoder.training


def test_a_hook_of_the_training_step_encodes_and_changes_nothing(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    values = []
    for callbacks in ([], [EncodesInTheStep()]):
        module, recorder = small_embedder(tiny_backbone_dir, **DROPOUT), Recorder()
        before = module.encode(["a red circle"])
        trainer = make_trainer(tmp_path / str(len(callbacks)), recorder, *callbacks, max_steps=2)
        trainer.fit(module, small_data(tiny_mmeb_dir))
        values.append(recorder.values)
        for callback in callbacks:
            assert torch.equal(callback.embeddings[0], before)
    assert values[0] == values[1]


def test_calls_of_all_kinds_side_by_side_are_those_one_after_another(tiny_backbone_dir: str) -> None:
    module = small_embedder(tiny_backbone_dir, **DROPOUT)
    with torch.no_grad():
        for parameter in module.encoder.parameter_groups()["adapters"]:
            parameter.add_(0.2 * torch.randn_like(parameter))  # half of them start at zero
    kinds = [
        {"paths": paths, "batch_size": size, "instruction": instruction}
        for paths in (0, 1, "aggregate", "all", [1, 0])
        for size, instruction in ((1, None), (3, "find"))
    ]
    alone = [module.encode(mixed_inputs(), **kind) for kind in kinds]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda n: module.encode(mixed_inputs(), **kinds[n % 10]), range(50)))
    for number, embeddings in enumerate(together):
        assert torch.equal(embeddings, alone[number % 10])
    assert all(each.training for each in module.modules())


def embed_pickled(content: bytes) -> torch.Tensor:
    module = pickle.loads(content)
    return module.encode(["a red circle"], paths=1)


def test_a_pickled_model_encodes_in_a_new_process(tiny_backbone_dir: str) -> None:
    module = small_embedder(tiny_backbone_dir)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        there = processes.submit(embed_pickled, pickle.dumps(module)).result()
    torch.testing.assert_close(there, module.encode(["a red circle"], paths=1), rtol=1e-6, atol=1e-6)
