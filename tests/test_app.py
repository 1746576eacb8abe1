"""The page: what it shows for a query."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from parallel_decoupling.app import build_page, find
from parallel_decoupling.batch import RawInput
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.search import ExactIndex, Searcher
from tests.support.stores import save_pictures
from tests.support.tiny import noise_image


@pytest.fixture(scope="module")
def searcher(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """Of three pictures, of which the last is lost afterwards, and an item without one."""
    folder, embedder = tmp_path_factory.mktemp("pictures"), Embedder.from_pretrained(checkpoint)
    index = ExactIndex(save_pictures(folder, embedder, 3, "a text"))
    (folder / "2.png").unlink()
    return Searcher(embedder, index)


def ask(searcher: Searcher, **changes: Any) -> Any:
    query = {"instruction": "", "text": "", "image": None, "scoring": "path_1", **changes}
    return find(searcher, Path(searcher.index.metadata["image_dir"]), **query)


def test_a_picture_finds_itself(searcher: Searcher) -> None:
    """First hit, cosine 1 on every path, its own pixels; lost and missing pictures are named."""
    pictures, rows = ask(searcher, image=noise_image(32, 32, 1))
    first, caption = pictures[0]
    assert caption == "1. 1.000"
    assert first.tobytes() == noise_image(32, 32, 1).convert("RGB").tobytes()
    assert rows[0] == ["1", "1", "1.000", "1.000", "1.000"]
    assert len(pictures) == len(rows) == 4
    captions = " ".join(caption for _, caption in pictures)
    assert captions.count("(picture cannot be read; see --image_dir)") == 1
    assert sum(caption.endswith(" 3") for _, caption in pictures) == 1


def test_the_page_offers_every_scoring(searcher: Searcher, tmp_path: Path) -> None:
    components = build_page(searcher, tmp_path).get_config_file()["components"]
    (radio,) = [each["props"]["choices"] for each in components if each["type"] == "radio"]
    assert [value for _, value in radio] == list(searcher.scorings)


def test_the_instruction_goes_before_the_text(searcher: Searcher) -> None:
    """Same hits as for both in one prompt; blanks around do not count; an instruction alone is nothing."""
    _, rows = ask(searcher, instruction=" find: ", text="a red circle ")
    (hits,) = searcher.search([RawInput("find: a red circle\n")], 12, "path_1")
    assert [row[1:3] for row in rows] == [[hit.id, f"{hit.score:.3f}"] for hit in hits]
    assert rows != ask(searcher, text="a red circle")[1]
    assert ask(searcher, instruction="find", text=" ") == ([], [])
