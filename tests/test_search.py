"""Search, exact and in LanceDB, against plain loops, within its memory, only with the model of the items."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decoupling import lance_index
from parallel_decoupling.evaluation import store as store_module
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.lance_index import IndexType, LanceIndex, write_lance_index
from parallel_decoupling.model.identity import path_hashes
from parallel_decoupling.search import ExactIndex, Searcher
from tests.support.stores import check_hits, queries_by_column, save_store, score, vectors

SCORINGS = ("aggregate", "path_0", "path_1", "path_2", "maxsim")
ITEMS, QUERIES = vectors(400), vectors(5, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """400 items in three shards."""
    groups = {"group": [row % 3 for row in range(400)], "name": [f"item {row}" for row in range(400)]}
    return save_store(tmp_path_factory.mktemp("store"), ITEMS, groups, model="last.ckpt")


@pytest.mark.parametrize("scoring", SCORINGS)
def test_equals_plain_loops(scoring: str, store: Store) -> None:
    index = ExactIndex(store)
    assert index.scorings == SCORINGS
    hits = index.search(queries_by_column(3 * QUERIES), 6, scoring)
    check_hits(hits, QUERIES, ITEMS, 6, scoring)
    assert all(hit.similarities.keys() == {"path_0", "path_1", "path_2"} for hit in hits[0])
    assert all(hit.fields == {"group": int(hit.id) % 3, "name": f"item {hit.id}"} for hit in hits[0])


def test_concatenated_aggregates(tmp_path: Path) -> None:
    """The cosine of an aggregate of 3 D numbers is the mean cosine of aligned paths."""
    index = ExactIndex(save_store(tmp_path, ITEMS, aggregate=ITEMS.flatten(1) / 3**0.5))
    queries = queries_by_column(QUERIES) | {"aggregate": QUERIES.flatten(1)}
    check_hits(index.search(queries, 5, "aggregate"), QUERIES, ITEMS, 5, "concat")


@pytest.mark.parametrize(("scoring", "count"), [("path_0", 1), ("path_1", 5), ("maxsim", 1), ("maxsim", 5)])
def test_ties_stay_in_the_order_of_the_rows(
    scoring: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosines of vectors of four signs are exact, so many of 400 are equal, within and across row groups."""
    monkeypatch.setattr(store_module, "ROW_GROUP_SIZE", 50)
    generator = torch.Generator().manual_seed(0)
    items, queries = (torch.randn(n, 2, 4, generator=generator).sign() / 2 for n in (400, count))
    index = ExactIndex(save_store(tmp_path, items, rows_per_shard=130))
    for top_k in (1, 7, 60, 500):
        for found, query in zip(
            index.search(queries_by_column(queries), top_k, scoring), queries.numpy(), strict=True
        ):
            scores = [score(query, item, scoring) for item in items.numpy()]
            expected = sorted(range(400), key=lambda row: (-scores[row], row))[:top_k]
            assert [(hit.id, hit.score) for hit in found] == [(str(row), scores[row]) for row in expected]


@pytest.mark.parametrize("scoring", ["path_0", "maxsim"])
def test_equal_items_are_found_in_their_order(scoring: str, tmp_path: Path) -> None:
    """A product of matrices alone gives the last of 1101 equal rows another score."""
    index = ExactIndex(save_store(tmp_path, ITEMS[:1].repeat(3000, 1, 1), rows_per_shard=1101))
    (hits,) = index.search(queries_by_column(QUERIES[:1]), 3000, scoring)
    assert [hit.id for hit in hits] == [str(row) for row in range(3000)]


def test_what_fits_into_the_budget_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight row groups of three paths and an id each; the hits are the same."""
    monkeypatch.setattr(store_module, "ROW_GROUP_SIZE", 512)
    items, queries = vectors(4096, dim=128), queries_by_column(vectors(2, dim=128, seed=1))
    store, reads = save_store(tmp_path, items, rows_per_shard=2048), list[Any]()
    read, hits, again = store.read, [], []
    monkeypatch.setattr(store, "read", lambda *which: (reads.append(which), read(*which))[1])
    for budget in (0, items.nbytes // 2, 2 * items.nbytes):
        index = ExactIndex(store, budget)
        hits.append(index.search(queries, 5, "maxsim"))
        reads.clear()
        assert index.search(queries, 5, "maxsim") == hits[0] == hits[-1]
        again.append(len(reads))
    assert again[0] > again[1] > again[2] == 0


def test_unusable_arguments(store: Store, tmp_path: Path) -> None:
    index, queries = ExactIndex(store), queries_by_column(QUERIES)
    for arguments, message in (
        ((queries, 0, "path_0"), "top_k must be 1 or more.*, got 0"),
        ((queries, "3", "path_0"), "top_k must be a valid integer, got '3'"),
        ((None, 3, "path_0"), "queries must be .* got None"),
        (({"path_0": QUERIES[:, 0].tolist()}, 3, "path_0"), "queries must be an instance of Tensor, got"),
        (({}, 3, "path_0"), r"queries\['path_0'\] must be a tensor \[0, 24\], got None"),
        (({"path_0": QUERIES[:, 0, :5]}, 3, "path_0"), r"must be a tensor \[5, 24\], got \[5, 5\]"),
        ((queries | {"path_1": QUERIES[:2, 1]}, 3, "path_0"), r"'path_1'\] must be .* got \[2, 24\]"),
        ((queries, 3, "path_7"), "scoring is 'path_7'; this index has aggregate, path_0"),
        ((queries, 3, "path_0", "group = 1"), "exact search does not take conditions; make a LanceDB index"),
        (({"path_0": QUERIES[:, 0] * torch.nan}, 3, "path_0"), "embedding of a query is zero or not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(*arguments)
    for value in (0.0, torch.inf, torch.nan):
        items = ITEMS[:20].clone()
        items[17, 1] = value
        index = ExactIndex(save_store(tmp_path / str(value), items, rows_per_shard=8))
        index.search(queries, 1, "path_0", None)
        with pytest.raises(ValueError, match="path_1 of '17' is zero or not finite"):
            index.search(queries, 1, "maxsim")


def test_another_default_device(store: Store) -> None:
    queries = queries_by_column(QUERIES)
    expected = ExactIndex(store).search(queries, 3, "path_0")
    with torch.device("meta"):
        assert ExactIndex(store).search(queries, 3, "path_0") == expected


FAR = {"far": pa.array([2**62], pa.timestamp("us")), "mars": pa.array([1], pa.timestamp("us", "Mars/Base"))}


@pytest.mark.parametrize("name", FAR)
def test_a_cell_that_python_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    items = save_store(tmp_path / "items", ITEMS[:1], {name: FAR[name]})
    indexes: list[Any] = [ExactIndex(items)]
    if find_spec("lancedb"):
        write_lance_index(str(items.folder), str(tmp_path / "index"))
        indexes.append(LanceIndex(tmp_path / "index"))
    for index in indexes:
        with pytest.raises(ValueError, match=f"{tmp_path}/.*, column '{name}', of timestamp.*Python cannot"):
            index.search(queries_by_column(QUERIES), 3, "path_0")


class RowEmbedder:
    """Embeds the text "7" as item 7 with some of its paths; ``shared`` and ``own`` stand for the weights."""

    device = torch.device("cpu")

    def __init__(
        self, *paths: int, concatenates: bool = False, shared: float = 0.0, own: float = 0.0
    ) -> None:
        self.paths, self.options = list(paths), dict[str, Any]()
        self.encoder: Any = nn.Module()
        self.encoder.shared = nn.Parameter(torch.full((4,), float(shared)))
        weights = torch.arange(3.0).unsqueeze(1)[self.paths] + own
        self.encoder.prefixes = nn.ParameterDict({"numbers": nn.Parameter(weights)})
        self.encoder.num_paths, self.encoder.embed_dim = len(paths), 24
        self.encoder.aggregate_dim = 24 * (len(paths) if concatenates else 1)
        self.encoder.aggregate = lambda embeddings_BND: F.normalize(
            embeddings_BND.flatten(1) if concatenates else embeddings_BND.mean(dim=1), dim=-1
        )

    def encode_query(self, inputs: list[str], **options: Any) -> Tensor:
        self.options = options
        assert options["paths"] == "all"
        return ITEMS[[int(text) for text in inputs]][:, self.paths]


def stored(folder: Path, embedder: RowEmbedder, **options: Any) -> ExactIndex:
    """Embed all items."""
    aggregate = embedder.encoder.aggregate(ITEMS[:, embedder.paths])
    hashes = path_hashes(embedder.encoder)
    store = save_store(folder, ITEMS[:, embedder.paths], aggregate=aggregate, path_sha256=hashes, **options)
    return ExactIndex(store)


@pytest.mark.parametrize("paths", [(0, 1, 2), (1, 2, 0), (2,), (2, 0)])
@pytest.mark.parametrize("concatenates", [False, True])
def test_a_model_searches_by_the_paths_that_it_has(
    paths: tuple[int, ...], concatenates: bool, tmp_path: Path
) -> None:
    """Whatever their numbers in it; by all paths or the aggregate only with all of them."""
    index = stored(tmp_path, RowEmbedder(0, 1, 2, concatenates=concatenates))
    searcher = Searcher(RowEmbedder(*paths, concatenates=concatenates), index)
    by_path = {f"path_{path}" for path in paths}
    several = {"maxsim"} if len(paths) == 3 else set()
    if len(paths) == 3 and (paths == (0, 1, 2) or not concatenates):
        several.add("aggregate")
    assert set(searcher.scorings) == by_path | several
    for scoring in searcher.scorings:
        hits = searcher.search(["7", "3"], 2, scoring)
        assert [[found.id for found in best][0] for best in hits] == ["7", "3"]
        assert hits[0][0].score == pytest.approx(1)
        assert hits[0][0].similarities == pytest.approx(dict.fromkeys(sorted(by_path), 1))
    for scoring in {*SCORINGS} - {*searcher.scorings}:
        with pytest.raises(ValueError, match=f"scoring is '{scoring}'; this model and index have"):
            searcher.search(["7"], 2, scoring)


@pytest.mark.parametrize(
    ("columns", "other"),
    [
        ([], RowEmbedder(0, 1, 2, shared=1)),
        ([], RowEmbedder(0, 1, 2, own=0.1)),
        (["aggregate"], RowEmbedder(0, 1)),
        (["path_1"], RowEmbedder(0, 2)),
    ],
)
def test_other_weights_than_those_of_the_items_are_refused(
    columns: list[str], other: RowEmbedder, tmp_path: Path
) -> None:
    index = stored(tmp_path, RowEmbedder(0, 1, 2), columns=columns, model="last.ckpt")
    with pytest.raises(ValueError, match="index must be an instance of Index, got None"):
        Searcher(other, None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"other weights than .*last\.ckpt.*trained further.*run predict with this one"
    ):
        Searcher(other, index)


def test_the_instruction_is_the_models_own_unless_given(tmp_path: Path) -> None:
    embedder = RowEmbedder(0, 1, 2)
    searcher = Searcher(embedder, stored(tmp_path, embedder))
    searcher.search(["7"], 1)
    assert embedder.options == {"paths": "all"}
    searcher.search(["7"], 1, instruction="")
    assert embedder.options == {"paths": "all", "instruction": ""}


@pytest.fixture(scope="module")
def lance(store: Store, tmp_path_factory: pytest.TempPathFactory) -> LanceIndex:
    pytest.importorskip("lancedb")
    folder = tmp_path_factory.mktemp("index")
    write_lance_index(str(store.folder), str(folder))
    return LanceIndex(folder)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_equals_exact_search(scoring: str, lance: LanceIndex, store: Store) -> None:
    queries = queries_by_column(QUERIES)
    found = lance.search(queries, 6, scoring)
    check_hits(found, QUERIES, ITEMS, 6, scoring)
    for hits, others in zip(found, ExactIndex(store).search(queries, 6, scoring), strict=True):
        assert [(hit.id, hit.fields) for hit in hits] == [(hit.id, hit.fields) for hit in others]
    assert (len(lance), lance.scorings, lance.metadata["model"]) == (400, SCORINGS, "last.ckpt")
    assert lance.metadata == store.metadata


@pytest.mark.parametrize("index_type", get_args(IndexType))
@pytest.mark.usefixtures("lance")
def test_an_approximate_index_finds_an_item_by_itself(
    index_type: IndexType, store: Store, tmp_path: Path
) -> None:
    write_lance_index(str(store.folder), str(tmp_path), index_type)
    index = LanceIndex(tmp_path)
    kinds = {each.index_type.upper().replace("IVF", "") for each in index._table.list_indices()}
    assert kinds == {index_type.removeprefix("IVF_")}
    for scoring in SCORINGS:
        hits = index.search(queries_by_column(ITEMS[:20]), 3, scoring, "group >= 0")
        assert [best.id for best, *_ in hits] == [str(row) for row in range(20)]
        assert hits[0][0].score == pytest.approx(1, abs=1e-5), "scored in float32"


@pytest.mark.usefixtures("lance")
def test_an_index_that_is_stopped_halfway_stays_the_old_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = save_store(tmp_path / "few", ITEMS[:9])
    write_lance_index(str(few.folder), str(tmp_path / "index"))

    def stopped(store: Store) -> Iterator[Any]:
        yield next(tables(store))
        raise KeyboardInterrupt

    tables = lance_index._tables
    monkeypatch.setattr(lance_index, "_tables", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_lance_index(str(store.folder), str(tmp_path / "index"))
    assert len(LanceIndex(tmp_path / "index")) == 9
    monkeypatch.undo()
    write_lance_index(str(store.folder), str(tmp_path / "index"))
    assert len(LanceIndex(tmp_path / "index")) == 400
    assert len(list((tmp_path / "index").iterdir())) == 1, "nothing of the old one, nor of the stopped"


@pytest.mark.usefixtures("lance")
def test_only_indexes_are_replaced_or_opened(store: Store, tmp_path: Path) -> None:
    import lancedb

    lancedb.connect(tmp_path).create_table("items-00009", [{"own": 1}])
    (tmp_path / "items-mine.lance").mkdir()
    write_lance_index(str(store.folder), str(tmp_path))
    before = LanceIndex(tmp_path)
    write_lance_index(str(store.folder), str(tmp_path))
    with pytest.raises(ValueError, match="was replaced meanwhile: open it again"):
        before.search(queries_by_column(QUERIES), 3, "path_0")
    names = ["items-00002.lance", "items-00009.lance", "items-mine.lance"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == names
    assert len(LanceIndex(tmp_path)) == 400


STRINGS = pa.array(["a"] * 9)
REFUSED = {name: STRINGS for name in ("a.b", "_rowid", "", "_distance", 'a"`b')}
REFUSED["list"] = pa.array([["a"]] * 9, pa.list_view(pa.string()))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("lance")
def test_a_column_that_lancedb_does_not_take_is_named_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    items = save_store(tmp_path / "items", ITEMS[:9], {"good": STRINGS, name: REFUSED[name]})
    with pytest.raises(ValueError, match=f"column {re.escape(repr(name))} of .* LanceDB does not take it"):
        write_lance_index(str(items.folder), str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_conditions_are_sql(lance: LanceIndex, tmp_path: Path) -> None:
    (hits,) = lance.search(queries_by_column(QUERIES[:1]), 400, "path_0", "group = 1 AND name LIKE '%7'")
    assert {hit.id for hit in hits} == {str(row) for row in range(7, 400, 10) if row % 3 == 1}
    with pytest.raises(ValueError, match=r"(?s)LanceDB refuses the search \(where='colour = 1'\).*colour"):
        lance.search(queries_by_column(QUERIES), 3, "path_0", "colour = 1")
    with pytest.raises(ValueError, match=r"LanceDB refuses the search \(where='\"group\" / 0 > 1'\)"):
        lance.search(queries_by_column(QUERIES), 3, "path_0", '"group" / 0 > 1')
    with pytest.raises(ValueError, match="where='group = 1; drop': give one condition"):
        lance.search(queries_by_column(QUERIES), 3, "path_0", "group = 1; drop")
    with pytest.raises(ValueError, match="LanceDB refuses the search .* LIMIT 3"):
        lance.search(queries_by_column(QUERIES), 9, "path_0", "group = 1 LIMIT 3")
    assert lance.search(queries_by_column(QUERIES[:1]), 3, "path_0", "name = 'item; 7'") == [[]]
    assert len(lance.search(queries_by_column(QUERIES[:1].requires_grad_()), 2**62, "path_0")[0]) == 400
    with pytest.raises(ValueError, match="scoring is 'path_7'; this index has aggregate"):
        lance.search(queries_by_column(QUERIES), 3, "path_7")
    with pytest.raises(ValueError, match="does not hold an index"):
        LanceIndex(tmp_path)
