"""The collator: rows equal the processor's own output, whatever stands next to them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from parallel_decoupling.batch import PADDING_ID, EncoderInputs, RawInput, RawPair
from parallel_decoupling.data.collate import Collator, identity
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.prompts import prompt
from tests.data.mmeb_files import write_image

TOKEN = "<|image_pad|>"


@pytest.fixture(scope="module")
def processor(tiny_backbone_dir: str) -> Any:
    return AutoProcessor.from_pretrained(tiny_backbone_dir)


@pytest.fixture
def rows(tmp_path: Path) -> list[RawInput]:
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    small, wide = Image.fromarray(noise), write_image(tmp_path / "wide.png", "blue", (64, 32))
    return [
        prompt("a red circle"),
        prompt("a green star above two yellow crosses", small, "Represent the given image"),
        prompt(images=[wide, small, wide], text="which"),
        prompt("x"),
        prompt(image=wide),
    ]


def alone(processor: Any, row: RawInput) -> dict[str, torch.Tensor]:
    images = [load_image(image) for image in row.images] or None
    return dict(processor(text=[row.text.replace("<|image_1|>", TOKEN)], images=images, return_tensors="pt"))


def assert_rows_equal_single_calls(
    inputs: EncoderInputs, processor: Any, rows: list[RawInput], side: str
) -> None:
    for number, row in enumerate(rows):
        expected = alone(processor, row)
        width = expected["input_ids"].shape[1]
        keep = slice(-width, None) if side == "left" else slice(width)
        for key, tensor in inputs.tokens.items():
            assert torch.equal(tensor[number, keep], expected.pop(key)[0]), key
            assert tensor.dtype == torch.int64
        assert inputs.tokens["attention_mask"][number].sum() == width
        assert inputs.vision[number].keys() == expected.keys()
        assert all(torch.equal(inputs.vision[number][key], expected[key]) for key in expected)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pick", [[0, 1, 2, 3, 4], [0, 3], [1], [2, 4], [3]])
def test_mixed_rows_equal_single_processor_calls(
    processor: Any,
    rows: list[RawInput],
    side: str,
    pick: list[int],
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor.tokenizer, "padding_side", side)
    chosen, collator = [rows[number] for number in pick], Collator(processor, image_token=TOKEN)
    if not together:
        monkeypatch.setattr(collator, "_process", lambda *_: None)
    inputs = collator.encode_inputs(chosen)
    assert len(inputs) == len(chosen)
    assert set(inputs.tokens) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert_rows_equal_single_calls(inputs, processor, chosen, side)


def test_image_tensors_are_told_from_tokens_of_the_same_shape(processor: Any) -> None:
    image = Image.new("RGB", (32, 16))  # two image tokens and a newline: as many as a grid has numbers
    inputs = Collator(processor, image_token=TOKEN).encode_inputs([prompt(image=image)])
    assert inputs.tokens["input_ids"].shape == (1, 3)
    assert_rows_equal_single_calls(inputs, processor, [prompt(image=image)], "left")
    assert set(inputs.vision[0]) == {"pixel_values", "image_grid_thw"}


def test_unsplittable_image_tensors_are_never_guessed(processor: Any, rows: list[RawInput]) -> None:
    class Strange:
        """A processor whose batch calls return one entry too many."""

        tokenizer = processor.tokenizer

        def __call__(self, text: list[str], **options: Any) -> dict[str, torch.Tensor]:
            data = dict(processor(text=text, **options))
            if len(text) > 1:
                data["pixel_values"] = torch.cat([data["pixel_values"], data["pixel_values"][:1]])
            return data

    inputs = Collator(Strange(), image_token=TOKEN).encode_inputs(rows)
    assert_rows_equal_single_calls(inputs, processor, rows, processor.tokenizer.padding_side)


def test_pairs_keep_order_and_identity(processor: Any, tmp_path: Path) -> None:
    image = write_image(tmp_path / "x.png")
    cat, dog = RawInput("cat"), RawInput("dog")
    pairs = [
        RawPair(RawInput("q0"), cat, (dog, RawInput("owl")), "A", 0),
        RawPair(RawInput("q1"), prompt(image=image), (cat, cat), "B", 7),
        RawPair(RawInput("q2"), cat, (dog, dog), "A", 1),
    ]
    batch = Collator(processor, image_token=TOKEN)(pairs)
    ids = batch.candidate_ids.tolist()
    assert batch.candidate_ids.dtype == torch.int64
    names = ["cat", "picture", "cat", "dog", "owl", "cat", "cat", "dog", "dog"]
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in names] for a in names]
    texts = processor.batch_decode(batch.candidate.tokens["input_ids"], skip_special_tokens=True)
    assert [text.strip() for text in texts] == [name.replace("picture", "") for name in names]
    assert batch.subsets == ("A", "B", "A")
    assert len(batch.query) == 3
    assert batch.to("cpu").subsets == batch.subsets


def test_a_missing_negative_is_a_short_text_that_is_no_target(processor: Any, tmp_path: Path) -> None:
    dash, picture = RawInput("-"), prompt(image=write_image(tmp_path / "x.png"))
    pairs = [
        RawPair(RawInput("q0"), dash, (None, dash), "A", 0),
        RawPair(RawInput("q1"), picture, (None, None), "A", 1),
    ]
    batch = Collator(processor, image_token=TOKEN)(pairs)
    own, other = identity(dash), identity(picture)
    assert batch.candidate_ids.tolist() == [own, other, PADDING_ID, own, PADDING_ID, PADDING_ID]
    assert batch.candidate.lengths.tolist()[2:] == [1] * 4
    assert [bool(row) for row in batch.candidate.vision] == [False, True, False, False, False, False]


def test_several_positives_and_scores_stand_row_by_row(processor: Any) -> None:
    a, b, c, n = (RawInput(text) for text in "abcn")
    pairs = [
        RawPair(RawInput("q0"), a, (n,), "A", 0, (b, None), (3.0, 2.0, math.nan, -1.0)),
        RawPair(RawInput("q1"), c, (None,), "B", 0, (None, None)),
    ]
    batch = Collator(processor, image_token=TOKEN)(pairs)
    ids = [identity(each) if each else PADDING_ID for each in (a, c, b, None, n, None, None, None)]
    assert batch.candidate_ids.tolist() == ids
    assert batch.num_positives == 3
    wanted = torch.tensor([[3.0, 2.0, math.nan, -1.0], [math.nan] * 4])
    torch.testing.assert_close(batch.to("cpu").teacher, wanted, equal_nan=True)


def test_identity_is_text_and_image() -> None:
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    pictures = (black, white, black.resize((2, 8)), black.convert("L"), "x", "y")
    inputs = [RawInput("a"), RawInput("b"), *(RawInput("a", (picture,)) for picture in pictures)]
    assert len({identity(row) for row in inputs}) == len(inputs)
    assert identity(RawInput("a", (black.copy(),))) == identity(RawInput("a", (black,)))
    assert all(-(2**63) <= identity(row) < 2**63 for row in inputs)
    assert identity(RawInput("a")) == 4681665781835383343  # stable over processes and runs


def test_identity_is_of_content_and_not_of_names_and_white_space(tmp_path: Path) -> None:
    first, copy, other = (tmp_path / name for name in ("a.png", "copy.png", "other.png"))
    write_image(first)
    copy.write_bytes(first.read_bytes())
    write_image(other, "blue")
    of_file = [identity(prompt("x", str(file))) for file in (first, copy, other)]
    assert of_file[0] == of_file[1] != of_file[2]
    same = [" a b ", "a b", "a b\n"]
    assert len({identity(RawInput(text)) for text in same}) == 1
    assert len({identity(RawInput(text)) for text in ("a b", "A b", "a  b", "ab")}) == 4
    texts = ["<|image_1|>\n cat\n", "<|image_1|> cat", "<|image_1|>\ncat \n"]
    assert len({identity(RawInput(text, (str(first),))) for text in texts}) == 1
