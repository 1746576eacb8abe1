"""Rows of files: prompts arrive verbatim, candidates are unique, bad rows are named or left out.

Rows of your own data are the worked example of docs/data.md.
"""

import json
import re
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel_decoupling.batch import RawInput
from parallel_decoupling.cli import main
from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.data.readers import TrainCollator, TrainSubset, read_eval_task
from parallel_decoupling.data.row_sources import TaskSide
from parallel_decoupling.data.tasks import MMEB_TASKS, find_eval_tasks, find_train_subsets
from parallel_decoupling.data.unusable import RowError
from tests.support.mmeb import (
    OWN_ENTRY,
    SHOP_DOCUMENT,
    eval_row,
    train_row,
    write_eval,
    write_image,
    write_shop,
    write_train,
)

QUERY = "<|image_1|>\nRepresent the given image with the following question: What is it? \n"


@pytest.mark.parametrize("root", ["MMEB-train/images", "MMEB-train"])
@pytest.mark.parametrize("prefix", ["images/", ""])
def test_training_prompt_is_verbatim_in_every_image_layout(tmp_path: Path, root: str, prefix: str) -> None:
    image = write_image(tmp_path / root / "OK-VQA" / "Train" / "OK-VQA_image_0.jpg")
    row = train_row(QUERY, "a cat", qry_image_path=f"{prefix}OK-VQA/Train/OK-VQA_image_0.jpg")
    write_train(tmp_path, "OK-VQA", [row])
    pair = TrainSubset(tmp_path, "OK-VQA")[0]
    assert pair.query == RawInput(QUERY, (image,))
    assert pair.candidate == RawInput("a cat")
    assert (pair.negatives, pair.subset, pair.row) == ((), "OK-VQA", 0)


def test_shards_are_one_table_and_errors_name_the_shard(tmp_path: Path) -> None:
    write_train(tmp_path, "S", [train_row("a"), train_row("b")])
    file = tmp_path / "MMEB-train/S/original-00000-of-00001.parquet"
    file.rename(file.with_name("original-00000-of-00002.parquet"))
    write_train(tmp_path, "S", [train_row("c"), train_row("<|image_1|>")])
    file.rename(file.with_name("original-00001-of-00002.parquet"))
    write_train(tmp_path, "S", [train_row("z")], split="diverse_instruction")
    subset = TrainSubset(tmp_path, "S")
    assert [subset[row].query.text for row in range(3)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"'S', file .*original-00001-of-00002.parquet, row 1, column 'qry'"):
        subset[3]
    assert TrainSubset(tmp_path, "S", "diverse_instruction")[0].query.text == "z"
    assert find_train_subsets(tmp_path, "diverse_instruction") == ["S"]


def test_limit_is_a_seeded_sample_in_file_order(tmp_path: Path) -> None:
    write_train(tmp_path, "S", [train_row(str(number)) for number in range(50)])
    subsets = [TrainSubset(tmp_path, "S", limit=20, seed=seed) for seed in (0, 0, 1)]
    kept = [[int(subset[row].query.text) for row in range(20)] for subset in subsets]
    assert kept[0] == kept[1] != kept[2]
    assert len(set(kept[0])) == 20
    assert kept[0] == sorted(kept[0]) != list(range(20))
    assert len(TrainSubset(tmp_path, "S", limit=99)) == 50


@pytest.mark.parametrize(
    ("negatives", "expected"),
    [
        ({"neg_text": "n", "neg_image_path": ""}, ["n", None]),
        ({"neg_text": ["n", "m", "o"], "neg_image_path": ["", "", ""]}, ["n", "m"]),
        ({"neg_text": ["n", "m"], "neg_image_path": None}, ["n", "m"]),
        ({"neg_text": " \n", "neg_image_path": ""}, [None, None]),
        ({"neg_text": [" ", "n"], "neg_image_path": ["", ""]}, ["n", None]),
        ({}, [None, None]),
    ],
)
def test_every_row_has_the_asked_number_of_negatives(
    tmp_path: Path, negatives: dict[str, Any], expected: list[str | None]
) -> None:
    write_train(tmp_path, "S", [train_row(**negatives)])
    subset = TrainSubset(tmp_path, "S", hard_negatives=2)
    for pair in (subset[0], TrainSubset(tmp_path, "S", hard_negatives=2, missing_images="skip")[0]):
        assert [negative and negative.text for negative in pair.negatives] == expected


LISTS = {"pos_text": ["a", "b", "", "c"], "neg_text": ["n", "m"]}
LISTS |= {"pos_image_path": [""] * 4, "neg_image_path": ["", ""]}
BLANK = {"pos_text": ["", " "], "pos_image_path": ["", ""], "neg_text": [], "neg_image_path": []}


@pytest.mark.parametrize(
    ("counts", "candidates", "scores"),
    [
        ((1, 0), ["a"], [5]),
        ((2, 1), ["a", "b", "n"], [5, 4, -1]),
        ((4, 3), ["a", "b", "c", None, "n", "m", None], [5, 4, nan, nan, -1, -2, nan]),
    ],
)
def test_lists_are_several_positives_with_a_teachers_scores(
    tmp_path: Path, counts: tuple[int, int], candidates: list[str | None], scores: list[float]
) -> None:
    given = {**LISTS, "teacher_scores": [5.0, 4.0, None, -1.0, -2.0]}
    write_train(tmp_path, "S", [train_row(**given), train_row(**BLANK, teacher_scores=None)])
    subset = TrainSubset(tmp_path, "S", positives=counts[0], hard_negatives=counts[1])
    assert subset.blank_rows == 1
    pair = subset[0]
    own = (pair.candidate, *pair.positives, *pair.negatives)
    assert [each and each.text for each in own] == candidates
    assert list(pair.teacher) == pytest.approx(scores, nan_ok=True)
    assert len(pair.positives) == counts[0] - 1
    write_train(tmp_path, "T", [train_row(**{**LISTS, "teacher_scores": None}), train_row(**given)])
    assert np.isnan(TrainSubset(tmp_path, "T", positives=2)[0].teacher).all()


def test_positives_that_are_cut_off_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_train(tmp_path, "S", [train_row(**LISTS)])
    TrainSubset(tmp_path, "S", positives=4).log_gaps()
    assert not caplog.text
    TrainSubset(tmp_path, "S", positives=2).log_gaps()
    assert "'S': rows have up to 4 positives; data.positives takes the first 2" in caplog.text


@pytest.mark.parametrize("scores", [[1.0] * 4, [1.0] * 6, "5", ["high"] * 5, [1.0] * 4 + [1e308]])
def test_scores_that_do_not_fit_are_named(tmp_path: Path, scores: Any) -> None:
    write_train(tmp_path, "S", [train_row(**LISTS, teacher_scores=scores)])
    with pytest.raises(
        ValueError, match="row 0, column 'teacher_scores': must be a list of 5 finite numbers"
    ):
        TrainSubset(tmp_path, "S")[0]


def test_a_subset_without_any_negative_is_said_to_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_train(tmp_path, "S", [train_row(neg_text=["", "n"], neg_image_path=["", ""]), train_row()])
    write_train(tmp_path, "T", [train_row(neg_text=[""], neg_image_path=[""]), train_row()])
    write_train(tmp_path, "U", [train_row()])
    for name in "STU":
        TrainSubset(tmp_path, name).log_gaps()
        TrainSubset(tmp_path, name, hard_negatives=1).log_gaps()
    assert re.findall("subset '(.)': no row has a hard negative", caplog.text) == ["T", "U"]


def test_missing_column_and_file_are_named(tmp_path: Path) -> None:
    row = train_row()
    del row["pos_text"]
    write_train(tmp_path, "S", [row])
    with pytest.raises(ValueError, match=r"'S', file .*: column 'pos_text' is missing; found qry"):
        TrainSubset(tmp_path, "S")
    with pytest.raises(ValueError, match=r"S holds no train-\*\.parquet that ends .*; found original-00000"):
        TrainSubset(tmp_path, "S", "train")
    write_eval(tmp_path, "GQA", [{"qry_inst": "i", "qry_text": "q"}])
    with pytest.raises(ValueError, match="column 'tgt_text' is missing; found qry_inst, qry_text"):
        read_eval_task(tmp_path, "GQA")


@pytest.mark.parametrize("root", ["MMEB-eval", "MMEB-eval/images"])
def test_eval_inputs_are_unique_and_positive_comes_first(tmp_path: Path, root: str) -> None:
    image = write_image(tmp_path / root / "RefCOCO-Matching" / "image_0.jpg")
    pictures = {"tgt_img_path": ["RefCOCO-Matching/image_0.jpg"] * 3}
    rows = [
        eval_row("q", ["<|image_1|>\nb", "<|image_1|>\na", "<|image_1|>\nb"], **pictures),
        eval_row("q", ["<|image_1|>\na", "<|image_1|>\nc", "<|image_1|>\nb"], **pictures),
    ]
    write_eval(tmp_path, "RefCOCO-Matching", rows)
    task = read_eval_task(tmp_path, "RefCOCO-Matching")
    assert task.task is MMEB_TASKS["RefCOCO-Matching"]
    assert task.queries == [RawInput("q")]
    assert task.candidates == [RawInput(f"<|image_1|>\n{letter}", (image,)) for letter in "bac"]
    assert task.query_of_row == [0, 0]
    assert task.candidates_of_row == [[0, 1, 0], [1, 2, 0]]


def test_one_text_stands_for_a_list_of_images(tmp_path: Path) -> None:
    images = [write_image(tmp_path / f"MMEB-eval/NIGHTS/{number}.jpg") for number in range(2)]
    names = ["NIGHTS/0.jpg", "NIGHTS/1.jpg"]
    write_eval(tmp_path, "NIGHTS", [eval_row("q", [], tgt_text="", tgt_img_path=names)])
    expected = [RawInput("<|image_1|>\n", (image,)) for image in images]
    assert read_eval_task(tmp_path, "NIGHTS").candidates == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (eval_row("q", ["a"]), "row 1, column 'tgt_text': 1 candidates"),
        (eval_row("q", ["a", "a"]), "row 1, column 'tgt_text': 1 candidates"),
        (eval_row("q", ["a", "b"], tgt_img_path=[""]), "2 texts but 1 image paths"),
        (eval_row("", ["a", "b"]), "column 'qry_text': neither text nor image"),
        (eval_row("q", ["a", "b"], tgt_img_path=["", "GQA/0.jpg"]), "task 'GQA', .*row 1.*no image file"),
        (eval_row("q", ["a", "b"], qry_img_path="GQA/0.jpg"), "row 1, column 'qry_img_path': no image file"),
    ],
)
def test_bad_eval_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_eval(tmp_path, "GQA", [eval_row("q", ["a", "b"]), row])
    with pytest.raises(ValueError, match=message):
        read_eval_task(tmp_path, "GQA")
    if "no image" in message:  # unless that is left to the loader
        assert len(read_eval_task(tmp_path, "GQA", must_exist=False).query_of_row) == 2


def test_a_missing_picture_is_of_its_own_column(tmp_path: Path) -> None:
    write_train(tmp_path, "S", [train_row("<|image_1|>\nq", qry_image_path="none.jpg")])
    with pytest.raises(ValueError, match="row 0, column 'qry_image_path': no image file 'none.jpg'"):
        TrainSubset(tmp_path, "S")[0]


def test_query_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    write_eval(tmp_path, "GQA", [eval_row(str(number), ["a", "b"]) for number in range(10)])
    assert [query.text for query in read_eval_task(tmp_path, "GQA", limit=3).queries] == ["0", "3", "6"]
    assert len(read_eval_task(tmp_path, "GQA", limit=99).queries) == 10


def test_blank_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "MMEB-train/images/x.png")
    rows = [train_row("a"), train_row("", "b"), train_row("c", " \n"), train_row(" \u00a0" * 9, "f")]
    rows += [train_row("", "d", qry_image_path="images/x.png"), train_row(qry=None)]  # type: ignore[arg-type]
    write_train(tmp_path, "S", rows)
    subset = TrainSubset(tmp_path, "S")
    assert [subset[row].row for row in range(len(subset))] == [0, 4]
    assert subset.blank_rows == 4
    write_train(tmp_path, "T", rows[1:3])
    with pytest.raises(ValueError, match="subset 'T', .*every row has neither text nor image"):
        TrainSubset(tmp_path, "T")


def test_the_first_rows_are_vlm2vecs_cap(tmp_path: Path) -> None:
    write_train(tmp_path, "S", [train_row(str(number) * (number != 2)) for number in range(9)])
    subset = TrainSubset(tmp_path, "S", limit=5, limit_by="first")
    assert [subset[row].query.text for row in range(len(subset))] == ["0", "1", "3", "4"]
    assert len(TrainSubset(tmp_path, "S", limit=99, limit_by="first")) == 8


def test_the_next_usable_row_stands_in(tmp_path: Path, tiny_backbone_dir: str) -> None:
    images = tmp_path / "MMEB-train/images"
    for number in (0, 3):
        write_image(images / f"{number}.png")
    (images / "1.png").write_bytes(b"broken")
    write_train(tmp_path, "S", [train_row("q", qry_image_path=f"images/{row}.png") for row in range(5)])
    subset, collator = TrainSubset(tmp_path, "S", missing_images="skip"), load_collator(tiny_backbone_dir)
    assert [subset[row].row for row in range(5)] == [0, 1, 3, 3, 0], "nothing is decoded yet"
    assert [subset.usable(row, collator).row for row in range(5)] == [0, 3, 3, 3, 0]
    batch, expected = (
        TrainCollator(collator, [subset])([subset[0], subset[1]]),
        collator([subset[0], subset[3]]),
    )
    assert torch.equal(batch.query.vision[1]["pixel_values"], expected.query.vision[1]["pixel_values"])
    subset.missing_images = "error"
    with pytest.raises(RowError, match=r"training subset 'S', row 1: Cannot read image .*1\.png"):
        TrainCollator(collator, [subset])([subset[0], subset[1]])
    write_train(tmp_path, "T", [train_row("q", qry_image_path="images/1.png")] * 3)
    with pytest.raises(ValueError, match="3 rows in a row .* `lightning verify`"):
        TrainSubset(tmp_path, "T", missing_images="skip").usable(1, collator)
    write_train(tmp_path, "U", [train_row("<|image_1|>")])
    with pytest.raises(ValueError, match="in the text but no image"):
        TrainSubset(tmp_path, "U", missing_images="skip")[0]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("GQA", [0, 1, 2, 3, 4]),  # text (no images there): all differ
        ("MSCOCO_t2i", [0, 1, 0, 1, 1]),  # the image alone
        ("RefCOCO-Matching", [0, 1, 2, 3, 3]),  # image and caption without its quotes
    ],
)
def test_what_makes_candidates_the_same_is_the_tasks(tmp_path: Path, task: str, expected: list[int]) -> None:
    texts, images = ["a", "a", "b", "b", '"b"'], ["0.png", "1.png", "0.png", "1.png", "1.png"]
    for image in images:
        write_image(tmp_path / "MMEB-eval" / image)
    rows = {"qry_inst": "i", "qry_text": "q", "tgt_inst": "Show:", "tgt_text": texts, "tgt_img_path": images}
    write_eval(tmp_path, task, [rows])
    read = read_eval_task(tmp_path, task)
    assert read.candidates_of_row == [expected]
    assert read.candidates[0].text == "<|image_1|> Show: a\n", "the first one seen stands for all"


def test_rows_and_candidates_can_be_left_out(tmp_path: Path) -> None:
    rows = [eval_row("p", ["a", "b", "c"]), eval_row("q", ["b", "a"]), eval_row("r", ["c", "b"])]
    write_eval(tmp_path, "GQA", rows)
    task = read_eval_task(tmp_path, "GQA")
    for side, row in (("query", 2), ("candidate", 0)):
        assert TaskSide(task, side, tmp_path).where(2) == f"evaluation task 'GQA', row {row}, {side}"
    less = task.without({2}, set())
    assert (less.query_of_row, less.candidates_of_row) == ([0, 1], task.candidates_of_row[:2])
    less = task.without(set(), {0})  # the positive of p; q keeps nothing but its positive
    assert (less.query_of_row, less.candidates_of_row) == ([2], [[2, 1]])
    assert less.candidates == task.candidates


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write_shop(tmp_path)


def photo(shop: Path, name: str) -> str:
    return str(shop / "photos" / f"{name}.jpg")


def test_training_rows_are_what_the_document_shows(shop: Path) -> None:
    assert find_train_subsets(shop) == ["ShopSearch"]
    first, second, third = (TrainSubset(shop, "ShopSearch", hard_negatives=2)[row] for row in range(3))
    query, candidate = re.findall(r"^```\n((?:Find|<).*?)^```", SHOP_DOCUMENT, flags=re.MULTILINE | re.DOTALL)
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
    asked = ("a seat for the kitchen", "a lamp", "something red")
    assert [query.text for query in task.queries] == [f"Find a product that matches: {q}\n" for q in asked]
    shown = ("chair_2", "lamp_1", "chair_1")
    assert [row.images for row in task.candidates] == [(photo(shop, name),) for name in shown]
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
    write_train(shop, "VOC2007", [train_row()])
    assert find_train_subsets(shop) == ["ShopSearch", "VOC2007"]
    main(["verify", str(shop)])
    assert "problem" not in capsys.readouterr().out


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
    if isinstance(rows[0]["q"], list):
        with pytest.raises(ValueError, match="column 'q': holds a list, where a row has one value"):
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
