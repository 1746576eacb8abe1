"""An exported folder in the real sentence-transformers: the embeddings of ``Embedder.encode``."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.sentence_transformers import as_sentence_transformer
from tests.support.embedders import mixed_inputs, tiny_embedder
from tests.support.fit import small_embedder

ROW_BY_ROW: dict[str, Any] = {"batch_size": 1}
"""Without padding the two libraries' batches are the same, so that embeddings are equal bit for bit."""


@pytest.fixture(scope="module")
def folder(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    embedder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", local_files_only=True)


def encode(model: SentenceTransformer, inputs: list[Any], **options: Any) -> Tensor:
    return model.encode(inputs, convert_to_tensor=True, show_progress_bar=False, **options)


@pytest.mark.parametrize("kind", ["loaded", "made"])
def test_equals_encode(kind: str, model: SentenceTransformer, embedder: Embedder, folder: Path) -> None:
    model = model if kind == "loaded" else as_sentence_transformer(folder)
    expected = embedder.encode(mixed_inputs(), paths="aggregate", **ROW_BY_ROW)
    assert torch.equal(encode(model, mixed_inputs(), **ROW_BY_ROW), expected)
    torch.testing.assert_close(encode(model, mixed_inputs()), expected, rtol=1e-5, atol=1e-5)
    for item, row in zip(mixed_inputs(), expected, strict=True):
        assert torch.equal(encode(model, item), row), "a single input"


def test_a_call_waits_for_a_training_step_and_leaves_its_modes(tiny_backbone_dir: str) -> None:
    module = small_embedder(tiny_backbone_dir, adapter={"dropout": 0.5})
    expected, model = module.encode("a"), as_sentence_transformer(module.embedder)
    with ThreadPoolExecutor(1) as threads:
        with module.encoder.turns.alone():
            call = threads.submit(encode, model, "a")  # type: ignore[arg-type]
            assert not wait([call], timeout=0.5).done
            assert all(each.training for each in module.encoder.modules())
        torch.testing.assert_close(call.result(), expected)
    assert all(each.training for each in module.encoder.modules())


@pytest.mark.parametrize("around", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)])
def test_what_is_set_around_a_call_makes_no_difference(around: Any, embedder: Embedder) -> None:
    model, inputs = as_sentence_transformer(embedder), mixed_inputs()
    expected = embedder.encode(inputs, **ROW_BY_ROW)
    with around:
        found = encode(model, inputs, **ROW_BY_ROW)
        assert (model.encode(inputs, **ROW_BY_ROW) == expected.numpy()).all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("path", [0, 2])
def test_one_path(path: int, model: SentenceTransformer, embedder: Embedder) -> None:
    expected = embedder.encode(mixed_inputs(), paths=path, **ROW_BY_ROW)
    assert torch.equal(encode(model, mixed_inputs(), paths=path, **ROW_BY_ROW), expected)
    made = as_sentence_transformer(embedder, path)
    assert torch.equal(encode(made, mixed_inputs(), **ROW_BY_ROW), expected)
    assert not torch.equal(encode(model, mixed_inputs(), **ROW_BY_ROW), expected)


def test_prompts_are_instructions(model: SentenceTransformer, embedder: Embedder) -> None:
    assert model.prompts == {"query": "find", "document": "show"}
    options: dict[str, Any] = {"convert_to_tensor": True, **ROW_BY_ROW}
    queries = model.encode_query(mixed_inputs(), **options)
    expected = embedder.encode_query(mixed_inputs(), paths="aggregate", **ROW_BY_ROW)
    assert torch.equal(queries, expected)
    documents = model.encode_document(mixed_inputs(), **options)
    expected = embedder.encode_candidate(mixed_inputs(), paths="aggregate", **ROW_BY_ROW)
    assert torch.equal(documents, expected)
    own = encode(model, mixed_inputs(), prompt="count the objects: ", **ROW_BY_ROW)
    expected = embedder.encode(
        mixed_inputs(), instruction="count the objects:", paths="aggregate", **ROW_BY_ROW
    )
    assert torch.equal(own, expected)
    assert not torch.equal(own, queries)


@pytest.mark.parametrize("paths", [0, 2, "aggregate"])
@pytest.mark.parametrize("load", ["library", "ours"])
def test_saving_keeps_the_chosen_path(paths: Any, load: str, embedder: Embedder, tmp_path: Path) -> None:
    as_sentence_transformer(embedder, paths).save_pretrained(str(tmp_path / "again"))
    expected = embedder.encode(mixed_inputs(), paths=paths, **ROW_BY_ROW)
    if load == "ours":
        again = as_sentence_transformer(tmp_path / "again")
        torch.testing.assert_close(encode(again, mixed_inputs(), **ROW_BY_ROW), expected)
    else:
        again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
        assert torch.equal(encode(again, mixed_inputs(), **ROW_BY_ROW), expected)


def test_a_save_that_is_killed_leaves_one_of_two_models(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is the last folder or file that it brings to its place."""
    before, replace = as_sentence_transformer(embedder, 0), os.replace
    old, new = (embedder.encode(["a"], paths=paths) for paths in (0, "aggregate"))
    before.save_pretrained(str(tmp_path / "0" / "model"))
    (tmp_path / "0" / "model" / "notes.txt").write_text("mine")
    killed = Mock(side_effect=KeyboardInterrupt)
    for allowed in range(20):
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(allowed + 1))
        left = iter([replace] * allowed)
        monkeypatch.setattr("os.replace", lambda *names, left=left: next(left, killed)(*names))
        try:
            as_sentence_transformer(embedder).save_pretrained(str(folder / "model"))
        except KeyboardInterrupt:
            monkeypatch.undo()
            whole = [file.parent for file in folder.glob("*/config.json")]
            found = [encode(as_sentence_transformer(each), ["a"]) for each in whole]
            assert found
            assert all(torch.allclose(each, old) or torch.allclose(each, new) for each in found)
        else:
            break
    monkeypatch.undo()
    assert allowed > 3
    (each,) = folder.iterdir()
    assert (each / "notes.txt").read_text() == "mine"
    torch.testing.assert_close(encode(as_sentence_transformer(each), ["a"]), new)


def test_bad_input(model: SentenceTransformer, embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="paths is 3; use 'aggregate' or a path number, 0 to 2"):
        as_sentence_transformer(embedder, 3)
    with pytest.raises(ValueError, match="paths is 'all'"):
        encode(model, ["text"], paths="all")
    with pytest.raises(ValueError, match="unknown keys"):
        encode(model, ["text", {"role": "user", "content": "a chat"}])
    with pytest.raises(ValueError, match=r"^'  ': An input needs a text"):
        encode(model, ["a", "  ", "b"])
    with pytest.raises(ValueError, match="processing_kwargs have no effect"):
        encode(model, ["a"], processing_kwargs={"text": {"max_length": 3}})


def test_strings_are_texts_whatever_they_name(embedder: Embedder, image_file: str) -> None:
    texts = ["click on logo.gif", image_file, "https://a.b/c.png"]
    expected = embedder.encode([{"text": text} for text in texts], **ROW_BY_ROW)
    assert torch.equal(encode(as_sentence_transformer(embedder), texts, **ROW_BY_ROW), expected)


@pytest.mark.parametrize("bad", ["", "half \ud83d", "a <|image_pad|>", None])
def test_a_bad_input_is_named_by_its_place_or_gets_a_counted_stand_in(
    bad: Any, embedder: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    inputs: list[Any] = [*(["a"] * 30), bad, *(["b"] * 9)]
    model = as_sentence_transformer(embedder)
    with pytest.raises(ValueError, match=r"^input 30: "):
        encode(model, inputs)
    with pytest.raises(ValueError, match=r"^input 0: "):
        model.encode_query(sentences=[bad, "x"])
    going = as_sentence_transformer(embedder, bad_inputs="stand_in")
    found = encode(going, [*inputs, bad], **ROW_BY_ROW)
    expected = encode(model, ["missing" if each is bad else each for each in [*inputs, bad]], **ROW_BY_ROW)
    assert torch.equal(found, expected)
    assert going[0].num_stand_ins == 2
    assert "inputs that got a stand-in so far: 2" in caplog.text


def test_max_seq_length_is_max_tokens(embedder: Embedder, tmp_path: Path) -> None:
    model, text = as_sentence_transformer(embedder), "a red circle " * 50
    assert model.max_seq_length == 1024
    model.max_seq_length = 8
    short = Embedder(embedder.encoder, max_tokens=8)
    with pytest.warns(UserWarning, match="more than 8 tokens"):
        expected = short.encode([text])
    assert torch.equal(encode(model, [text]), expected)
    assert model[0].num_cut == 1
    assert embedder.limit.max_tokens == 1024
    model.save_pretrained(str(tmp_path / "short"))
    model.save_pretrained(str(tmp_path / "short"))  # in place of the one before
    again = SentenceTransformer(str(tmp_path / "short"), trust_remote_code=True, device="cpu")
    assert again.max_seq_length == 8
    for wrong in (8.0, "8"):
        with pytest.raises(ValueError, match="max_tokens="):
            model.max_seq_length = wrong  # type: ignore[assignment]
    model.max_seq_length = None
    assert model.max_seq_length == 1024


def test_saving_keeps_the_prompts(embedder: Embedder, tmp_path: Path) -> None:
    model = as_sentence_transformer(embedder, prompts={"query": "Q:", "passage": "P:"})
    model.default_prompt_name = "passage"
    expected = encode(model, ["a"])
    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert again.prompts == {"query": "Q:", "passage": "P:", "document": ""}
    assert again.default_prompt_name == "passage"
    torch.testing.assert_close(encode(again, ["a"]), expected)


@pytest.mark.parametrize(
    "option", [{"prompt": 5}, {"batch_size": "3"}, {"truncate_dim": 0}, {"output_value": "token_embeddings"}]
)
def test_options_of_encode_are_checked(option: dict[str, Any], embedder: Embedder) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be "):
        as_sentence_transformer(embedder).encode(["a"], **option)


@pytest.mark.parametrize(
    "option",
    [
        {"backend": "onnx"},
        {"model_kwargs": {"dtype": "bfloat16"}},
        {"processor_kwargs": {"padding_side": "right"}},
        {"config_kwargs": {"hidden_size": 3}},
    ],
)
def test_options_without_effect_are_refused(option: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}.* would have no effect here"):
        SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **option)


def test_one_path_with_its_adapter_merged_is_a_stock_model(tiny_backbone_dir: str, tmp_path: Path) -> None:
    """The library reads the backbone; see ``test_path_lora`` for transformers and pictures."""
    embedder = tiny_embedder(tiny_backbone_dir, per_path=True, prefix_length=0)
    embedder.save_pretrained(tmp_path / "model", [1], merge_adapters=True)
    model = SentenceTransformer(str(tmp_path / "model" / "backbone"), device="cpu")
    texts = ["a red circle", "a green star above two yellow crosses"]
    torch.testing.assert_close(encode(model, texts), embedder.encode(texts, paths=1), rtol=1e-4, atol=1e-4)


def test_the_library_quantizes_what_encode_gives(model: SentenceTransformer, embedder: Embedder) -> None:
    """A bit per sign, and 255 steps between the ends of the range."""
    expected = embedder.encode(mixed_inputs(), **ROW_BY_ROW).numpy()
    packed = model.encode(mixed_inputs(), precision="ubinary", show_progress_bar=False, **ROW_BY_ROW)
    assert np.array_equal(np.unpackbits(packed, axis=1), expected > 0)
    ranges = np.stack([expected.min(axis=0) - 0.01, expected.max(axis=0) + 0.01])
    step = (ranges[1] - ranges[0]) / 255
    restored = ranges[0] + step * (quantize_embeddings(expected, "int8", ranges=ranges) + 128.0)
    assert (np.abs(restored - expected) <= step + 1e-6).all()


@pytest.mark.slow
def test_devices_share_a_list(embedder: Embedder) -> None:
    texts = [f"a text with the number {number}" for number in range(9)]
    model = as_sentence_transformer(embedder)
    found = torch.from_numpy(
        model.encode(texts, device=["cpu", "cpu"], chunk_size=2, show_progress_bar=False)
    )
    torch.testing.assert_close(found, embedder.encode(texts), rtol=1e-5, atol=1e-5)
