"""A folder of embeddings: a file that is not the one that was written in its place is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from parallel_decoupling.evaluation.store import METADATA_KEY, Keeper, Store, StoreWriter
from tests.support.stores import TableRows, save_store, vectors

NAMES = [f"embeddings-{shard:05d}.parquet" for shard in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 rows in three shards, with a text each, a structure, and a number whose name has a dot."""
    fields = {"text": [f"word {row}" for row in range(20)], "a.b": list(range(20))}
    save_store(
        tmp_path, vectors(20), {**fields, "a": [{"b": row, "c": "x"} for row in range(20)]}, rows_per_shard=8
    )
    return tmp_path


def read_all(folder: Path) -> list[dict[str, Any]]:
    store = Store(folder)
    store.column("path_1")
    return store.rows(range(len(store)))


def rewrite(change: Callable[[pa.Table], pa.Table], **options: Any) -> Callable[[Path], None]:
    """Change the rows of the first file, written as before, but not what it says of itself."""

    def run(folder: Path) -> None:
        before = pq.read_table(folder / NAMES[0])
        table = change(before).replace_schema_metadata(before.schema.metadata)
        fields = [name for name in table.column_names if not name.startswith(("aggregate", "path_"))]
        packed = dict.fromkeys(table.column_names, "none") | dict.fromkeys(fields, "zstd")
        known: dict[str, Any] = {"use_dictionary": fields, "compression": packed, "write_page_checksum": True}
        pq.write_table(table, folder / NAMES[0], **known, **options)

    return run


def column(name: str, cells: Callable[[pa.Table], Any]) -> Callable[[Path], None]:
    return rewrite(lambda table: table.set_column(table.column_names.index(name), name, cells(table)))


def says(content: bytes) -> Callable[[Path], None]:
    """Change what the first file says of itself."""

    def run(folder: Path) -> None:
        table = pq.read_table(folder / NAMES[0])
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: content}), folder / NAMES[0])

    return run


def swap(folder: Path) -> None:
    (folder / NAMES[0]).rename(folder / "other")
    (folder / NAMES[1]).rename(folder / NAMES[0])
    (folder / "other").rename(folder / NAMES[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: shutil.copy(folder / NAMES[0], folder / NAMES[1]),
            "name is .*00001.parquet instead of .*00000.parquet",
        ),
        (
            lambda folder: shutil.copy(folder / NAMES[0], folder / "embeddings-00003.parquet"),
            "0003.parquet is not",
        ),
        (swap, "name is .*00000.parquet instead of .*00001.parquet"),
        (
            rewrite(lambda table: table.slice(0, 0)),
            "its number of rows is 0 instead of 8",
        ),
        (rewrite(lambda table: table, row_group_size=3), "its columns by row group is"),
        (rewrite(lambda table: table.drop(["id"])), "its columns by row group is"),
        (rewrite(lambda table: table.drop(["text"])), "its columns by row group is"),
        (rewrite(lambda table: table.select(table.column_names[::-1])), "has other columns than"),
        (
            rewrite(lambda table: table.rename_columns({"text": "words"})),
            "has other columns than",
        ),
        (
            column("id", lambda table: table["id"].take(list(range(8))[::-1])),
            "column id is not what was written",
        ),
        (column("id", lambda table: pa.array(["z"] * 8)), "column id is not what was written"),
        (column("id", lambda table: pa.nulls(8, pa.string())), "column id is not what was written"),
        (column("text", lambda table: pa.array(["z"] * 8)), "column text is not what was written"),
        (column("a.b", lambda table: pa.array([0] * 8)), "column a.b is not what was written"),
        (
            column("a", lambda table: pa.array([{"b": 1, "c": "y"}] * 8)),
            "column a.[bc] is not what was written",
        ),
        (says(b"[]"), "is not a complete file"),
        (says(b"null"), "is not a complete file"),
        (says(b'"a"'), "is not a complete file"),
        (says(b"\xff"), "is not a complete file"),
        (says(b"[" * 100_000), "is not a complete file"),
    ],
)
def test_another_file_than_was_written(change: Any, message: str, folder: Path) -> None:
    rows = read_all(folder)
    assert [row["text"] for row in rows] == [f"word {row}" for row in range(20)]
    change(folder)
    with pytest.raises(ValueError, match=f"{folder}/embeddings-0.*{message}"):
        read_all(folder)


def test_rows_with_other_ids_or_fields_are_other_rows(tmp_path: Path) -> None:
    before = pa.table({"id": ["a", "b"], "price": [1, 2]})
    about = {"columns": ["aggregate"], "num_rows": 2, "rows_per_shard": 2}

    def finished(table: pa.Table, **options: Any) -> frozenset[int]:
        rows: Any = TableRows(table)
        keeper = Keeper(tmp_path, lambda: {"identity": {}, "num_paths": 1, "aggregation": {}}, **options)
        done = keeper.finished(rows, about)
        if not done:
            keeper.writers[""].write(0, [0, 1], {"aggregate": torch.eye(2)}, {})
        return done

    assert not finished(before)
    assert finished(before) == {0}
    others = [before.set_column(0, "id", pa.array(["b", "a"])), before.rename_columns({"price": "stock"})]
    for other in others:
        with pytest.raises(ValueError, match="was written with another rows_sha256"):
            finished(other)
    assert not finished(others[0], replace=True)
    assert [row["id"] for row in Store(tmp_path).rows([0, 1])] == ["b", "a"]


def test_what_is_replaced_is_gone_at_once(folder: Path) -> None:
    rows: Any = TableRows(pa.table({"id": ["0"]}))
    keeper = Keeper(folder, dict, replace=True)
    assert not keeper.finished(rows, {"columns": ["aggregate"], "num_rows": 1, "rows_per_shard": 1})
    assert not list(folder.glob("*.parquet"))


def test_a_folder_without_any_embedding_is_refused(tmp_path: Path) -> None:
    rows: Any = TableRows(pa.table({"id": ["0"]}))
    about = {"columns": ["aggregate"], "num_rows": 1, "rows_per_shard": 1}
    StoreWriter(tmp_path, rows, about).write(0, [], {"aggregate": torch.empty(0, 4)}, {0: "too long"})
    with pytest.raises(ValueError, match="has no embeddings: all 1 rows were refused"):
        Store(tmp_path)


def test_every_column_has_a_hash(folder: Path) -> None:
    content = pq.read_metadata(folder / NAMES[2])
    (hashes,) = json.loads(content.metadata[METADATA_KEY])["chunks_sha256"]
    assert len({*hashes}) == content.num_columns == 9


def test_unusable_arguments(folder: Path) -> None:
    store = Store(folder)
    for call, message in (
        (lambda: Store(None), "folder must be .* got None"),
        (lambda: store.rows([3, 20]), "has 20 rows, from 0; got 20"),
        (lambda: store.rows([-1]), "has 20 rows, from 0; got -1"),
        (lambda: store.column("text"), "has the vectors aggregate, path_0, .*, got 'text'"),
        (lambda: store.read(99), "has 3 row groups, got batch 99"),
        (lambda: Keeper(folder, dict, dtype="int8"), "dtype must be 'float32' or 'float16', got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
