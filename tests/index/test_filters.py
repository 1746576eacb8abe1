from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling.index.lance_index import LanceIndex
from parallel_decoupling.index.protocol import Index
from parallel_decoupling.index.torch_index import TorchIndex
from tests.index.brute_force import embeddings, matching, search

COUNT = 60
ITEMS, QUERY = embeddings(COUNT), embeddings(1, seed=1)
FIELDS: dict[str, list[Any]] = {
    "color": [("red", "green", "it's `blue`", None)[row % 4] for row in range(COUNT)],
    "The Size": [row % 7 for row in range(COUNT)],
    "weight": [None if row % 9 == 0 else row / 10 for row in range(COUNT)],
    "new": [row % 2 == 0 for row in range(COUNT)],
    "tags": [["a"] for _ in range(COUNT)],
}


@pytest.fixture(scope="module", params=["torch", "lance"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    index: Index = TorchIndex() if request.param == "torch" else LanceIndex(tmp_path_factory.mktemp("lance"))
    index.add(range(COUNT), ITEMS, FIELDS)
    return index


@pytest.mark.parametrize(
    "conditions",
    [
        {"color": "red"},
        {"color": "it's `blue`"},
        {"color": None},
        {"color": ["red", None]},
        {"color": ["green", "no such color"]},
        {"The Size": 3},
        {"The Size": [1, 5]},
        {"The Size": {"min": 2, "max": 4}},
        {"weight": {"min": 3.05}},
        {"weight": {"max": 2}},
        {"weight": {"max": 1e20}},
        {"The Size": {"min": 4, "max": 2**63 - 1}},
        {"weight": 1.5},
        {"new": True},
        {"new": [False]},
        {"new": False, "color": ["red", "green"], "weight": {"min": 1, "max": 4.5}},
        {"color": "violet"},
    ],
)
@pytest.mark.parametrize("scoring", ["path_1", "maxsim"])
def test_filter_finds_what_a_loop_finds(index: Index, conditions: dict[str, Any], scoring: str) -> None:
    rows = matching(conditions, FIELDS)
    (hits,) = index.search(QUERY, COUNT, scoring, conditions)
    ((*best,),) = search(QUERY, ITEMS, COUNT, scoring, rows)
    assert [hit.id for hit in hits] == [str(row) for row, _ in best]
    assert bool(rows) == (conditions != {"color": "violet"})


def test_filter_on_ids(index: Index) -> None:
    (hits,) = index.search(QUERY, 5, filter={"id": ["7", "9"]})
    assert {hit.id for hit in hits} == {"7", "9"}


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"shape": "ring"}, "there is no field 'shape'; this index has id, color, The Size"),
        ({"color": 3}, "field 'color': 3 is no value of its type, string"),
        ({"The Size": "3"}, "'3' is no value of its type, int64"),
        ({"The Size": 1.5}, "1.5 is no value of its type, int64"),
        ({"The Size": True}, "True is no value"),
        ({"new": 1}, "1 is no value of its type, bool"),
        ({"weight": float("nan")}, "nan is no value"),
        ({"The Size": 10**20}, "100000000000000000000 is out of range for its type, int64"),
        ({"The Size": [1, -(10**20)]}, "is out of range"),
        ({"The Size": {"max": 2**63}}, "is out of range"),
        ({"weight": 10**20}, "is out of range for its type, double"),
        ({"weight": {"min": 2**53 + 1}}, "is out of range"),
        ({"weight": {"above": 3}}, "is no range"),
        ({"weight": {}}, "is no range"),
        ({"color": []}, "an empty list finds nothing"),
        ({"tags": "a"}, "conditions work on texts, numbers and booleans"),
        ({}, "map a field to"),
    ],
)
def test_unusable_filter(index: Index, conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index.search(QUERY, 5, filter=conditions)


def test_filter_after_loading(index: Index, tmp_path: Path) -> None:
    index.save(tmp_path)
    loaded = type(index).load(tmp_path)
    assert loaded.search(QUERY, 5, filter={"new": True}) == index.search(QUERY, 5, filter={"new": True})
