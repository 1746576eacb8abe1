from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from parallel_decoupling.index.lance_index import LanceIndex
from parallel_decoupling.index.loading import load_index
from parallel_decoupling.index.settings import Precision
from parallel_decoupling.index.torch_index import TorchIndex
from tests.index.brute_force import embeddings, same_hits

SCORINGS = ("aggregate", "sum", "maxsim", "path_0", "path_1", "path_2")
ITEMS, QUERIES = embeddings(400), embeddings(5, seed=1)


def exact() -> TorchIndex:
    index = TorchIndex()
    index.add(range(400), ITEMS, {"group": [row % 3 for row in range(400)]})
    return index


def lance(
    folder: Path | None = None, approximate: bool = False, precision: Precision = "float32"
) -> LanceIndex:
    index = LanceIndex(folder, approximate, precision)
    index.add(range(300), ITEMS[:300], {"group": [row % 3 for row in range(300)]})
    index.add(range(300, 400), ITEMS[300:], {"group": [row % 3 for row in range(300, 400)]})
    return index


@pytest.fixture(scope="module")
def index() -> LanceIndex:
    return lance()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_exact_search_equals_the_torch_index(index: LanceIndex, scoring: str) -> None:
    assert same_hits(index.search(QUERIES, 6, scoring), exact().search(QUERIES, 6, scoring))


def test_query_of_one_path_alone(index: LanceIndex) -> None:
    alone = index.search(QUERIES[:, 1:2], 4, "path_1")
    assert same_hits(alone, exact().search(QUERIES[:, 1:2], 4, "path_1"))


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_approximate_search_finds_an_item_by_itself(precision: Precision, tmp_path: Path) -> None:
    lance(tmp_path, approximate=True, precision=precision).save(tmp_path)
    index = LanceIndex.load(tmp_path)
    assert {config.index_type for config in index._opened().list_indices()} == {
        {"float32": "IvfFlat", "int8": "IvfSq", "binary": "IvfRq"}[precision]
    }
    for scoring in SCORINGS:
        hits = index.search(ITEMS[:20], 3, scoring, {"group": [0, 1, 2]})
        assert [best.id for best, *_ in hits] == [str(row) for row in range(20)]
        assert hits[0][0].score == pytest.approx(1, abs=1e-5), "scored in float32"


@pytest.mark.parametrize("own_folder", [True, False])
def test_saved_and_loaded_index_finds_the_same_hits(own_folder: bool, tmp_path: Path) -> None:
    index = lance(tmp_path if own_folder else None)
    index.save(tmp_path)
    loaded = load_index(tmp_path)
    assert isinstance(loaded, LanceIndex)
    assert (loaded.settings, len(loaded)) == (index.settings, 400)
    assert loaded.search(QUERIES, 4, "maxsim") == index.search(QUERIES, 4, "maxsim")
    with pytest.raises(ValueError, match="'7' is in the index already"):
        loaded.add([7], ITEMS[:1], {"group": [1]})
    loaded.add(["new"], QUERIES[:1], {"group": [1]})
    assert LanceIndex.load(tmp_path).search(QUERIES[:1], 1)[0][0].id == "new"


def test_a_new_index_replaces_the_one_in_the_folder(tmp_path: Path) -> None:
    lance(tmp_path).save(tmp_path)
    index = LanceIndex(tmp_path)
    index.add(["only"], ITEMS[:1])
    with pytest.raises(ValueError, match="no index"):
        load_index(tmp_path)
    index.save(tmp_path)
    assert len(load_index(tmp_path)) == 1


def test_one_path(tmp_path: Path) -> None:
    index, reference = LanceIndex(tmp_path, path_names=("path_4",)), TorchIndex(path_names=("path_4",))
    for one in (index, reference):
        one.add(range(400), ITEMS[:, :1])
    for scoring in ("aggregate", "sum", "maxsim", "path_4"):
        assert same_hits(
            index.search(QUERIES[:, :1], 3, scoring), reference.search(QUERIES[:, :1], 3, scoring)
        )


def test_unusable_items_and_settings(index: LanceIndex) -> None:
    for ids, fields, message in (
        (["x"], {"other": [1]}, "those of the index are"),
        (["x"], {"group": ["a"]}, "other types"),
        (["x"], {"group": [1.5]}, "other types than the index has: id string, group double"),
        (["3"], {"group": [1]}, "'3' is in the index already"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(ids, ITEMS[:1], fields)
    assert len(index) == 400
    with pytest.raises(ValueError, match="set approximate or take the kind torch"):
        LanceIndex(precision="int8")
    with pytest.raises(ValueError, match="divisible by 8"):
        LanceIndex(approximate=True, precision="binary").add(["a"], torch.ones(1, 2, 20))
    with pytest.raises(ValueError, match="empty"):
        LanceIndex().save("unused")


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    exact().save(tmp_path)
    with pytest.raises(ValueError, match="of kind 'torch', not 'lance'"):
        LanceIndex.load(tmp_path)
    with pytest.raises(ValueError, match="holds an index of kind 'torch'; delete it"):
        lance().save(tmp_path)
    with pytest.raises(ValueError, match="holds an index of kind 'torch'; delete it"):
        LanceIndex(tmp_path).add(["x"], ITEMS[:1], {"group": [1]})
    assert len(load_index(tmp_path)) == 400


def test_damaged_folder(tmp_path: Path) -> None:
    index = LanceIndex()
    index.add(["a"], ITEMS[:1])
    index.save(tmp_path)
    (tmp_path / "items.lance").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no items.lance"):
        load_index(tmp_path)


def test_missing_lancedb_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ValueError, match=r"pip install 'parallel-decoupling\[search\]'"):
        LanceIndex()
