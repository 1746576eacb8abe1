"""What users may pass to ``encode``, and what is refused with the index of the item."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER, RawInput
from parallel_decoupling.data.prompts import prompt, to_raw_inputs


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


def test_text_that_only_ends_like_an_image_is_a_text_in_a_dictionary() -> None:
    assert to_raw_inputs([{"text": "logo.png"}]) == [RawInput("logo.png")]
    assert to_raw_inputs(["one/two of a text"]) == [RawInput("one/two of a text")]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Path("cat.PNG"), "no image file 'cat.PNG'"),
        ({"image": "missing.jpg"}, "no image file 'missing.jpg'"),
        ({"txt": "typo"}, r"unknown keys \['txt'\]"),
        ({"text": " "}, "needs a text or an image"),
        ({"text": 3}, "'text' is a int"),
        ({"image": Image.new("L", (1, 1)), "images": [Image.new("L", (1, 1))]}, "image or images, not both"),
        ({"images": "a.png"}, "'images' is a single str"),
        (torch.zeros(3), r"an array of shape \[3\] is not a picture; use \[height, width\]"),
    ],
)
def test_bad_input_is_an_error_that_names_its_index(item: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"input 1.*{message}"):
        to_raw_inputs(["fine", item])
