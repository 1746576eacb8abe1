"""Rows that cannot be embedded: one exception, raised in one place, on every way in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import parallel_decoupling
from parallel_decoupling.batch import RawInput, TokenLimit
from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.unusable import RowError, doubled, one_row
from parallel_decoupling.data.verify import verify
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode_rows
from tests.data.mmeb_files import eval_row, train_row, write_eval, write_image, write_train

ROOT = Path(next(iter(parallel_decoupling.__path__)))


def test_the_package_catches_everything_in_one_place_and_raises_the_error_there_alone() -> None:
    for pattern in (r"except( \(?(Base)?Exception\b.*)?:", r"raise RowError|RowError\("):
        found = [
            (str(file.relative_to(ROOT)), line)
            for file in ROOT.rglob("*.py")
            for line in file.read_text(encoding="utf-8").splitlines()
            if re.search(pattern, line) and "class RowError" not in line
        ]
        assert [file for file, _ in found] == ["data/unusable.py"], found


@pytest.mark.parametrize(
    "error", [KeyError("a"), ZeroDivisionError("b"), TypeError("c"), RecursionError("d")]
)
def test_whatever_is_raised_becomes_the_error_of_the_row(error: Exception) -> None:
    with pytest.raises(RowError, match=f"^row 3: {type(error).__name__}: ") as caught, one_row("row 3: "):
        raise error
    assert caught.value.__cause__ is error
    with pytest.raises(RowError, match=r"^outer: inner: why$"), one_row("outer: "), one_row("inner: "):
        raise ValueError("why")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_exhausted_memory_is_not_the_fault_of_a_row(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, one_row():
        raise error
    assert caught.value is error


def test_growing_counts_are_worth_a_line_when_they_double() -> None:
    assert [count for count in range(20) if doubled(count, 1)] == [0, 1, 3, 7, 15]
    assert not doubled(5, 0)
    assert doubled(5, 7)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, OverflowError, IndexError, RuntimeError])
def test_whatever_a_decoder_raises_names_the_file(
    error: type[Exception], image_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error("in the metadata")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    with pytest.raises(RowError, match=r"Cannot read image .*picture\.PNG.*in the metadata"):
        load_image(image_file)


def bad_rows(folder: Path) -> dict[str, RawInput]:
    """Rows of every kind that fails, by a word of the reason."""
    thin = write_image(folder / "thin.png", size=(2000, 2))
    (folder / "broken.png").write_bytes(b"no picture")
    whole = Path(write_image(folder / "whole.png", size=(64, 64))).read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(folder / "pipe.png")
    Image.new("1", (9000, 21000)).save(folder / "bomb.png")
    names = {"aspect ratio": thin, "cannot identify": "broken.png", "truncated": "half.png"}
    names |= {"no such file": "pipe.png", "decompression bomb": "bomb.png"}
    pictures = {why: prompt(image=str(folder / name)) for why, name in names.items()}
    return {
        **pictures,
        "surrogates": RawInput("half \ud83d"),
        "own image token": RawInput("a <|image_pad|>"),
        "0 images but 1": RawInput("<|image_1|> a"),
        "1 images but 0": RawInput("a", (thin,)),
        "neither text nor image": RawInput(" "),
    }


def test_every_kind_is_found_exactly_and_the_others_are_as_without_them(
    embedder: Embedder, tmp_path: Path
) -> None:
    kinds = bad_rows(tmp_path)
    good = [prompt("a red circle"), prompt(image=write_image(tmp_path / "good.png"))]
    rows = [row for bad in kinds.values() for row in (good[0], bad, good[1])]
    encoded = encode_rows(embedder.encoder, embedder.collator, rows, batch_size=7, keep_going=True)
    assert sorted(encoded.bad_rows) == list(range(1, len(rows), 3))
    for why, row in zip(kinds, sorted(encoded.bad_rows), strict=True):
        assert why in encoded.bad_rows[row]
    assert encoded.embeddings[1::3].isnan().all()
    for place, row in ((0, good[0]), (2, good[1])):
        alone = embedder.encode([row]).expand(len(kinds), -1)
        torch.testing.assert_close(encoded.embeddings[place::3], alone, atol=1e-6, rtol=0)
    for row in (1, 4):
        with pytest.raises(RowError, match=r"^input 2: "):
            embedder.encode([*good, rows[row], good[0]], batch_size=2)


def test_a_processor_may_raise_what_it_wants(tiny_backbone_dir: str) -> None:
    plain = load_collator(tiny_backbone_dir)

    class Strange:
        """Fails for a word, as if for something deep inside."""

        tokenizer, image_processor = plain.processor.tokenizer, plain.processor.image_processor

        def __call__(self, text: list[str], **options: Any) -> Any:
            if any("poison" in each for each in text):
                raise KeyError("deep inside")
            return plain.processor(text=text, **options)

    collator = Collator(Strange(), image_token=plain.image_token, limit=TokenLimit())
    encoded, problems = collator.encode_usable([RawInput("a"), RawInput("poison"), RawInput("b")])
    assert encoded is not None
    assert len(encoded) == 2
    assert list(problems) == [1]
    assert "KeyError: 'deep inside'" in str(problems[1])
    with pytest.raises(RowError, match=r"^place 1: The processor refuses 'poison'"):
        collator.encode_inputs([RawInput("a"), RawInput("poison")], ["place 0: ", "place 1: "])
    with pytest.raises(ValueError, match="no inputs"):
        collator.encode_inputs([])


def test_verify_finds_exactly_these_rows(tmp_path: Path, tiny_backbone_dir: str) -> None:
    images = tmp_path / "MMEB-train/images"
    images.mkdir(parents=True)
    bad_rows(images)
    names = ["whole", "thin", "whole", "broken", "half", "whole", "pipe", "bomb"]
    write_train(tmp_path, "S", [train_row("q", qry_image_path=f"images/{name}.png") for name in names])
    write_image(tmp_path / "MMEB-eval/thin.png", size=(2000, 2))
    rows = [eval_row("q", ["a", "b"]), eval_row("x <|image_pad|>", ["a", "c"])]
    write_eval(tmp_path, "GQA", [*rows, eval_row("q", ["d", "e"], qry_img_path="thin.png")])
    _, train, test = verify(tmp_path, load_collator(tiny_backbone_dir), sample=None)
    assert train.counts["unusable"] == 5
    assert re.findall(r"row (\d): ", train.problems[-1]) == ["1", "3", "4", "6", "7"]
    assert re.findall(r"row (\d), (\w+): ", test.problems[-1]) == [("1", "query"), ("2", "query")]
    few = verify(tmp_path, load_collator(tiny_backbone_dir), sample=1)[2]
    assert "2 of 4 rows" not in few.problems[0], "a text that is refused is found beyond the sample"
    assert "own image token" in few.problems[0]
