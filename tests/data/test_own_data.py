"""Rows of your own data: the worked example of docs/data.md, and files that do not fit their entry."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
        (
            'q,a\nx,"[""y"", ""z""]"\n',
            "column 'a': holds a list; a training row has one query and one positive",
        ),
        ("q,a\n,\n", "every row has neither text nor image"),
    ],
)
def test_files_that_do_not_fit_their_columns_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": OWN_ENTRY}))
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        TrainSubset(tmp_path, "Mine")


def test_a_list_of_queries_is_named(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": OWN_ENTRY}))
    (tmp_path / "a.csv").write_text('q,a\n"[""x"", ""y""]","[""cat"", ""dog""]"\n')
    with pytest.raises(ValueError, match=r"'Mine', .*row 0, column 'q': holds a list; a row has one query"):
        read_eval_task(tmp_path, "Mine")


def test_one_bad_cell_does_not_turn_lists_of_candidates_into_texts(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": OWN_ENTRY}))
    lists = 'q,a\n1,"[""cat"", ""dog""]"\n2,"[""dog"", ""cat""]"\n'
    (tmp_path / "a.csv").write_text(lists + "3,\"['dog', 'cat']\"\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 2, column 'a': .*\['dog', 'cat'\].* not a JSON list"):
        read_eval_task(tmp_path, "Mine")
    (tmp_path / "a.csv").write_text(lists + "3,\n")
    with pytest.raises(ValueError, match=r"'Mine', file .*a\.csv, row 2, column 'a': 0 candidates"):
        read_eval_task(tmp_path, "Mine")
    (tmp_path / "a.csv").write_text("q,a\n1,[a]\n2,cat\n")
    assert read_eval_task(tmp_path, "Mine").candidates_of_row == [[0, 1], [1, 0]]


def test_an_empty_cell_of_negatives_is_an_empty_list(tmp_path: Path) -> None:
    columns = {"query_text": "q", "candidate_text": "a", "negative_text": "n"}
    (tmp_path / "tasks.json").write_text(json.dumps({"Mine": {**OWN_ENTRY, "columns": columns}}))
    (tmp_path / "a.csv").write_text(
        'q,a,n\n"[""a"", ""b""]",[a],"[""x"", ""y""]"\n2,b,\n3,"[""c""]","[""z""]"\n'
    )
    subset = TrainSubset(tmp_path, "Mine", hard_negatives=2)
    found = [[negative and negative.text for negative in subset[row].negatives] for row in range(3)]
    assert found == [["x", "y"], [None, None], ["z", None]]
    assert [subset[row].candidate.text for row in range(3)] == ["[a]", "b", '["c"]'], "one text per row"
    assert subset[0].query.text == '["a", "b"]'


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
