"""An exported folder in the real sentence-transformers: the embeddings of ``Embedder.encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers import SentenceTransformer

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.sentence_transformers import as_sentence_transformer
from tests.support.embedders import mixed_inputs, tiny_embedder

ROW_BY_ROW: dict[str, Any] = {"batch_size": 1}
"""Without padding the two libraries' batches are the same, so that embeddings are equal bit for bit."""


@pytest.fixture(scope="module")
def embedder(tiny_backbone_dir: str) -> Embedder:
    return tiny_embedder(tiny_backbone_dir)


@pytest.fixture(scope="module")
def folder(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    embedder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(f"socket.socket.{name}", refuse)
        return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", local_files_only=True)


def refuse(*arguments: Any) -> None:
    raise AssertionError("no network")


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


def test_bad_input(model: SentenceTransformer, embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="paths is 3; use 'aggregate' or a path number, 0 to 2"):
        as_sentence_transformer(embedder, 3)
    with pytest.raises(ValueError, match="paths is 'all'"):
        encode(model, ["text"], paths="all")
    with pytest.raises(ValueError, match="unknown keys"):
        encode(model, ["text", {"role": "user", "content": "a chat"}])
