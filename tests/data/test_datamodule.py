"""The data module: same batches for any workers and processes, exact resume, clear errors."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from parallel_decoupling import distributed
from parallel_decoupling.batch import PADDING_ID, PairBatch
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.data.tables import default_cache_dir
from parallel_decoupling.evaluation.encode import RowBatch
from tests.support.fit import stand_in_model
from tests.support.mmeb import eval_row, train_row, write_eval, write_image, write_train

BATCH_SIZE = 8
STEPS = 5  # per epoch: 40 rows


class CharacterProcessor:
    """A stand-in for a processor that ignores images: token ids are the code points."""

    def __init__(self) -> None:
        self.tokenizer = self

    def __call__(self, text: list[str], **_: Any) -> dict[str, torch.Tensor]:
        rows = [torch.tensor([ord(character) for character in one]) for one in text]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def texts(inputs: Any) -> list[str]:
    return ["".join(chr(code) for code in row if code) for row in inputs.tokens["input_ids"].tolist()]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write_train(tmp_path, "A", [train_row(f"a{number}", f"A{number}") for number in range(25)])
    write_train(tmp_path, "B", [train_row(f"b{number}", f"B{number}") for number in range(15)])
    write_eval(tmp_path, "VOC2007", [eval_row(f"v{number}", ["cat", "dog", "owl"]) for number in range(5)])
    write_eval(tmp_path, "GQA", [eval_row(f"g{number % 3}", [f"y{number}", "no"]) for number in range(4)])
    return tmp_path


def module(data_dir: Path, stage: str | None = "fit", **options: Any) -> MMEBDataModule:
    data = MMEBDataModule(str(data_dir), batch_size=BATCH_SIZE, **options)
    data.connect(stand_in_model(CharacterProcessor()))
    if stage:
        data.setup(stage)
    return data


def queries(batches: Any) -> list[list[str]]:
    return [texts(batch.query) for batch in batches]


class Toy(LightningModule):
    """Records what each step saw; manual optimization that steps every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []
        self.epochs: list[int] = []
        self.tested: list[tuple[int, list[str]]] = []

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.seen.append(texts(batch.query))
        self.epochs.append(self.current_epoch)
        self.manual_backward((self.weight**2).sum())
        if batch_idx % 2:
            self.optimizers().step()

    def validation_step(self, batch: RowBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tested.append((dataloader_idx, texts(batch.inputs)))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(root: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    return Trainer(default_root_dir=root, num_sanity_val_steps=0, **{**defaults, **quiet, **options})


def fit(data: MMEBDataModule, root: Path, ckpt_path: Path | None = None, **options: Any) -> Toy:
    toy = Toy()
    runner = trainer(root, enable_checkpointing="callbacks" in options, **options)
    runner.fit(toy, datamodule=data, ckpt_path=ckpt_path)
    return toy


@pytest.fixture
def uninterrupted(data_dir: Path, tmp_path: Path) -> Toy:
    return fit(module(data_dir, None), tmp_path)


def test_fit_sees_every_row_once_per_epoch(uninterrupted: Toy) -> None:
    assert uninterrupted.epochs == [0] * STEPS + [1] * STEPS + [2] * STEPS
    for number in range(3):
        rows = sum(uninterrupted.seen[number * STEPS : (number + 1) * STEPS], [])
        assert len(set(rows)) == len(rows) == 40
    assert uninterrupted.seen[:STEPS] != uninterrupted.seen[STEPS : 2 * STEPS]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resumed_run_sees_the_remaining_batches(
    data_dir: Path,
    tmp_path: Path,
    uninterrupted: Toy,
    stop: int,
    num_workers: int,
    recwarn: pytest.WarningsRecorder,
) -> None:
    class StopAfter(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if len(trainer.lightning_module.seen) == stop:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                raise RuntimeError("stopped on purpose")

    first, data = Toy(), module(data_dir, None, num_workers=num_workers)
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        trainer(tmp_path, callbacks=[StopAfter()], enable_checkpointing=False).fit(first, datamodule=data)
    second = fit(module(data_dir, None, num_workers=num_workers), tmp_path, tmp_path / "stop.ckpt")
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]
    assert first.seen == uninterrupted.seen[:stop]
    assert second.seen == uninterrupted.seen[stop:]
    assert second.epochs == uninterrupted.epochs[stop:]


def test_a_run_continues_after_its_last_epoch(data_dir: Path, tmp_path: Path, uninterrupted: Toy) -> None:
    saving = ModelCheckpoint(tmp_path / "c", save_last=True)
    first = fit(module(data_dir, None), tmp_path, max_epochs=2, callbacks=[saving])
    second = fit(module(data_dir, None), tmp_path, tmp_path / "c" / "last.ckpt")
    assert first.seen + second.seen == uninterrupted.seen


def test_limited_batches_walk_through_the_data_or_repeat(
    data_dir: Path, tmp_path: Path, uninterrupted: Toy
) -> None:
    toy = fit(module(data_dir, None), tmp_path, limit_train_batches=2, max_epochs=2)
    assert toy.seen == uninterrupted.seen[:4]
    toy = fit(module(data_dir, None), tmp_path, overfit_batches=2)
    assert toy.seen == toy.seen[:2] * 3


def test_loaders_leave_the_global_random_state_alone(data_dir: Path) -> None:
    seed_everything(3)
    before = torch.get_rng_state()
    list(module(data_dir).train_dataloader())
    data = module(data_dir, "test")
    [list(loader) for loader in data.test_dataloader()]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_outside_a_trainer_continues_with_the_next_epoch(data_dir: Path, uninterrupted: Toy) -> None:
    loader = module(data_dir).train_dataloader()
    iter(loader)  # made and dropped: takes nothing
    assert len(loader) == STEPS
    assert queries(loader) + queries(loader) == uninterrupted.seen[: 2 * STEPS]


def test_positives_and_negatives_come_with_their_query(data_dir: Path) -> None:
    rows = [train_row(f"b{number}", f"B{number}", neg_text=f"not B{number}") for number in range(15)]
    write_train(data_dir, "B", rows)
    for batch in module(data_dir, hard_negatives=1).train_dataloader():
        positives = [text.upper() for text in texts(batch.query)]
        negatives = [f"not {text}" if text[0] == "B" else "-" for text in positives]
        assert texts(batch.candidate) == positives + negatives
        assert (batch.candidate_ids == PADDING_ID).tolist() == [
            text == "-" for text in texts(batch.candidate)
        ]
        assert [subset.lower() for subset in batch.subsets] == [text[0] for text in texts(batch.query)]


def test_no_more_is_padded_than_the_fullest_row_has(data_dir: Path) -> None:
    rows = [train_row("q", ["p", "o"], pos_image_path=["", ""], neg_text="n") for _ in range(9)]
    write_train(data_dir, "B", rows)
    data = module(data_dir, positives=10**12, hard_negatives=10**12)
    assert [(subset.positives, subset.hard_negatives) for subset in data.train_data] == [(2, 1)] * 2
    assert {len(batch.candidate_ids) for batch in data.train_dataloader()} == {3 * data.batch_size}


def test_options_are_passed_on(data_dir: Path) -> None:
    data = module(data_dir, train_subsets=["B"], row_limit=8, row_limit_by="first", image_size="mid")
    (subset,) = data.train_data
    assert [subset[row].row for row in range(len(subset))] == list(range(8))
    assert data.collator.images == ImagePolicy("mid")
    assert module(data_dir, None, max_pixels=99).collator.images == ImagePolicy(max_pixels=99)
    rows = sum(queries(module(data_dir, weights={"B": 4.0}).train_dataloader()), [])
    assert sum(row.startswith("b") for row in rows) == 32
    batches = queries(module(data_dir, policy="homogeneous").train_dataloader())
    assert all(len({row[0] for row in batch}) == 1 for batch in batches)


def test_clusters_of_neighbours_are_of_the_rows_that_row_limit_keeps(data_dir: Path) -> None:
    rows = [train_row(f"c{number}", neighbour_order=7 * number % 24) for number in range(24)]
    write_train(data_dir, "C", rows, "mined")
    near = {"policy": "neighbours", "sub_batch_size": 4, "row_limit": 16}
    batches = queries(module(data_dir, split="mined", **near).train_dataloader())
    places = [7 * int(query[1:]) % 24 for query in sum(batches, [])]
    kept = [sorted(places)[start : start + 4] for start in range(0, 16, 4)]
    assert sorted(places[start : start + 4] for start in range(0, 16, 4)) == kept
    with pytest.raises(ValueError, match=r"'A': no column neighbour_order .* Run `parallel-decoupling mine`"):
        module(data_dir, **near).train_dataloader()


def test_eval_loaders_give_unique_queries_then_unique_candidates(data_dir: Path, tmp_path: Path) -> None:
    data, toy = module(data_dir, None, eval_batch_size=2), Toy()
    trainer(tmp_path).test(toy, datamodule=data, verbose=False)
    assert [task.task.name for task in data.eval_tasks_data] == ["VOC2007", "GQA"]
    assert [rows.name for rows in data.rows] == [
        f"{task}/{side}" for task in ("VOC2007", "GQA") for side in ("query", "candidate")
    ]
    expected = {0: "v0 v1|v2 v3|v4", 1: "cat dog|owl", 2: "g0 g1|g2", 3: "y0 no|y1 y2|y3"}
    batches = [(loader, batch.split()) for loader, rows in expected.items() for batch in rows.split("|")]
    assert toy.tested == batches


def test_only_validate_needs_validation_tasks(data_dir: Path, tmp_path: Path) -> None:
    data = module(data_dir, None)
    assert fit(data, tmp_path, max_epochs=1).tested == []
    with pytest.raises(ValueError, match=r"Nothing to evaluate.*--data\.validation_tasks"):
        trainer(tmp_path).validate(Toy(), datamodule=data, verbose=False)
    toy = fit(module(data_dir, None, validation_tasks=["GQA"]), tmp_path, max_epochs=1)
    assert [loader for loader, _ in toy.tested] == [0, 1]
    trainer(tmp_path).validate(
        toy, datamodule=module(data_dir, None, validation_tasks=["GQA"]), verbose=False
    )
    assert [loader for loader, _ in toy.tested] == [0, 1] * 2


def test_tasks_that_nobody_listed_are_scored_last_and_say_how_to_list_them(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("Mine", "Another", "CIFAR-100"):
        write_eval(data_dir, name, [eval_row("q", ["a", "b"])])
    data = module(data_dir, "test")
    assert [task.task.name for task in data.eval_tasks_data] == ["VOC2007", "GQA", "Another", "Mine"]
    about = '{"meta_task": "retrieval", "in_distribution": false}'
    rows = f'{{"Another": {about}, "Mine": {about}}}'
    assert f"add to {data_dir / 'tasks.json'}, with the right meta-task: {rows}" in caplog.text
    (data_dir / "tasks.json").write_text(f'\ufeff{{"Mine": {about}}}')
    caplog.clear()
    found = [(task.task.name, task.task.meta_task) for task in module(data_dir, "test").eval_tasks_data]
    assert found[2:] == [("Mine", "retrieval"), ("Another", "custom")]
    assert "Mine" not in caplog.text
    named = module(data_dir, "test", eval_tasks=["CIFAR-100"])
    assert [task.task.meta_task for task in named.eval_tasks_data] == ["custom"]
    assert module(data_dir, "validate", validation_tasks=["CIFAR-100"]).eval_tasks_data


def test_every_option_can_be_read_back_for_the_checkpoint(data_dir: Path) -> None:
    options: dict[str, Any] = {"max_pixels": 99, "missing_images": "skip", "row_limit": 7, "download": True}
    data = MMEBDataModule(str(data_dir), **options)
    assert {name: data.settings[name] for name in options} == options
    names = inspect.signature(MMEBDataModule).parameters
    assert list(data.settings) == [name for name in names if not name.startswith("predict_")]


def test_preparing_makes_the_mapped_tables_of_the_stage(data_dir: Path, tmp_path: Path) -> None:
    tables = default_cache_dir() / "tables"
    data = module(data_dir, None, train_subsets=["A"], eval_tasks=["GQA"])
    data.prepare_data()
    assert len(list(tables.glob("*.arrow"))) == 1, "without a trainer: evaluation tasks"
    trainer(tmp_path, enable_checkpointing=False, max_epochs=1).fit(Toy(), datamodule=data)
    assert len(list(tables.glob("*.arrow"))) == 2


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("fit", {"train_subsets": ["a"]}, "Unknown training subset 'a'.*Found: A, B"),
        ("fit", {"weights": {"C": 1.0}}, "Unknown subset in weights 'C'.*Found: A, B"),
        ("fit", {"split": "diverse_instruction"}, "No training subset .*diverse_instruction"),
        ("fit", {"split": "*"}, r"The split '\*' becomes a file"),
        ("fit", {"train_subsets": []}, "No training subset .*train_subsets"),
        (
            "fit",
            {"eval_tasks": ["GQA", "VOC2077"]},
            "Unknown evaluation task 'VOC2077'. Did you mean 'VOC2007'",
        ),
        ("fit", {"validation_tasks": ["VOC2077"]}, "Unknown evaluation task 'VOC2077'"),
        ("test", {"eval_tasks": []}, "data.eval_tasks is empty"),
        ("test", {"eval_tasks": ["DocVQA"]}, "Unknown evaluation task 'DocVQA'.*Found: GQA, VOC2007"),
        ("test", {"eval_tasks": ["Mine"]}, "a folder with .*<task>/test-.*or an entry of .*tasks.json"),
        ("test", {"data_dir": "no/such"}, "data_dir 'no/such' is not a folder"),
    ],
)
def test_unknown_names_list_what_exists(
    data_dir: Path, stage: str, options: dict[str, Any], message: str
) -> None:
    MMEBDataModule(str(data_dir), eval_tasks=["CIRR"], download=True).setup("fit")  # a download will fetch it
    with pytest.raises(ValueError, match=message):
        MMEBDataModule(**{"data_dir": str(data_dir), **options}).setup(stage)


def test_a_data_module_without_model_says_so(data_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"call data\.connect\(model\)"):
        MMEBDataModule(str(data_dir)).test_dataloader()


ROWS = 24
GONE = (3, 4, 11, 23)
BROKEN = 17
BAD = (*GONE, BROKEN)


@pytest.fixture
def gaps_dir(tmp_path: Path) -> Path:
    """Queries q0, q1, ... with an image each, some of which are not there."""
    images = tmp_path / "MMEB-train" / "images"
    for row in set(range(ROWS)) - set(GONE):
        write_image(images / f"{row}.png")
    (images / f"{BROKEN}.png").write_bytes(b"broken")
    rows = [train_row(f"q{row}\n", f"p{row}", qry_image_path=f"images/{row}.png") for row in range(ROWS)]
    write_train(tmp_path, "S", rows)
    return tmp_path


def expected_queries(gaps_dir: Path) -> list[list[str]]:
    """By hand: the sampler's rows, where a bad one is replaced by the next good one."""
    sampler = module(gaps_dir).train_dataloader().batch_sampler
    assert sampler is not None
    after = {row: [(row + step) % ROWS for step in range(ROWS)] for row in range(ROWS)}
    good = {row: next(other for other in after[row] if other not in BAD) for row in after}
    steps = range(ROWS // 8)
    return [[f"<image>\nq{good[row]}\n" for _, row in sampler.batch(step)] for step in steps]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_skipping_is_the_same_for_all_processes_and_workers(
    gaps_dir: Path, world_size: int, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        data = module(gaps_dir, missing_images="skip", num_workers=num_workers)
        parts.append(queries(data.train_dataloader()))
    assert [sum(step, []) for step in zip(*parts, strict=True)] == expected_queries(gaps_dir)


def test_skipped_rows_are_counted_in_the_log(gaps_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(gaps_dir, missing_images="skip")
    with caplog.at_level(logging.WARNING):
        list(data.train_dataloader())
    assert data.train_data[0].num_skipped == 6, "row 3 passes over 3 and 4"
    assert "training subset 'S', rows skipped so far: 1. The last: row" in caplog.messages[0]
    assert [re.findall(r"so far: (\d)", message) for message in caplog.messages] == [["1"], ["2"], ["4"]]
