"""Embeddings of ``predict`` on disk: a Parquet file per shard, in the order of the source.

Here: ``EmbeddingWriter``, its progress bar, and what a file says about itself (``docs/embedding_files.md``).
Elsewhere on purpose: which rows are a shard and who does it (``data.row_loaders``).
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.row_loaders import RowBatch, RowBatches, RowLoader, Shards
from parallel_decoupling.data.rows import AGGREGATE, RowSource
from parallel_decoupling.distributed import gather_objects, rank
from parallel_decoupling.index.searcher import PATH_HASHES
from parallel_decoupling.model.identity import path_hashes, rows_hash

if TYPE_CHECKING:
    from parallel_decoupling.training.evaluator import EvaluatedEncoder

METADATA_KEY = b"parallel_decoupling"
BAD_ROWS_FILE = "bad_rows.jsonl"
FILE_NAME = re.compile(r"embeddings-(\d{5,})\.parquet")
SAME_IN_ALL_FILES = (
    "source_sha256",
    "model_sha256",
    "columns",
    "dtype",
    "instruction",
    "rows_per_shard",
)
"""Metadata that a file of an earlier run must share with this one."""
HARMLESS_WARNINGS = ("Couldn't infer the batch indices", "Total length of `RowLoader` across ranks is zero")
"""Of Lightning, about loaders of our own, and about a run with nothing left to do."""


class EmbeddingWriter(BasePredictionWriter):
    """Writes the embeddings of ``predict_source``, and goes on where a killed run stopped.

    A file appears complete or not at all. Files that are there are kept if they are of the same source, model
    and settings. Without ``predict_source`` the writer does nothing.

    Args:
        output_dir: Folder for embeddings-00000.parquet, ... and bad_rows.jsonl; made if it is not there.
        dtype: Of the embeddings in the files.
    """

    def __init__(
        self, output_dir: str | None = None, dtype: Literal["float32", "float16"] = "float32"
    ) -> None:
        super().__init__("batch")
        self.output_dir, self.dtype = output_dir, dtype
        self._metadata: dict[str, Any] = {}
        self._shards, self._finished = Shards(0, 1), frozenset[int]()
        self._rows: list[int] = []
        self._bad_rows: dict[int, str] = {}
        self._vectors: dict[str, list[Tensor]] = {}
        self._began: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the data module which shards are done.

        Raises:
            ValueError: rows to embed and no folder for them, or the reverse.
        """
        data: Any = getattr(trainer, "datamodule", None)
        source, self._metadata = getattr(data, "predict_source", None), {}
        if stage != "predict" or (source is None and self.output_dir is None):
            return
        if source is None or self.output_dir is None:
            raise ValueError(
                "predict_source (what to embed) and the writer's output_dir (where to) belong together: give "
                "--data.predict_source and --writer.output_dir, or none for the evaluation tasks."
            )
        for message in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        module = cast("EvaluatedEncoder", pl_module)
        data.finished_shards = lambda rows, shards: self._start(trainer, module, rows, shards)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the embeddings of a batch, and write the shard that ends with it."""
        if not isinstance(batch, RowBatch) or batch.place.shard is None or self.output_dir is None:
            return
        self._rows += batch.rows
        self._bad_rows |= batch.bad_rows
        for name, vectors in prediction.items():
            self._vectors.setdefault(name, []).append(vectors[: len(batch.rows)].float().cpu())
        if batch.place.last:
            loader: RowLoader = cast(Any, trainer).predict_dataloaders
            self._write(batch.place.shard, loader.batches)
            self._rows, self._bad_rows, self._vectors = [], {}, {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """When all processes are done, write ``bad_rows.jsonl`` and say what there is."""
        if stage != "predict" or not self._metadata:
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._finish()

    def _start(
        self, trainer: Trainer, module: EvaluatedEncoder, rows: RowBatches, shards: Shards
    ) -> Collection[int]:
        """Describe this run; find the shards that are done, on all processes before one writes."""
        assert self.output_dir is not None
        folder, self._shards = Path(self.output_dir), shards
        self._rows, self._bad_rows, self._vectors = [], {}, {}
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = trainer.ckpt_path
        self._metadata = {
            "model": None if checkpoint is None else str(Path(checkpoint).resolve()),
            "model_sha256": module.embedding_hash(),
            PATH_HASHES: path_hashes(module.encoder),
            "num_paths": module.encoder.num_paths,
            "columns": rows.columns,
            "dtype": self.dtype,
            "instruction": rows.instruction,
            "source": str(rows.source.path.resolve()),
            "source_sha256": rows_hash(_identified(rows.source)),
            "image_dir": str(rows.source.image_dir),
            "num_rows": len(rows.source),
            "rows_per_shard": shards.rows_per_shard,
            "num_shards": len(shards),
        }
        if rank() == 0:
            for unfinished in folder.glob(".embeddings-*.unfinished"):
                unfinished.unlink()
        there = set()
        for file in folder.iterdir():
            if found := FILE_NAME.fullmatch(file.name):
                self._check(file)
                there.add(int(found[1]))
        self._finished = frozenset(gather_objects(there)[0])
        if self._finished:
            rank_zero_info(f"{folder}: {len(self._finished)} of {len(shards)} files are there and kept.")
        return self._finished

    def _check(self, file: Path) -> None:
        """Compare a file of an earlier run with what this run would write."""
        found = read_metadata(file)
        wanted = json.loads(json.dumps(self._metadata))
        for name in SAME_IN_ALL_FILES:
            if found.get(name) != wanted[name]:
                raise ValueError(
                    f"{file} was written with {name} {found.get(name)!r}, not {wanted[name]!r}. Give another "
                    "writer.output_dir, or empty this one."
                )

    def _write(self, shard: int, batches: RowBatches) -> None:
        """Write one file: beside its place first, so that a killed run leaves no half of it there."""
        order = np.argsort(self._rows)
        table = batches.source.columns([self._rows[place] for place in order])
        fields = table.column_names
        for name in batches.columns:
            numbers = torch.cat(self._vectors[name]).numpy()[order].astype(self.dtype)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])
            table = table.append_column(name, vectors)
        ids = batches.source.ids
        bad_rows = [
            {"row": row, "id": ids[row].as_py(), "reason": reason}
            for row, reason in sorted(self._bad_rows.items())
        ]
        first = self._shards.rows(shard).start
        own = {**self._metadata, "shard": shard, "first_row": first, "bad_rows": bad_rows}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(own)})
        file = self._file(shard)
        unfinished = file.with_name(f".{file.stem}.{rank()}.unfinished")
        pq.write_table(table, unfinished, use_dictionary=fields)
        unfinished.replace(file)

    def _file(self, shard: int) -> Path:
        return Path(cast(str, self.output_dir)) / f"embeddings-{shard:05d}.parquet"

    def _finish(self) -> None:
        done = [shard for shard in range(len(self._shards)) if self._file(shard).is_file()]
        bad_rows = [row for shard in done for row in read_metadata(self._file(shard))["bad_rows"]]
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in bad_rows)
        bad_rows_file = self._file(0).with_name(BAD_ROWS_FILE)
        bad_rows_file.write_text(lines, encoding="utf-8")
        new = sum(len(self._shards.rows(shard)) for shard in done if shard not in self._finished)
        rows = sum(len(self._shards.rows(shard)) for shard in done)
        speed = ""
        if new and self._began is not None:
            speed = f", {new:,} of them now at {new / (time.perf_counter() - self._began):,.1f} per second"
        message = [f"{self.output_dir}: {rows - len(bad_rows):,} rows embedded in {len(done)} files{speed}."]
        if bad_rows:
            message.append(
                f"{len(bad_rows):,} rows could not be embedded: {bad_rows_file} says which and why."
            )
        if len(done) < len(self._shards):
            message.append(f"{len(self._shards) - len(done)} files are missing: run the same command again.")
        rank_zero_info(" ".join(message))


class RowProgressBar(TQDMProgressBar):
    """Lightning's bar counting rows in ``predict``: rows of the main process done, rows/s, time left."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Begin with the rows that this process is going to embed."""
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, *args)
        bar, loader = self.predict_progress_bar, cast(Any, trainer).predict_dataloaders
        if batch_idx == 0 and isinstance(loader, RowLoader):
            bar.unit, bar.total = "row", loader.plan.num_rows
            bar.set_description("Embedding")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count the rows of the batch."""
        if isinstance(batch, RowBatch):
            self.predict_progress_bar.update(len(batch.place.rows))
        else:
            super().on_predict_batch_end(trainer, pl_module, outputs, batch, *args)


def row_embeddings(encoder: Any, batch: RowBatch) -> dict[str, Tensor]:
    """The wanted columns of a batch: paths ``[B, D]``, the aggregate ``[B, D']``.

    A path that is not wanted is not computed, unless the aggregate needs it.
    """
    paths = [int(name.removeprefix("path_")) for name in batch.columns if name != AGGREGATE]
    if AGGREGATE not in batch.columns:
        embeddings_BND = encoder(batch.inputs, paths)
        return {f"path_{path}": embeddings_BND[:, place] for place, path in enumerate(paths)}
    embeddings_BND = encoder(batch.inputs)
    columns = {AGGREGATE: encoder.aggregate(embeddings_BND)}
    return columns | {f"path_{path}": embeddings_BND[:, path] for path in paths}


def read_metadata(file: Path) -> dict[str, Any]:
    """What a file of embeddings says about itself.

    Raises:
        ValueError: it is no such file.
    """
    try:
        metadata = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {file}: {error}. Delete it and run again.") from error
    return cast(dict[str, Any], json.loads(metadata.get(METADATA_KEY, b"{}")))


def _identified(source: RowSource) -> Iterator[RawInput]:
    """Yield the rows of a source with all their fields as text."""
    for row in range(len(source)):
        fields = json.dumps(source.columns([row]).to_pylist()[0], sort_keys=True, default=str)
        image = source.images[row].as_py()
        yield RawInput(fields, (str(source.image_dir / image),) if image else ())
