"""The callback of ``predict``: from what ``PDFEmbedder`` embeds to the shards of a store."""

from __future__ import annotations

import json
import time
import warnings
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.distributed import gather_objects
from parallel_decoupling.evaluation.store import AGGREGATE, Keeper, path_column, read_metadata, shard_files
from parallel_decoupling.training.module import PDFEmbedder

BAD_ROWS_FILE = "bad_rows.jsonl"
HARMLESS_WARNINGS = ("Couldn't infer the batch indices", "Total length of .* across ranks is zero")
"""Warnings of Lightning about loaders that are not torch's."""


class EmbeddingWriter(Callback):
    """Writes what ``predict`` embeds, shard by shard; a killed run resumes with the shards that are missing.

    Args:
        data: the data module whose rows are embedded.
        keeper: of the stores; the same that ``data.connect`` was given.
    """

    def __init__(self, data: MMEBDataModule, keeper: Keeper) -> None:
        self.data, self.keeper = data, keeper

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        for message in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        self._begin_shard()
        self._began, self._num_embedded = time.perf_counter(), 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the embeddings of a batch, and write the shard that ends with it."""
        if batch.place.shard is None:
            return
        rows = self.data.rows[dataloader_idx]
        self._rows += batch.rows
        self._bad_rows |= batch.bad_rows
        paths = range(outputs.shape[1]) if batch.paths is None else batch.paths
        embeddings_BND = outputs[: len(batch.rows)]
        vectors = {path_column(path): embeddings_BND[:, place] for place, path in enumerate(paths)}
        columns = self.keeper.writers[rows.name].about["columns"]
        if AGGREGATE in columns:
            vectors[AGGREGATE] = cast(PDFEmbedder, pl_module).encoder.aggregate(embeddings_BND)
        for name in columns:
            self._vectors.setdefault(name, []).append(vectors[name].float().cpu())
        if batch.place.last:
            whole = {name: torch.cat(parts) for name, parts in self._vectors.items()}
            self.keeper.write(rows, batch.place.shard, self._rows, whole, self._bad_rows)
            self._num_embedded += len(self._rows)
            self._begin_shard()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When all processes are done, write ``bad_rows.jsonl`` and say what there is."""
        trainer.strategy.barrier()
        seconds = time.perf_counter() - self._began
        num_embedded = sum(gather_objects(self._num_embedded))
        if not trainer.is_global_zero:
            return
        missing, num_rows, bad_rows = 0, 0, []
        for writer in self.keeper.writers.values():
            there = shard_files(writer.folder)
            missing += writer.num_shards - len(there)
            num_rows += sum(len(writer.rows_of(shard)) for shard in there)
            bad_rows += [row for file in there.values() for row in read_metadata(file)["bad_rows"]]
        bad_rows_file = self.keeper.root / BAD_ROWS_FILE
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in bad_rows)
        bad_rows_file.write_text(lines, encoding="utf-8")
        speed = f"{num_embedded:,} of them now at {num_embedded / seconds:,.1f} per second"
        message = f"{self.keeper.root}: {num_rows - len(bad_rows):,} rows embedded, {speed}."
        if bad_rows:
            message += f" {len(bad_rows):,} rows could not be embedded: {bad_rows_file} says which and why."
        if missing:
            message += f" {missing} files are missing: run the same command again."
        rank_zero_info(message)

    def _begin_shard(self) -> None:
        self._rows: list[int] = []
        self._bad_rows: dict[int, str] = {}
        self._vectors: dict[str, list[Tensor]] = {}
