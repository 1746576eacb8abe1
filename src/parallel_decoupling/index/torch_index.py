"""The built-in index: exact, in memory or mapped from the disk, safetensors and Parquet.

With int8 or binary precision a search compares codes first and scores a shortlist again in float32, so
that a saved index reads the codes and a few rows of the float32 vectors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel_decoupling.index.filters import Filter, check_filter, to_arrow
from parallel_decoupling.index.items import ID, check_new_ids, join_fields, prepare_items, vectors_of
from parallel_decoupling.index.protocol import Fields, Hit
from parallel_decoupling.index.quantization import QUANTIZERS, Codes
from parallel_decoupling.index.scoring import exact_scores, prepare_queries, scores
from parallel_decoupling.index.settings import IndexSettings, Precision

if TYPE_CHECKING:
    from typing_extensions import Self

VECTORS_FILE, CODES_FILE, FIELDS_FILE = "vectors.safetensors", "codes.safetensors", "fields.parquet"
ROWS_AT_ONCE = 16384


class TorchIndex:
    """Compares every query with every item that passes the filter.

    Args:
        precision: of the first comparison; ``float32`` is exact.
        oversample: int8 and binary score the best ``top_k * oversample`` again in float32.
        path_names: of the N paths; by default ``path_0``, ``path_1``, ...
        path_weights: of the aggregate; by default equal.
        metadata: any JSON, kept with the index.
        concatenated: whether the model's aggregate is the concatenated paths (``aggregation: concat``).

    Raises:
        ValueError: a setting is not usable.
    """

    def __init__(
        self,
        precision: Precision = "float32",
        oversample: int = 4,
        path_names: Sequence[str] = (),
        path_weights: Sequence[float] = (),
        metadata: Mapping[str, Any] | None = None,
        concatenated: bool = False,
    ) -> None:
        self._settings = IndexSettings(
            "torch",
            tuple(path_names),
            tuple(path_weights),
            precision=precision,
            oversample=oversample,
            metadata=metadata or {},
            concatenated=concatenated,
        )
        self._quantizer = QUANTIZERS[precision]
        self._batches: list[dict[str, Codes]] = []
        self._fields: pa.Table | None = None
        self._ids: set[str] = set()

    @property
    def settings(self) -> IndexSettings:
        """See ``Index``."""
        return self._settings

    def __len__(self) -> int:
        return 0 if self._fields is None else self._fields.num_rows

    def add(self, ids: Sequence[Any], embeddings: Tensor, fields: Fields | None = None) -> None:
        """See ``Index``."""
        settings, embeddings_BND, table = prepare_items(ids, embeddings, fields, self._settings)
        if self._fields is not None and not self._ids:
            self._ids = set(self._fields[ID].to_pylist())
        new_ids = table[ID].to_pylist()
        check_new_ids(new_ids, self._ids)
        joined = join_fields(self._fields, table)
        if not new_ids:
            return
        self._settings, self._fields = settings, joined
        self._ids.update(new_ids)
        vectors = vectors_of(embeddings_BND, settings)
        batch: dict[str, Codes] = {name: (column.contiguous(),) for name, column in vectors.items()}
        if settings.precision != "float32":
            batch |= {_code(name): self._quantizer.encode(column) for name, column in vectors.items()}
        self._batches.append(batch)

    def search(
        self,
        queries: Tensor,
        top_k: int = 10,
        scoring: str = "aggregate",
        filter: Filter | None = None,
    ) -> list[list[Hit]]:
        """See ``Index``."""
        queries_QND = prepare_queries(queries, top_k, scoring, self._settings)
        scoring = self._settings.compared(scoring)
        rows = None if filter is None else self._matching_rows(filter)
        found_QK = self._shortlist(queries_QND, top_k, scoring, rows)
        return [
            self._hits(query_ND, found_K, top_k, scoring)
            for query_ND, found_K in zip(queries_QND, found_QK, strict=True)
        ]

    def save(self, folder: str | Path) -> None:
        """See ``Index``."""
        if self._fields is None:
            raise ValueError("the index is empty; add items before saving it")
        folder = Path(folder)
        self._settings.check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns = self._columns()
        _save_tensors({name: columns[name] for name in self._settings.columns}, folder / VECTORS_FILE)
        (folder / CODES_FILE).unlink(missing_ok=True)
        if self._settings.precision != "float32":
            codes = {name: columns[_code(name)] for name in self._settings.columns}
            _save_tensors(codes, folder / CODES_FILE)
        pq.write_table(self._fields, folder / FIELDS_FILE)
        self._settings.to_folder(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """See ``Index``. The tensors stay on the disk and are read where a search needs them."""
        folder = Path(folder)
        settings = IndexSettings.from_folder(folder, "torch")
        index = cls(settings.precision)
        index._settings = settings
        try:
            index._fields = pq.read_table(folder / FIELDS_FILE)
            batch = _load_tensors(folder / VECTORS_FILE)
            if settings.precision != "float32":
                codes = _load_tensors(folder / CODES_FILE)
                batch |= {_code(name): code for name, code in codes.items()}
        except (OSError, pa.ArrowInvalid, SafetensorError) as error:
            raise ValueError(
                f"{folder}: the index is incomplete or damaged ({error}); write it again"
            ) from error
        index._batches = [batch]
        return index

    def _columns(self) -> dict[str, Codes]:
        """All items' vectors and codes by column; joins what was added since the last call."""
        if len(self._batches) > 1:
            joined = {}
            for name in self._batches[0]:
                parts = zip(*(batch[name] for batch in self._batches), strict=True)
                joined[name] = tuple(torch.cat(part) for part in parts)
            self._batches = [joined]
        return self._batches[0]

    def _matching_rows(self, conditions: Filter) -> Tensor:
        assert self._fields is not None
        check_filter(conditions, self._fields.schema)
        table = self._fields.select(list(conditions))
        numbered = table.append_column("_row", pa.array(np.arange(len(self))))
        return torch.from_numpy(numbered.filter(to_arrow(conditions))["_row"].to_numpy().copy())

    def _shortlist(self, queries_QND: Tensor, top_k: int, scoring: str, rows: Tensor | None) -> Tensor:
        """Row numbers ``[Q, K']`` of the best items by codes, K' as far as there are items."""
        columns = self._columns()
        exact = self._settings.precision == "float32"
        wanted = top_k * (1 if exact else self._settings.oversample)
        count = len(self) if rows is None else len(rows)
        best_QK = queries_QND.new_empty(len(queries_QND), 0)
        found_QK = torch.empty(len(queries_QND), 0, dtype=torch.int64)
        for start in range(0, count, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, count)
            chosen: Any = slice(start, stop) if rows is None else rows[start:stop]

            def similarity(column: str, query_QD: Tensor, chosen: Any = chosen) -> Tensor:
                name = column if column in columns else self._settings.path_names[0]
                codes = columns[name if exact else _code(name)]
                return self._quantizer.similarity(query_QD, tuple(part[chosen] for part in codes))

            numbers = torch.arange(start, stop) if rows is None else chosen
            scores_QC = scores(queries_QND, scoring, self._settings, similarity)
            best_QK = torch.cat([best_QK, scores_QC], dim=1)
            found_QK = torch.cat([found_QK, numbers.expand(len(queries_QND), -1)], dim=1)
            best_QK, kept = best_QK.topk(min(wanted, best_QK.shape[1]), dim=1)
            found_QK = found_QK.gather(1, kept)
        return found_QK

    def _hits(self, query_ND: Tensor, rows_K: Tensor, top_k: int, scoring: str) -> list[Hit]:
        assert self._fields is not None
        columns = self._columns()
        items_KND = torch.stack([columns[name][0][rows_K] for name in self._settings.path_names], dim=1)
        scores_K, similarities_KN = exact_scores(query_ND, items_KND, scoring, self._settings)
        order = scores_K.argsort(descending=True, stable=True)[:top_k]
        table = self._fields.take(pa.array(rows_K[order].numpy()))
        return make_hits(table, scores_K[order], similarities_KN[order], scoring, self._settings)


def make_hits(
    table: pa.Table, scores_K: Tensor, similarities_KN: Tensor, scoring: str, settings: IndexSettings
) -> list[Hit]:
    """Hits from rows of ids and fields, in their order."""
    names = settings.path_names if similarities_KN.shape[1] == settings.num_paths else (scoring,)
    hits = []
    for row, score, similarities in zip(
        table.to_pylist(), scores_K.tolist(), similarities_KN.tolist(), strict=True
    ):
        hits.append(Hit(row.pop(ID), score, dict(zip(names, similarities, strict=True)), row))
    return hits


def _code(column: str) -> str:
    return f"{column}/code"


def _save_tensors(columns: Mapping[str, Codes], file: Path) -> None:
    """Write tensors; an open index that maps the old file keeps it."""
    tensors = {f"{name}.{part}": tensor for name, code in columns.items() for part, tensor in enumerate(code)}
    unfinished = file.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    os.replace(unfinished, file)


def _load_tensors(file: Path) -> dict[str, Codes]:
    columns: dict[str, Codes] = {}
    with safe_open(file, framework="pt") as tensors:
        for key in sorted(tensors.keys(), key=lambda key: int(key.rpartition(".")[2])):
            name = key.rpartition(".")[0]
            columns[name] = (*columns.get(name, ()), tensors.get_tensor(key))
    return columns
