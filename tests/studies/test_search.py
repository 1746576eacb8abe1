from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from studies import search
from studies.search import SCORINGS, TOP_K, World
from tests.index.brute_force import embeddings


@pytest.fixture(scope="module")
def world() -> World:
    """600 items; every query is its own item with noise."""
    items = torch.nn.functional.normalize(embeddings(600, dim=32), dim=-1)
    queries = torch.nn.functional.normalize(items[:20] + 0.02 * embeddings(20, dim=32, seed=1), dim=-1)
    return World(items, queries, [{row} for row in range(20)])


@pytest.fixture(scope="module")
def results(world: World) -> search.Results:
    exact = search._torch_index(world.items)
    expected = {
        scoring: [[int(hit.id) for hit in hits] for hits in exact.search(world.queries, TOP_K, scoring)]
        for scoring in SCORINGS
    }
    results: search.Results = {}
    for measure_some in (
        search.measure_torch,
        search.measure_numpy,
        search.measure_lance,
        search.measure_plain_lance,
    ):
        results |= measure_some(world, expected)
    return results


def test_exact_systems_agree(results: search.Results) -> None:
    exact = [
        measurement
        for one, measurement in results.items()
        if one.precision == "float32" and one.dimensions == 32 and "approximate" not in one.system
    ]
    assert len(exact) == 4 + 3 + 4 + 1
    assert {one.recall_at_10 for one in exact} == {1.0}
    assert {one.truth_at_10 for one in exact} == {1.0}


def test_bytes_are_those_of_the_codes(results: search.Results) -> None:
    sizes = {
        (one.scoring, one.precision): one.bytes_per_item
        for one in results
        if one.system == "torch" and one.dimensions == 32
    }
    assert sizes["path_0", "float32"] == sizes["aggregate", "float32"] == 128
    assert sizes["sum", "int8"] == 3 * 36
    assert sizes["maxsim", "binary"] == 3 * 8


def test_fewer_dimensions_and_shorter_lists_find_less(results: search.Results) -> None:
    def recall(precision: str, oversample: int, dimensions: int) -> float:
        (found,) = (
            measurement.recall_at_10
            for one, measurement in results.items()
            if (one.system, one.scoring) == ("torch", "sum")
            and (one.precision, one.oversample, one.dimensions) == (precision, oversample, dimensions)
        )
        return found

    assert recall("float32", 1, 8) < recall("float32", 1, 16) < recall("float32", 1, 32)
    assert recall("binary", 1, 32) < recall("binary", 4, 32) < recall("binary", 16, 32)


def test_table_has_every_line(results: search.Results, world: World, tmp_path: Path) -> None:
    search.write_results(results, tmp_path, world)
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert sum(line.startswith("| ") for line in table.splitlines()) == len(results) + 2
    assert (tmp_path / "search.png").stat().st_size > 10_000
