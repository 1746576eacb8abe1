"""What the data module's loaders iterate over: rows of the training mixture, and rows to encode."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pyarrow as pa
from torch.utils.data import DataLoader, Dataset

from parallel_decoupling.batch import RawInput, RawPair
from parallel_decoupling.data.mixture import MixtureSampler
from parallel_decoupling.data.readers import TrainSubset
from parallel_decoupling.data.row_sources import RowSource
from parallel_decoupling.data.tasks import EvalTask

Batch = TypeVar("Batch")
MissingImages = Literal["error", "skip"]
Side = Literal["query", "candidate"]

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


class TaskSide:
    """The unique queries or candidates of one evaluation task, as rows to encode.

    Args:
        task: the task.
        side: which of them.
        data_dir: what image names are relative to when they are stored.

    Attributes:
        name: of the folder for their embeddings.
    """

    def __init__(self, task: EvalTask, side: Side, data_dir: Path) -> None:
        self.task, self.side, self.data_dir = task, side, data_dir
        self.name = f"{task.task.name}/{side}"
        self._rows = task.queries if side == "query" else task.candidates

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> RawInput:
        return self._rows[row]

    def where(self, row: int) -> str:
        """Name a row in an error message."""
        return self.task.place(self.side, row)

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return ``id``, ``text`` and ``image`` (the first one, relative to ``data_dir``) of some rows."""
        used = [self._rows[row] for row in rows]
        files = [row.images[0] if row.images else None for row in used]
        images = [os.path.relpath(file, self.data_dir) if isinstance(file, str) else None for file in files]
        texts = [row.text for row in used]
        columns = {"id": [str(row) for row in rows], "text": texts, "image": images}
        return pa.table(columns, schema=pa.schema({name: pa.string() for name in columns}))

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, as plain values."""
        return {"source": self.name, "instruction": "", "num_rows": len(self)}


class SourceRows:
    """The rows of ``predict_source`` with their instruction, as rows to encode.

    Args:
        source: the rows.
        instruction: put before every text.
    """

    name = ""

    def __init__(self, source: RowSource, instruction: str) -> None:
        self.source, self.instruction = source, instruction

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> RawInput:
        return self.source.raw_input(row, self.instruction)

    def where(self, row: int) -> str:
        """Name a row in an error message."""
        return f"{self.source.path}, row {row}"

    def columns(self, rows: Sequence[int]) -> pa.Table:
        """Return ``id`` and the source's columns of some rows."""
        return self.source.columns(rows)

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, as plain values."""
        return {**self.source.describe(), "instruction": self.instruction}
