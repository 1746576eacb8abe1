"""Prompts to the letter: all 36 tasks in both published formats, and what users may pass to ``encode``."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.prompts import (
    PromptRules,
    is_single,
    listed,
    prompt,
    split_candidate,
    split_query,
    to_raw_inputs,
    written_text,
)
from parallel_decoupling.data.readers import TrainSubset, read_eval_task
from parallel_decoupling.data.tasks import MMEB_TASKS
from parallel_decoupling.data.unusable import one_row
from tests.support.mmeb import train_row, write_eval, write_image, write_train

_LINES = Path(__file__).with_name("golden_prompts.jsonl").read_text(encoding="utf-8").splitlines()
GOLDEN: dict[str, tuple[str, ...]] = {row.pop("task"): tuple(row.values()) for row in map(json.loads, _LINES)}
"""First rows of MMEB's tasks as its users quote them, some shortened: their parts, and what they make."""


def write_both(folder: Path, task: str) -> tuple[Path, Path]:
    """The golden row of a task, and a second candidate, in both formats; returns two data folders."""
    query_inst, query_text, query, candidate_inst, candidate_text, candidate = GOLDEN[task]
    has_query_image = query.startswith("<|image_1|>")
    has_image = candidate.startswith("<|image_1|>")
    images = [f"{task}/{number}.jpg" if has_image else "" for number in range(2)]
    for part, place in (("v1", "MMEB-eval"), ("split", "image-tasks")):
        for number in range(2):
            write_image(folder / part / place / task / f"{number}.jpg", ("red", "blue")[number])
    lone = "<|image_1|>\n" if task in ("WebQA", "EDIS") else ""
    row = {"qry_text": lone + query, "qry_img_path": f"{task}/0.jpg" if has_query_image else ""}
    row |= {"tgt_text": [candidate, candidate if has_image else "other"], "tgt_img_path": images}
    write_eval(folder / "v1", task, [row])
    rows: dict[str, Any] = {"qry_inst": f"<|image_1|>\n{query_inst}", "qry_text": query_text}
    if MMEB_TASKS[task].prompt.own_line:
        rows["qry_inst"] = f" {query_inst} "
    if not has_query_image and not lone:
        rows["qry_inst"] = query_inst
    if has_query_image:
        rows["qry_img_path"] = f"{task}/0.jpg"
    rows["tgt_text"] = [candidate_text, candidate_text if has_image else "other"]
    if has_image:
        rows |= {"tgt_inst": f"<|image_1|>\n{candidate_inst}", "tgt_img_path": images}
    write_eval(folder / "split", task, [rows])
    return folder / "v1", folder / "split"


def test_every_task_is_golden() -> None:
    assert list(GOLDEN) == list(MMEB_TASKS)


@pytest.mark.parametrize("task", GOLDEN)
def test_both_formats_give_the_golden_prompts(tmp_path: Path, task: str) -> None:
    for data_dir in write_both(tmp_path, task):
        read = read_eval_task(data_dir, task)
        assert [row.text for row in read.queries] == [GOLDEN[task][2]]
        assert read.candidates[0].text == GOLDEN[task][5]
        assert [len(row.images) for row in read.queries] == [GOLDEN[task][2].count("<|image_1|>")]
        assert len(read.candidates[0].images) == GOLDEN[task][5].count("<|image_1|>")


@pytest.mark.parametrize("task", GOLDEN)
def test_what_users_type_becomes_the_prompt_of_the_benchmark(task: str) -> None:
    """But for the end of four prompts: VisDial's queries have a second newline, crops of objects none."""
    query_inst, query_text, query, candidate_inst, candidate_text, candidate = GOLDEN[task]
    query_image, image = ("x.png" if text.startswith("<|image_1|>") else None for text in (query, candidate))
    typed = prompt(query_text or None, query_image, query_inst).text
    assert typed + ("\n" if task == "VisDial" else "") == query
    typed = prompt(candidate_text or None, image, candidate_inst if image else None).text
    crop = task in ("MSCOCO", "RefCOCO", "Visual7W-Pointing")
    assert (typed.removesuffix("\n") if crop else typed) == candidate


@pytest.mark.parametrize(
    ("instruction", "text", "own_line", "expected"),
    [
        ("<|image_1|>\nName it", "", False, "<|image_1|>\nName it\n"),  # a newline as it is written
        ("<|image_1|> Name it", "", False, "<|image_1|> Name it\n"),  # a space as it is written
        ("Name it", "", False, "<|image_1|> Name it\n"),  # nothing written: a space
        ("<|image_1|> Name it ", "", True, "<|image_1|>\nName it\n"),  # a line of its own
        ("Name it: ", "cat", True, "<|image_1|>\nName it: cat\n"),  # one space before the text
        ("Name it:", "a cat \nor \ndog", True, "<|image_1|>\nName it: a cat\nor\ndog\n"),
        ("Name it:", "cat? ", True, "<|image_1|>\nName it: cat? \n"),  # the last newline comes after that
        ("", "cat", True, "<|image_1|>\ncat\n"),
        ("", "", True, "<|image_1|>\n"),
    ],
)
def test_whitespace_of_a_split_query(instruction: str, text: str, own_line: bool, expected: str) -> None:
    assert split_query(instruction, text, PromptRules(own_line=own_line), has_image=True) == expected


def test_whitespace_of_split_texts_without_image_and_of_candidates() -> None:
    two_ends, crop = PromptRules(query_end="\n\n"), PromptRules(candidate_end="")
    assert split_query("<|image_1|>\nFind:", "a b \nc", two_ends, has_image=False) == "Find: a b \nc\n\n"
    assert split_candidate("ignored", " a label ", crop, has_image=False) == " a label "
    for written, expected in (
        ("<|image_1|>\nShow", "<|image_1|>\nShow"),
        ("<|image_1|>\nShow \n", "<|image_1|>\nShow\n"),  # the end is kept, and nothing is added
        ("Show", "<|image_1|> Show"),
        ("", "<|image_1|>"),
    ):
        assert split_candidate(written, "", crop, has_image=True) == expected
    assert split_candidate("<|image_1|>\nShow", " ", PromptRules(), has_image=True) == "<|image_1|>\nShow\n"
    assert split_candidate("<|image_1|>\nShow:", "it", crop, has_image=True) == "<|image_1|>\nShow: it\n"


@pytest.mark.parametrize(
    ("text", "has_image", "drop", "expected"),
    [
        ("<|image_1|> a\n \n", True, False, "<|image_1|> a\n \n"),  # to the letter
        ("see <|image_1|> here", True, False, "see <|image_1|> here"),  # diverse instructions
        ("", True, False, "<|image_1|>\n"),
        ("a dog.", True, False, "<|image_1|>\na dog."),
        ("<|image_1|>\nFind it\n", False, True, "Find it\n"),
        ("<|image_1|> Find it", False, True, "Find it"),
        ("plain \n", False, False, "plain \n"),
    ],
)
def test_written_prompts_are_kept(text: str, has_image: bool, drop: bool, expected: str) -> None:
    assert written_text(text, has_image=has_image, drop_placeholder=drop) == expected


def test_a_lone_placeholder_is_dropped_in_training_where_queries_are_texts(tmp_path: Path) -> None:
    for subset in ("WebQA", "Mine"):
        write_train(tmp_path, subset, [train_row("<|image_1|>\nFind it: x\n", "that")])
    assert TrainSubset(tmp_path, "WebQA")[0].query == RawInput("Find it: x\n")
    with pytest.raises(ValueError, match="'Mine', file .*, row 0, column 'qry': .* in the text but no image"):
        TrainSubset(tmp_path, "Mine")[0]


def test_prompts_follow_mmebs_template() -> None:
    assert prompt("q?", "x.png", "Answer:") == RawInput("<|image_1|>\nAnswer: q?\n", ("x.png",))
    assert prompt(image="x.png", instruction="Look.") == RawInput("<|image_1|>\nLook.\n", ("x.png",))
    assert prompt(image="x.png") == RawInput("<|image_1|>\n", ("x.png",))
    assert prompt("t", images=["x", "y"]) == RawInput("<|image_1|>\n<|image_1|>\nt\n", ("x", "y"))
    assert prompt(" a cat\n", instruction="Find:") == RawInput("Find: a cat\n")
    assert prompt(" a cat\n", instruction=" ") == RawInput("a cat")
    assert prompt("a cat") == RawInput("a cat")
    with pytest.raises(ValueError, match="a text or an image"):
        prompt("  ", instruction="Find")
    with pytest.raises(ValueError, match="not both"):
        prompt(image="x", images=["y"])


def test_every_kind_of_input_becomes_its_prompt(image_file: str) -> None:
    image = Image.new("RGB", (8, 8))
    rows = to_raw_inputs(
        [
            "a text",
            image,
            image_file,
            Path(image_file),
            {"text": "what?", "image": image},
            {"text": "which?", "images": [image, image_file], "instruction": "My own:"},
            {"text": "no picture", "image": None},
        ],
        instruction="Find it:",
    )
    assert rows == [
        prompt("a text", instruction="Find it:"),
        prompt(image=image, instruction="Find it:"),
        prompt(image=image_file, instruction="Find it:"),
        prompt(image=image_file, instruction="Find it:"),
        prompt("what?", image=image, instruction="Find it:"),
        prompt("which?", images=[image, image_file], instruction="My own:"),
        prompt("no picture", instruction="Find it:"),
    ]
    assert rows[4].text == f"{IMAGE_PLACEHOLDER}\nFind it: what?\n"


def test_finished_prompts_pass_unchanged() -> None:
    assert to_raw_inputs([RawInput(" as it is \n")]) == [RawInput(" as it is \n")]
    with pytest.raises(ValueError, match="input 0: a RawInput"):
        to_raw_inputs([RawInput("x")], instruction="more")


def pixels(item: Any) -> np.ndarray[Any, Any]:
    """Of the one picture that an item becomes."""
    (row,) = to_raw_inputs([item])
    assert row.text == f"{IMAGE_PLACEHOLDER}\n"
    return np.asarray(load_image(row.images[0]))


def loaded(items: list[Any]) -> None:
    """Decode the pictures, too."""
    for number, row in enumerate(to_raw_inputs(items)):
        for image in row.images:
            with one_row(f"input {number}: "):
                load_image(image)


def test_pictures_are_known_by_their_type_whatever_their_name(tmp_path: Path) -> None:
    original = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    original[0, 0], original[0, 1] = 0, 255
    for name in ("a.png", "a.avif", "no_suffix", "a.txt", "a b.jfif"):
        Image.fromarray(original).save(tmp_path / name, "png")
    data = (tmp_path / "a.png").read_bytes()
    code = base64.b64encode(data).decode()
    broken_lines = "\r\n".join(code[start : start + 76] for start in range(0, len(code), 76))
    fractions = torch.from_numpy(original / 255)
    items = [
        *(str(tmp_path / name) for name in os.listdir(tmp_path)),
        *(tmp_path / name for name in os.listdir(tmp_path)),
        *(data, bytearray(data), memoryview(data), original, fractions, fractions.permute(2, 0, 1)),
        *(original.astype(np.uint16) * 257, (original / 255).astype(np.float32), original.astype(float)),
        *(
            torch.from_numpy(original),
            torch.from_numpy(original).permute(2, 0, 1),
            fractions.bfloat16().half(),
        ),
        f"data:image/png;base64,{code}",
        f"DATA:IMAGE/PNG;BASE64,{code.rstrip('=')}",
        f"data:;base64,{broken_lines}",
        f"data:application/octet-stream; base64,{code}",
        f"data:image/png;base64,{code.replace('+', '-').replace('/', '_')}",
    ]
    for item in items:
        rounded = 1 if isinstance(item, torch.Tensor) and item.dtype == torch.float16 else 0
        for form in (item, {"image": item}, {"images": [item]}):
            assert np.abs(pixels(form).astype(int) - original).max() <= rounded, str(item)[:60]
        assert is_single(item)
    assert len(listed(np.stack([original, original]))) == 2
    assert pixels(original[:, :, :1]).shape == pixels(original[:, :, 0] > 99).shape == (6, 5, 3)


def test_other_strings_are_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.png").write_text("no picture")
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    texts = [
        "click on logo.gif",
        "cat.PNG",
        "notes.png",
        "folder.png",
        "pipe.png",
        "data: the set",
        "a\0b.png",
    ]
    texts += ["see https://a.b/c.png", "x" * 5000 + ".png", "base64,"]
    assert to_raw_inputs(texts) == [RawInput(text) for text in texts]
    Image.new("1", (1, 1)).save("cat.PNG")
    assert to_raw_inputs([{"text": "cat.PNG"}, "cat.PNG"]) == [RawInput("cat.PNG"), prompt(image="cat.PNG")]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            "https://a.b/c.png",
            r"'https://a.b/c.png' is an address, and nothing is fetched.*\{'text': \.\.\.\}",
        ),
        ({"image": "s3://bucket/key"}, "is an address"),
        ("data:image/png;base64,AAAA", "3 bytes that are not a picture"),
        ("data:image/svg+xml,<svg/>", "a data URI must be in base64: data:image/png;base64,"),
        (b"text", "4 bytes that are not a picture"),
        ({"image": "iVBORw0KGgo="}, "no image file 'iVBORw0KGgo='"),
        (Path("cat.PNG"), "no image file 'cat.PNG'"),
        ({"txt": "typo"}, r"unknown keys \['txt'\]"),
        ({"text": " "}, "needs a text or an image"),
        ({"text": 3}, "'text' is a int"),
        ({"image": Image.new("L", (1, 1)), "images": [Image.new("L", (1, 1))]}, "image or images, not both"),
        ({"images": "a.png"}, "'images' is a single str"),
        (torch.zeros(3), r"an array of shape \[3\] is not a picture; use \[height, width\]"),
        (np.zeros((2, 2, 5)), r"an array of shape \[2, 2, 5\]"),
        (np.full((2, 2), np.nan), "values from nan"),
        (torch.randn(3, 8, 8), "values from -.*Convert it to 8 bits"),
        (None, "a NoneType cannot be embedded; use a text, or as a picture a file"),
        ({"text": ["a", "b"], "price": [1, 2]}, "a dict is not a list of inputs: pass one column, such as"),
        ({"image": ["a.png", "b.png"]}, "a dict is not a list of inputs: pass one column, such as"),
        (("a", "b"), r"a tuple is not an input: pass one column.*to_dict\('records'\)"),
        ({"a"}, "a set is not a list"),
        ({"images": 5}, "an input of type int cannot be embedded; use a list"),
        (torch.zeros(2, 2, dtype=torch.complex64), "a Tensor cannot be embedded"),
        (np.ma.masked_array(np.zeros((2, 2)), np.eye(2)), "masked pixels; replace them by filled"),
    ],
)
def test_what_is_neither_says_what_to_pass(item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^input 1: .*{message}"):
        loaded(["a", item])


def tables() -> list[Any]:
    pandas, columns = pytest.importorskip("pandas"), {"text": ["a", "b"], "price": [1, 2]}
    arrow = pa.table(columns)
    frame = pandas.DataFrame(columns)
    mixed = np.array([("a", 1)], dtype=[("text", "U1"), ("price", int)])
    return [
        arrow,
        arrow.to_batches()[0],
        frame,
        columns.keys(),
        {"a", "b"},
        frozenset("a"),
        mixed,
        columns.items(),
    ]


def test_tables_have_one_message_and_their_columns_are_lists() -> None:
    for table in tables():
        with pytest.raises(
            ValueError, match=r"is not a list of inputs: pass one column.*to_dict\('records'\)"
        ):
            to_raw_inputs(table)
    frame = tables()[2]
    arrow = pa.array(frame["text"])
    for column in (frame["text"], tuple(frame["text"]), iter(frame["text"]), np.array(frame["text"]), arrow):
        assert to_raw_inputs(column) == [RawInput("a"), RawInput("b")]
    assert to_raw_inputs(frame[["text"]].to_dict("records")) == [RawInput("a"), RawInput("b")]
    for rows in (frame.iterrows(), frame.itertuples()):
        with pytest.raises(ValueError, match=r"is not an input: pass one column.*to_dict\('records'\)"):
            to_raw_inputs(rows)
    for row in (frame.astype(str).iloc[0], [frame.astype(str).iloc[0]]):
        with pytest.raises(ValueError, match=r"a Series indexed by names .*: pass its to_dict\(\)"):
            to_raw_inputs(row)


def test_an_empty_cell_of_pandas_is_none() -> None:
    pandas = pytest.importorskip("pandas")
    for empty in (None, np.nan, np.float32("nan"), pandas.NA, pandas.NaT):
        records = [{"text": "a", "image": empty, "instruction": empty, "images": empty, "video": empty}]
        assert to_raw_inputs(records, "find") == to_raw_inputs(["a"], "find")
        with pytest.raises(ValueError, match="^input 0: An input needs a text or an image"):
            to_raw_inputs([{"text": empty}])


def test_what_has_no_items_cannot_be_embedded() -> None:
    nested = torch.nested.nested_tensor([torch.rand(3, 4, 4), torch.rand(3, 5, 5)])
    for value in (3, np.array("a"), scipy.sparse.eye(3), nested):
        kind = type(value).__name__
        with pytest.raises(ValueError, match=f"^an input of type {kind} cannot be embedded; use a list"):
            to_raw_inputs(value)


@pytest.mark.parametrize("instruction", [["x"], 5, b"x", False])
def test_an_instruction_is_a_string(instruction: Any) -> None:
    kind = type(instruction).__name__
    with pytest.raises(ValueError, match=f"^instruction is a {kind}; use a string"):
        to_raw_inputs("a", instruction)
