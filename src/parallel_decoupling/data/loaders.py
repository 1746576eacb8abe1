"""Data sets and loaders behind the data module: rows of the mixture, batches of an evaluation task.

Here: which process and which worker reads what. Elsewhere on purpose: options (``datamodule``), reading
(``readers``), tensors (``collate``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from parallel_decoupling.batch import RawInput, RawPair
from parallel_decoupling.data.collate import Collator, EvalBatch
from parallel_decoupling.data.images import ImageError, check_images
from parallel_decoupling.data.mixture import MixtureSampler
from parallel_decoupling.data.readers import TrainSubset
from parallel_decoupling.data.tasks import EvalTask

Batch = TypeVar("Batch")
MissingImages = Literal["error", "skip"]

log = logging.getLogger(__name__)


class Batches(Generic[Batch]):
    """A loader's batches, started anew by each iteration at the step that ``position`` says.

    Iterating is lazy: workers start with the first batch, so an iterator that is made and dropped
    (Lightning does so when it resumes at the end of an epoch) takes nothing from the sampler.

    Args:
        loader: the data loader.
        sampler: its sampler, if the start can move.
        position: number of batches consumed so far; None lets the sampler count its own epochs.

    Attributes:
        num_skipped: training rows of this process passed over so far, because of their images.
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
        self.num_skipped = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.batch_sampler is not None and self.position is not None:
            self.batch_sampler.start_step = self.position()
        for batch in self.loader:
            self._count(getattr(batch, "skipped", ()))
            yield batch

    def _count(self, reasons: Sequence[str]) -> None:
        """Log the number of skipped rows each time that it doubles."""
        if not reasons:
            return
        before, self.num_skipped = self.num_skipped, self.num_skipped + len(reasons)
        if before.bit_length() < self.num_skipped.bit_length():
            log.warning("Training rows skipped so far: %d. The last: %s", self.num_skipped, reasons[-1])

    def state_dict(self) -> dict[str, int]:
        """Nothing to save: the trainer's progress is the position. Tells Lightning that this resumes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""


class TrainRows(Dataset[RawPair]):
    """Rows of all subsets by ``(subset, row)``.

    Args:
        subsets: in the order of the sampler.
        missing_images: ``skip`` puts the next readable row of the subset in the place of one whose images
            are missing or broken. It decodes every image once more to find out.
    """

    def __init__(self, subsets: Sequence[TrainSubset], missing_images: MissingImages = "error") -> None:
        self.subsets = subsets
        self.missing_images = missing_images

    def __getitem__(self, place: tuple[int, int]) -> RawPair:
        subset, row = place
        if self.missing_images == "skip":
            return self.subsets[subset].readable(row)
        return self.subsets[subset][row]


class EvalBatches(Dataset[EvalBatch]):
    """Batches of one task: unique queries, then unique candidates; a batch has one side.

    Process r of W has batches r, r + W, ...; where they do not divide evenly the first ones come
    again at the end, so every process has the same number and rows may be encoded twice.

    Args:
        task: the task.
        collator: makes tensors.
        batch_size: rows per batch.
        rank: this process.
        world_size: number of processes.
        missing_images: ``skip`` marks inputs whose images are missing or broken, and a text stands in
            for them, so that every process goes on with as many rows.
    """

    STAND_IN = RawInput("missing")

    def __init__(
        self,
        task: EvalTask,
        collator: Collator,
        batch_size: int,
        rank: int,
        world_size: int,
        missing_images: MissingImages = "error",
    ) -> None:
        self.task = task
        self.collator = collator
        self.missing_images = missing_images
        sides: tuple[tuple[Literal["query", "candidate"], int], ...] = (
            ("query", len(task.queries)),
            ("candidate", len(task.candidates)),
        )
        places = [
            (side, range(start, min(start + batch_size, size)))
            for side, size in sides
            for start in range(0, size, batch_size)
        ]
        count = -(-len(places) // world_size)
        self.places = [places[(rank + number * world_size) % len(places)] for number in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> EvalBatch:
        side, indices = self.places[number]
        everything = self.task.queries if side == "query" else self.task.candidates
        missing: tuple[int, ...] = ()
        if self.missing_images == "skip":
            missing = tuple(index for index in indices if not _readable(everything[index]))
        rows = [self.STAND_IN if index in missing else everything[index] for index in indices]
        try:
            inputs = self.collator.encode_inputs(rows)
        except ValueError:  # once more, to say where: naming every input costs more than reading it
            inputs = self.collator.encode_inputs(rows, [self.task.place(side, index) for index in indices])
        return EvalBatch(inputs, side, torch.tensor(indices), missing)


def _readable(row: RawInput) -> bool:
    try:
        check_images(row)
    except ImageError:
        return False
    return True
