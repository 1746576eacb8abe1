"""A LanceDB table made of the embeddings that ``predict`` wrote: approximate search, SQL conditions."""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch.nn.functional as F

from parallel_decoupling import search as searching
from parallel_decoupling.evaluation.score import similarities
from parallel_decoupling.evaluation.store import (
    METADATA_KEY,
    Store,
    Vectors,
    python_rows,
    to_cells,
    to_tensor,
)
from parallel_decoupling.files import atomic_write, locked
from parallel_decoupling.model.identity import check_seal, sealed
from parallel_decoupling.model.locations import located, portable
from parallel_decoupling.option_types import PositiveInt, checked
from parallel_decoupling.search import MAXSIM, Hit

TABLE = "items-{:05d}"  # name of a table by its number, which is higher than that of the table it replaces
TABLE_NAME = re.compile(r"items-(\d{5,})\.lance")
REFINED = 10  # items per hit that an approximate index scores again with the vectors themselves
ROWS_FOR_TRAINING = 256  # fewest items on which LanceDB trains an approximate index

IndexType = Literal["IVF_FLAT", "IVF_SQ", "IVF_PQ", "IVF_RQ"]
"""LanceDB's names: partitions of whole vectors, or of vectors in 8 bits, product codes or 1 bit a number."""


@checked()
def write_lance_index(embeddings: str, index_dir: str, index_type: IndexType | None = None) -> None:
    """Make a LanceDB index of embeddings.

    Args:
        embeddings: the folder that predict wrote; exact search needs nothing else.
        index_dir: gets the index; one that is there is replaced when the new one is complete.
        index_type: approximate search, by LanceDB's names; none compares with every item.
    """
    import lancedb.index

    store = Store(embeddings)
    if index_type is not None and len(store) < ROWS_FOR_TRAINING:
        raise ValueError(f"{index_type} needs at least {ROWS_FOR_TRAINING} items; leave out index_type")
    tables = _tables(store)
    first = next(tables)
    _check_fields(first, store)
    metadata = {METADATA_KEY: json.dumps(sealed(portable(store.metadata, index_dir)))}
    with locked(index_dir):
        old = table_dirs(index_dir)
        name = TABLE.format(max(old, default=0) + 1)
        with atomic_write(Path(index_dir, f"{name}.lance")) as unfinished:
            database = lancedb.connect(unfinished.parent)
            table = database.create_table(name, first.replace_schema_metadata(metadata))
            for rows in tables:
                table.add(rows)
            if index_type is not None:
                kind = getattr(lancedb.index, index_type.title().replace("_", ""))
                for column in (*store.columns, *([MAXSIM] if MAXSIM in first.column_names else [])):
                    table.create_index(column, config=kind(distance_type="cosine"))
        for folder in old.values():
            shutil.rmtree(folder)
    sys.stdout.write(f"{index_dir}: {len(store)} items with {', '.join(store.columns)}\n")


def table_dirs(index_dir: str | Path) -> dict[int, Path]:
    """Return the tables of ``write_lance_index`` in a folder by number, of which the highest counts."""
    import lancedb

    named = ((TABLE_NAME.fullmatch(folder.name), folder) for folder in Path(index_dir).glob("items-*"))
    tables = {int(match[1]): folder for match, folder in named if match}
    database: Any = lancedb.connect(index_dir) if tables else None

    def is_own(folder: Path) -> bool:
        try:
            return METADATA_KEY in (database.open_table(folder.stem).schema.metadata or {})
        except (ValueError, RuntimeError):
            return False

    return {number: tables[number] for number in sorted(tables) if is_own(tables[number])}


class LanceIndex:
    """Searches a table that ``write_lance_index`` wrote, by the aggregate, one path, or MaxSim.

    LanceDB finds the items, the scores are computed from the vectors as in exact search.
    """

    @checked()
    def __init__(self, index_dir: str | Path) -> None:
        import lancedb

        tables = table_dirs(index_dir)
        if not tables:
            raise ValueError(f"{index_dir} does not hold an index: write one with lightning index")
        self._folder, self._number = Path(index_dir), max(tables)
        self._table: Any = lancedb.connect(index_dir).open_table(TABLE.format(self._number))
        schema = self._table.schema
        content = json.loads(schema.metadata[METADATA_KEY])
        self.metadata: Mapping[str, Any] = located(check_seal(content, index_dir), index_dir)
        self.columns: tuple[str, ...] = tuple(self.metadata["columns"])
        self._fields = [name for name in schema.names if name not in (*self.columns, MAXSIM)]
        self.scorings = (*self.columns, *([MAXSIM] if MAXSIM in schema.names else []))

    def __len__(self) -> int:
        return int(self._table.count_rows())

    @checked()
    def search(
        self, queries: Vectors, top_k: PositiveInt, scoring: str, where: str | None = None
    ) -> list[list[Hit]]:
        """Find the best items of every query; see ``search.Index``."""
        if where is not None and ";" in re.sub("'[^']*'", "", where):  # LanceDB ignores what follows
            raise ValueError(f"where={where!r}: give one condition, without ;")
        paths = [name for name in searching.path_columns(self.columns) if name in queries]
        scored, hits = searching.compared(scoring, self.columns), []
        names = list(dict.fromkeys([*scored, *paths]))
        for number, query_ND in enumerate(searching.query_vectors(queries, scoring, self)):
            search = self._table.search(query_ND.squeeze(0).detach().numpy(), vector_column_name=scoring)
            search = search.distance_type("cosine").limit(min(top_k, len(self))).refine_factor(REFINED)
            search = search.select([*self._fields, *names, "_distance"])
            try:
                found = (search if where is None else search.where(f"({where})")).to_arrow()
            except (ValueError, RuntimeError) as error:
                if not table_dirs(self._folder).get(self._number):
                    raise ValueError(f"{self._folder} was replaced meanwhile: open it again") from error
                raise ValueError(f"LanceDB refuses the search (where={where!r}): {error}") from error
            vectors = {name: F.normalize(to_tensor(found[name]), dim=-1) for name in names}
            scores_K = similarities(query_ND[None], [vectors[name] for name in scored])[0]
            scores_K, order_K = scores_K.sort(descending=True, stable=True)
            rows = python_rows(found.select(self._fields).take(order_K.numpy()), self._folder)
            query = {name: queries[name][number] for name in paths}
            found_K = {name: vectors[name][order_K] for name in paths}
            hits.append(searching.make_hits(query, found_K, scores_K, rows))
        return hits


def _check_fields(table: pa.Table, store: Store) -> None:
    """Refuse a field whose name or type LanceDB cannot store or find, by a trial with each of them."""
    import lancedb

    column = store.columns[0]
    query_D = to_tensor(table[column])[0].numpy()
    for name in (name for name in table.column_names if name not in (*store.columns, MAXSIM)):
        try:
            one = table.select([name, column]).slice(0, 1)
            trial: Any = lancedb.connect("memory://").create_table("trial", one)
            trial.search(query_D, vector_column_name=column).select([name, "_distance"]).to_arrow()
        except (ValueError, RuntimeError) as error:
            found = f"{store.folder}, column {name!r} of {table.schema.field(name).type}"
            advice = "Embed the rows again with another name or type"
            raise ValueError(f"{found}: LanceDB does not take it ({error}). {advice}") from error


def _tables(store: Store) -> Iterator[pa.Table]:
    """Yield the rows of a store, with float32 vectors, and a column of all paths if there are several."""
    paths = searching.path_columns(store.columns)
    for batch in range(len(store.batch_sizes)):
        table = store.read(batch).replace_schema_metadata(None)
        vectors = {name: to_tensor(table[name]).numpy() for name in store.columns}
        for name, vectors_BD in vectors.items():
            table = table.set_column(table.column_names.index(name), name, to_cells(vectors_BD))
        if len(paths) > 1:
            paths_BND = np.stack([vectors[name] for name in paths], axis=1)
            ends = pa.array(np.arange(0, len(table) * len(paths) + 1, len(paths)), pa.int32())
            several = pa.ListArray.from_arrays(ends, to_cells(paths_BND.reshape(-1, paths_BND.shape[2])))
            table = table.append_column(MAXSIM, several)
        yield table
