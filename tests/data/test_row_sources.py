"""Folders of images and tables of rows as sources of ``predict``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.row_sources import RowSource
from parallel_decoupling.evaluation.encode import to_raw_inputs

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


def test_a_folder_of_images_is_searched_to_the_bottom(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/second.JPG", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    source = RowSource(tmp_path)
    assert source.columns([0, 1]).to_pydict() == {
        name: ["a.png", "b/c/second.JPG"] for name in ("id", "image")
    }
    assert source[1] == to_raw_inputs([tmp_path / "b/c/second.JPG"])[0]


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
    listdir = os.listdir

    def refuse(place: str) -> list[str]:
        if place.endswith("closed"):
            raise PermissionError(place)
        return listdir(place)

    monkeypatch.setattr("os.listdir", refuse)
    source = RowSource(folder)
    rows = range(len(source))
    assert source.columns([*rows])["id"].to_pylist() == ["a.png", "b.avif", "l/d.JFIF", "z/c"]
    assert source[2].images == (str(folder / "l" / "d.JFIF"),)
    assert set(source.left_out.split(", ", 1)[0].split()) == {"4", "other", "files", "(1.txt"}
    for part in (
        "4 other files (1.txt, 2.heic, 3.txt, …)",
        "2 links or special files (gone.png, pipe.png)",
        "1 folders that cannot be read (closed)",
        "2 folders that are there twice (m, z/up)",
    ):
        assert part in source.left_out
    assert RowSource(save(tmp_path / "rows.csv")).left_out == ""


def test_names_that_are_not_utf8_are_rows_like_others(tmp_path: Path) -> None:
    names = [b"a.png", b"caf\xe9.png"]
    for name in names:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            Image.new("RGB", (8, 8)).save(file, "PNG")
    source = RowSource(tmp_path)
    columns = source.columns([0, 1])
    assert columns["id"].to_pylist() == columns["image"].to_pylist() == ["a.png", "bytes:caf%E9.png"]
    files = [os.fsencode(str(source[row].images[0])) for row in range(2)]
    assert files == [os.fsencode(tmp_path) + b"/" + name for name in names]
    pq.write_table(columns, tmp_path / "again.parquet")
    again = RowSource(tmp_path / "again.parquet")
    assert [os.fsencode(str(again[row].images[0])) for row in range(2)] == files


def test_an_empty_row_has_no_input(tmp_path: Path) -> None:
    rows = [{"text": "one", "image": ""}, {"text": " ", "image": ""}]
    source = RowSource(save(tmp_path / "rows.csv", rows))
    assert source[0] == RawInput("one")
    with pytest.raises(ValueError, match="text or an image"):
        source[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"caption": "x"}], "needs a column text, image .* found caption"),
        ([{"text": "x", "path_3": 1}], "a column 'path_3' holds embeddings"),
        ([{"text": "x", "aggregate": 1}], "a column 'aggregate' holds embeddings"),
        ([{"text": "x", "id": "1"}, {"text": "y", "id": None}], "row 1, .* an id of its own, got None"),
        ([{"text": "x", "id": "1"}, {"text": "y", "id": "1"}], "row 0, .* an id of its own, got 1"),
        ([{"text": "x", "image": {"bytes": b"x", "path": "y"}}], "'image': holds struct<.*Images must be"),
        ([{"text": ["x"]}], "column 'text': holds a list"),
    ],
)
def test_unusable_tables(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RowSource(save(tmp_path / "rows.parquet", rows))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photo", "photo is neither a folder nor a file"),
        ("", "holds no picture"),
    ],
)
def test_unusable_places(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowSource(tmp_path / name)
