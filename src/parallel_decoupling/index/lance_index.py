"""The index of the extra ``search``: LanceDB on disk, exact or approximate, multi-vector for MaxSim.

LanceDB finds a shortlist, by brute force over float32 or through an IVF index of float32, int8 (scalar) or
binary (RaBitQ) vectors; the scores of the hits are computed from the stored float32 vectors as everywhere.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from parallel_decoupling.index.filters import Filter, check_filter, to_sql
from parallel_decoupling.index.items import ID, check_new_ids, join_fields, prepare_items, vectors_of
from parallel_decoupling.index.protocol import Fields, Hit
from parallel_decoupling.index.scoring import aggregate, exact_scores, prepare_queries
from parallel_decoupling.index.settings import AGGREGATE, MAXSIM, SETTINGS_FILE, SUM, IndexSettings, Precision
from parallel_decoupling.index.torch_index import make_hits

if TYPE_CHECKING:
    from lancedb.table import LanceTable
    from typing_extensions import Self

TABLE = "items"
ROWS_FOR_TRAINING = 256
"""With fewer items an approximate index has nothing to train on; LanceDB then compares with every item."""


class LanceIndex:
    """Keeps the items in a LanceDB table; memory does not grow with them.

    Each scoring has a column of its own name, so that a search is one LanceDB search: the vectors of every
    path, of the aggregate, of the concatenated paths (``sum``), and a multi-vector of all paths
    (``maxsim``); together ``3 N + 1`` vectors per item on disk (``3 N`` without an aggregate of its own).

    Args:
        index_dir: where the table is written from the first ``add`` on; by default a temporary folder
            until ``save``.
        approximate: look at the partitions nearest to the query only; built by ``save``.
        precision: of the approximate comparison; ``int8`` and ``binary`` need ``approximate``.
        oversample: candidates per hit that are scored again in float32.
        path_names: of the N paths; by default ``path_0``, ``path_1``, ...
        path_weights: of the aggregate; by default equal.
        metadata: any JSON, kept with the index.
        concatenated: whether the model's aggregate is the concatenated paths (``aggregation: concat``).

    Raises:
        ValueError: a setting is not usable, or LanceDB is not installed.
    """

    def __init__(
        self,
        index_dir: str | Path | None = None,
        approximate: bool = False,
        precision: Precision = "float32",
        oversample: int = 4,
        path_names: Sequence[str] = (),
        path_weights: Sequence[float] = (),
        metadata: Mapping[str, Any] | None = None,
        concatenated: bool = False,
    ) -> None:
        if precision != "float32" and not approximate:
            raise ValueError(
                f"precision {precision!r} of the kind lance is approximate; "
                "set approximate or take the kind torch"
            )
        self._settings = IndexSettings(
            "lance",
            tuple(path_names),
            tuple(path_weights),
            precision=precision,
            oversample=oversample,
            approximate=approximate,
            metadata=metadata or {},
            concatenated=concatenated,
        )
        self._temporary = None
        if index_dir is None:
            self._temporary = tempfile.TemporaryDirectory()  # lives as long as the index
            index_dir = self._temporary.name
        self._folder = Path(index_dir)
        self._database = _lancedb().connect(self._folder)
        self._table: LanceTable | None = None
        self._fields_schema: pa.Schema | None = None
        self._ids: set[str] | None = set()  # None: not read yet

    @property
    def settings(self) -> IndexSettings:
        """See ``Index``."""
        return self._settings

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count_rows()

    def add(self, ids: Sequence[Any], embeddings: Tensor, fields: Fields | None = None) -> None:
        """See ``Index``. Written at once; an approximate index knows the items from the next ``save`` on."""
        settings, embeddings_BND, table = prepare_items(ids, embeddings, fields, self._settings)
        if settings.precision == "binary" and settings.dim % 8:
            raise ValueError(f"LanceDB's binary index needs dimensions divisible by 8, got {settings.dim}")
        if self._ids is None:
            self._ids = set(self._opened().search().select([ID]).limit(len(self)).to_arrow()[ID].to_pylist())
        new_ids = table[ID].to_pylist()
        check_new_ids(new_ids, self._ids)
        if not new_ids:
            return
        if self._table is None:
            self._start_table(_with_vectors(table, embeddings_BND, settings))
        else:
            joined = join_fields(self._schema().empty_table(), table)
            if joined.schema != self._schema():
                raise ValueError(
                    "the new items have fields of other types than the index has: "
                    f"{_types(joined.schema)}; not {_types(self._schema())}"
                )
            self._table.add(_with_vectors(joined, embeddings_BND, settings))
        self._settings = settings
        self._ids.update(new_ids)

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
        if filter is not None:
            check_filter(filter, self._schema())
        return [self._search_one(query_ND, top_k, scoring, filter) for query_ND in queries_QND]

    def save(self, folder: str | Path) -> None:
        """See ``Index``. An approximate index is trained here."""
        table = self._opened()
        folder = Path(folder)
        self._settings.check_folder(folder)
        if folder.resolve() != self._folder.resolve():
            copy = folder / f"{TABLE}.lance"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self._folder / f"{TABLE}.lance", copy)
            table = _lancedb().connect(folder).open_table(TABLE)
        if self._settings.approximate and table.count_rows() >= ROWS_FOR_TRAINING:
            for column in _vector_columns(self._settings):
                table.create_index(column, config=_ivf(self._settings.precision))
        self._settings.to_folder(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """See ``Index``."""
        settings = IndexSettings.from_folder(folder, "lance")
        if not Path(folder, f"{TABLE}.lance").is_dir():
            raise ValueError(f"{folder}: the index is damaged (no {TABLE}.lance); write it again")
        index = cls(folder, settings.approximate, settings.precision)
        index._settings, index._ids = settings, None
        index._table = index._database.open_table(TABLE)
        return index

    def _opened(self) -> LanceTable:
        if self._table is None:
            raise ValueError("the index is empty; add items before using it")
        return self._table

    def _start_table(self, rows: pa.Table) -> None:
        """Write the first items; what the folder held before is gone."""
        self._settings.check_folder(self._folder)
        (self._folder / SETTINGS_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._folder / f"{TABLE}.lance", ignore_errors=True)
        self._table = self._database.create_table(TABLE, rows)

    def _schema(self) -> pa.Schema:
        """Ids and fields."""
        if self._fields_schema is None:
            vectors = _vector_columns(self._settings)
            fields = [field for field in self._opened().schema if field.name not in vectors]
            self._fields_schema = pa.schema(fields)
        return self._fields_schema

    def _search_one(self, query_ND: Tensor, top_k: int, scoring: str, conditions: Filter | None) -> list[Hit]:
        settings = self._settings
        single = settings.num_paths == 1
        column = settings.path_names[0] if single else scoring
        names = self._schema().names
        vectors = settings.path_names[0] if single else MAXSIM
        search = self._opened().search(_query_vector(query_ND, scoring, settings), vector_column_name=column)
        search = search.distance_type("cosine").limit(top_k * settings.oversample)
        if conditions is not None:
            search = search.where(to_sql(conditions))
        found = search.select([*names, vectors, "_distance"]).to_arrow()
        items_KND = _tensor(found[vectors]).view(-1, settings.num_paths, settings.dim)
        scores_K, similarities_KN = exact_scores(query_ND, items_KND, scoring, settings)
        order = scores_K.argsort(descending=True, stable=True)[:top_k]
        table = found.select(names).take(pa.array(order.numpy()))
        return make_hits(table, scores_K[order], similarities_KN[order], scoring, settings)


def _vector_columns(settings: IndexSettings) -> tuple[str, ...]:
    return settings.columns if settings.num_paths == 1 else (*settings.columns, SUM, MAXSIM)


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _with_vectors(table: pa.Table, embeddings_BND: Tensor, settings: IndexSettings) -> pa.Table:
    """Append a column of vectors per scoring."""
    for name, vectors_BD in vectors_of(embeddings_BND, settings).items():
        table = table.append_column(name, _fixed_size_lists(vectors_BD))
    if settings.num_paths == 1:
        return table
    table = table.append_column(SUM, _fixed_size_lists(embeddings_BND.flatten(1)))
    rows, paths, _ = embeddings_BND.shape
    starts = pa.array(np.arange(0, rows * paths + 1, paths), pa.int32())
    multi = pa.ListArray.from_arrays(starts, _fixed_size_lists(embeddings_BND.flatten(0, 1)))
    return table.append_column(MAXSIM, multi)


def _fixed_size_lists(vectors_BD: Tensor) -> pa.FixedSizeListArray:
    numbers = pa.array(vectors_BD.contiguous().view(-1).numpy())
    return pa.FixedSizeListArray.from_arrays(numbers, vectors_BD.shape[1])


def _tensor(column: pa.ChunkedArray) -> Tensor:
    """All numbers of a column of vectors or of multi-vectors."""
    array = column.combine_chunks()
    while not pa.types.is_floating(array.type):
        array = array.flatten()
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())


def _query_vector(query_ND: Tensor, scoring: str, settings: IndexSettings) -> np.ndarray:
    """What LanceDB compares with the scoring's column."""
    if len(query_ND) == 1:
        return query_ND[0].numpy()
    if scoring in settings.path_names:
        return query_ND[settings.path_names.index(scoring)].numpy()
    if scoring == AGGREGATE:
        return aggregate(query_ND, settings.path_weights).numpy()
    return (query_ND.flatten() if scoring == SUM else query_ND).numpy()


def _ivf(precision: Precision) -> Any:
    from lancedb.index import IvfFlat, IvfRq, IvfSq

    kind = {"float32": IvfFlat, "int8": IvfSq, "binary": IvfRq}[precision]
    return kind(distance_type="cosine")


def _lancedb() -> ModuleType:
    try:
        import lancedb
    except ImportError as error:
        raise ValueError("the kind lance needs LanceDB: pip install 'parallel-decoupling[search]'") from error
    return lancedb
