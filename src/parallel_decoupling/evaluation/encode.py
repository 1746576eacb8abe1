"""The only encoding loop: rows, in batches of similar length, over shards and processes.

``BatchPlan`` and ``RowBatches`` also make the batches of ``test``, ``validate`` and ``predict``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import image_size, smart_size
from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.model.encoder import Encoder, check_dim, truncate

CHARACTERS_PER_TOKEN = 4
FIXED_IMAGE_TOKENS = 576
PROGRESS_FROM = 5  # batches from which encode shows a progress bar on a terminal
STAND_IN = RawInput("missing")  # encoded where a batch has no usable row: all processes make as many steps

Paths = Literal["all", "aggregate"] | int | Sequence[int]


class Rows(Protocol):
    """What can be encoded: rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> RawInput:
        """Return a row's prompt; raise ``ValueError`` if the row cannot be used."""


class TokenEstimate:
    """Roughly how many tokens a row has, without decoding its pictures; only their order depends on it."""

    def __init__(self, collator: Collator) -> None:
        images = collator.images
        self.factor = 0  # side in pixels of a token; 0 where all pictures have the same number of tokens
        if images.size is None and images.factor > 1:
            budget: Mapping[str, int] = cast(Any, collator.processor).image_processor.size
            least, most = budget["shortest_edge"], budget["longest_edge"]
            least = min(most, max(least, images.min_pixels or 1))
            most = max(least, min(most, images.max_pixels or most))
            self.factor, self.limits = images.factor, {"min_pixels": least, "max_pixels": most}

    def __call__(self, row: RawInput) -> float:
        """Estimate from the text's length and the pictures' sizes, read from the headers of their files."""
        return len(row.text) / CHARACTERS_PER_TOKEN + sum(self._image_tokens(image) for image in row.images)

    def _image_tokens(self, image: Any) -> float:
        if not self.factor:
            return FIXED_IMAGE_TOKENS
        size = image_size(image) if isinstance(image, str) else image.size
        if size is None:  # an unreadable file
            return 0.0
        width, height = smart_size(*size, factor=self.factor, **self.limits)
        return width * height / self.factor**2


@dataclass(frozen=True)
class BatchPlace:
    """Which rows form a batch."""

    shard: int | None  # None for a batch without rows
    rows: tuple[int, ...]
    last: bool = False  # whether the shard ends with this batch


class BatchPlan(Sampler[BatchPlace]):
    """Batches of one process, each of rows of similar length, the longest first.

    With ``rows_per_shard`` a process has every ``world_size``-th of the shards that are not ``finished``;
    without, all rows are one shard and the process has every ``world_size``-th of its batches. All processes
    have as many batches, some without rows. Which rows share a batch does not depend on their number.
    """

    def __init__(
        self,
        rows: Rows,
        estimate: Callable[[RawInput], float],
        batch_size: int,
        *,
        rows_per_shard: int | None = None,
        finished: Collection[int] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rows, self._estimate, self._batch_size = rows, estimate, batch_size
        size = rows_per_shard or max(1, len(rows))
        shards = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        self._shards = {number: shard for number, shard in enumerate(shards) if number not in finished}
        places = [
            [(shard, start) for start in range(0, len(numbers), batch_size)]
            for shard, numbers in self._shards.items()
        ]
        if rows_per_shard is None:
            batches = list(chain.from_iterable(places))
            shares = [batches[process::world_size] for process in range(world_size)]
        else:
            shares = [list(chain.from_iterable(places[process::world_size])) for process in range(world_size)]
        self._share = shares[rank]
        self._length = max(1, *map(len, shares))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[BatchPlace]:
        ordered: dict[int, list[int]] = {}
        for shard, start in self._share:
            if shard not in ordered:
                ordered = {shard: sorted(self._shards[shard], key=self._tokens, reverse=True)}
            rows, stop = ordered[shard], start + self._batch_size
            yield BatchPlace(shard, tuple(rows[start:stop]), last=stop >= len(rows))
        yield from [BatchPlace(None, ())] * (self._length - len(self._share))

    def _tokens(self, row: int) -> float:
        try:
            return self._estimate(self._rows[row])
        except ValueError:  # RowBatches says which row and why
            return 0.0


@dataclass(frozen=True)
class RowBatch:
    """Tokenised rows of one shard."""

    inputs: EncoderInputs  # one stand-in if the batch does not have a usable row
    place: BatchPlace  # which rows were asked for
    rows: tuple[int, ...]  # numbers of the rows in inputs, in that order
    bad_rows: dict[int, str] = field(default_factory=dict)  # the others, each with the reason
    paths: tuple[int, ...] | None = None  # which are wanted; None is all

    def to(self, device: torch.device | str) -> RowBatch:
        """Move the inputs to ``device``."""
        return replace(self, inputs=self.inputs.to(device))


class RowBatches(Dataset[RowBatch]):
    """Makes the tensors of a batch; a row that cannot be used is an error unless ``keep_going``."""

    def __init__(
        self,
        rows: Rows,
        collator: Collator,
        where: Callable[[int], str],
        *,
        keep_going: bool = False,
        paths: tuple[int, ...] | None = None,
    ) -> None:
        self._rows, self._collator, self._where = rows, collator, where
        self._keep_going, self._paths = keep_going, paths

    def __getitem__(self, place: BatchPlace) -> RowBatch:
        usable, bad_rows = place.rows, dict[int, str]()
        try:
            inputs = self._inputs(usable)
        except ValueError:  # one by one, to find out which row it is
            bad_rows = self._problems(usable)
            usable = tuple(row for row in usable if row not in bad_rows)
            inputs = self._inputs(usable)
        return RowBatch(inputs, place, usable, bad_rows, self._paths)

    def _inputs(self, rows: Sequence[int]) -> EncoderInputs:
        return self._collator.encode_inputs([self._rows[row] for row in rows] or [STAND_IN])

    def _problems(self, rows: Sequence[int]) -> dict[int, str]:
        problems = {}
        for row in rows:
            try:
                self._inputs([row])
            except ValueError as error:
                if not self._keep_going:
                    raise type(error)(f"{self._where(row)}: {error}") from error
                problems[row] = str(error)
        return problems


def encode(
    encoder: Encoder,
    collator: Collator,
    inputs: Iterable[Any],
    *,
    instruction: str | None = None,
    paths: Paths = "aggregate",
    truncate_dim: int | None = None,
    batch_size: int = 32,
    show_progress: bool | None = None,
) -> Tensor:
    """Embed inputs of any mix of modalities in one process; see ``Embedder.encode`` for the options.

    Runs in eval mode on the device of the encoder, between the steps of a training; every submodule's mode is
    restored.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    selected = _selected_paths(paths, encoder.num_paths)
    whole = encoder.embed_dim
    dim = whole if truncate_dim is None else check_dim(truncate_dim, whole, "truncate_dim")
    device = next(encoder.parameters()).device

    def wanted(embeddings_BND: Tensor) -> Tensor:
        if dim < whole:
            embeddings_BND = truncate(embeddings_BND, dim)
        if isinstance(paths, str) and paths == "aggregate":
            embeddings_BND = encoder.aggregate(embeddings_BND)
        elif isinstance(paths, Integral):
            embeddings_BND = embeddings_BND[:, 0]
        return embeddings_BND.float().cpu()

    rows = to_raw_inputs(inputs, instruction)
    plan = BatchPlan(rows, TokenEstimate(collator), batch_size)
    batches = RowBatches(rows, collator, "input {}".format)
    if show_progress is None:
        show_progress = len(plan) >= PROGRESS_FROM and sys.stderr.isatty()
    num_selected = encoder.num_paths if selected is None else len(selected)
    with torch.no_grad():
        shape = wanted(torch.zeros(1, num_selected, whole, device=device)).shape[1:]
    result = torch.empty(len(rows), *shape)
    with torch.inference_mode():
        for place in tqdm(plan, desc="encode", unit="batch", leave=False, disable=not show_progress):
            if place.rows:
                batch = batches[place].to(device)
                with encoder.turns.encoding(encoder):
                    embeddings_BND = encoder(batch.inputs, selected)
                result[list(place.rows)] = wanted(embeddings_BND)
    return result


def _selected_paths(paths: Paths, num_paths: int) -> list[int] | None:
    """Return path numbers for the encoder; None is all of them."""
    if isinstance(paths, str):
        if paths not in ("all", "aggregate"):
            raise ValueError(f"paths is {paths!r}; use 'all', 'aggregate', a path number or a list of them")
        return None
    selected = list(paths) if isinstance(paths, Iterable) else [paths]
    if not selected:
        raise ValueError("paths is empty; select at least one path")
    for path in selected:
        if not isinstance(path, Integral) or isinstance(path, bool) or not 0 <= path < num_paths:
            raise ValueError(f"there is no path {path!r}; the encoder has paths 0 to {num_paths - 1}")
    return [int(path) for path in selected]
