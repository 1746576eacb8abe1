from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel_decoupling.index.searcher import Searcher
from parallel_decoupling.index.torch_index import TorchIndex
from tests.index.brute_force import embeddings

ITEMS = torch.nn.functional.normalize(embeddings(20), dim=-1)


class RowEmbedder:
    """Embeds the text "7" as item 7 and notes the options."""

    def __init__(self, num_paths: int = 3) -> None:
        self.encoder = SimpleNamespace(num_paths=num_paths)
        self.options: dict[str, Any] = {}

    def encode_query(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        self.options = options
        embeddings_BND = ITEMS[[int(text) for text in inputs]][:, : self.encoder.num_paths]
        paths = options["paths"]
        if paths == "aggregate":
            return torch.nn.functional.normalize(embeddings_BND.mean(dim=1), dim=-1)
        return embeddings_BND if paths == "all" else embeddings_BND[:, paths]


def test_search_by_what_the_model_embeds() -> None:
    index = TorchIndex()
    index.add(range(20), ITEMS, {"even": [row % 2 == 0 for row in range(20)]})
    embedder = RowEmbedder()
    hits = Searcher(embedder, index).search(["7", "3"], 2, "sum")
    assert [[hit.id for hit in best][0] for best in hits] == ["7", "3"]
    assert embedder.options == {"paths": [0, 1, 2]}, "the model's own instruction"
    Searcher(embedder, index).search(["7"], instruction="Find")
    assert embedder.options["instruction"] == "Find"
    assert Searcher(embedder, index).search(["7"], 1, filter={"even": True})[0][0].id != "7"


def test_only_the_paths_in_the_index_are_compared() -> None:
    index = TorchIndex(path_names=("path_0", "path_2"))
    index.add(range(20), ITEMS[:, [0, 2]])
    embedder = RowEmbedder()
    ((hit,),) = Searcher(embedder, index).search(["4"], 1, "path_2")
    assert (hit.id, embedder.options["paths"]) == ("4", [0, 2])


def test_index_of_aggregates() -> None:
    index = TorchIndex(path_names=("aggregate",))
    index.add(range(20), ITEMS.mean(dim=1, keepdim=True))
    ((hit,),) = Searcher(RowEmbedder(), index).search(["4"], 1)
    assert (hit.id, hit.score) == ("4", pytest.approx(1, abs=1e-5))


def test_model_with_one_path_searches_by_that_path() -> None:
    index = TorchIndex()
    index.add(range(20), ITEMS)
    searcher = Searcher(RowEmbedder(num_paths=1), index)
    assert searcher.search(["4"], 1, "path_0")[0][0].id == "4"
    with pytest.raises(ValueError, match="queries of shape"):
        searcher.search(["4"], 1, "aggregate")


def test_queries_are_truncated_as_the_items_were() -> None:
    index = TorchIndex(metadata={"truncate_dim": 8})
    index.add(range(20), ITEMS[..., :8])
    ((hit,),) = Searcher(RowEmbedder(), index).search(["4"], 1)
    assert (hit.id, hit.score) == ("4", pytest.approx(1, abs=1e-5))
