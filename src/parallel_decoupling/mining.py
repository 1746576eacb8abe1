"""What a model ranks high for a query, but below the row's own candidate: hard negatives and neighbours."""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from parallel_decoupling.data.collate import identity
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.readers import MMEB_TRAIN, TrainSubset
from parallel_decoupling.data.row_reader import CANDIDATE, QUERY, Side, side_of
from parallel_decoupling.data.row_sources import TaskSide
from parallel_decoupling.data.tasks import NEIGHBOURS, ROLES, EvalTask, Task, chosen, find_train_subsets
from parallel_decoupling.distributed import gather_objects, rank, torchrun_group, world_size
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode_rows
from parallel_decoupling.evaluation.store import AGGREGATE, ROWS_PER_SHARD, Keeper, Store
from parallel_decoupling.files import atomic_write
from parallel_decoupling.model.identity import about_encoder
from parallel_decoupling.option_types import NonNegativeInt, PositiveInt, checked


@checked()
def mine(
    data_dir: str,
    model: str,
    output_dir: str,
    negatives: PositiveInt = 1,
    first_rank: NonNegativeInt = 0,
    last_rank: PositiveInt = 100,
    margin: float = 0.0,
) -> None:
    """Write the split "mined" of all training subsets in MMEB's layout, with hard negatives and neighbours.

    The processes that ``torchrun`` starts share the work and write what one process writes.

    Args:
        data_dir: holds MMEB-train/; or mini-mmeb.
        model: checkpoint, run or exported folder; its aggregate ranks the candidates of a subset.
        output_dir: keeps the embeddings, from which a command that was stopped resumes.
        negatives: most negatives of a row, best first; in place of those that it has.
        first_rank: of a negative among the candidates that are not the query's own, from 0.
        last_rank: likewise; the first one that is too far.
        margin: how far a negative scores below the row's first own candidate at least.
    """
    if first_rank >= last_rank:
        raise ValueError(f"first_rank must be below last_rank, got {first_rank} and {last_rank}")
    with torchrun_group() as number:
        device = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
        embedder, without = Embedder.from_pretrained(model, device=device), []
        about = about_encoder(embedder.encoder, **vars(embedder.limit))
        keeper = Keeper(output_dir, lambda: about, replace=True)
        folder = MMEBDataModule(data_dir=data_dir).folder
        for name in chosen(None, find_train_subsets(folder), folder):
            subset = TrainSubset(folder, name)
            if subset.reader.source is not None:
                raise ValueError(f"{name} is a table of your own; mine reads and writes MMEB's layout.")
            task, cells = as_task(subset)
            query, candidate = (TaskSide(task, side, folder) for side in ("query", "candidate"))
            vectors = _embedded(embedder, keeper, query), _embedded(embedder, keeper, candidate)
            near = hard_negatives(*vectors, task, range(first_rank, last_rank), margin)
            if rank() > 0:
                continue
            sys.stdout.write(f"{name}: {sum(map(bool, near))} of {len(near)} rows have a negative\n")
            if any(near):
                lists = [[cells[each] for each in row[:negatives]] for row in near]
                order = neighbour_order(near, [row[0] for row in task.candidates_of_row])
                _write_split(subset, folder, lists, order.argsort())
            else:
                without.append(name)
    if without:
        advice = "take other ranks or a smaller margin"
        raise ValueError(
            f"no row has a negative in {', '.join(without)}, where nothing was written: {advice}"
        )


def _write_split(subset: TrainSubset, folder: Path, negatives: list[list[Side]], places: Any) -> None:
    """Write the split "mined" of a subset: its rows with these negatives and places among neighbours."""
    columns = dict(zip(MMEB_TRAIN, map(subset.table.column, ROLES), strict=True))
    cells = {key: column.take(subset.kept) for key, column in columns.items() if column is not None}
    for part, key in enumerate(MMEB_TRAIN[4:]):
        cells[key] = pa.array([[side[part] for side in row] for row in negatives], pa.list_(pa.string()))
    cells[NEIGHBOURS] = pa.array(places)
    with atomic_write(folder / "MMEB-train" / subset.subset / "mined-00000-of-00001.parquet") as unfinished:
        pq.write_table(pa.table(cells), unfinished)


def as_task(subset: TrainSubset) -> tuple[EvalTask, list[Side]]:
    """Return the unique queries and candidates of a subset, and the cells behind every candidate."""
    task, reader = EvalTask(Task(subset.subset, "retrieval", False), [], [], [], []), subset.reader
    places: dict[tuple[Side, Side], int] = {}
    distinct: dict[int, int] = {}  # the same picture may have two names
    sides: list[Side] = []
    for row in subset.kept.tolist():
        cells = reader.table[row]
        own = [(QUERY, side_of(cells, QUERY))]
        own += [(CANDIDATE, side) for side in reader.filled(row, CANDIDATE, cells)]
        for kind, side in (each for each in own if each not in places):
            read = reader.input(row, kind, side)
            if kind == QUERY:
                places[kind, side] = len(task.queries)
                task.queries.append(read)
                continue
            places[kind, side] = distinct.setdefault(identity(read), len(sides))
            if len(distinct) > len(sides):
                sides.append(side)
                task.candidates.append(read)
        task.query_of_row.append(places[own[0]])
        task.candidates_of_row.append([places[each] for each in own[1:]])
    return task, sides


def _embedded(embedder: Embedder, keeper: Keeper, rows: TaskSide) -> Tensor:
    """Return the aggregates of one side ``[rows, D]`` from its store; the processes write what it lacks."""
    about = {**rows.about, "num_rows": len(rows), "rows_per_shard": ROWS_PER_SHARD, "columns": [AGGREGATE]}
    finished = keeper.finished(rows, {**about, "images": embedder.images.settings})
    writer, first = keeper.writers[rows.name], rank() == 0
    missing = [shard for shard in range(writer.num_shards) if shard not in finished]
    for shard in tqdm(missing[rank() :: world_size()], desc=rows.name, unit="shard", disable=not first):
        numbers = writer.rows_of(shard)

        def where(place: int, numbers: range = numbers) -> str:
            return rows.where(numbers[place])

        options: dict[str, Any] = {"where": where, "show_progress": None if first else False}
        part = cast(Any, Subset)(rows, numbers)
        encoded = encode_rows(embedder.encoder, embedder.collator, part, **options)
        writer.write(shard, numbers, {AGGREGATE: encoded.embeddings}, {})
    gather_objects(None)  # wait until all are written
    return Store(writer.folder).column(AGGREGATE).to(embedder.device)


def hard_negatives(
    query_QD: Tensor, candidate_CD: Tensor, task: EvalTask, ranks: range, margin: float
) -> list[list[int]]:
    """Return what has these ranks and scores ``margin`` below each row's own; a query's own have no rank.

    Every process has all rows' candidates, and ranks those of its share.
    """
    own, found = defaultdict[int, set[int]](set), list[list[int]]()
    for query, candidates in zip(task.query_of_row, task.candidates_of_row, strict=True):
        own[query].update(candidates)
    share = range(rank(), len(task.query_of_row), world_size())
    for row in tqdm(share, desc=task.task.name, unit="row", disable=rank() > 0):
        query = task.query_of_row[row]
        score_C = candidate_CD @ query_QD[query]
        highest = score_C[task.candidates_of_row[row][0]] - margin
        score_C[list(own[query])] = -torch.inf
        best = score_C.topk(min(ranks.stop, len(score_C) - len(own[query]))).indices[ranks.start :]
        found.append(best[score_C[best] <= highest].tolist())
    near = list[list[int]]([[]]) * len(task.query_of_row)
    for number, part in enumerate(gather_objects(found)):
        near[number :: world_size()] = part
    return near


def neighbour_order(near: list[list[int]], own: list[int]) -> Any:
    """Return the rows in an order in which neighbours stand side by side, also where rows are left out of it.

    Row i has candidate ``own[i]`` and hard negatives ``near[i]``, best first. It is linked to the rows of its
    k-th negative with weight 1 / k. All rows, then each half of them, each quarter and so on are sorted by a
    value that starts as a row's place and becomes like its neighbours' (power iteration clustering). B3
    (arXiv 2505.11293) has METIS cut a graph without weights into clusters; weights and order are ours.
    """
    size, counts = len(own), [len(row) for row in near]
    row = np.concatenate([np.arange(size), np.repeat(np.arange(size), counts)])
    candidate, is_own = np.array([*own, *chain(*near)]), np.arange(len(row)) < size
    weight = np.concatenate([np.ones(size), *(1 / np.arange(1, 1 + count) for count in counts)])
    place = np.arange(size)
    for level in range(max(1, size.bit_length() - 2)):
        part = place * 2**level // size  # no link leaves its part
        keys = part[row] * (1 + candidate.max()) + candidate
        key = 2 * np.unique(keys, return_inverse=True)[1]  # and 1 more: its rows, and rows near it
        here = csr_array((weight, (row, key + is_own)), (size, key.max() + 2))
        there = csr_array((weight, (key + ~is_own, row)), here.shape[::-1])
        degree, value = here @ (there @ np.ones(size)) + 1e-9, place.astype(float)
        for _ in range(50):
            value -= (np.bincount(part, degree * value) / np.bincount(part, degree))[part]
            value += here @ (there @ value) / degree
        order = np.lexsort((value, part))
        place = order.argsort()
    return order
