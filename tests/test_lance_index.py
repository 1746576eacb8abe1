"""Search in LanceDB: the hits of exact search, conditions in SQL, and approximate indices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("lancedb")

from parallel_decoupling import lance_index
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.lance_index import IndexType, LanceIndex, write_lance_index
from parallel_decoupling.search import ExactIndex
from tests.support.stores import check_hits, queries_by_column, save_store, vectors

SCORINGS = ("aggregate", "path_0", "path_1", "path_2", "maxsim")
ITEMS, QUERIES = vectors(400), vectors(5, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """400 items in three shards."""
    groups = {"group": [row % 3 for row in range(400)], "name": [f"item {row}" for row in range(400)]}
    return save_store(tmp_path_factory.mktemp("store"), ITEMS, groups, model="last.ckpt")


@pytest.fixture(scope="module")
def index(store: Store, tmp_path_factory: pytest.TempPathFactory) -> LanceIndex:
    folder = tmp_path_factory.mktemp("index")
    write_lance_index(store, folder)
    return LanceIndex(folder)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_equals_exact_search(scoring: str, index: LanceIndex, store: Store) -> None:
    queries = queries_by_column(QUERIES)
    found = index.search(queries, 6, scoring)
    check_hits(found, QUERIES, ITEMS, 6, scoring)
    expected = ExactIndex(store).search(queries, 6, scoring)
    for hits, others in zip(found, expected, strict=True):
        for hit, other in zip(hits, others, strict=True):
            assert (hit.id, hit.fields, hit.similarities.keys()) == (
                other.id,
                other.fields,
                other.similarities.keys(),
            )
    assert (len(index), index.scorings, index.metadata["model"]) == (400, SCORINGS, "last.ckpt")
    assert index.metadata == store.metadata


@pytest.mark.parametrize("index_type", get_args(IndexType))
def test_an_approximate_index_finds_an_item_by_itself(
    index_type: IndexType, store: Store, tmp_path: Path
) -> None:
    write_lance_index(store, tmp_path, index_type)
    index = LanceIndex(tmp_path)
    kinds = {each.index_type.upper().replace("IVF", "") for each in index._table.list_indices()}
    assert kinds == {index_type.removeprefix("IVF_")}
    for scoring in SCORINGS:
        hits = index.search(queries_by_column(ITEMS[:20]), 3, scoring, "group >= 0")
        assert [best.id for best, *_ in hits] == [str(row) for row in range(20)]
        assert hits[0][0].score == pytest.approx(1, abs=1e-5), "scored in float32"


def test_an_index_that_is_stopped_halfway_stays_the_old_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = save_store(tmp_path / "few", ITEMS[:9])
    write_lance_index(few, tmp_path / "index")

    def stopped(store: Store) -> Iterator[Any]:
        yield next(tables(store))
        raise KeyboardInterrupt

    tables = lance_index._tables
    monkeypatch.setattr(lance_index, "_tables", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_lance_index(store, tmp_path / "index")
    assert len(LanceIndex(tmp_path / "index")) == 9
    monkeypatch.undo()
    write_lance_index(store, tmp_path / "index")
    assert len(LanceIndex(tmp_path / "index")) == 400
    assert len(list((tmp_path / "index").iterdir())) == 1, "nothing of the old one, nor of the stopped"


def test_conditions_are_sql(index: LanceIndex) -> None:
    (hits,) = index.search(queries_by_column(QUERIES[:1]), 400, "path_0", "group = 1 AND name LIKE '%7'")
    assert {hit.id for hit in hits} == {str(row) for row in range(7, 400, 10) if row % 3 == 1}
    with pytest.raises(ValueError, match=r"(?s)LanceDB refuses the search \(where='colour = 1'\).*colour"):
        index.search(queries_by_column(QUERIES), 3, "path_0", "colour = 1")


def test_unusable_arguments(store: Store, index: LanceIndex, tmp_path: Path) -> None:
    few = save_store(tmp_path / "few", ITEMS[:9])
    with pytest.raises(ValueError, match="IVF_PQ needs at least 256 items"):
        write_lance_index(few, tmp_path / "index", "IVF_PQ")
    with pytest.raises(ValueError, match="scoring is 'path_7'; this index has aggregate"):
        index.search(queries_by_column(QUERIES), 3, "path_7")
    with pytest.raises(ValueError, match=r"does not hold an index"):
        LanceIndex(tmp_path)
