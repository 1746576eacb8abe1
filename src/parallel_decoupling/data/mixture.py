"""Which rows make up which training batch, for every process alike, and a loader that starts anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from torch.utils.data import DataLoader, Sampler

Policy: TypeAlias = Literal["mixed", "homogeneous", "sub_batch", "neighbours"]
_Array: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

# Streams of random numbers that must not meet: default_rng([seed, stream, ...]).
_ORDER, _ROWS, _REPAIR = 0, 1, 2


class MixtureSampler(Sampler[list[tuple[int, int]]]):
    """Batches of ``(subset, row)`` from several subsets, as a pure function of (seed, step).

    In an epoch subset s is drawn c_s times: all its rows, or its share by weight of the rows of all subsets.
    Draws come in groups of g rows of one subset (g = 1 mixed, ``sub_batch_size`` sub_batch and neighbours,
    ``batch_size`` homogeneous), so c_s is a multiple of g and at least g. All subsets' groups are shuffled by
    (seed, epoch) and cut into batches; an incomplete last batch is dropped. Draw k of subset s, counted over
    all epochs, is ``permutation(seed, s, k // n_s)[k mod n_s]``: a subset is used up before any row comes
    again. For neighbours, clusters of g rows that follow each other in ``orders[s]`` are permuted; where two
    passes meet, a group has rows of both. Where two permutations meet inside one batch, a row that they share
    is replaced by another row of the subset, so a batch repeats a row only if it draws more rows than the
    subset has.

    ``sizes`` are the rows n_s per subset, ``batch_size`` is GLOBAL, ``weights`` are shares of the epoch per
    SUBSET (None is by size), ``orders`` the rows per subset with neighbours side by side.

    Relations:
        ``sub_batch`` with ``sub_batch_size=1`` equals ``mixed``, with ``batch_size`` equals
        ``homogeneous``; ``neighbours`` with 1 equals ``mixed`` of rows that are numbered by their place in
        the order. The slices of all ranks, joined, equal the batch at ``world_size=1``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        batch_size: int,
        weights: Sequence[float] | None = None,
        policy: Policy = "mixed",
        sub_batch_size: int | None = None,
        orders: Sequence[_Array] = (),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert min(sizes, default=0) > 0, "TrainSubset refuses subsets without rows"
        if batch_size < 1 or batch_size % world_size:
            rule = f"must be a positive multiple of the {world_size} processes"
            raise ValueError(f"batch_size={batch_size} is the global batch and {rule}.")
        self.sizes, self.batch_size = list(sizes), batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start_step = 0  # of the next iteration
        self.orders = list(orders) or [np.arange(size) for size in sizes]
        fixed = {"mixed": 1, "homogeneous": batch_size}.get(policy)
        self.group_size = fixed or sub_batch_size or 0
        if (fixed is None) == (sub_batch_size is None) or batch_size % max(self.group_size, 1):
            rule = f"sub_batch and neighbours need one that divides {batch_size=}, other policies have none"
            raise ValueError(f"{policy=} with sub_batch_size={sub_batch_size}: {rule}.")
        self.cluster_size = self.group_size if policy == "neighbours" else 1
        counts = [size // self.group_size for size in self.sizes]
        if weights is not None:
            assert len(weights) == len(sizes), "one per subset"
            shares = [weight / max(weights) for weight in weights]  # sums of the weights may overflow
            total = sum(sizes) / self.group_size / sum(shares)
            counts = [round(total * share) for share in shares]
        self.groups = [max(1, count) for count in counts]
        self.steps_per_epoch = sum(self.groups) * self.group_size // batch_size
        if not self.steps_per_epoch:
            rows = sum(self.sizes)
            raise ValueError(f"{rows} rows do not fill one batch of {batch_size}. Use a smaller batch_size.")
        self._epoch: tuple[int, _Array, _Array] | None = None

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's slices from ``start_step`` to the end of that epoch; the next is up then."""
        first = self.start_step
        stop = (first // self.steps_per_epoch + 1) * self.steps_per_epoch
        self.start_step = stop
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for step in range(first, stop):
            yield self.batch(step)[mine]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Return the GLOBAL batch of a step as ``batch_size`` pairs ``(subset, row)``."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._plan(epoch))
        _, subsets, rows = self._epoch
        place = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return list(zip(subsets[place].tolist(), rows[place].tolist(), strict=True))

    def _plan(self, epoch: int) -> tuple[_Array, _Array]:
        """Return subset and row of every draw of an epoch, in order."""
        subset_of_group = np.repeat(np.arange(len(self.sizes)), self.groups)
        np.random.default_rng([self.seed, _ORDER, epoch]).shuffle(subset_of_group)
        subsets = np.repeat(subset_of_group, self.group_size)
        rows = np.empty_like(subsets)
        for subset in range(len(self.sizes)):
            slots = np.flatnonzero(subsets == subset)
            rows[slots] = self.orders[subset][self._draws(subset, epoch, slots // self.batch_size)]
        return subsets, rows

    def _draws(self, subset: int, epoch: int, batch_of_draw: _Array) -> _Array:
        """Return the places of a subset's rows for one epoch; ``batch_of_draw`` is non-decreasing."""
        size, count = self.sizes[subset], len(batch_of_draw)
        first = epoch * count
        passes = range(first // size, (first + count - 1) // size + 1)
        skipped = first - passes[0] * size
        rows = np.concatenate([self._pass(subset, number) for number in passes])[skipped : skipped + count]
        for seam in range(size - skipped, count, size):
            if batch_of_draw[seam - 1] == batch_of_draw[seam]:
                start, stop = np.searchsorted(batch_of_draw, batch_of_draw[seam] + np.array([0, 1]))
                if stop - start <= size:  # a row on both sides is replaced by one on neither
                    rng = np.random.default_rng([self.seed, _REPAIR, subset, first + seam])
                    clash = np.flatnonzero(np.isin(rows[seam:stop], rows[start:seam])) + seam
                    free = np.setdiff1d(np.arange(size), rows[start:stop])
                    rows[clash] = rng.permutation(free)[: len(clash)]
        return rows

    def _pass(self, subset: int, number: int) -> _Array:
        """Return the places of a subset's rows in the order of one pass."""
        size = self.sizes[subset]
        first = min(size, -number * size % self.cluster_size)  # for the last group of the pass before
        head, middle, tail = np.split(np.arange(size), [first, size - (size - first) % self.cluster_size])
        clusters = middle.reshape(-1, self.cluster_size)
        rng = np.random.default_rng([self.seed, _ROWS, subset, number])
        return np.concatenate([head, clusters[rng.permutation(len(clusters))].ravel(), tail])


class Batches:
    """A loader's batches, started by each iteration at the step that ``position`` says, or else one epoch on.

    Iterating is lazy: an iterator that Lightning makes and drops when it resumes takes nothing.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: MixtureSampler | None = None,
        position: Callable[[], int] | None = None,
    ) -> None:
        self.loader, self.batch_sampler, self.position = loader, sampler, position

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.batch_sampler is not None and self.position is not None:
            self.batch_sampler.start_step = self.position()
        yield from self.loader

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the trainer's progress is the position. Tells Lightning that this resumes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore nothing."""
