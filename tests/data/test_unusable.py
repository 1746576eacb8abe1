"""Rows that cannot be embedded: one exception, raised in one place, on every way in; ``max_tokens``."""

import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import parallel_decoupling
from parallel_decoupling.batch import EncoderInputs, LongText, RawInput, TokenLimit
from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.unusable import RowError, one_row
from parallel_decoupling.data.verify import verify
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import TokenEstimate, encode_rows
from tests.support.fit import ONE_PATH, make_trainer, small_data, small_embedder
from tests.support.mmeb import eval_row, train_row, write_eval, write_image, write_train
from tests.support.tiny_clip import CONTEXT_LENGTH

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


def test_a_disk_that_fails_is_not_the_fault_of_a_row_but_names_it() -> None:
    """Another time the row may be read, so it must not be left out."""
    with pytest.raises(OSError, match=r"\[Errno 5\] row 3: Input/output error") as caught, one_row("row 3: "):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, RowError)


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
    names |= {"not a regular file": "pipe.png", "decompression bomb": "bomb.png"}
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
    with pytest.raises(ValueError, match="list of inputs to encode is empty"):
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


LONG = "a red circle left of a small blue square " * 40


def limited(embedder: Embedder, max_tokens: int, long_text: LongText = "truncate") -> Collator:
    collator = embedder.collator
    collator.limit = TokenLimit(max_tokens, long_text)
    return collator


def ids(inputs: EncoderInputs, row: int = 0) -> list[int]:
    return list(inputs.select([row]).tokens["input_ids"][0].tolist())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("together", [True, False])
def test_the_end_of_the_text_goes_and_all_else_stays(
    embedder: Embedder, side: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.encoder.processor.tokenizer, "padding_side", side)
    picture = Image.new("RGB", (48, 32), "red")
    rows = [
        prompt(LONG),
        prompt(LONG, instruction="find a picture of"),
        prompt("short"),
        prompt(LONG, image=picture, instruction="what is"),
    ]
    whole, collator = embedder.collator.encode_inputs(rows), limited(embedder, 30)
    if not together:
        process = collator._process
        monkeypatch.setattr(collator, "_process", lambda rows: process(rows) if len(rows) == 1 else None)
    cut = collator.encode_inputs(rows)
    assert cut.num_cut == 3
    assert whole.num_cut == 0
    assert cut.lengths.tolist() == [30, 30, whole.lengths[2], 30]
    for row in range(4):
        kept = ids(whole, row)
        assert ids(cut, row) == (kept if len(kept) <= 30 else [*kept[:29], kept[-1]])
    newline = ids(whole, 1)[-1]
    assert [ids(cut, row)[-1] for row in (1, 3)] == [newline] * 2, "what is pooled"
    assert torch.equal(cut.vision[3]["pixel_values"], whole.vision[3]["pixel_values"])
    embeddings = embedder.encoder(cut)
    for row in range(4):
        alone = embedder.encoder(collator.encode_inputs([rows[row]]))
        torch.testing.assert_close(embeddings[row], alone[0], atol=1e-6, rtol=0)


def test_pictures_and_instructions_that_do_not_fit_are_refused(embedder: Embedder) -> None:
    pictures = [Image.new("RGB", (side, side)) for side in (64, 16)]  # 16 tokens and 1
    large, small = (prompt(LONG, image=picture) for picture in pictures)
    asked, written = prompt("a", instruction=LONG), RawInput(f"<|image_1|> {LONG}", large.images)
    encoded, problems = limited(embedder, 10).encode_usable([large, small, asked, written, prompt("a")])
    assert sorted(problems) == [0, 2, 3]
    assert all("pictures and instruction take" in str(problem) for problem in problems.values())
    assert encoded is not None
    assert encoded.lengths.tolist()[0] == 10
    strict = Embedder(embedder.encoder, max_tokens=10, long_text="error")
    with pytest.raises(RowError, match=r"input 1: \d+ tokens where max_tokens is 10: 'a red circle"):
        strict.encode(["a", LONG])


def test_encode_counts_what_it_cut(embedder: Embedder) -> None:
    short = Embedder(embedder.encoder, max_tokens=12)
    with pytest.warns(UserWarning, match="2 of 3 inputs have more than 12 tokens"):
        short.encode([LONG, "a", {"text": LONG, "image": Image.new("RGB", (16, 16))}], batch_size=1)
    assert embedder.limit == TokenLimit(1024), "the backbone's positions"
    assert TokenEstimate(short.collator)(RawInput("x" * 10**6)) == 12


@pytest.mark.parametrize(("max_tokens", "message"), [(1, "from 2 to 1024"), (1025, "from 2 to 1024")])
def test_limits_that_cannot_be(embedder: Embedder, max_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Embedder(embedder.encoder, max_tokens=max_tokens)
    with pytest.raises(ValueError, match="long_text must be 'truncate' or 'error', got 'cut'"):
        Embedder(embedder.encoder, long_text="cut")  # type: ignore[arg-type]


def test_open_clip_cuts_by_itself_and_its_limit_is_its_own(tiny_clip_dir: str) -> None:
    embedder = small_embedder(tiny_clip_dir, **ONE_PATH, adapter={"kind": "frozen"}).embedder
    assert embedder.limit.max_tokens == CONTEXT_LENGTH
    rows = [RawInput("a " * 50), RawInput("a"), prompt(image=Image.new("RGB", (8, 8)))]
    assert embedder.collator.encode_inputs(rows).num_cut == 1
    strict = Embedder(embedder.encoder, long_text="error").collator
    encoded, problems = strict.encode_usable(rows)
    assert list(problems) == [0]
    assert encoded is not None
    torch.testing.assert_close(
        embedder.encoder(encoded), embedder.encoder(embedder.collator.encode_inputs(rows[1:]))
    )
    with pytest.raises(ValueError, match="max_tokens=5, but this OpenCLIP model has"):
        Embedder(embedder.encoder, max_tokens=5)


def test_the_limit_is_the_models_in_checkpoint_export_and_data(
    tiny_backbone_dir: str, tiny_mmeb_dir: str, tmp_path: Path
) -> None:
    module = small_embedder(tiny_backbone_dir, max_tokens=9, long_text="error")
    expected = TokenLimit(9, "error")
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(
        RowError, match=r"training subset 'colours_.*, row \d+: \d+ tokens where max_tokens is 9"
    ):
        trainer.fit(module, small_data(tiny_mmeb_dir))
    assert module.about()["identity"] != small_embedder(tiny_backbone_dir).about()["identity"]
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    loaded = Embedder.from_pretrained(tmp_path / "x.ckpt")
    loaded.save_pretrained(tmp_path / "export")
    exported = Embedder.from_pretrained(tmp_path / "export")
    assert module.limit == module.embedder.limit == loaded.limit == exported.limit == expected
    assert small_data(tiny_mmeb_dir).connect(module).collator.limit == expected
    assert replace(expected, long_text="truncate") == TokenLimit(9)
    cut = small_embedder(tiny_backbone_dir, max_tokens=20)
    trainer = make_trainer(tmp_path / "cut", max_steps=1)
    trainer.fit(cut, small_data(tiny_mmeb_dir))
    assert trainer.callback_metrics["mix/cut_texts"] > 0
