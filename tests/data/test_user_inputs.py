"""What users may pass to ``encode``, and what is refused with the index of the item."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.prompts import is_single, listed, prompt, to_raw_inputs
from parallel_decoupling.data.unusable import one_row


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
        ({"a"}, "a set is not a list"),
    ],
)
def test_what_is_neither_says_what_to_pass(item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^input 1: .*{message}"):
        loaded(["a", item])


def tables() -> list[Any]:
    import pyarrow as pa

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
    for column in (frame["text"], tuple(frame["text"]), iter(frame["text"]), np.array(frame["text"])):
        assert to_raw_inputs(column) == [RawInput("a"), RawInput("b")]
    assert to_raw_inputs(frame[["text"]].to_dict("records")) == [RawInput("a"), RawInput("b")]
    with pytest.raises(ValueError, match="a int cannot be embedded; use a list"):
        to_raw_inputs(3)
