"""Where rows come from: the mixture of training, and folders and tables as sources of ``predict``."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from parallel_decoupling.data.mixture import MixtureSampler
from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.data.row_sources import RowSource

SIZES = [50, 7, 123]
POLICIES = [("mixed", None), ("sub_batch", 4), ("homogeneous", None), ("neighbours", 4)]


def sampler(sizes: list[int] = SIZES, batch_size: int = 8, **options: Any) -> MixtureSampler:
    return MixtureSampler(sizes, batch_size=batch_size, **options)


def epoch(mixture: MixtureSampler, number: int = 0) -> list[list[tuple[int, int]]]:
    steps = range(number * mixture.steps_per_epoch, (number + 1) * mixture.steps_per_epoch)
    return [mixture.batch(step) for step in steps]


@pytest.mark.parametrize(("policy", "block"), POLICIES)
def test_batch_depends_on_seed_and_step_only(policy: Any, block: int | None) -> None:
    options = {"policy": policy, "sub_batch_size": block, "weights": [1.0, 1.0, 3.0]}
    steps = 3 * sampler(**options).steps_per_epoch
    forward = [sampler(**options).batch(step) for step in range(steps)]
    used = sampler(**options)
    assert [used.batch(step) for step in reversed(range(steps))] == forward[::-1]
    assert [sampler(**options, seed=1).batch(step) for step in range(steps)] != forward
    assert len({tuple(batch) for batch in forward}) >= steps - (policy == "neighbours")  # few clusters


@pytest.mark.parametrize(("policy", "block"), POLICIES)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_join_to_the_same_global_batches(policy: Any, block: int | None, world_size: int) -> None:
    whole = sampler(policy=policy, sub_batch_size=block)
    ranks = [
        list(sampler(policy=policy, sub_batch_size=block, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == epoch(whole)


def test_a_batch_is_of_blocks_of_one_subset() -> None:
    batches = epoch(sampler(policy="homogeneous"))
    assert Counter(batch[0][0] for batch in batches) == {0: 50 // 8, 1: 1, 2: 123 // 8}
    for size, policy in ((8, "homogeneous"), (4, "sub_batch")):
        batches = epoch(sampler(policy=policy, sub_batch_size=4 if size == 4 else None))
        blocks = [batch[start : start + size] for batch in batches for start in range(0, 8, size)]
        assert all(len({subset for subset, _ in block}) == 1 for block in blocks)
    assert any(len({subset for subset, _ in batch}) > 1 for batch in batches)


@pytest.mark.parametrize(("block", "policy"), [(1, "mixed"), (8, "homogeneous")])
def test_sub_batch_of_extreme_size_equals_the_other_policies(block: int, policy: Any) -> None:
    assert epoch(sampler(policy="sub_batch", sub_batch_size=block)) == epoch(sampler(policy=policy))


def test_neighbours_of_size_1_equal_mixed_batches_of_renamed_rows() -> None:
    orders = [np.random.default_rng(size).permutation(size) for size in SIZES]
    weights = [2.0, 1.0, 1.0]  # passes meet inside of batches
    mixture = sampler(policy="neighbours", sub_batch_size=1, orders=orders, weights=weights)
    mixed = chain(*(epoch(sampler(weights=weights), number) for number in range(3)))
    renamed = [[(subset, orders[subset][row]) for subset, row in batch] for batch in mixed]
    assert list(chain(*(epoch(mixture, number) for number in range(3)))) == renamed


@pytest.mark.parametrize("size", [48, 50, 3])
def test_a_batch_of_neighbours_is_of_whole_clusters(size: int) -> None:
    """Only where two passes over a subset meet, a group has rows of both, or replaced ones."""
    orders = [np.random.default_rng(rows).permutation(rows) for rows in (size, 40)]
    mixture = sampler([size, 40], policy="neighbours", sub_batch_size=4, orders=orders)
    clusters: list[list[list[int]]] = [[], []]
    for batch in chain(*(epoch(mixture, number) for number in range(20))):
        for group in (batch[:4], batch[4:]):
            ((subset, _),) = {(subset, 0) for subset, _ in group}
            clusters[subset].append(np.argsort(orders[subset])[[row for _, row in group]].tolist())
    parted = [cluster for cluster in clusters[0] if cluster != [*range(cluster[0], cluster[0] + 4)]]
    assert len(parted) <= (2 * 4 * len(clusters[0]) / size if size % 4 else 0)
    assert sorted(map(tuple, {tuple(each) for each in clusters[1]})) == [
        tuple(range(first, first + 4)) for first in range(0, 40, 4)
    ]


def test_weights_are_shares_per_subset() -> None:
    counts = Counter(subset for subset, _ in chain(*epoch(sampler(weights=[2.0, 1.0, 1.0], batch_size=10))))
    assert counts == {0: 90, 1: 45, 2: 45}
    for scale in (5e-324, 8e307):  # sums of the weights would be 0 or infinite
        scaled = sampler(weights=[2 * scale, scale, scale], batch_size=10)
        assert Counter(subset for subset, _ in chain(*epoch(scaled))) == counts


@pytest.mark.parametrize(("policy", "block"), POLICIES)
@pytest.mark.parametrize("weights", [None, [5.0, 1.0, 2.0]])
def test_a_batch_repeats_a_row_only_if_it_draws_more_rows_than_the_subset_has(
    policy: Any, block: int | None, weights: list[float] | None
) -> None:
    mixture = sampler([30, 5, 40], batch_size=16, policy=policy, sub_batch_size=block, weights=weights)
    for step in range(200):
        batch = mixture.batch(step)
        drawn = Counter(subset for subset, _ in batch)
        distinct = Counter(subset for subset, _ in set(batch))
        assert all(distinct[subset] == min(drawn[subset], mixture.sizes[subset]) for subset in drawn)


@pytest.mark.parametrize(("policy", "block"), POLICIES)
def test_rows_of_a_subset_come_equally_often(policy: Any, block: int | None) -> None:
    mixture = sampler([100, 60], batch_size=16, policy=policy, sub_batch_size=block, weights=[1.0, 3.0])
    counts = Counter(chain(*(batch for number in range(20) for batch in epoch(mixture, number))))
    for subset, size in enumerate(mixture.sizes):
        times = [counts[subset, row] for row in range(size)]
        mean = sum(times) / size
        assert mean - 3 <= min(times) <= max(times) <= mean + 3  # 20 independent draws spread by far more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "world_size": 2}, "multiple of the 2 processes"),
        ({"batch_size": 999}, "180 rows do not fill one batch"),
        ({"policy": "sub_batch"}, "policy='sub_batch' with sub_batch_size=None: sub_batch and"),
        ({"policy": "neighbours"}, "policy='neighbours' with sub_batch_size=None: .* neighbours need"),
        ({"policy": "sub_batch", "sub_batch_size": 3}, "sub_batch_size=3: .* divides batch_size=8"),
        (
            {"policy": "mixed", "sub_batch_size": 4},
            "with sub_batch_size=4: .* other policies have none",
        ),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)


ROWS: list[dict[str, Any]] = [
    {"id": "b", "text": "2024-05-01", "image": None, "year": 1999, "shape": "square"},
    {"id": "a", "text": None, "image": "pictures/red.png", "year": 2001, "shape": "circle"},
    {"id": "c", "text": "2024-05-02", "image": "pictures/red.png", "year": 2002, "shape": None},
]


def save(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    (file.parent / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (20, 30), "red").save(file.parent / "pictures" / "red.png")
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        pa.csv.write_csv(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_table_gives_inputs_as_encode_does_and_fields_with_their_types(suffix: str, tmp_path: Path) -> None:
    source = RowSource(save(tmp_path / f"rows{suffix}"))
    picture = str(tmp_path / "pictures" / "red.png")
    plain = [{"text": "2024-05-01"}, {"image": picture}, {"text": "2024-05-02", "image": picture}]
    assert [source[row] for row in range(len(source))] == to_raw_inputs(plain)
    source = RowSource(tmp_path / f"rows{suffix}", "Find.")
    assert [source[row] for row in range(len(source))] == to_raw_inputs(plain, "Find.")
    expected = {"source": str(tmp_path / f"rows{suffix}"), "image_dir": str(tmp_path), "instruction": "Find."}
    assert source.about == expected
    columns = source.columns([0, 2])
    assert columns.column_names == ["id", "text", "image", "year", "shape"]
    assert columns["id"].to_pylist() == ["b", "c"]
    assert columns["year"].to_pylist() == [1999, 2002]
    assert columns.schema.field("year").type == pa.int64()
    assert RowSource(tmp_path / f"rows{suffix}").columns([]).schema == columns.schema


def test_rows_without_id_are_called_by_their_number(tmp_path: Path) -> None:
    file = save(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    assert RowSource(file).columns([0, 1]).to_pydict() == {"id": ["0", "1"], "text": ["one", "two"]}


def test_a_folder_of_parquet_files_and_nothing_else_is_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, text in (("b.parquet", "second"), ("a.parquet", "first")):
        pq.write_table(pa.table({"text": [text]}), folder / name)
    (folder / "_SUCCESS").touch()
    source = RowSource(folder)
    assert [source[row].text for row in range(len(source))] == ["first", "second"]
    Image.new("RGB", (8, 8)).save(folder / "c.png")
    pictures = RowSource(folder)
    assert pictures.columns([*range(len(pictures))])["id"].to_pylist() == ["c.png"]
    assert "a.parquet" in pictures.left_out


def test_what_a_folder_has_beside_pictures_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for place in (folder / "z", folder / "closed", elsewhere):
        place.mkdir(parents=True)
    for file in (folder / "a.png", folder / "b.avif", folder / "z" / "c", elsewhere / "d.JFIF"):
        Image.new("RGB", (8, 8)).save(file, {"": "PNG", ".JFIF": "JPEG"}.get(file.suffix))
    for name in ("1.txt", "2.heic", "3.txt", "4.pdf"):
        (folder / name).write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    for name, target in {"gone.png": "none", "l": elsewhere, "m": folder / "z", "z/up": folder}.items():
        (folder / name).symlink_to(target)
    scandir = os.scandir

    def refuse(place: str) -> Any:
        if str(place).endswith("closed"):
            raise PermissionError(13, "closed", place)
        return scandir(place)

    monkeypatch.setattr("os.scandir", refuse)
    source = RowSource(folder)
    rows = range(len(source))
    assert source.columns([*rows])["id"].to_pylist() == ["a.png", "b.avif", "l/d.JFIF", "z/c"]
    assert source[2].images == (str(folder / "l" / "d.JFIF"),)
    assert set(source.left_out.split(", ", 1)[0].split()) == {"4", "other", "files", "(1.txt"}
    for part in (
        "4 other files (1.txt, 2.heic, 3.txt, …)",
        "2 links or special files (gone.png, pipe.png)",
        "1 folders that cannot be read (closed)",
        "2 folders that are there twice (z/up, m)",
    ):
        assert part in source.left_out
    assert RowSource(save(tmp_path / "rows.csv")).left_out == ""


def test_names_that_are_not_utf8_are_found_again_from_a_table_of_their_ids(tmp_path: Path) -> None:
    files = [os.fsencode(tmp_path) + b"/" + name for name in (b"a.png", b"caf\xe9.png")]
    for file in files:
        with open(file, "wb") as stream:
            Image.new("RGB", (8, 8)).save(stream, "PNG")
    source = RowSource(tmp_path)
    pq.write_table(source.columns([0, 1]), tmp_path / "again.parquet")
    for each in (source, RowSource(tmp_path / "again.parquet")):
        assert [os.fsencode(str(each[row].images[0])) for row in range(2)] == files


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"caption": "x"}], "needs a column text, image .* found caption"),
        ([{"text": "x", "path_3": 1}], "a column 'path_3' holds embeddings"),
        ([{"text": "x", "aggregate": 1}], "a column 'aggregate' holds embeddings"),
        ([{"text": "x", "maxsim": 1}], "a column 'maxsim' holds embeddings"),  # in an index of several paths
        ([{"text": "x", "id": "1"}, {"text": "y", "id": None}], "row 1, .* an id of its own, got None"),
        ([{"text": "x", "id": "1"}, {"text": "y", "id": "1"}], "row 0, .* an id of its own, got 1"),
        ([{"text": ["x"]}], "column 'text': holds a list"),
    ],
)
def test_unusable_tables(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RowSource(save(tmp_path / "rows.parquet", rows))
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "meta": {}}')
    with pytest.raises(ValueError, match="Give columns that a Parquet file can hold"):
        RowSource(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "message"), [("photo", "photo is neither a folder nor a file"), ("", "holds no picture")]
)
def test_unusable_places(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowSource(tmp_path / name)
