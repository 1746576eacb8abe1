from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.index.searcher import PATH_HASHES, Searcher
from parallel_decoupling.index.torch_index import TorchIndex
from parallel_decoupling.model.identity import path_hashes
from parallel_decoupling.training.module import PDFEmbedder
from tests.index.brute_force import embeddings
from tests.support.embedders import mixed_inputs, tiny_embedder
from tests.support.fit import make_trainer, small_embedder

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


def test_without_hashes_a_model_needs_the_paths_of_the_index() -> None:
    index = TorchIndex()
    index.add(range(20), ITEMS)
    with pytest.raises(ValueError, match=r"the model has 1 paths, .*search with the whole model"):
        Searcher(RowEmbedder(num_paths=1), index)
    single = TorchIndex(path_names=("path_2",))
    single.add(range(20), ITEMS[:, :1])
    assert Searcher(RowEmbedder(num_paths=1), single).search(["4"], 1)[0][0].id == "4", "there is one only"


@pytest.fixture(scope="module")
def embedder(tiny_backbone_dir: str) -> Embedder:
    return tiny_embedder(tiny_backbone_dir, aggregation="learned")


def checked_index(embedder: Embedder, *names: str) -> TorchIndex:
    """An index of ``mixed_inputs`` as ``lightning index`` makes it."""
    metadata = {PATH_HASHES: path_hashes(embedder.encoder), "model": "last.ckpt"}
    vectors = embedder.encode_query(mixed_inputs())
    if names == ("aggregate",):
        vectors = embedder.encode_query(mixed_inputs(), paths="aggregate").unsqueeze(1)
    elif names:
        vectors = vectors[:, [int(name[5:]) for name in names]]
    index = TorchIndex(path_names=names, metadata=metadata)
    index.add(range(4), vectors)
    return index


@pytest.mark.parametrize("paths", [[1, 2, 0], [2]])
def test_exported_paths_are_those_of_the_index_whatever_their_numbers(
    paths: list[int], embedder: Embedder, tmp_path: Path
) -> None:
    index = checked_index(embedder)
    embedder.save_pretrained(tmp_path / "export", paths=paths)
    searcher = Searcher(Embedder.from_pretrained(tmp_path / "export"), index)
    for path in paths:
        hits = [best[0] for best in searcher.search(mixed_inputs(), 1, f"path_{path}")]
        assert [hit.id for hit in hits] == ["0", "1", "2", "3"]
        assert all(hit.similarities[f"path_{path}"] == pytest.approx(1, abs=1e-5) for hit in hits)
    if len(paths) == 3:
        assert searcher.scorings == index.settings.scorings
        hits = [best[0] for best in searcher.search(mixed_inputs(), 1, "sum")]
        assert [hit.score for hit in hits] == pytest.approx([1] * 4, abs=1e-5)
    else:
        assert searcher.scorings == ("path_2",)
        for scoring in ("aggregate", "path_0", "maxsim"):
            with pytest.raises(ValueError, match="the model has path_2: use the scoring path_2, or a model"):
                searcher.search(mixed_inputs(), 1, scoring)
        with pytest.raises(ValueError, match="this index has aggregate, sum"):
            searcher.search(mixed_inputs(), 1, "path_7")


def test_paths_in_the_index_are_found_among_exported_ones(embedder: Embedder, tmp_path: Path) -> None:
    index = checked_index(embedder, "path_0", "path_2")
    embedder.save_pretrained(tmp_path / "export", paths=[2, 0])
    searcher = Searcher(Embedder.from_pretrained(tmp_path / "export"), index)
    assert [best[0].score for best in searcher.search(mixed_inputs(), 1, "sum")] == pytest.approx([1] * 4)


@pytest.mark.parametrize("names", [(), ("aggregate",), ("path_1",)])
@pytest.mark.parametrize("changed", ["prefixes.", "backbone."])
def test_a_model_that_was_trained_on_is_refused(
    names: tuple[str, ...], changed: str, tiny_backbone_dir: str
) -> None:
    options: dict[str, Any] = {"aggregation": "learned"}
    index = checked_index(tiny_embedder(tiny_backbone_dir, **options), *names)
    again = tiny_embedder(tiny_backbone_dir, **options)
    searched = Searcher(again, index).search(mixed_inputs(), 1)
    assert [hit.score for (hit,) in searched] == pytest.approx([1] * 4, abs=1e-5)
    with torch.no_grad():
        for name, parameter in again.encoder.named_parameters():
            if parameter.requires_grad and name.startswith(changed):
                parameter.add_(1e-3 * parameter.std())
    with pytest.raises(ValueError, match=r"other weights than .*last\.ckpt.*trained on.*lightning predict"):
        Searcher(again, index)


def test_an_aggregate_of_fewer_paths_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    index = checked_index(embedder, "aggregate")
    embedder.save_pretrained(tmp_path / "export", paths=[0, 1])
    with pytest.raises(ValueError, match="lacks paths that the index needs"):
        Searcher(Embedder.from_pretrained(tmp_path / "export"), index)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_hashes_of_a_checkpoint_and_of_its_export_are_equal(
    kind: str, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    module: PDFEmbedder = small_embedder(tiny_backbone_dir, adapter={"kind": kind})
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    hashes = path_hashes(module.encoder)
    assert len(set(hashes)) == module.encoder.num_paths == 2
    assert path_hashes(Embedder.from_pretrained(tmp_path / "last.ckpt").encoder) == hashes
    module.save_pretrained(tmp_path / "export", paths=[1])
    assert path_hashes(Embedder.from_pretrained(tmp_path / "export").encoder) == hashes[1:]


def test_an_older_index_is_searched_with_a_warning() -> None:
    index = TorchIndex(metadata={"model": "last.ckpt"})
    index.add(range(20), ITEMS)
    with pytest.warns(UserWarning, match=r"last\.ckpt may have been trained on since\..*lightning predict"):
        searcher = Searcher(RowEmbedder(), index)
    assert searcher.search(["4"], 1)[0][0].id == "4"
