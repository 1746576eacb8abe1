"""Reading MMEB's files: prompts arrive verbatim, bad rows are named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.readers import TrainSubset, read_eval_task
from parallel_decoupling.data.tasks import (
    MMEB_TASKS,
    MMEB_TRAIN_SUBSETS,
    find_eval_tasks,
    find_train_subsets,
    read_tasks,
)
from tests.data.mmeb_files import eval_row, train_row, write_eval, write_image, write_rows, write_train

QUERY = "<|image_1|>\nRepresent the given image with the following question: What is it? \n"


def test_table_is_mmebs() -> None:
    counts = Counter((task.meta_task, task.in_distribution) for task in MMEB_TASKS.values())
    assert counts == {
        ("classification", True): 5,
        ("classification", False): 5,
        ("vqa", True): 6,
        ("vqa", False): 4,
        ("retrieval", True): 8,
        ("retrieval", False): 4,
        ("grounding", True): 1,
        ("grounding", False): 3,
    }
    assert len(MMEB_TRAIN_SUBSETS) == 20
    assert {name.replace("_1K", "-1K") for name in MMEB_TRAIN_SUBSETS} == {
        name for name, task in MMEB_TASKS.items() if task.in_distribution
    }
    assert "ImageNet_1K" in MMEB_TRAIN_SUBSETS
    assert MMEB_TASKS["Visual7W-Pointing"].meta_task == "grounding"


def test_tasks_file_adds_tasks(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"mine": {"meta_task": "vqa", "in_distribution": False}}))
    tasks = read_tasks(tmp_path)
    assert len(tasks) == 37
    assert (tasks["mine"].meta_task, tasks["mine"].in_distribution) == ("vqa", False)


@pytest.mark.parametrize(
    "row",
    [
        {"meta_task": "vqa"},
        {"meta_task": "video", "in_distribution": True},
        {"meta_task": "vqa", "in_distribution": 1},
    ],
)
def test_bad_tasks_file_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps({"mine": row}))
    with pytest.raises(ValueError, match=r"tasks\.json, task 'mine'"):
        read_tasks(tmp_path)


def test_only_tasks_of_the_table_are_found(tmp_path: Path) -> None:
    for name in ("CIFAR-100", "GQA", "VOC2007"):
        write_eval(tmp_path, name, [eval_row("q", ["a", "b"])])
    assert find_eval_tasks(tmp_path) == ["VOC2007", "GQA"]


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "<|image_1|>\n"),
        (None, "<|image_1|>\n"),
        ("a dog.", "<|image_1|>\na dog."),
        ("<|image_1|> a\n", "<|image_1|> a\n"),
    ],
)
def test_image_without_placeholder_gets_one_line(tmp_path: Path, text: str | None, expected: str) -> None:
    image = write_image(tmp_path / "MMEB-train/images/x.png")
    write_train(tmp_path, "S", [train_row(pos_text=text, pos_image_path="images/x.png")])
    assert TrainSubset(tmp_path, "S")[0].candidate == RawInput(expected, (image,))


def test_shards_are_one_table_and_errors_name_the_shard(tmp_path: Path) -> None:
    folder = tmp_path / "MMEB-train/S"
    write_rows(folder / "original-00001-of-00002.parquet", [train_row("c"), train_row("", "")])
    write_rows(folder / "original-00000-of-00002.parquet", [train_row("a"), train_row("b")])
    write_rows(folder / "diverse_instruction-00000-of-00001.parquet", [train_row("z")])
    subset = TrainSubset(tmp_path, "S")
    assert [subset[row].query.text for row in range(3)] == ["a", "b", "c"]
    with pytest.raises(
        ValueError, match=r"subset 'S', file .*original-00001-of-00002.parquet, row 1, column 'qry'"
    ):
        subset[3]
    assert TrainSubset(tmp_path, "S", "diverse_instruction")[0].query.text == "z"
    assert find_train_subsets(tmp_path, "diverse_instruction") == ["S"]


def test_limit_is_a_seeded_sample_in_file_order(tmp_path: Path) -> None:
    write_train(tmp_path, "S", [train_row(str(number)) for number in range(50)])
    kept = [
        [int(subset[i].query.text) for i in range(len(subset))]
        for subset in (
            TrainSubset(tmp_path, "S", limit=20),
            TrainSubset(tmp_path, "S", limit=20),
            TrainSubset(tmp_path, "S", limit=20, seed=1),
        )
    ]
    assert kept[0] == kept[1] != kept[2]
    assert len(set(kept[0])) == 20
    assert kept[0] == sorted(kept[0]) != list(range(20))
    assert len(TrainSubset(tmp_path, "S", limit=99)) == 50


@pytest.mark.parametrize(
    ("negatives", "expected"),
    [
        ({"neg_text": "n", "neg_image_path": ""}, ["n", "n"]),
        ({"neg_text": ["n", "m", "o"], "neg_image_path": ["", "", ""]}, ["n", "m"]),
        ({"neg_text": ["n", "m"], "neg_image_path": None}, ["n", "m"]),
        ({"neg_text": "", "neg_image_path": ""}, ["that", "that"]),
        ({"neg_text": None, "neg_image_path": None}, ["that", "that"]),
        ({}, ["that", "that"]),
    ],
)
def test_every_row_has_the_asked_number_of_negatives(
    tmp_path: Path, negatives: dict[str, Any], expected: list[str]
) -> None:
    write_train(tmp_path, "S", [train_row(**negatives)])
    assert [
        negative.text for negative in TrainSubset(tmp_path, "S", hard_negatives=2)[0].negatives
    ] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (train_row("", "x"), "row 0, column 'qry': neither text nor image"),
        (train_row("x", " \n"), "row 0, column 'pos_text': neither text nor image"),
        (
            train_row("x", qry_image_path="images/no.jpg"),
            r"column 'qry': no image file 'images/no.jpg' under .*MMEB-train",
        ),
        (train_row("<|image_1|>\nx"), "in the text but no image"),
        (train_row("<|image_1|><|image_1|>", qry_image_path="images/x.png"), "2 placeholders"),
    ],
)
def test_bad_training_row_is_named_when_it_is_read(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_image(tmp_path / "MMEB-train/images/x.png")
    write_train(tmp_path, "S", [row])
    subset = TrainSubset(tmp_path, "S")
    with pytest.raises(ValueError, match=message):
        subset[0]


def test_missing_column_and_file_are_named(tmp_path: Path) -> None:
    row = train_row()
    del row["pos_text"]
    write_train(tmp_path, "S", [row])
    with pytest.raises(
        ValueError, match=r"training subset 'S', file .*: column 'pos_text' is missing; found qry"
    ):
        TrainSubset(tmp_path, "S")
    with pytest.raises(ValueError, match=r"no file .*S.train-\*\.parquet; the folder holds original-00000"):
        TrainSubset(tmp_path, "S", "train")
    write_eval(tmp_path, "GQA", [{"qry_inst": "i", "qry_text": "q"}])
    with pytest.raises(ValueError, match="use TIGER-Lab/MMEB-eval"):
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
    names = ["NIGHTS/image_0.jpg", "NIGHTS/image_1.jpg"]
    for name in names:
        write_image(tmp_path / "MMEB-eval" / name)
    write_eval(
        tmp_path, "NIGHTS", [{"qry_text": "q", "qry_img_path": "", "tgt_text": "", "tgt_img_path": names}]
    )
    assert [row.text for row in read_eval_task(tmp_path, "NIGHTS").candidates] == ["<|image_1|>\n"] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (eval_row("q", ["a"]), "row 1, column 'tgt_text': 1 candidates"),
        (eval_row("q", ["a", "b"], tgt_img_path=[""]), "2 texts but 1 image paths"),
        (eval_row("", ["a", "b"]), "column 'qry_text': neither text nor image"),
        (eval_row("q", ["a", ""]), "column 'tgt_text': neither text nor image"),
        (
            eval_row("q", ["a", "b"], tgt_img_path=["", "GQA/0.jpg"]),
            "task 'GQA', file .*, row 1.*no image file",
        ),
    ],
)
def test_bad_eval_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_eval(tmp_path, "GQA", [eval_row("q", ["a", "b"]), row])
    with pytest.raises(ValueError, match=message):
        read_eval_task(tmp_path, "GQA")


def test_query_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    write_eval(tmp_path, "GQA", [eval_row(str(number), ["a", "b"]) for number in range(10)])
    assert [query.text for query in read_eval_task(tmp_path, "GQA", limit=3).queries] == ["0", "3", "6"]
    assert len(read_eval_task(tmp_path, "GQA", limit=99).queries) == 10


def test_unknown_task_names_the_closest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown evaluation task 'ImageNet_1K'. Did you mean 'ImageNet-1K'"):
        read_eval_task(tmp_path, "ImageNet_1K")
