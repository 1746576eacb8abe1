"""Hard negatives of training rows: candidates that a model ranks high for a query, but below its own."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from parallel_decoupling.commands import load_model
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.readers import MMEB_TRAIN, TrainSubset
from parallel_decoupling.data.row_reader import CANDIDATE, QUERY, Side, side_of
from parallel_decoupling.data.row_sources import TaskSide
from parallel_decoupling.data.tasks import ROLES, EvalTask, Task, find_train_subsets
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode_rows
from parallel_decoupling.evaluation.store import AGGREGATE, Keeper, Store
from parallel_decoupling.files import atomic_write
from parallel_decoupling.model.identity import about_encoder, encoder_identity
from parallel_decoupling.option_types import NonNegativeInt, PositiveInt, checked

ROWS_PER_SHARD = 4096
ROWS_AT_ONCE = 256


@checked()
def mine(
    data_dir: str,
    model: str,
    subsets: Sequence[str] | None = None,
    split: str = "original",
    to: str = "mined",
    negatives: PositiveInt = 1,
    first_rank: NonNegativeInt = 0,
    last_rank: PositiveInt = 100,
    margin: float = 0.0,
    output_dir: str = "mined",
) -> None:
    """Write hard negatives for training rows in MMEB's layout, as a split beside the one that is read.

    Args:
        data_dir: folder with MMEB-train, or mini-mmeb.
        model: checkpoint, run or exported folder, whose aggregate ranks the candidates of a subset.
        subsets: names of training subsets; none takes all.
        split: what is read.
        to: what is written, for data.split; its negatives replace those of the rows.
        negatives: most negatives of a row.
        first_rank: of a negative among the candidates that are not the query's own, from 0.
        last_rank: likewise; this rank itself is left out.
        margin: by how much the query's own candidate must score above a negative at least.
        output_dir: keeps the embeddings; a run that was stopped goes on.
    """
    folder, embedder = MMEBDataModule(data_dir=data_dir).folder, load_model(model)
    for name in subsets or find_train_subsets(folder, split):
        subset = TrainSubset(folder, name, split)
        task, sides = as_task(subset)
        query_QD, candidate_CD = (
            embedded(embedder, TaskSide(task, side, folder), Path(output_dir)) for side in ("query", "candidate")
        )
        own = [row[0] for row in task.candidates_of_row]
        ranks = range(first_rank, last_rank)
        found = hard_negatives(query_QD, candidate_CD, task.query_of_row, own, ranks, margin, negatives)
        file = folder / "MMEB-train" / name / f"{to}-00000-of-00001.parquet"
        columns = {theirs: subset.table.column(ours) for ours, theirs in zip(ROLES, MMEB_TRAIN, strict=True)}
        kept = {key: column.take(subset.kept) for key, column in columns.items() if column is not None}
        for key, part in zip(MMEB_TRAIN[4:], (0, 1), strict=True):
            kept[key] = pa.array([[sides[each][part] for each in row] for row in found], pa.list_(pa.string()))
        with atomic_write(file) as unfinished:
            pq.write_table(pa.table(kept), unfinished)
        share = sum(map(bool, found)) / len(found)
        sys.stdout.write(f"{file}: {len(found)} rows, {100 * share:.0f} % with a negative\n")


def as_task(subset: TrainSubset) -> tuple[EvalTask, list[Side]]:
    """Return the unique queries and candidates of a subset, and the cells behind every candidate."""
    reader, queries, candidates = subset.reader, dict[Side, Any](), dict[Side, Any]()
    if reader.source is not None:
        raise ValueError(f"{reader.table.owner} is a table of your own; mine reads MMEB's layout")
    task = EvalTask(Task(subset.subset, "retrieval", False), [], [], [], [])
    for row in map(int, subset.kept):
        cells = reader.table[row]
        query, own = side_of(cells, QUERY), reader.filled(row, CANDIDATE, cells)
        for side, seen, kind in [(query, queries, QUERY), *((each, candidates, CANDIDATE) for each in own)]:
            seen.setdefault(side, reader.input(row, kind, side))
        task.query_of_row.append(list(queries).index(query))
    return task, list(candidates)
