"""The only encoding loop: rows, in batches of similar length, over shards and processes.

``BatchPlan`` decides which rows form a batch and which process encodes it, ``RowBatches`` makes its tensors,
``encode`` is the loop in one process. ``test``, ``validate`` and ``predict`` hand the same plan and the same
batches to a Trainer; what they return is kept in ``evaluation.store``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import image_size, smart_size
from parallel_decoupling.evaluation.user_inputs import to_raw_inputs
from parallel_decoupling.model.encoder import check_dim, truncate

CHARACTERS_PER_TOKEN = 4
FIXED_IMAGE_TOKENS = 576
PROGRESS_FROM = 5
"""Batches from which ``encode`` shows a progress bar on a terminal."""
STAND_IN = RawInput("missing")
"""What is encoded where a batch does not have a usable row, so that every process makes as many steps."""

Paths = Literal["all", "aggregate"] | int | Sequence[int]


class Rows(Protocol):
    """What can be encoded: rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> RawInput:
        """Return a row's prompt; raise ``ValueError`` if the row cannot be used."""


class PathEncoder(Protocol):
    """What ``encode`` needs of a model."""

    @property
    def num_paths(self) -> int:
        """Number of paths N."""

    @property
    def embed_dim(self) -> int:
        """Dimension D of one path's embedding."""

    @property
    def aggregate_dim(self) -> int:
        """Dimension of the aggregated embedding."""

    def __call__(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed as ``[B, N', D]``; None is all paths."""

    def aggregate(self, embeddings_BND: Tensor) -> Tensor:
        """Combine all paths into one embedding."""

    def eval(self) -> Any:
        """Enter evaluation mode."""

    def modules(self) -> Iterator[nn.Module]:
        """All submodules."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters; the first tells the device."""


class TokenEstimate:
    """Roughly how many tokens a row has, without decoding its pictures; only the order of rows depends on it.

    Args:
        collator: tells how large the processor makes pictures, if it has a pixel budget (as Qwen's has).
    """

    def __init__(self, collator: Collator) -> None:
        images, processor = collator.images, getattr(collator.processor, "image_processor", None)
        self.factor = 0  # side in pixels of a token; 0 where all pictures have the same number of tokens
        if images.size is None and images.factor > 1:
            budget: Mapping[str, int] = cast(Any, processor).size
            least, most = budget["shortest_edge"], budget["longest_edge"]
            least = min(most, max(least, images.min_pixels or 1))
            self.factor = images.factor
            self.limits = {
                "min_pixels": least,
                "max_pixels": max(least, min(most, images.max_pixels or most)),
            }

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
    """Which rows form a batch.

    Attributes:
        shard: their shard; None for a batch without rows.
        rows: row numbers.
        last: whether the shard ends with this batch.
    """

    shard: int | None
    rows: tuple[int, ...]
    last: bool = False


class BatchPlan(Sampler[BatchPlace]):
    """Batches of one process, each of rows of similar length, the longest first.

    With ``rows_per_shard`` a process has every ``world_size``-th of the shards that are to be done; without,
    all rows are one shard and the process has every ``world_size``-th of its batches. All processes have the
    same number of batches, at least one: those with less to do end with batches without rows. Every row is in
    one batch of one process, and which rows share a batch does not depend on the number of processes.

    Args:
        rows: to be encoded.
        estimate: of the tokens of a row.
        batch_size: rows per batch.
        rows_per_shard: consecutive rows that belong together on disk; None makes one shard.
        finished: shards that are done, the same on all processes.
        rank: this process.
        world_size: number of processes.
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
        self._rows_per_shard = rows_per_shard or max(1, len(rows))
        shards = range(-(-len(rows) // self._rows_per_shard))
        to_do = [shard for shard in shards if shard not in finished]
        self._split_batches = rows_per_shard is None
        self._rank, self._world_size = rank, world_size
        self._own_shards = to_do if self._split_batches else to_do[rank::world_size]
        if self._split_batches:
            longest = -(-self._num_batches(to_do) // world_size)
        else:
            longest = max(self._num_batches(to_do[first::world_size]) for first in range(world_size))
        self._length = max(1, longest)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[BatchPlace]:
        places = [place for shard in self._own_shards for place in self._shard(shard)]
        if self._split_batches:
            places = places[self._rank :: self._world_size]
        yield from places
        yield from [BatchPlace(None, ())] * (self._length - len(places))

    def _range(self, shard: int) -> range:
        first = shard * self._rows_per_shard
        return range(first, min(first + self._rows_per_shard, len(self._rows)))

    def _num_batches(self, shards: Sequence[int]) -> int:
        return sum(-(-len(self._range(shard)) // self._batch_size) for shard in shards)

    def _shard(self, shard: int) -> Iterator[BatchPlace]:
        rows = sorted(self._range(shard), key=self._tokens, reverse=True)
        for start in range(0, len(rows), self._batch_size):
            stop = start + self._batch_size
            yield BatchPlace(shard, tuple(rows[start:stop]), last=stop >= len(rows))

    def _tokens(self, row: int) -> float:
        try:
            return self._estimate(self._rows[row])
        except ValueError:  # RowBatches says which row and why
            return 0.0


@dataclass(frozen=True)
class RowBatch:
    """Tokenised rows of one shard.

    Attributes:
        inputs: ``B`` rows; one stand-in if the batch does not have a usable row.
        place: which rows were asked for.
        rows: numbers of the rows in ``inputs``, in that order.
        bad_rows: the others, each with the reason.
        paths: which paths are wanted; None is all.
    """

    inputs: EncoderInputs
    place: BatchPlace
    rows: tuple[int, ...]
    bad_rows: dict[int, str] = field(default_factory=dict)
    paths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> RowBatch:
        """Move the inputs to ``device``."""
        return replace(self, inputs=self.inputs.to(device))


class RowBatches(Dataset[RowBatch]):
    """Makes the tensors of a batch.

    Args:
        rows: to be encoded.
        collator: makes tensors.
        where: names a row in an error message.
        keep_going: report a row that cannot be used in ``RowBatch.bad_rows`` instead of raising.
        paths: see ``RowBatch``.
    """

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
        try:
            inputs = self._collator.encode_inputs([self._rows[row] for row in place.rows] or [STAND_IN])
            return RowBatch(inputs, place, place.rows, paths=self._paths)
        except ValueError:  # one by one, to find out which row it is
            return self._one_by_one(place)

    def _one_by_one(self, place: BatchPlace) -> RowBatch:
        usable: dict[int, RawInput] = {}
        bad_rows: dict[int, str] = {}
        for row in place.rows:
            try:
                self._collator.encode_inputs([self._rows[row]])
                usable[row] = self._rows[row]
            except ValueError as error:
                if not self._keep_going:
                    raise type(error)(f"{self._where(row)}: {error}") from error
                bad_rows[row] = str(error)
        inputs = self._collator.encode_inputs(list(usable.values()) or [STAND_IN])
        return RowBatch(inputs, place, tuple(usable), bad_rows, self._paths)


def encode(
    encoder: PathEncoder,
    collator: Collator,
    inputs: Iterable[Any],
    *,
    instruction: str | None = None,
    paths: Paths = "aggregate",
    truncate_dim: int | None = None,
    batch_size: int = 32,
    show_progress: bool | None = None,
) -> Tensor:
    """Embed inputs of any mix of modalities.

    Rows are encoded in batches of similar length, longest first (memory peaks at once), and returned
    in the order given. Runs without gradients, in eval mode, on the device of the encoder; every
    submodule's training mode is restored.

    Args:
        encoder: the model.
        collator: tokenises for that model.
        inputs: see ``user_inputs.to_raw_inputs``.
        instruction: see ``user_inputs.to_raw_inputs``.
        paths: ``"aggregate"``; ``"all"``; one path's number (the cost of the plain backbone); or several.
        truncate_dim: keep this many coordinates of every path, renormalised; the aggregate is that of the
            shorter paths. None keeps all D. Made for models trained with ``matryoshka_dims``.
        batch_size: rows per forward call, at least 1.
        show_progress: None shows a bar on a terminal when there are more than a few batches.

    Returns:
        CPU float32, unit norm: ``[B, D]`` for the aggregate (``[B, N * D]`` if the encoder concatenates) and
        for one path; ``[B, N', D]`` for ``"all"`` or a sequence of ``N'`` paths, in its order. With
        ``truncate_dim`` it takes the place of D.

    Raises:
        ValueError: an input (names its index), a path, the dimension or the batch size is not usable.

    Relations:
        ``paths=n`` equals column ``n`` of ``paths="all"``. The result does not depend on ``batch_size``.
        ``truncate_dim=D`` changes nothing. A single truncated path is the first ``truncate_dim`` coordinates
        of the whole one, renormalised.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    selected = _selected_paths(paths, encoder.num_paths)
    dim = encoder.embed_dim
    if truncate_dim is not None:
        dim = check_dim(truncate_dim, encoder.embed_dim, "truncate_dim")
    rows = to_raw_inputs(inputs, instruction)
    plan = BatchPlan(rows, TokenEstimate(collator), batch_size)
    batches = RowBatches(rows, collator, "input {}".format)
    if show_progress is None:
        show_progress = len(plan) >= PROGRESS_FROM and sys.stderr.isatty()
    first_parameter = next(encoder.parameters(), None)
    device = torch.device("cpu") if first_parameter is None else first_parameter.device
    result = torch.empty(len(rows), *_trailing_shape(encoder, paths, selected, dim))
    with _evaluating(encoder), torch.inference_mode():
        for place in tqdm(plan, desc="encode", unit="batch", leave=False, disable=not show_progress):
            if not place.rows:
                continue
            embeddings_BND = encoder(batches[place].to(device).inputs, selected)
            if dim < encoder.embed_dim:
                embeddings_BND = truncate(embeddings_BND, dim)
            if isinstance(paths, str) and paths == "aggregate":
                embeddings = encoder.aggregate(embeddings_BND)
            else:
                embeddings = embeddings_BND[:, 0] if isinstance(paths, Integral) else embeddings_BND
            result[list(place.rows)] = embeddings.float().cpu()
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
        whole = isinstance(path, Integral) and not isinstance(path, bool)
        if not whole or not 0 <= path < num_paths:
            raise ValueError(f"there is no path {path!r}; the encoder has paths 0 to {num_paths - 1}")
    return [int(path) for path in selected]


def _trailing_shape(
    encoder: PathEncoder, paths: Paths, selected: list[int] | None, dim: int
) -> tuple[int, ...]:
    if isinstance(paths, str) and paths == "aggregate":
        return (encoder.aggregate_dim // encoder.embed_dim * dim,)
    if isinstance(paths, Integral):
        return (dim,)
    return (encoder.num_paths if selected is None else len(selected), dim)


@contextmanager
def _evaluating(encoder: PathEncoder) -> Iterator[None]:
    """Enter eval mode; afterwards every submodule has the mode that it had."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
