"""``Embedder``: one item or a list, every kind of path, instructions, similarities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.backbone import AdapterConfig, load_backbone
from parallel_decoupling.model.encoder import ParallelEncoder
from tests.support.embedders import mixed_inputs, tiny_embedder
from tests.support.tiny import save_tiny_backbone


def test_one_item_is_the_list_of_it_without_the_batch_dimension(tiny_backbone_dir: str) -> None:
    embedder = tiny_embedder(tiny_backbone_dir)
    dim = embedder.embed_dim
    for item in mixed_inputs():
        for paths, shape in (("aggregate", (dim,)), ("all", (3, dim)), (1, (dim,)), ([2, 0], (2, dim))):
            found = embedder.encode(item, paths=paths)  # type: ignore[arg-type]
            assert found.shape == shape
            assert torch.equal(found, embedder.encode([item], paths=paths)[0])  # type: ignore[arg-type]


def test_queries_and_documents_have_their_instructions(tiny_backbone_dir: str) -> None:
    embedder, inputs = tiny_embedder(tiny_backbone_dir), mixed_inputs()
    assert torch.equal(embedder.encode_query(inputs), embedder.encode(inputs, instruction="find"))
    documents = embedder.encode(inputs, instruction="show")
    assert torch.equal(embedder.encode_document(inputs), documents)
    assert torch.equal(embedder.encode_candidate(inputs), documents)
    assert torch.equal(embedder.encode_document(inputs, instruction=None), embedder.encode(inputs))
    assert not torch.equal(documents, embedder.encode(inputs))


@pytest.mark.parametrize("prefix_type", ["deep", "shallow"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_encode_outside_autocast(
    tiny_backbone_dir: str, image_file: str, dtype: Any, prefix_type: Any
) -> None:
    inputs = ["a red circle", {"text": "what colour is it?", "image": image_file}]
    results = []
    for kind in (dtype, "float32"):
        backbone = load_backbone(tiny_backbone_dir, dtype=kind, adapter=AdapterConfig(kind="dora"))
        encoder = ParallelEncoder(backbone, num_paths=2, prefix_type=prefix_type, aggregation="learned")
        with torch.no_grad():  # an adapter that adds nothing would hide a wrong dtype
            for name, parameter in encoder.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) % 3 * 0.01)
        embedder = Embedder(encoder)
        results.append((embedder.encode(inputs, paths="all"), embedder.encode(inputs)))
    for half, full in zip(*results, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(half.shape[:-1]))
        assert F.cosine_similarity(half, full, dim=-1).min() > 0.98


def test_real_encoder_gives_the_same_embeddings_at_any_batch_size(tmp_path: Path, image_file: str) -> None:
    torch.manual_seed(0)
    encoder = ParallelEncoder(load_backbone(str(save_tiny_backbone(tmp_path / "tiny"))), num_paths=2)
    image = Image.new("RGB", (48, 64), "blue")
    inputs = ["a red circle", image, {"text": "what colour is it?", "image": image_file}, "count the objects"]
    embedder = Embedder(encoder)
    single = embedder.encode(inputs, paths="all", batch_size=1)
    together = embedder.encode(inputs, paths="all", batch_size=4)
    torch.testing.assert_close(together, single, atol=1e-5, rtol=0)
    torch.testing.assert_close(embedder.encode(inputs, paths=1), single[:, 1], atol=1e-5, rtol=0)
    aggregate = embedder.encode(inputs)
    torch.testing.assert_close(aggregate, encoder.aggregate(single), atol=1e-5, rtol=0)
    torch.testing.assert_close(single.norm(dim=-1), torch.ones(4, 2))
    assert (Embedder.similarity(single, single) - torch.eye(4)).tril(-1).max() < 0.9999, "rows must differ"


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_similarity_equals_loops(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(4, *shape), torch.randn(5, *shape)
    result = Embedder.similarity(a, b)
    for i in range(4):
        for j in range(5):
            cosine = F.cosine_similarity(a[i], b[j], dim=-1).mean()
            torch.testing.assert_close(result[i, j], cosine)
    torch.testing.assert_close(Embedder.similarity_pairwise(a, b[:4]), result[:, :4].diagonal())
    with pytest.raises(ValueError, match="4 and 5 rows"):
        Embedder.similarity_pairwise(a, b)
