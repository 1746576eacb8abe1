"""Tables: cells arrive as they are in the files, mapped and shared, and copies follow their source."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parallel_decoupling.data import tables
from parallel_decoupling.data.tables import Table, arrow_copy, default_cache_dir

COLUMNS = {"text": "text", "more": "more"}


def parquet(file: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=3)
    return file


def test_cells_equal_the_files_across_batches_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_decoupling.data.tables.ROWS_PER_BATCH", 4)
    texts = [f"row {number}\n" for number in range(23)]
    lists = [[f"{number}", ""] for number in range(23)]
    files = [
        parquet(tmp_path / "a.parquet", {"text": texts[:10], "more": lists[:10]}),
        parquet(tmp_path / "b.parquet", {"more": lists[10:], "text": texts[10:], "other": [b"x"] * 13}),
    ]
    table = Table("subset 'S'", files, {"mine": "text", "more": "more", "absent": "none"})
    assert len(table) == 23
    assert [table[row] for row in range(23)] == [
        {"mine": text, "more": cells} for text, cells in zip(texts, lists, strict=True)
    ]
    assert table.column("mine").to_pylist() == texts
    assert table.column("absent") is None
    assert table.where(12, "mine") == f"subset 'S', file {files[1]}, row 2, column 'text'"
    assert table.where(9, "more").endswith("a.parquet, row 9, column 'more'")


def test_a_row_does_not_load_the_file(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["x" * 1000] * 2_000})
    Table("S", [file], {"text": "text"})
    before = pa.total_allocated_bytes()
    table = Table("S", [file], {"text": "text"})
    assert table[1_500]["text"] == "x" * 1000
    assert pa.total_allocated_bytes() - before < 50_000, "mapped, not allocated"


def test_copies_are_made_once_and_again_when_the_contents_change(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["old"]})
    os.utime(file, ns=(1, 1))
    copy = arrow_copy(file, {"text": False}, "S")
    written = copy.stat().st_mtime_ns
    os.utime(file, ns=(2, 2))  # another time alone changes nothing
    assert (arrow_copy(file, {"text": False}, "S"), copy.stat().st_mtime_ns) == (copy, written)
    assert arrow_copy(file, {"text": False, "more": False}, "S") != copy
    parquet(file, {"text": ["new"]})  # of the same size
    os.utime(file, ns=(2, 2))
    assert Table("S", [file], {"text": "text"})[0] == {"text": "new"}
    assert not copy.exists(), "the copy of the earlier contents is gone"


@pytest.mark.parametrize("left", [0, 8, 100, -1])
def test_a_copy_that_was_cut_is_written_again(tmp_path: Path, left: int) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["x"] * 9})
    copy = arrow_copy(file, {"text": False}, "S")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:left])
    assert len(Table("S", [file], {"text": "text"})) == 9
    assert copy.read_bytes() == whole


def test_a_copy_that_another_process_finished_meanwhile_is_never_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["x"]})
    replace, others = Path.replace, []

    def other_process_first(self: Path, target: Path) -> Path:
        assert all(copy.is_file() for copy in others), "removed before the new one is there"
        return replace(self, target)

    def write_twice(*arguments: Any) -> None:
        write(*arguments)
        if not others:
            others.append(tmp_path)  # once
            others[:] = [arrow_copy(file, {"text": False}, "S")]
            monkeypatch.setattr(Path, "replace", other_process_first)

    write = tables._write
    monkeypatch.setattr(tables, "_write", write_twice)
    assert [arrow_copy(file, {"text": False}, "S")] == others


def test_a_pickled_table_maps_the_files_again(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["x" * 100] * 1000})
    data = pickle.dumps(Table("S", [file], {"text": "text"}))
    assert len(data) < 1000
    assert pickle.loads(data)[999] == {"text": "x" * 100}


def test_every_kind_of_text_column_becomes_text(tmp_path: Path) -> None:
    columns = {
        "a": pa.array(["x", None]).cast(pa.large_string()),
        "b": pa.array(["x", "y"]).dictionary_encode(),
        "c": pa.array([1, 2]),
        "d": pa.array([None, None]),
        "e": pa.array([["x"], None], pa.large_list(pa.large_string())),
        "f": pa.array(["x", "y"], pa.string_view()),
    }
    table = Table("S", [parquet(tmp_path / "a.parquet", columns)], {name: name for name in columns})
    assert table[0] == {"a": "x", "b": "x", "c": "1", "d": None, "e": ["x"], "f": "x"}
    assert table[1] == {"a": None, "b": "y", "c": "2", "d": None, "e": None, "f": "y"}


def test_jsonl_and_csv_read_like_parquet(tmp_path: Path) -> None:
    rows = [
        {"text": 'a "quoted", text\nof two lines', "more": ["p", "q, r"], "number": 1},
        {"text": "", "more": ["[s]"], "number": 2},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [row["text"].replace('"', '""') for row in rows]
    lines = "".join(f'"{text}",{number + 1}\n' for number, text in enumerate(cells))
    (tmp_path / "a.csv").write_text("text,number\n" + lines)
    parquet(tmp_path / "a.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    expected = [{**row, "number": str(row["number"])} for row in rows]
    for suffix in ("jsonl", "csv", "parquet"):
        names = ("text", "number") if suffix == "csv" else ("text", "more", "number")
        table = Table("S", [tmp_path / f"a.{suffix}"], {name: name for name in names})
        assert [table[row] for row in range(2)] == [{name: row[name] for name in names} for row in expected]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_a_byte_order_mark_is_read_right(tmp_path: Path, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "a.csv").write_bytes(mark + "text;more\r\nä;1\r\nö;2\r\n".encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(
        mark + '{"text": "ä", "more": 1}\n{"text": "ö", "more": 2}'.encode(encoding)
    )
    for name in ("a.csv", "a.jsonl"):
        table = Table("S", [tmp_path / name], COLUMNS)
        assert table.rows.to_pydict() == {"text": ["ä", "ö"], "more": ["1", "2"]}


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_encodings_are_one_message_with_the_row(tmp_path: Path, suffix: str, encoding: str) -> None:
    is_csv, is_wide = suffix == "csv", encoding.startswith("utf")
    lines = ['{"text": "a"}', '{"text": "caf\xe9"}', '{"text": "b"}']
    lines = ["text", "a", "caf\xe9", "b"] if is_csv else lines
    (tmp_path / f"a.{suffix}").write_bytes("\n".join(lines).encode(encoding))
    place = "row " if is_wide else rf"row 1 \(line {2 + is_csv}\) is not UTF-8"
    with pytest.raises(ValueError, match=rf"a\.{suffix}: {place}.*Save the file as UTF-8\.$"):
        Table("subset 'S'", [tmp_path / f"a.{suffix}"], COLUMNS)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_the_one_that_gives_the_columns(tmp_path: Path, delimiter: str) -> None:
    rows = [["text", "note, or; what"], ["a;b,c\td", "1"], ["e", "2"]]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    table = Table("S", [tmp_path / "a.csv"], {"text": "text", "other": "note, or; what"})
    assert table.rows.to_pydict() == {"text": ["a;b,c\td", "e"], "other": ["1", "2"]}
    (tmp_path / "a.csv").write_text(delimiter.join(("question", "photo", "title")) + "\n" + delimiter * 2)
    with pytest.raises(ValueError, match="column 'text' is missing; found question, photo, title"):
        Table("S", [tmp_path / "a.csv"], {"text": "text"}).check(["text"], ())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'text,more\nx,1\ny,"2\nz,3\n', "row 1: .* Is a quotation mark left open"),
        ("a.csv", b'text,more\nx,1\n"y" z,2\n', "row 1: .*expected after"),
        ("a.csv", b"text,more\nx,1\ny\n", "row 1 has 1 cells, where the header has 2"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }\n', "row 1: Expecting value"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', "row 1: .* surrogates not allowed"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ' + b"[" * 99999, "row 1: maximum recursion depth"),
        ("a.jsonl", b'{"text": "x"}\n{}\n{"text": ["x"]}\n', "row 2, column 'text': .* values of one type"),
        (
            "a.jsonl",
            b'{"text": 1}\n{"text": 9e9}\n{"text": 99999999999999999999}\n',
            "row 2, column 'text': ",
        ),
        ("a.jsonl", b'["text"]\n', "a line is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y", "text": "z"}\n', "row 1: 'text' is there 2 times"),
        ("a.jsonl", b'{"image": {"bytes": "x"}}\n', "nor a column of pictures"),
        ("a.jsonl", b'{"image": {"bytes": null, "path": 3}}\n', "nor a column of pictures"),
        ("a.parquet", b"PAR1 cut off", "Is it complete"),
        ("a.csv", b"text,more\n", "has no rows"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.csv", b"text,text\nx,y\n", "two columns have the same name"),
        ("a.txt", b"text", "must end with one of .parquet, .jsonl, .csv"),
        ("none.csv", None, "Check data_dir"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_row(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    read = "" if message.startswith(("has no", "two", "must")) else "S: cannot read "
    with pytest.raises(ValueError, match=rf"{read}.*{name}.*{message}"):
        Table("S", [tmp_path / name], {**COLUMNS, "image": "image"})
    assert not list((default_cache_dir() / "tables").glob(".unfinished-*"))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"n": pa.array([1])}, {"n": ["1"]}, "column 'n' holds int64 in .*a.parquet, but string in .*b.parq"),
        (
            {"n": pa.array([0], pa.timestamp("s"))},
            {"n": pa.array([0], pa.timestamp("s", "UTC"))},
            "column 'n' holds timestamp",
        ),
        ({"text": ["x"]}, {"text": [["x"]]}, "column 'text' holds string in .*a.parquet, but list"),
    ],
)
def test_a_column_of_two_types_is_named_with_both_files(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    files = [parquet(tmp_path / "a.parquet", first), parquet(tmp_path / "b.parquet", second)]
    with pytest.raises(ValueError, match=f"^S: {message}"):
        Table("S", files, {"text": "text"}, keep_others=True)


def test_a_column_of_two_types_in_one_file_is_named_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_decoupling.data.tables.ROWS_PER_BATCH", 2)
    (tmp_path / "a.jsonl").write_text(
        '{"text": null}\n{"text": 1}\n{"text": 2.5}\n{"text": 2}\n{"text": "x"}'
    )
    with pytest.raises(ValueError, match="'text' holds double in rows up to 1, but string in rows up to 4"):
        Table("S", [tmp_path / "a.jsonl"], COLUMNS)


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([b"\xff" * 16], pa.binary(16)),
        pa.array([b"\xff" * 16]).dictionary_encode(),
        pa.array([b"ok", b"\xff"]).view(pa.string()),
    ],
)
def test_cells_that_are_not_texts_are_named(tmp_path: Path, cells: pa.Array) -> None:
    file, rows = parquet(tmp_path / "a.parquet", {"text": cells}), f"rows 0 to {len(cells) - 1}"
    with pytest.raises(ValueError, match=f"cannot read .*{rows}, column 'text': .*Invalid UTF8"):
        Table("S", [file], COLUMNS)


def test_kept_columns_of_csv_lose_nothing(tmp_path: Path) -> None:
    columns: dict[str, tuple[list[str], list[Any]]] = {
        "year": (["1999", "2000", ""], [1999, 2000, None]),
        "price": (["1.50", "2.00", "10"], [1.5, 2.0, 10.0]),
        "zip": (["00123", "4", ""], ["00123", "4", ""]),
        "country": (["NA", "NA", ""], ["NA", "NA", ""]),
        "stock": (["1", "2", "N/A"], ["1", "2", "N/A"]),
        "big": (["12345678901234567890", "5", "6"], ["12345678901234567890", "5", "6"]),
    }
    rows = [columns, *zip(*(written for written, _ in columns.values()), strict=True)]
    (tmp_path / "a.csv").write_text(
        "".join("t," * bool(n) + ("" if n else "text,") + ",".join(row) + "\n" for n, row in enumerate(rows))
    )
    table = Table("S", [tmp_path / "a.csv"], {"text": "text"}, keep_others=True)
    assert table.rows.drop_columns("text").to_pydict() == {name: read for name, (_, read) in columns.items()}


def test_nan_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel_decoupling.data.tables.ROWS_PER_BATCH", 1)
    nan = float("nan")
    lists = pa.array([[1.5, nan], [nan, 2.0]], pa.list_(pa.float32(), 2))
    file = parquet(tmp_path / "a.parquet", {"text": [1.0, nan], "more": lists})
    expected = {"text": ["1", None], "more": [["1.5", None], [None, "2"]]}
    assert Table("S", [file], COLUMNS).rows.to_pydict() == expected
    (tmp_path / "a.jsonl").write_text('{"text": "nan", "more": NaN}\n{"text": NaN, "more": "x"}\n')
    expected = {"text": ["nan", None], "more": [None, "x"]}
    assert Table("S", [tmp_path / "a.jsonl"], COLUMNS).rows.to_pydict() == expected


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    for name in (tmp_path / "a.csv", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            Table("S", [name], COLUMNS)


def test_jsonl_texts_that_look_like_dates_stay_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_decoupling.data.tables.ROWS_PER_BATCH", 5)
    columns = {
        "day": ("1969-07-20", "1969-07-20 20:17"),
        "days": (["2020-01-01", "2020-01-02T10:00:00Z"], []),
    }
    columns |= {"gap": (None, "2020-01-01"), "list": ([], None), "nothing": (None, None)}
    rows: list[dict[str, Any]] = [{name: cells[row] for name, cells in columns.items()} for row in (0, 1)] * 9
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table("S", [tmp_path / "a.jsonl"], {name: name for name in columns})
    assert [table[row] for row in range(18)] == rows


def test_columns_beside_the_texts_keep_their_types(tmp_path: Path) -> None:
    columns = {
        "text": pa.array([1, 2]),
        "year": pa.array([1999, None]),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "view": pa.array(["a", "b"], pa.string_view()),
        "parts": pa.array([{"x": 1}, None]),
        "views": pa.array([{"y": "c"}, None], pa.struct([("y", pa.string_view())])),
        "map": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string_view())),
        "pair": pa.array([["c", "d"], None], pa.list_(pa.string_view(), 2)),
    }
    file = parquet(tmp_path / "a.parquet", columns)
    rows = Table("S", [file], {"text": "text"}, keep_others=True).rows
    kinds = [pa.string(), pa.int64(), pa.string(), pa.string(), pa.struct([("x", pa.int64())])]
    kinds += [pa.struct([("y", pa.string())]), pa.map_(pa.string(), pa.string()), pa.list_(pa.string(), 2)]
    assert rows.schema == pa.schema(list(zip(columns, kinds, strict=True)))
    first = {"text": "1", "year": 1999, "kind": "a", "view": "a", "parts": {"x": 1}, "views": {"y": "c"}}
    first |= {"map": [("k", "v")], "pair": ["c", "d"]}
    assert rows.take([0]).to_pylist() == [first]


def test_a_column_of_nulls_in_one_file_takes_the_type_of_the_other(tmp_path: Path) -> None:
    files = [
        parquet(tmp_path / "a.parquet", {"text": ["x"], "more": pa.nulls(1)}),
        parquet(tmp_path / "b.parquet", {"text": ["y"], "more": [["p", "q"]]}),
    ]
    table = Table("S", files, COLUMNS)
    assert [table[row] for row in range(2)] == [
        {"text": "x", "more": None},
        {"text": "y", "more": ["p", "q"]},
    ]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PARALLEL_DECOUPLING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "parallel_decoupling"
    monkeypatch.setenv("PARALLEL_DECOUPLING_CACHE", "elsewhere")
    assert default_cache_dir() == Path("elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PARALLEL_DECOUPLING_CACHE", "~/cache")
    assert default_cache_dir() == tmp_path / "cache"


def test_a_cache_that_cannot_be_written_is_named_and_not_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = parquet(tmp_path / "rows.parquet", {"text": ["a"]})
    monkeypatch.setenv("PARALLEL_DECOUPLING_CACHE", str(file / "cache"))
    with pytest.raises(NotADirectoryError, match=r"rows\.parquet/cache") as raised:
        arrow_copy(file, {"text": False}, "owner")
    assert "cannot read" not in str(raised.value)
