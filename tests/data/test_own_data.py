"""Rows of your own data: the worked example of docs/data.md, and files that do not fit their entry."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling.batch import RawInput
from parallel_decoupling.cli import main
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.readers import TrainSubset, read_eval_task
from parallel_decoupling.data.tasks import find_eval_tasks, find_train_subsets
from tests.data.mmeb_files import OWN_ENTRY, train_row, write_image, write_train

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """The example of the document, as it stands there."""
    blocks = re.findall(r"^`(shop/[^`]+)`:\n\n```\w+\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    names = ("tasks.json", "train.jsonl", "test.csv", "labels.jsonl")
    assert [name for name, _ in blocks] == [f"shop/{name}" for name in names]
    for name, content in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name in ("chair_1", "chair_2", "lamp_1"):
        write_image(tmp_path / "shop" / "photos" / f"{name}.jpg")
    return tmp_path / "shop"


def photo(shop: Path, name: str) -> str:
    return str(shop / "photos" / f"{name}.jpg")


def test_training_rows_are_what_the_document_shows(shop: Path) -> None:
    assert find_train_subsets(shop) == ["ShopSearch"]
    first, second, third = (TrainSubset(shop, "ShopSearch", hard_negatives=2)[row] for row in range(3))
    query, candidate = re.findall(r"^```\n((?:Find|<).*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    assert first.query == RawInput(query.removesuffix("\n"))
    assert first.candidate == RawInput(candidate.removesuffix("\n"), (photo(shop, "chair_1"),))
    shown = "<|image_1|>\nRepresent the given product.\n"
    assert first.negatives == (RawInput(shown, (photo(shop, "lamp_1"),)), None)
    found = [negative and negative.images[0] for negative in second.negatives]
    assert found == [photo(shop, "chair_1"), photo(shop, "chair_2")]
    assert third.candidate == RawInput(shown, (photo(shop, "chair_2"),))
    assert third.negatives == (None, None)


def test_a_positive_alone_is_ranked_among_all_positives(shop: Path) -> None:
    task = read_eval_task(shop, "ShopSearch")
    assert [query.text for query in task.queries] == [
        "Find a product that matches: a seat for the kitchen\n",
        "Find a product that matches: a lamp\n",
        "Find a product that matches: something red\n",
    ]
    assert [row.images for row in task.candidates] == [
        (photo(shop, name),) for name in ("chair_2", "lamp_1", "chair_1")
    ]
    assert task.candidates_of_row == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]
    assert task.candidates[0].text == "<|image_1|>\nRepresent the given product. Stool\n"


def test_lists_of_candidates_belong_to_their_row(shop: Path) -> None:
    task = read_eval_task(shop, "ShopLabels")
    assert task.queries[0] == RawInput("<|image_1|>\nName the product.\n", (photo(shop, "chair_1"),))
    assert [row.text for row in task.candidates] == ["chair", "lamp", "table"]
    assert task.candidates_of_row == [[0, 1, 2], [1, 0]]


def test_the_example_goes_through_the_data_module(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = MMEBDataModule(str(shop), batch_size=2)
    data.prepare_data()
    data.setup("fit")
    assert [len(subset) for subset in data.train_data] == [3]
    data.setup("test")
    assert [task.task.name for task in data.eval_tasks_data] == ["ShopSearch", "ShopLabels"]
    assert find_eval_tasks(shop) == ["ShopSearch", "ShopLabels"]
    main(["verify", str(shop)])
    assert "problem" not in capsys.readouterr().out


def test_own_subsets_stand_next_to_mmebs(shop: Path) -> None:
    write_train(shop, "VOC2007", [train_row()])
    assert find_train_subsets(shop) == ["ShopSearch", "VOC2007"]
    assert find_train_subsets(shop, "diverse_instruction") == ["ShopSearch"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,b\nx,y\n", "training subset 'Mine', file .*a.csv: column 'a' is missing; found q, b"),
        ("q,a\n,\n", "every row has neither text nor image"),
    ],
)
def test_files_that_do_not_fit_their_columns_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": OWN_ENTRY}))
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        TrainSubset(tmp_path, "Mine")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"q": ["x", "y"], "a": ["cat", "dog"]}], "row 0, column 'q': holds a list, where a row has one"),
        ([{"q": "x", "a": ["cat"]}], "row 0, column 'a': 1 candidates"),
        ([{"q": "x", "a": ["cat", "dog"]}, {"q": "x", "a": []}], "row 1, column 'a': 0 candidates"),
    ],
)
def test_lists_that_do_not_fit_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    entry = {**OWN_ENTRY, "train_file": "a.jsonl", "eval_file": "a.jsonl"}
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": entry}))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"'Mine', .*{message}"):
        read_eval_task(tmp_path, "Mine")
    with pytest.raises(ValueError, match="column '[qa]': holds a list, where a row has one value"):
        TrainSubset(tmp_path, "Mine")


@pytest.mark.parametrize("cell", ['"[""cat"", ""dog""]"', "\"['dog', 'cat']\""])
def test_a_list_in_a_csv_cell_is_named(tmp_path: Path, cell: str) -> None:
    columns = {"query_text": "q", "candidate_text": "a", "negative_text": "n"}
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": {**OWN_ENTRY, "columns": columns}}))
    (tmp_path / "a.csv").write_text(f"q,a,n\n1,x,[y]\n2,{cell},z\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 1, column 'a': .*Keep lists in a JSONL"):
        read_eval_task(tmp_path, "Mine")
    (tmp_path / "a.csv").write_text(f"q,a,n\n{cell},[x],{cell}\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 0, column 'n': .*Keep lists in a JSONL"):
        TrainSubset(tmp_path, "Mine")
    (tmp_path / "a.csv").write_text(f"q,a,n\n{cell},[x],z\n3,cat,z\n")
    assert read_eval_task(tmp_path, "Mine").candidates_of_row == [[0, 1], [1, 0]], "queries are texts"


def test_a_pool_must_not_be_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel_decoupling.data.readers.MAX_POOL_ENTRIES", 8)
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": OWN_ENTRY}))
    (tmp_path / "a.csv").write_text("q,a\n1,x\n2,y\n3,z\n")
    with pytest.raises(ValueError, match="3 rows with 3 candidates each are too many"):
        read_eval_task(tmp_path, "Mine")


def test_missing_images_are_named_by_row_and_column(shop: Path) -> None:
    (shop / "photos" / "chair_1.jpg").unlink()
    with pytest.raises(ValueError, match=r"'ShopLabels', file .*, row 0, column 'photo': no image file"):
        read_eval_task(shop, "ShopLabels")
    with pytest.raises(
        ValueError, match=r"'ShopSearch', file .*train.jsonl, row 0, column 'title': no image file"
    ):
        TrainSubset(shop, "ShopSearch")[0]
