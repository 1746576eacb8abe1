"""Pictures of every kind and size, and rows as the processor has them, whatever stands next to them."""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from parallel_decoupling.batch import PADDING_ID, EncoderInputs, RawInput, RawPair
from parallel_decoupling.data.collate import Collator, identity
from parallel_decoupling.data.images import (
    ImageFolder,
    ImagePolicy,
    SquareSize,
    as_picture,
    load_image,
    names_picture,
    smart_size,
)
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.unusable import RowError
from tests.support.mmeb import write_image


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    level = 200
    if mode.startswith("I"):
        image = Image.fromarray(np.full((8, 8), level * 257, np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.new("RGB", (8, 8), (level,) * 3).convert("P" if mode == "PA" else mode).convert(mode)
    file = tmp_path / ("x.tif" if mode in ("CMYK", "PA", "I") else "x.jpg" if mode == "YCbCr" else "x.png")
    if mode != "PA":  # no format holds it
        image.save(file)
        image = Image.open(file)
    pixels = np.asarray(load_image(str(file) if mode != "PA" else image))
    assert pixels.shape == (8, 8, 3)
    assert abs(pixels.mean() - (255 if mode == "1" else level)) < (80 if mode == "1" else 3)
    assert load_image(image).mode == "RGB"


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("uint16", 257), ("uint16", 1), (">u2", 257), ("int32", 1), ("int32", 257), ("float32", 1 / 255)]
    + [("float32", 1), ("float32", 257)],
)
def test_wide_greys_come_out_like_their_8_bit_original(tmp_path: Path, dtype: str, scale: float) -> None:
    """TIFF I;16, I;16B, I and F: from 0 to 1, to 255 and to 65535."""
    original = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray((original * np.float64(scale)).astype(dtype)).save(tmp_path / "x.tif")
    for image in (str(tmp_path / "x.tif"), Image.open(tmp_path / "x.tif")):
        assert np.array_equal(np.asarray(load_image(image))[:, :, 1], original)
    for wrong in (-1.0, 70_000.0):
        Image.fromarray(np.full((2, 2), wrong, np.float32)).save(tmp_path / "y.tif")
        with pytest.raises(RowError, match=r"y\.tif.* values from .*Convert it to 8 bits"):
            load_image(str(tmp_path / "y.tif"))


def test_fractions_may_overshoot_as_after_resizing() -> None:
    pixels = np.linspace(-1e-4, 1.0000001, 256).reshape(16, 16)
    assert np.array_equal(np.asarray(load_image(as_picture(pixels)))[:, :, 0].ravel(), np.arange(256))


def test_eps_is_not_read_as_pillow_would_start_ghostscript(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "x.eps")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.eps").read_bytes())
    with pytest.raises(RowError, match="cannot identify image file"):
        load_image(str(tmp_path / "x.jpg"))
    with pytest.raises(ValueError, match="not a picture"):
        as_picture((tmp_path / "x.eps").read_bytes())
    assert not names_picture(str(tmp_path / "x.eps"))


def test_a_picture_whose_file_was_closed_says_so(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as read, Image.open(tmp_path / "x.png") as unread:
        read.load()
    assert load_image(read).size == (8, 8)
    with pytest.raises(RowError, match="its file was closed unread; embed it inside `with`"):
        load_image(unread)


def test_threads_share_a_picture_that_was_opened_and_not_loaded(tmp_path: Path) -> None:
    noise(600, 500).save(tmp_path / "a.png")
    expected = load_image(str(tmp_path / "a.png"))
    for _ in range(5):
        with Image.open(tmp_path / "a.png") as picture, ThreadPoolExecutor(8) as threads:
            for found in threads.map(load_image, [picture] * 8):
                assert found.tobytes() == expected.tobytes()


def test_a_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    pixels = np.asarray(load_image(str(tmp_path / "x.png")))
    assert (pixels[0, 0].tolist(), pixels[1, 1].tolist()) == ([10, 20, 30], [200, 0, 0])


def test_exif_rotation_is_applied_unless_told_otherwise_and_the_input_untouched(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (8, 4), "red"), Image.Exif()
    image.putpixel((0, 0), (0, 0, 255))
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    image.save(tmp_path / "x.png", exif=exif)
    opened = Image.open(tmp_path / "x.png")
    for image_or_file in (opened, str(tmp_path / "x.png")):
        turned = load_image(image_or_file)
        assert (turned.size, turned.getpixel((3, 0))) == ((4, 8), (0, 0, 255))
        assert load_image(image_or_file, turn=False).size == opened.size == (8, 4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_named_never_anything_else(tmp_path: Path, suffix: str) -> None:
    rng, file = random.Random(0), tmp_path / f"x.{suffix}"
    noise(48, 32).save(file)
    whole, errors = file.read_bytes(), 0
    for attempt in range(150):
        damaged = bytearray(whole[: rng.randrange(len(whole)) if attempt % 3 == 0 else None])
        for _ in range(3 if damaged else 0):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            assert load_image(str(file)).mode == "RGB"
        except RowError:
            errors += 1
    assert errors > 10


@pytest.mark.parametrize(("size", "side"), [("low", 128), ("mid", 672), ("high", 1344)])
def test_vlm2vecs_squares_are_pillows_default_resize(size: SquareSize, side: int) -> None:
    image = noise(90, 41)
    assert np.array_equal(np.asarray(ImagePolicy(size)(image)), np.asarray(image.resize((side, side))))


@pytest.mark.parametrize("factor", [16, 28, 32])
def test_smart_size_equals_transformers(factor: int) -> None:
    rng = random.Random(factor)
    for _ in range(500):
        width, height = rng.randrange(factor, 3000), rng.randrange(factor, 3000)
        if max(width, height) / min(width, height) > 190:
            continue
        low = rng.choice([factor**2, 4 * factor**2, 256 * factor**2])
        high = rng.choice([low, 4 * low, 1280 * factor**2 + low])
        expected = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
        ours = smart_size(width, height, factor=factor, min_pixels=low, max_pixels=high)
        assert ours == expected[::-1], (width, height, low, high)
    for _ in range(2000):  # budgets of whole squares, where one rounding more or less is a multiple
        side, multiples = rng.randrange(12 * factor, 4000), rng.randrange(2, 11)
        high = (multiples * factor) ** 2
        expected = smart_resize(side, side, factor=factor, min_pixels=1, max_pixels=high)
        assert smart_size(side, side, factor=factor, min_pixels=1, max_pixels=high) == expected, (side, high)


def test_a_budget_bounds_the_pixels_and_keeps_the_aspect_ratio() -> None:
    policy = ImagePolicy(min_pixels=56 * 56, max_pixels=280 * 280, factor=28)
    for width, height in ((500, 375), (2000, 300), (30, 40), (29, 600), (56, 84)):
        resized = policy(Image.new("RGB", (width, height)))
        assert resized.width % 28 == resized.height % 28 == 0
        assert 56 * 56 <= resized.width * resized.height <= 280 * 280
        assert abs(np.log(resized.width / resized.height * height / width)) < 0.5
    assert policy(Image.new("RGB", (20, 5))).size == (56, 56)  # VLM2Vec's rule for sides below 28
    assert policy(Image.new("RGB", (27, 900))).size == (56, 56)
    assert ImagePolicy(max_pixels=9999, factor=28)(Image.new("RGB", (20, 40))).size == (56, 56)
    fitting = Image.new("RGB", (56, 84))
    assert policy(fitting) is fitting
    least, most = ImagePolicy(min_pixels=400), ImagePolicy(max_pixels=10_000)  # one bound and no patches
    cases = ((most, (400, 100), (200, 50)), (most, (3, 5), (3, 5)), (least, (10, 10), (20, 20)))
    for policy, before, after in (*cases, (ImagePolicy(), (10, 10), (10, 10))):
        assert policy(Image.new("RGB", before)).size == after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": "large"}, "image_size must be 'low', 'mid' or 'high'.* got 'large'"),
        ({"image_size": "low", "max_pixels": 9}, "min_pixels and max_pixels have no meaning"),
        ({"max_frames": 0}, "max_frames must be 1 or more"),
        ({"max_video_pixels": -1}, "max_video_pixels must be 1 or more"),
        ({"min_pixels": 0}, "min_pixels must be 1 or more"),
        ({"min_pixels": 10, "max_pixels": 9}, "min_pixels=10 is above max_pixels=9"),
    ],
)
def test_settings_that_contradict_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagePolicy(**options)  # type: ignore[arg-type]


def test_the_collator_resizes_before_the_processor_and_takes_its_factor(tiny_backbone_dir: str) -> None:
    processor = AutoProcessor.from_pretrained(tiny_backbone_dir)  # patches of 8, merged 2 x 2
    budget = Collator(processor, image_token="<|image_pad|>", images=ImagePolicy(max_pixels=32 * 32))
    assert budget.images.factor == 16
    picture = noise(64, 40)
    (vision,) = budget.encode_inputs([prompt(image=picture)]).vision
    assert vision["image_grid_thw"].tolist() == [[1, 2, 4]]
    small = picture.resize((32, 16), Image.Resampling.BICUBIC)
    plain = Collator(processor, image_token="<|image_pad|>")
    (expected,) = plain.encode_inputs([prompt(image=small)]).vision
    assert torch.equal(vision["pixel_values"], expected["pixel_values"])


def test_squares_ignore_the_exif_orientation_as_vlm2vec_does(tiny_backbone_dir: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(64, 32).save(tmp_path / "x.png", exif=exif)
    processor = AutoProcessor.from_pretrained(tiny_backbone_dir)
    collator = Collator(processor, image_token="<|image_pad|>", images=ImagePolicy("low"))
    rows = [prompt(image=str(tmp_path / "x.png")), prompt(image=noise(64, 32))]
    turned, plain = collator.encode_inputs(rows).vision
    assert torch.equal(turned["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("prefix", ["images/", ""])
@pytest.mark.parametrize("place", ["a", "a/images", "b"])
def test_images_are_found_with_and_without_their_folder(tmp_path: Path, prefix: str, place: str) -> None:
    file = write_image(tmp_path / place / "X" / "0.png")
    folder = ImageFolder(tmp_path / "a", tmp_path / "b")
    for _ in range(2):
        assert folder.find(f"{prefix}X/0.png") == file
    assert not any(map(folder.find, (".", "..", "./", "X/1.png", "x" * 10**6, "a\0b", "")))
    with pytest.raises(ValueError, match="no image file 'X/1.png' under .*a or .*b"):
        folder.get("X/1.png")
    assert ImageFolder(tmp_path, must_exist=False).get("X/1.png") == "X/1.png"
    assert folder.find(file) == file, "an absolute name is itself"


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
        process = collator._process
        monkeypatch.setattr(collator, "_process", lambda rows: process(rows) if len(rows) == 1 else None)
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


def test_a_missing_negative_is_a_short_text_and_not_a_target(processor: Any, tmp_path: Path) -> None:
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
    palettes = [black.convert("P"), black.convert("P")]
    palettes[1].putpalette([255, 0, 0] * 256)
    assert len({identity(RawInput("a", (each,))) for each in palettes}) == 2
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
