from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from parallel_decoupling.index.scoring import aggregate
from parallel_decoupling.index.tables import open_embeddings
from tests.index.brute_force import embeddings

UNIT = torch.nn.functional.normalize(embeddings(30), dim=-1)


def column(vectors_BD: Tensor, dtype: str = "float32") -> pa.FixedSizeListArray:
    numbers = pa.array(vectors_BD.numpy().astype(dtype).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(numbers, vectors_BD.shape[1])


def table(
    rows: slice = slice(0, 30),
    weights: Sequence[float] = (1 / 3,) * 3,
    dtype: str = "float32",
    says: dict[str, Any] | None = None,
    **extra: Any,
) -> pa.Table:
    vectors = UNIT[rows]
    columns: dict[str, Any] = {
        "id": pa.array(range(rows.start, rows.stop)),
        "text": [f"text {row}" for row in range(rows.start, rows.stop)],
        "aggregate": column(aggregate(vectors, weights), dtype),
        "path_10": column(vectors[:, 2], dtype),
        "path_0": column(vectors[:, 0], dtype),
        "path_2": column(vectors[:, 1], dtype),
    }
    metadata = {"parallel_decoupling": json.dumps({"model": "last.ckpt", **(says or {})})}
    columns = {name: value for name, value in {**columns, **extra}.items() if value is not None}
    return pa.table(columns).replace_schema_metadata(metadata)


@pytest.mark.parametrize(("dtype", "exactness"), [("float32", 0), ("float16", 1e-3)])
def test_files_of_a_folder_in_order(dtype: str, exactness: float, tmp_path: Path) -> None:
    pq.write_table(table(slice(20, 30), dtype=dtype), tmp_path / "embeddings-00001.parquet")
    pq.write_table(table(slice(0, 20), dtype=dtype), tmp_path / "embeddings-00000.parquet")
    opened = open_embeddings(tmp_path)
    assert opened.path_names == ("path_0", "path_2", "path_10"), "by number"
    assert opened.metadata == {"model": "last.ckpt"}
    assert opened.path_weights == pytest.approx((1 / 3,) * 3)
    assert opened.num_rows == 30
    ids, vectors, fields = zip(*opened.batches(), strict=True)
    assert [name for part in ids for name in part] == [str(row) for row in range(30)]
    assert torch.cat(vectors).dtype == torch.float32
    assert float((torch.cat(vectors) - UNIT).abs().max()) <= exactness
    assert pa.concat_tables(fields).to_pydict() == {"text": [f"text {row}" for row in range(30)]}


def test_weights_of_a_learned_aggregate_are_recovered(tmp_path: Path) -> None:
    weights = (0.6, 0.3, 0.1)
    pq.write_table(table(weights=weights), tmp_path / "one.parquet")
    assert open_embeddings(tmp_path / "one.parquet").path_weights == pytest.approx(weights, abs=1e-4)


def test_concatenated_aggregate_needs_no_weights(tmp_path: Path) -> None:
    pq.write_table(table(aggregate=column(UNIT.flatten(1))), tmp_path / "one.parquet")
    opened = open_embeddings(tmp_path)
    assert (opened.path_weights, opened.concatenated) == ((), True)
    pq.write_table(table(), tmp_path / "one.parquet")
    assert not open_embeddings(tmp_path).concatenated


def test_aggregates_alone(tmp_path: Path) -> None:
    pq.write_table(table(path_0=None, path_2=None, path_10=None), tmp_path / "one.parquet")
    opened = open_embeddings(tmp_path)
    assert (opened.path_names, opened.path_weights) == (("aggregate",), ())
    ((_, vectors, _),) = opened.batches()
    assert torch.equal(vectors[:, 0], aggregate(UNIT, (1 / 3,) * 3))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"id": None}, "needs a column id"),
        ({"aggregate": column(UNIT[:, 0].flip(0))}, "no weighted mean of path_0, path_2, path_10"),
        ({"aggregate": column(UNIT.flatten(1)), "path_2": None}, "no weighted mean of path_0, path_10"),
        ({"path_2": None, "path_10": None}, "no weighted mean of path_0; keep all"),
        (
            {"path_0": [[1.0, 2.0]] * 30},
            "column path_0: list<.*>; vectors are lists of a fixed number of floats",
        ),
        (
            {"aggregate": None, "path_0": pa.array([None] + [[1.0] * 24] * 29, pa.list_(pa.float32(), 24))},
            "1 rows have no vector",
        ),
    ],
)
def test_unusable_tables(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    pq.write_table(table(**extra), tmp_path / "one.parquet")
    with pytest.raises(ValueError, match=message):
        list(open_embeddings(tmp_path).batches())


def shard(number: int, **says: Any) -> pa.Table:
    """File ``number`` of three, as ``lightning predict`` writes it."""
    own = {"shard": number, "first_row": 10 * number, "bad_rows": [{"row": number}], "num_shards": 3}
    same = {"model_sha256": "m", "source_sha256": "s", "instruction": None}
    return table(slice(10 * number, 10 * number + 10), says={**same, **own, **says})


def test_metadata_is_what_holds_for_all_files(tmp_path: Path) -> None:
    for number in range(3):
        pq.write_table(shard(number), tmp_path / f"embeddings-{number}.parquet")
    kept = {"model_sha256": "m", "source_sha256": "s", "instruction": None, "num_shards": 3}
    assert open_embeddings(tmp_path).metadata == {"model": "last.ckpt", **kept}


@pytest.mark.parametrize(
    ("key", "value"), [("model_sha256", "n"), ("source_sha256", "t"), ("instruction", "a"), ("num_shards", 4)]
)
def test_files_of_different_runs_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    for number in range(3):
        says = {key: value} if number == 2 else {}
        pq.write_table(shard(number, **says), tmp_path / f"embeddings-{number}.parquet")
    with pytest.raises(ValueError, match=rf"embeddings-2\.parquet was written with {key} {value!r}"):
        open_embeddings(tmp_path)


@pytest.mark.parametrize("numbers", [(0, 2), (0, 1, 1), (1,)])
def test_an_unfinished_folder_is_refused(numbers: tuple[int, ...], tmp_path: Path) -> None:
    for place, number in enumerate(numbers):
        pq.write_table(shard(number), tmp_path / f"embeddings-{place}.parquet")
    with pytest.raises(
        ValueError, match=r"the files \[.*\] of 0 to 2, each once: run the same lightning predict"
    ):
        open_embeddings(tmp_path)
    assert open_embeddings(tmp_path / "embeddings-0.parquet").num_rows == 10, "named as a single file"


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write one with lightning predict"):
        open_embeddings(tmp_path)
    with pytest.raises(ValueError, match="write one with lightning predict"):
        open_embeddings(tmp_path / "missing.parquet")
    pq.write_table(table(), tmp_path / "a.parquet")
    pq.write_table(table(text=None), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: other columns"):
        open_embeddings(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        open_embeddings(tmp_path / "a.parquet")
