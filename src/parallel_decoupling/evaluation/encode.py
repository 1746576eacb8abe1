"""The only encoding loop: rows, in batches of similar length, over shards and processes.

``BatchPlan`` and ``RowBatches`` also make the batches of ``test``, ``validate`` and ``predict``.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import image_size, smart_size
from parallel_decoupling.data.unusable import RowError, attempt, one_row, out_of_memory
from parallel_decoupling.model.encoder import Encoder, check_dim, check_paths, truncate

TOKENS_PER_PASS = 2**15  # most tokens of a forward pass, padding included, unless a single row has more
BYTES_PER_TOKEN = 4
FIXED_IMAGE_TOKENS = 576
TOKENS_OF_TIME = 8  # of a frame in Qwen3-VL, at most
PROGRESS_FROM = 5  # batches from which encode shows a progress bar on a terminal
STAND_IN = RawInput("missing")  # encoded where a batch has no usable row: all processes make as many steps

Paths = Literal["all", "aggregate"] | int | Sequence[int]


class Rows(Protocol):
    """What can be encoded: rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> RawInput:
        """Return a row's prompt; whatever is raised says why the row cannot be embedded."""


class TokenEstimate:
    """Roughly how many tokens a row has, without decoding its pictures; only their order depends on it.

    With one byte of text for each token no row has more.
    """

    def __init__(self, collator: Collator, bytes_per_token: int = BYTES_PER_TOKEN) -> None:
        self._bytes_per_token, self._parts = bytes_per_token, collator.text_parts
        self._images, self.most = collator.images, collator.limit.max_tokens
        self._frames: Any = collator.video_token and collator.processor.video_processor
        self.factor = 0  # side in pixels of a token; 0 where all pictures have the same number of tokens
        if self._images.image_size is None and self._images.factor > 1:
            budget: Mapping[str, int] = cast(Any, collator.processor).image_processor.size
            least, most = budget["shortest_edge"], budget["longest_edge"]
            least = min(most, max(least, self._images.min_pixels or 1))
            most = max(least, min(most, self._images.max_pixels or most))
            self.factor, self.limits = self._images.factor, {"min_pixels": least, "max_pixels": most}

    def __call__(self, row: RawInput) -> float:
        """Estimate from the text's length and the pictures' sizes, read from the headers of their files."""
        images = sum(self._image_tokens(image) for image in row.images) + self._video_tokens(row.video)
        length = sum(len(part.encode(errors="replace")) for part in self._parts(row))
        return min(length / self._bytes_per_token + images, self.most)

    def _video_tokens(self, video: Sequence[Any]) -> float:
        frames = self._images.chosen(video) if video and self._frames else []
        size = image_size(frames[0]) if frames else None
        if size is None:
            return 0.0
        width, height = self._images.frame_size(size, len(frames))
        patches = self._frames.get_num_of_video_patches(len(frames), height, width, {})
        return float(patches / self._frames.merge_size**2 + TOKENS_OF_TIME * len(frames))

    def _image_tokens(self, image: Any) -> float:
        if not self.factor:
            return FIXED_IMAGE_TOKENS
        size = image_size(image)
        if size is None:
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
        starts = {shard: range(0, len(numbers), batch_size) for shard, numbers in self._shards.items()}
        shares = [[(shard, start) for start in each] for shard, each in starts.items()]
        if rows_per_shard is None:
            shares = [[place] for share in shares for place in share]
        self._share = list(chain.from_iterable(shares[rank::world_size]))
        sizes = [sum(map(len, shares[process::world_size])) for process in range(world_size)]
        self._length = max(1, *sizes)

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
            with one_row():
                return self._estimate(self._rows[row])
        except RowError:  # RowBatches says which row and why
            return 0.0


@dataclass(frozen=True)
class RowBatch:
    """Tokenised rows of one shard."""

    inputs: EncoderInputs  # one stand-in if the batch does not have a usable row
    place: BatchPlace  # which rows were asked for
    rows: tuple[int, ...]  # numbers of the rows in inputs, in that order
    bad_rows: dict[int, str] = field(default_factory=dict)  # the others, each with the reason
    paths: tuple[int, ...] | None = None  # which are wanted; None is all

    def to(self, device: torch.device | str) -> "RowBatch":
        """Move the inputs to ``device``."""
        return replace(self, inputs=self.inputs.to(device))


@dataclass(frozen=True)
class RowBatches(Dataset[RowBatch]):
    """Makes the tensors of a batch; a row that cannot be embedded is an error unless ``keep_going``."""

    rows: Rows
    collator: Collator
    where: Callable[[int], str]
    keep_going: bool = False
    paths: tuple[int, ...] | None = None

    def __getitem__(self, place: BatchPlace) -> RowBatch:
        read, problems = attempt(self.rows.__getitem__, place.rows)
        inputs, unusable = self.collator.encode_usable(list(read.values()))
        numbers = list(read)
        problems |= {numbers[number]: error for number, error in unusable.items()}
        for row, problem in problems.items() if not self.keep_going else ():
            with one_row(f"{self.where(row)}: "):
                raise problem
        usable = tuple(row for row in place.rows if row not in problems)
        inputs = self.collator.encode_inputs([STAND_IN]) if inputs is None else inputs
        bad_rows = {row: str(problem) for row, problem in problems.items()}
        return RowBatch(inputs, place, usable, bad_rows, self.paths)


def embed(
    encoder: Callable[..., Tensor], inputs: EncoderInputs, paths: Sequence[int] | None = None
) -> Tensor:
    """Embed tokenised rows in forward passes of at most ``TOKENS_PER_PASS`` tokens, few of them padding.

    A pass that exhausts the memory is made in halves; when a single row does, the error is raised.
    """
    parts, start, longest, used = list[range](), 0, 0, 0
    for row, length in enumerate(inputs.lengths.tolist()):
        longest, used = max(longest, length), used + length
        padded = longest * (row + 1 - start)
        if row > start and (padded > TOKENS_PER_PASS or padded - used > TOKENS_PER_PASS // 8):
            parts.append(range(start, row))
            start, longest, used = row, length, length
    if not parts:
        try:
            return encoder(inputs, paths)
        except (MemoryError, RuntimeError) as error:
            if len(inputs) == 1 or not out_of_memory(error):
                raise
        start = len(inputs) // 2  # not in the handler: its traceback holds what is to be freed
        parts = [range(start)]
    rest = [*parts, range(start, len(inputs))]
    return torch.cat([embed(encoder, inputs.select(part), paths) for part in rest])


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Run with the CPU as the default device, and without autocast on ``device``, whatever is set outside."""
    on_cpu = torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext()  # it costs
    with on_cpu, torch.autocast(device.type, enabled=False):
        yield


@dataclass
class Encoded:
    """Embeddings of rows, NaN where one could not be embedded, their tokens, and what was left out."""

    embeddings: Tensor
    num_tokens: Tensor
    bad_rows: dict[int, str]
    num_cut: int


def encode_rows(
    encoder: Encoder,
    collator: Collator,
    rows: Rows,
    *,
    paths: Paths = "aggregate",
    truncate_dim: int | None = None,
    batch_size: int = 32,
    show_progress: bool | None = None,
    keep_going: bool = False,
    where: Callable[[int], str] = "input {}".format,
) -> Encoded:
    """Embed rows in one process; a row that cannot be embedded is an error unless ``keep_going``.

    Runs in eval mode on the device of the encoder, between the steps of a training; every submodule's mode is
    restored. A caller's default device and dtype, autocast and inference mode make no difference.
    """
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of 1 or more, got {batch_size!r}")
    paths = paths.tolist() if isinstance(paths, Tensor | np.ndarray) else paths
    selected = _selected_paths(paths, encoder.num_paths)
    whole = encoder.embed_dim
    dim = whole if truncate_dim is None else check_dim(truncate_dim, whole, "truncate_dim")
    device = next(encoder.parameters()).device

    aggregated = isinstance(paths, str) and paths == "aggregate"
    ordered = aggregated and getattr(encoder, "path_maps", None) is not None  # the best first

    def wanted(embeddings_BND: Tensor) -> Tensor:
        if dim < whole and not ordered:
            embeddings_BND = truncate(embeddings_BND, dim)
        if aggregated:
            embeddings_BND = encoder.aggregate(embeddings_BND)
        elif isinstance(paths, Integral):
            embeddings_BND = embeddings_BND[:, 0]
        if dim < whole and ordered:
            embeddings_BND = truncate(embeddings_BND, dim)
        return embeddings_BND.float().cpu()

    plan = BatchPlan(rows, TokenEstimate(collator), batch_size)
    batches = RowBatches(rows, collator, where, keep_going=keep_going)
    if show_progress is None:
        show_progress = len(plan) >= PROGRESS_FROM and sys.stderr.isatty()
    num_selected = encoder.num_paths if selected is None else len(selected)
    with torch.no_grad():
        shape = wanted(torch.zeros(1, num_selected, whole, device=device)).shape[1:]
    result = torch.full((len(rows), *shape), torch.nan, dtype=torch.float32, device="cpu")
    encoded = Encoded(result, torch.zeros(len(rows), dtype=torch.long, device="cpu"), {}, 0)
    with torch.inference_mode(), undisturbed(device):
        for place in tqdm(plan, desc="encode", unit="batch", leave=False, disable=not show_progress):
            if not place.rows:
                continue
            batch = batches[place]
            encoded.bad_rows.update(batch.bad_rows)
            if batch.rows:
                inputs = batch.inputs.to(device)
                with encoder.turns.encoding(encoder):
                    embeddings_BND = embed(encoder, inputs, selected)
                result[list(batch.rows)] = wanted(embeddings_BND)
                encoded.num_tokens[list(batch.rows)] = batch.inputs.lengths
                encoded.num_cut += batch.inputs.num_cut
    return encoded


def _selected_paths(paths: Paths, num_paths: int) -> list[int] | None:
    """Return path numbers for the encoder; None is all of them."""
    if isinstance(paths, str):
        if paths not in ("all", "aggregate"):
            raise ValueError(f"paths is {paths!r}; use 'all', 'aggregate', a path number or a list of them")
        return None
    return check_paths(list(paths) if isinstance(paths, Iterable) else [paths], num_paths)
