"""``max_tokens``: what is cut, what is refused, and that every way in has the model's limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from parallel_decoupling.batch import EncoderInputs, LongText, RawInput, TokenLimit
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.data.unusable import RowError
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import TokenEstimate
from tests.support.fit import ONE_PATH, make_trainer, small_data, small_embedder
from tests.support.tiny_clip import CONTEXT_LENGTH

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
        monkeypatch.setattr(collator, "_process", lambda *_: None)
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
    with pytest.raises(ValueError, match="long_text='cut': use truncate or error"):
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
    assert module.identity()["sha256"] != small_embedder(tiny_backbone_dir).identity()["sha256"]
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
