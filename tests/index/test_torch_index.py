from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel_decoupling.index.loading import load_index
from parallel_decoupling.index.settings import Precision
from parallel_decoupling.index.torch_index import ROWS_AT_ONCE, TorchIndex
from tests.index.brute_force import embeddings, same_hits, search

SCORINGS = ("aggregate", "sum", "maxsim", "path_0", "path_1", "path_2")
ITEMS, QUERIES = embeddings(150), embeddings(6, seed=1)


def filled(precision: Precision = "float32", oversample: int = 4) -> TorchIndex:
    index = TorchIndex(precision, oversample)
    fields = {"group": [row % 4 for row in range(len(ITEMS))]}
    index.add(range(100), ITEMS[:100], {"group": fields["group"][:100]})
    index.add(range(100, 150), ITEMS[100:], {"group": fields["group"][100:]})
    return index


@pytest.mark.parametrize("scoring", SCORINGS)
def test_finds_what_brute_force_finds(scoring: str) -> None:
    expected = search(QUERIES, ITEMS, 7, scoring)
    for hits, best in zip(filled().search(QUERIES, 7, scoring), expected, strict=True):
        assert [hit.id for hit in hits] == [str(row) for row, _ in best]
        assert [hit.score for hit in hits] == pytest.approx([value for _, value in best], abs=1e-5)
        assert [hit.fields for hit in hits] == [{"group": row % 4} for row, _ in best]


@pytest.mark.parametrize("precision", ["int8", "binary"])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_codes_with_a_shortlist_of_everything_are_exact(scoring: str, precision: Precision) -> None:
    index = filled(precision, oversample=50)  # 5 hits x 50: more than there are items
    assert same_hits(index.search(QUERIES, 5, scoring), filled().search(QUERIES, 5, scoring))


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.95), ("binary", 0.3)])
def test_a_longer_shortlist_finds_more(precision: Precision, least: float) -> None:
    recalls, expected = [], search(QUERIES, ITEMS, 10, "aggregate")
    for oversample in (1, 4, 10):
        found = 0
        index = filled(precision, oversample)
        for hits, best in zip(index.search(QUERIES, 10), expected, strict=True):
            found += len({hit.id for hit in hits} & {str(row) for row, _ in best})
            values = [hit.score for hit in hits]
            assert values == sorted(values, reverse=True)
        recalls.append(found / (10 * len(QUERIES)))
    assert recalls == sorted(recalls)
    assert recalls[0] >= least
    assert recalls[-1] > 0.9


def test_hits_have_the_cosine_of_every_path() -> None:
    (hit, *_), *_ = filled().search(QUERIES, 3)
    item, query = ITEMS[int(hit.id)], QUERIES[0]
    cosines = torch.nn.functional.cosine_similarity(query, item, dim=1)
    assert list(hit.similarities) == ["path_0", "path_1", "path_2"]
    assert list(hit.similarities.values()) == pytest.approx(cosines.tolist(), abs=1e-5)


def test_query_of_one_path_alone_equals_the_whole_query() -> None:
    whole, alone = filled().search(QUERIES, 4, "path_2"), filled().search(QUERIES[:, 2:], 4, "path_2")
    assert [[(hit.id, hit.score) for hit in hits] for hits in alone] == [
        [(hit.id, pytest.approx(hit.score)) for hit in hits] for hits in whole
    ]
    assert list(alone[0][0].similarities) == ["path_2"]


def test_weights_of_the_aggregate() -> None:
    index = TorchIndex(path_weights=(0.7, 0.2, 0.1))
    index.add(range(len(ITEMS)), ITEMS)
    expected = search(QUERIES, ITEMS, 5, "aggregate", weights=(0.7, 0.2, 0.1))
    assert [[int(hit.id) for hit in hits] for hits in index.search(QUERIES, 5)] == [
        [row for row, _ in best] for best in expected
    ]
    assert expected != search(QUERIES, ITEMS, 5, "aggregate")


@pytest.mark.parametrize("scoring", ["aggregate", "sum", "maxsim", "path_0"])
def test_with_one_path_all_scorings_are_equal(scoring: str, tmp_path: Path) -> None:
    index = TorchIndex()
    index.add(range(len(ITEMS)), ITEMS[:, :1])
    index.save(tmp_path)
    for one in (index, TorchIndex.load(tmp_path)):
        assert [[int(hit.id) for hit in hits] for hits in one.search(QUERIES[:, :1], 5, scoring)] == [
            [row for row, _ in best] for best in search(QUERIES[:, :1], ITEMS[:, :1], 5, "path_0")
        ]


def test_aggregates_alone_make_an_index() -> None:
    index = TorchIndex(path_names=("aggregate",))
    index.add(["a", "b"], ITEMS[:2, :1])
    assert index.settings.scorings == ("aggregate", "sum", "maxsim")
    ((hit, _),) = index.search(ITEMS[1:2, :1], 2)
    assert (hit.id, list(hit.similarities)) == ("b", ["aggregate"])


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_saved_and_loaded_index_finds_the_same(precision: Precision, tmp_path: Path) -> None:
    index = filled(precision)
    index.save(tmp_path)
    loaded = load_index(tmp_path)
    assert isinstance(loaded, TorchIndex)
    assert (loaded.settings, len(loaded)) == (index.settings, len(index))
    for scoring in SCORINGS:
        assert loaded.search(QUERIES, 4, scoring) == index.search(QUERIES, 4, scoring)
    with pytest.raises(ValueError, match="'7' is in the index already"):
        loaded.add([7], ITEMS[:1], {"group": [1]})
    loaded.add(["new"], QUERIES[:1], {"group": [1]})
    loaded.save(tmp_path)  # over the files that it maps
    assert TorchIndex.load(tmp_path).search(QUERIES[:1], 1)[0][0].id == "new"
    assert len(TorchIndex.load(tmp_path)) == 151


def test_codes_of_a_replaced_index_are_gone(tmp_path: Path) -> None:
    filled("binary").save(tmp_path)
    filled().save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "fields.parquet",
        "index.json",
        "vectors.safetensors",
    ]


def test_metadata_travels_with_the_index(tmp_path: Path) -> None:
    index = TorchIndex(metadata={"model": "runs/demo/checkpoints/last.ckpt"})
    index.add(["a"], ITEMS[:1])
    index.save(tmp_path)
    assert load_index(tmp_path).settings.metadata == {"model": "runs/demo/checkpoints/last.ckpt"}


def test_more_items_than_one_chunk() -> None:
    items = embeddings(ROWS_AT_ONCE + 500, paths=2, dim=8)
    index = TorchIndex("int8", oversample=8)
    index.add(range(len(items)), items, {"late": [row >= 300 for row in range(len(items))]})
    last = len(items) - 1
    assert index.search(items[last:], 1)[0][0].id == str(last)
    assert index.search(items[last:], 1, filter={"late": True})[0][0].id == str(last)
    assert index.search(items[:1], 1, filter={"late": True})[0][0].id != "0"


def test_fewer_items_than_asked_for() -> None:
    index = TorchIndex("binary")
    index.add(["a", "b"], ITEMS[:2], {"group": [0, 1]})
    assert [len(hits) for hits in index.search(QUERIES[:2], 10)] == [2, 2]
    assert [hit.id for hit in index.search(QUERIES[:1], 10, filter={"group": 1})[0]] == ["b"]
    assert index.search(QUERIES[:2], 10, filter={"group": 5}) == [[], []]


def test_half_precision_embeddings_are_accepted() -> None:
    index = TorchIndex()
    index.add(["a"], ITEMS[:1].half())
    assert index.search(ITEMS[:1], 1)[0][0].score == pytest.approx(1, abs=1e-5)


def test_unusable_items_leave_the_index_as_it_was() -> None:
    index = filled()
    broken = ITEMS[:2].clone()
    broken[1, 2] = 0
    for ids, vectors, fields, message in (
        (["x"], ITEMS[:2], {"group": [1, 2]}, "1 ids for 2 embeddings"),
        (["x", "x"], ITEMS[:2], {"group": [1, 2]}, "item 1: the id 'x'"),
        (["x", "3"], ITEMS[:2], {"group": [1, 2]}, "item 1: the id '3'"),
        (["x", "y"], broken, {"group": [1, 2]}, r"item 1 \(id 'y'\) has an embedding that is zero"),
        (["x", "y"], ITEMS[:2, :2], {"group": [1, 2]}, "do not fit an index of 3 paths"),
        (["x", "y"], ITEMS[:2, :, :5], {"group": [1, 2]}, "with 24 dimensions"),
        (["x", "y"], ITEMS[:2].long(), {"group": [1, 2]}, "int64"),
        (["x", "y"], ITEMS[:2], {"group": [1]}, "field 'group' has 1 values for 2 items"),
        (["x", "y"], ITEMS[:2], {"group": [1, "a"]}, "field 'group' holds values of different types"),
        (["x", "y"], ITEMS[:2], {"other": [1, 2]}, "those of the index are"),
        (["x", "y"], ITEMS[:2], {"group": ["a", "b"]}, "other types"),
        (["x", "y"], ITEMS[:2], {"path_1": [1, 2]}, "may not be called 'path_1'"),
        (["x", "y"], ITEMS[:2], {"a.b": [1, 2]}, "rename it"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(ids, vectors, fields)
    assert len(index) == 150
    assert index.search(QUERIES, 3) == filled().search(QUERIES, 3)


def test_unusable_searches() -> None:
    index = filled()
    for arguments, message in (
        ((QUERIES, 0), "top_k is 0"),
        ((QUERIES, 5, "path_3"), "this index has aggregate, sum, maxsim, path_0, path_1, path_2"),
        ((QUERIES[:, :1], 5, "aggregate"), r"takes \[Q, 3, 24\]"),
        ((QUERIES[..., :8], 5), r"takes \[Q, 3, 24\]"),
        ((QUERIES[0], 5), "queries of shape"),
        ((QUERIES * torch.nan, 5), "query 0 has an embedding that is zero or not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        TorchIndex().search(QUERIES)
    with pytest.raises(ValueError, match="empty"):
        TorchIndex().save("unused")


def test_folders_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no index.json"):
        load_index(tmp_path)
    filled().save(tmp_path)
    (tmp_path / "vectors.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="not the settings of an index"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int4"}, "choose from float32, int8, binary"),
        ({"oversample": 0}, "oversample is 0"),
        ({"path_names": ("a", "a")}, "repeat a name"),
        ({"path_names": ("a", "sum")}, "'sum' is the name of a scoring"),
        ({"path_names": ("a", "aggregate")}, "'aggregate' is the name of a scoring"),
        ({"path_names": ("a", "b"), "path_weights": (1.0,)}, "1 path_weights for 2 paths"),
    ],
)
def test_unusable_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchIndex(**settings)  # type: ignore[arg-type]
