"""The LightningDataModule that wires ``tasks``, ``mixture`` and ``collate`` into loaders.

Wiring only: files are read in ``tasks``, batches are composed in ``mixture``, tensors are made in
``collate``. The loaders are no ``torch.utils.data.DataLoader`` to Lightning, so it neither replaces
their sampler nor splits their rows: every process takes its own share here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from parallel_decoupling import distributed
from parallel_decoupling.batch import PairBatch, RawPair
from parallel_decoupling.data.collate import Collator, EvalBatch
from parallel_decoupling.data.mixture import MixtureSampler
from parallel_decoupling.data.tasks import (
    EvalTask,
    TrainSubset,
    check_names,
    find_eval_tasks,
    find_train_subsets,
    read_eval_task,
)

EMBEDDED = "mini-mmeb"
"""Value of ``data_dir`` that stands for the benchmark this package generates."""

Batch = TypeVar("Batch")


class Batches(Generic[Batch]):
    """A loader's batches, started anew by each iteration at the step that ``position`` says.

    Iterating is lazy: workers start with the first batch, so an iterator that is made and dropped
    (Lightning does so when it resumes at the end of an epoch) takes nothing from the sampler.

    Args:
        loader: the data loader.
        sampler: its sampler, if the start can move.
        position: number of batches consumed so far; None lets the sampler count its own epochs.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: MixtureSampler | None = None,
        position: Callable[[], int] | None = None,
    ) -> None:
        self.loader = loader
        self.batch_sampler = sampler
        self.position = position

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.batch_sampler is not None and self.position is not None:
            self.batch_sampler.start_step = self.position()
        yield from self.loader

    def state_dict(self) -> dict[str, int]:
        """Nothing to save: the trainer's progress is the position. Tells Lightning that this resumes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""


class _Rows(Dataset[RawPair]):
    """Rows of all subsets by ``(subset, row)``."""

    def __init__(self, subsets: Sequence[TrainSubset]) -> None:
        self.subsets = subsets

    def __getitem__(self, place: tuple[int, int]) -> RawPair:
        subset, row = place
        return self.subsets[subset][row]


class EvalBatches(Dataset[EvalBatch]):
    """Batches of one task: unique queries, then unique candidates; a batch has one side.

    Process r of W has batches r, r + W, ...; where they do not divide evenly the first ones come
    again at the end, so every process has the same number and rows may be encoded twice.
    """

    def __init__(
        self, task: EvalTask, collator: Collator, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.sides = {"query": task.queries, "candidate": task.candidates}
        self.collator = collator
        places = [
            (side, range(start, min(start + batch_size, len(rows))))
            for side, rows in self.sides.items()
            for start in range(0, len(rows), batch_size)
        ]
        count = -(-len(places) // world_size)
        self.places = [places[(rank + number * world_size) % len(places)] for number in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> EvalBatch:
        side, indices = self.places[number]
        inputs = self.collator.encode_inputs([self.sides[side][index] for index in indices])
        which: Literal["query", "candidate"] = "query" if side == "query" else "candidate"
        return EvalBatch(inputs, which, torch.tensor(indices))


class MMEBDataModule(LightningDataModule):
    """MMEB, the embedded benchmark in the same layout, or your own data in that layout.

    A training batch is a pure function of (seed, step): the same for any number of processes and
    workers, and a resumed run goes on with exactly the next one. Set the trainer's number of steps
    as usual; an epoch is one pass over the mixture.

    Args:
        data_dir: Folder that holds MMEB-train/ and MMEB-eval/, or "mini-mmeb", the benchmark that the
            package generates into its cache.
        train_subsets: Training subsets by folder name; null is all of MMEB-train.
        eval_tasks: Tasks of `test` by folder name; null is all of MMEB-eval that are in the task table
            (MMEB's 36, and those of data_dir/tasks.json).
        validation_tasks: Tasks that are scored during `fit` and `validate`; none by default.
        batch_size: GLOBAL training batch, divided among all processes.
        eval_batch_size: Rows per evaluation batch and process.
        num_workers: Loader worker processes per process; has no influence on the batches.
        split: Training split, the file name prefix: "original" or "diverse_instruction" in MMEB.
        weights: Share of the mixture per subset (not per row), by name; subsets not named weigh 1.
            Null draws every row once per epoch.
        row_limit: Cap of rows per training subset, by seeded sampling. MMEB's recipes cap at 50000 or
            100000 (the first rows).
        query_limit: Cap of rows per evaluation task, evenly spaced; for quick looks only.
        policy: "mixed" batches of all subsets, "homogeneous" of one subset each, or "sub_batch" of
            blocks of sub_batch_size rows of one subset.
        sub_batch_size: Block size of the policy "sub_batch"; divides batch_size.
        hard_negatives: Candidates per row from the neg_text and neg_image_path columns.
        seed: Seed of mixture and row_limit, independent of the trainer's seed.
    """

    def __init__(
        self,
        data_dir: str = EMBEDDED,
        train_subsets: list[str] | None = None,
        eval_tasks: list[str] | None = None,
        validation_tasks: Sequence[str] = (),
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        split: str = "original",
        weights: dict[str, float] | None = None,
        row_limit: int | None = None,
        query_limit: int | None = None,
        policy: Literal["mixed", "homogeneous", "sub_batch"] = "mixed",
        sub_batch_size: int | None = None,
        hard_negatives: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        numbers = {"eval_batch_size": eval_batch_size, "row_limit": row_limit, "query_limit": query_limit}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if hard_negatives < 0:
            raise ValueError(f"hard_negatives must be at least 0, got {hard_negatives}.")
        self.data_dir = data_dir
        self.train_subsets = train_subsets
        self.eval_tasks = eval_tasks
        self.validation_tasks = list(validation_tasks)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.split = split
        self.weights = weights
        self.row_limit = row_limit
        self.query_limit = query_limit
        self.policy: Literal["mixed", "homogeneous", "sub_batch"] = policy
        self.sub_batch_size = sub_batch_size
        self.hard_negatives = hard_negatives
        self.seed = seed
        self.train_data: list[TrainSubset] = []
        self.eval_tasks_data: list[EvalTask] = []
        """The tasks of the current stage, in the order of the evaluation loaders."""
        self._collator: Collator | None = None

    def connect(self, processor: Any, image_token: str) -> None:
        """Set the processor by hand; without it the trainer's module gives its encoder's."""
        self._collator = Collator(processor, image_token=image_token)

    def prepare_data(self) -> None:
        """Generate the embedded benchmark if it is asked for and not there yet."""
        self._folder()

    def setup(self, stage: str) -> None:
        """Open the files that ``stage`` needs: fit, validate or test.

        Raises:
            ValueError: unknown subset or task, or files that do not have MMEB's layout.
        """
        folder = self._folder()
        if stage == "fit":
            self.train_data = self._open_subsets(folder)
        found = find_eval_tasks(folder)
        names = self.validation_tasks
        if stage == "test":
            names = found if self.eval_tasks is None else self.eval_tasks
            if not names:
                raise ValueError(f"No evaluation task under {folder / 'MMEB-eval'}. Check data_dir.")
        check_names(names, found, "evaluation task")
        self.eval_tasks_data = [read_eval_task(folder, name, self.query_limit) for name in names]

    def train_dataloader(self) -> Batches[PairBatch]:
        """Batches of this process from the next step on: the trainer's count of processed ones."""
        weights = None
        if self.weights is not None:
            weights = [self.weights.get(subset.subset, 1.0) for subset in self.train_data]
        sampler = MixtureSampler(
            [len(subset) for subset in self.train_data],
            batch_size=self.batch_size,
            weights=weights,
            policy=self.policy,
            sub_batch_size=self.sub_batch_size,
            seed=self.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        loader = DataLoader(
            _Rows(self.train_data),
            batch_sampler=sampler,
            collate_fn=self.collator,
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )
        return Batches(loader, sampler, None if self.trainer is None else self._consumed)

    def val_dataloader(self) -> list[Batches[EvalBatch]]:
        """One loader per validation task."""
        return [self._eval_loader(task) for task in self.eval_tasks_data]

    def test_dataloader(self) -> list[Batches[EvalBatch]]:
        """One loader per evaluation task."""
        return [self._eval_loader(task) for task in self.eval_tasks_data]

    @property
    def collator(self) -> Collator:
        """The connected collator, or one with the processor of the module's encoder."""
        if self._collator is None:
            if self.trainer is None:
                raise ValueError("No processor: call connect(processor, image_token) or use a Trainer.")
            encoder: Any = self.trainer.lightning_module.encoder
            self.connect(encoder.processor, encoder.image_token)
        assert self._collator is not None
        return self._collator

    def _consumed(self) -> int:
        """Training batches processed so far in all epochs; part of every checkpoint.

        ``overfit_batches`` repeats the first ones.
        """
        trainer: Any = self.trainer
        return (
            0 if trainer.overfit_batches else int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        )

    def _folder(self) -> Path:
        if self.data_dir == EMBEDDED:
            from parallel_decoupling.data.world.benchmark import ensure_benchmark

            return ensure_benchmark()
        folder = Path(self.data_dir)
        if not folder.is_dir():
            raise ValueError(
                f"data_dir {self.data_dir!r} is no folder. Give the folder that holds MMEB-train/ and "
                f"MMEB-eval/, or {EMBEDDED!r} for the embedded benchmark."
            )
        return folder

    def _open_subsets(self, folder: Path) -> list[TrainSubset]:
        found = find_train_subsets(folder, self.split)
        names = found if self.train_subsets is None else self.train_subsets
        if not names:
            raise ValueError(
                f"No training subset {folder / 'MMEB-train'}/<subset>/{self.split}-*.parquet. "
                "Check data_dir and split."
            )
        check_names(names, found, "training subset")
        check_names(list(self.weights or {}), names, "subset in weights")
        options = {"hard_negatives": self.hard_negatives, "seed": self.seed}
        return [TrainSubset(folder, name, self.split, self.row_limit, **options) for name in names]

    def _eval_loader(self, task: EvalTask) -> Batches[EvalBatch]:
        batches = EvalBatches(
            task, self.collator, self.eval_batch_size, distributed.rank(), distributed.world_size()
        )
        loader = DataLoader(
            batches, batch_size=None, num_workers=self.num_workers, generator=torch.Generator()
        )
        return Batches(loader)
