"""Requests that are embedded together, with models of both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.serving.batches import embed_requests
from parallel_decoupling.serving.requests import EmbeddingRequest, RequestError, Selection
from tests.support.embedders import tiny_embedder
from tests.support.fit import small_embedder
from tests.support.tiny import noise_image
from tests.support.tiny_clip import CONTEXT_LENGTH, save_tiny_clip

CLIP_SETTINGS: dict[str, Any] = {
    "num_paths": 1,
    "prefix_length": 0,
    "mi_weight": 0,
    "aggregate_weight": 0,
    "adapter": {"kind": "frozen"},
}


def request(
    *inputs: dict[str, Any], selection: Selection = 0, truncate_dim: int | None = None
) -> EmbeddingRequest:
    """A request as the gate lets it pass."""
    return EmbeddingRequest(list(inputs), "default", selection, truncate_dim, "float")


@pytest.fixture(scope="module", params=["paths", "open_clip"])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """Two paths of the tiny backbone, and a tiny OpenCLIP model."""
    if request.param == "paths":
        return small_embedder(request.getfixturevalue("tiny_backbone_dir")).embedder
    folder = save_tiny_clip(tmp_path_factory.mktemp("clip"))
    return small_embedder(folder, **CLIP_SETTINGS).embedder


def test_each_request_gets_its_own_embeddings(embedder: Embedder) -> None:
    """Mixed modalities and selections: what ``encode`` gives for the request alone, and its tokens."""
    image = noise_image(40, 30)
    requests = [
        request({"text": "a red circle"}, {"image": image}),
        request({"text": "what colour", "image": image}, selection="aggregate"),
        request({"text": "b", "instruction": "find"}),
    ]
    for one, result in zip(requests, embed_requests(embedder, requests, 2), strict=True):
        assert not isinstance(result, RequestError)
        expected = embedder.encode(one.inputs, paths=one.selection)
        torch.testing.assert_close(result[0], expected, atol=1e-5, rtol=0)
        assert result[1] > 0


@pytest.mark.parametrize("aggregation", ["mean", "concat"])
def test_paths_are_cut_before_they_are_aggregated(aggregation: str, tiny_backbone_dir: str) -> None:
    """Requests of one batch that keep all, 5 or 3 numbers of every path: what ``encode`` gives."""
    embedder = tiny_embedder(tiny_backbone_dir, aggregation=aggregation)
    selections: list[Selection] = ["aggregate", 1]
    requests = [
        request({"text": "a red circle"}, selection=selection, truncate_dim=dim)
        for selection in selections
        for dim in (None, 5, 3)
    ]
    for one, result in zip(requests, embed_requests(embedder, requests, 32), strict=True):
        assert not isinstance(result, RequestError)
        expected = embedder.encode(one.inputs, paths=one.selection, truncate_dim=one.truncate_dim)
        torch.testing.assert_close(result[0], expected, atol=1e-5, rtol=0)


def test_only_the_guilty_request_fails(embedder: Embedder) -> None:
    """A text that the encoder refuses is an error of its request, not of the batch."""
    good = request({"text": "a"})
    image_mark = request({"text": "<|image_1|> a"})
    results = embed_requests(embedder, [good, image_mark, good], 32)
    assert isinstance(results[1], RequestError)
    assert (results[1].status, results[1].param) == (400, "input")
    for result in (results[0], results[2]):
        assert not isinstance(result, RequestError)
        torch.testing.assert_close(result[0], embedder.encode(good.inputs, paths=0), atol=1e-5, rtol=0)


def test_open_clip_cuts_no_text(tmp_path: Path) -> None:
    """A text longer than the tower is refused; one that fits is not."""
    clip = small_embedder(save_tiny_clip(tmp_path / "clip"), **CLIP_SETTINGS).embedder
    fits, long = request({"text": "a " * (CONTEXT_LENGTH - 2)}), request({"text": "a " * CONTEXT_LENGTH})
    first, second = embed_requests(clip, [fits, long], 32)
    assert not isinstance(first, RequestError)
    assert isinstance(second, RequestError)
    assert f"the {CONTEXT_LENGTH} tokens" in str(second)


def test_pictures_are_resized_as_by_the_embedder(tiny_backbone_dir: str) -> None:
    embedder = small_embedder(tiny_backbone_dir).embedder
    one = request({"image": noise_image(40, 30)})
    (plain,) = embed_requests(embedder, [one], 2)
    embedder.images = ImagePolicy(size="low")
    (resized,) = embed_requests(embedder, [one], 2)
    assert not isinstance(plain, RequestError)
    assert not isinstance(resized, RequestError)
    torch.testing.assert_close(resized[0], embedder.encode(one.inputs, paths=0), atol=1e-5, rtol=0)
    assert resized[1] > plain[1]
