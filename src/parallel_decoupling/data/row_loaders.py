"""Batches of the rows of a source, shard by shard.

A shard is a run of consecutive rows. It belongs to one process, which sorts its rows by length into batches:
so batches have little padding, while files come in the order of the source, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import smart_size
from parallel_decoupling.data.loaders import Batches
from parallel_decoupling.data.row_sources import AGGREGATE, RowSource

CHARACTERS_PER_TOKEN = 4
FIXED_IMAGE_TOKENS = 576
STAND_IN = RawInput("missing")
"""Encoded where a batch has no row, so that every process makes as many steps."""


@dataclass(frozen=True)
class RowPlace:
    """Which rows are a batch.

    Attributes:
        shard: their shard; None for a batch without rows.
        rows: numbers in the source.
        last: whether the shard ends with this batch.
    """

    shard: int | None
    rows: tuple[int, ...]
    last: bool


@dataclass(frozen=True)
class RowBatch:
    """Tokenised rows of one shard.

    Attributes:
        inputs: ``B`` rows; one stand-in if no row of the batch is usable.
        place: which rows were asked for.
        rows: numbers of those that are in ``inputs``, in that order.
        bad_rows: the others, each with the reason.
        columns: embeddings that are wanted: ``aggregate``, ``path_0``, ...
    """

    inputs: EncoderInputs
    place: RowPlace
    rows: tuple[int, ...]
    bad_rows: dict[int, str]
    columns: tuple[str, ...]

    def to(self, device: torch.device | str) -> RowBatch:
        """Move the inputs to ``device``."""
        return replace(self, inputs=self.inputs.to(device))


@dataclass(frozen=True)
class TokenEstimate:
    """Roughly how many tokens a row has, without decoding its picture; only the order of rows depends on it.

    Attributes:
        min_pixels: width times height of a resized picture at least.
        max_pixels: and at most.
        factor: side in pixels of a token; 0 where all pictures have the same number of tokens.
    """

    min_pixels: int = 1
    max_pixels: int = 1
    factor: int = 0

    @classmethod
    def of(cls, collator: Collator) -> TokenEstimate:
        """That of a processor with a pixel budget (Qwen's); elsewhere all pictures count alike."""
        images, processor = collator.images, getattr(collator.processor, "image_processor", None)
        if images.size is not None or images.factor == 1:
            return cls()
        budget: Mapping[str, int] = cast(Any, processor).size
        least, most = budget["shortest_edge"], budget["longest_edge"]
        least = min(most, max(least, images.min_pixels or 1))
        return cls(least, max(least, min(most, images.max_pixels or most)), images.factor)

    def __call__(self, image_size: tuple[int, int] | None, characters: int) -> float:
        """The estimate for a row from what ``RowSource.size`` says of it."""
        tokens = characters / CHARACTERS_PER_TOKEN
        if image_size is None:
            return tokens
        if not self.factor:
            return tokens + FIXED_IMAGE_TOKENS
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        width, height = smart_size(*image_size, factor=self.factor, **limits)
        return tokens + width * height / self.factor**2


class Shards:
    """How a source is cut into shards.

    Args:
        num_rows: of the source.
        rows_per_shard: of all shards but the last.
    """

    def __init__(self, num_rows: int, rows_per_shard: int) -> None:
        self.num_rows, self.rows_per_shard = num_rows, rows_per_shard

    def __len__(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Row numbers of a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))


class RowPlan(Sampler[RowPlace]):
    """Batches of one process: the longest rows of a shard first.

    Process r of W has every W-th of the shards that are to be done. All processes have as many batches:
    those with less to do end with batches without rows.

    Args:
        source: the rows.
        shards: of the source.
        estimate: of the tokens of a row.
        finished: shards that are done, the same on all processes.
        batch_size: rows per batch.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        source: RowSource,
        shards: Shards,
        estimate: TokenEstimate,
        finished: Collection[int],
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.source, self.shards, self.estimate, self.batch_size = source, shards, estimate, batch_size
        to_do = [shard for shard in range(len(shards)) if shard not in finished]
        self.to_do = to_do[rank::world_size]
        self._length = max(self._count(to_do[start::world_size]) for start in range(world_size))

    @property
    def num_rows(self) -> int:
        """Rows of this process."""
        return sum(len(self.shards.rows(shard)) for shard in self.to_do)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[RowPlace]:
        for shard in self.to_do:
            rows = sorted(self.shards.rows(shard), key=self._tokens, reverse=True)
            batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            for number, batch in enumerate(batches, start=1):
                yield RowPlace(shard, tuple(batch), last=number == len(batches))
        for _ in range(self._length - self._count(self.to_do)):
            yield RowPlace(None, (), last=False)

    def _tokens(self, row: int) -> float:
        return self.estimate(*self.source.size(row))

    def _count(self, shards: Sequence[int]) -> int:
        return sum(-(-len(self.shards.rows(shard)) // self.batch_size) for shard in shards)


class RowBatches(Dataset[RowBatch]):
    """Makes the tensors of a batch; a row that cannot be used is reported, not raised.

    Args:
        source: the rows.
        collator: makes tensors.
        instruction: before every text.
        columns: see ``RowBatch``.
    """

    def __init__(
        self, source: RowSource, collator: Collator, instruction: str, columns: tuple[str, ...]
    ) -> None:
        self.source, self.collator, self.instruction, self.columns = source, collator, instruction, columns

    def __getitem__(self, place: RowPlace) -> RowBatch:
        usable: dict[int, RawInput] = {}
        bad_rows: dict[int, str] = {}
        for row in place.rows:
            try:
                usable[row] = self.source.raw_input(row, self.instruction)
            except ValueError as error:
                bad_rows[row] = str(error)
        inputs = self._inputs(usable, bad_rows)
        return RowBatch(inputs, place, tuple(usable), bad_rows, self.columns)

    def _inputs(self, usable: dict[int, RawInput], bad_rows: dict[int, str]) -> EncoderInputs:
        """Tensors of the usable rows; those that turn out bad are moved."""
        if usable:
            try:
                return self.collator.encode_inputs(list(usable.values()))
            except ValueError:  # one by one, to find out which
                for row, raw in list(usable.items()):
                    try:
                        self.collator.encode_inputs([raw])
                    except ValueError as error:
                        bad_rows[row] = str(error)
                        del usable[row]
        return self.collator.encode_inputs(list(usable.values()) or [STAND_IN])


def chosen_columns(names: Sequence[str] | None, num_paths: int) -> tuple[str, ...]:
    """Names of embeddings in the order of a file; None is the aggregate and every path.

    Raises:
        ValueError: the model has no such path.
    """
    known = (AGGREGATE, *(f"path_{path}" for path in range(num_paths)))
    for name in names or ():
        if name not in known:
            raise ValueError(f"predict_columns: {name!r} is unknown; this model has {', '.join(known)}.")
    if names is not None and not names:
        raise ValueError(f"predict_columns is empty; choose from {', '.join(known)}.")
    return tuple(name for name in known if names is None or name in names)


class RowLoader(Batches[RowBatch]):
    """The batches of one process, and what they come from.

    Attributes:
        batches: of all processes.
        plan: which rows this process has.
    """

    def __init__(self, batches: RowBatches, plan: RowPlan, num_workers: int) -> None:
        self.batches, self.plan = batches, plan
        options = {"num_workers": num_workers, "generator": torch.Generator()}
        super().__init__(DataLoader(batches, batch_size=None, sampler=plan, **options))  # type: ignore[arg-type]
