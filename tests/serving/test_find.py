"""What the page shows, without a browser; and what is said where a package is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_decoupling.batch import RawInput
from parallel_decoupling.commands import app as app_command
from parallel_decoupling.commands import serve as serve_command
from parallel_decoupling.index.protocol import Hit
from parallel_decoupling.index.searcher import Searcher
from parallel_decoupling.index.torch_index import TorchIndex
from parallel_decoupling.serving.app import bars_html, find
from tests.support.fit import small_embedder
from tests.support.tiny import noise_image


@pytest.fixture(scope="module")
def searcher(tiny_backbone_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """Three pictures, the last of which is lost, and an item without one."""
    folder = tmp_path_factory.mktemp("pictures")
    embedder = small_embedder(tiny_backbone_dir).embedder
    pictures = [noise_image(32, 32, number) for number in range(3)]
    for number, picture in enumerate(pictures[:2]):
        picture.save(folder / f"{number}.png")
    index = TorchIndex(metadata={"image_dir": str(folder)})
    names = ["0.png", "1.png", "lost.png", None]
    index.add(["a", "b", "c", "d"], embedder.encode([*pictures, "a text"]), {"image": names})
    return Searcher(embedder, index)


def ask(searcher: Searcher, **changes: Any) -> Any:
    query = {"instruction": "", "text": "", "image": None, "scoring": "path_1", **changes}
    return find(searcher, Path(searcher.index.settings.metadata["image_dir"]), **query)


def test_a_picture_finds_itself(searcher: Searcher) -> None:
    """First hit, cosine 1 on every path, its own pixels; lost and missing pictures are named."""
    pictures, bars = ask(searcher, image=noise_image(32, 32, 1))
    first, caption = pictures[0]
    assert caption == "1. 1.000"
    assert first.tobytes() == noise_image(32, 32, 1).convert("RGB").tobytes()
    assert bars.count(">path_") == 2 * 4
    captions = " ".join(caption for _, caption in pictures)
    assert "(picture not readable)" in captions
    assert captions.count(" d") == 1


def test_the_instruction_goes_before_the_text(searcher: Searcher) -> None:
    """Same hits as for both in one prompt; blanks around do not count."""
    apart = ask(searcher, instruction=" find: ", text="a red circle ")
    (hits,) = searcher.search([RawInput("find: a red circle\n")], 12, "path_1")
    assert apart[1] == bars_html(hits, "path_1")
    assert apart[1] != ask(searcher, text="a red circle")[1]


def test_nothing_is_shown_without_a_query(searcher: Searcher) -> None:
    """An instruction alone is no query."""
    assert ask(searcher, instruction="find", text=" ") == ([], "")


def test_bars_are_cosines_between_0_and_1() -> None:
    """Widths are clipped, numbers are not; names are escaped; the scored path is marked."""
    similarities = {"path_0": 0.25, "<b>": -0.5, "path_2": float(torch.tensor(1.0)) + 1e-3}
    html = bars_html([Hit("a", 0.25, similarities, {})], "path_0")
    assert '<div class=scored>path_0<span><i style="width:25.0%' in html
    assert '&lt;b&gt;<span><i style="width:0.0%' in html
    assert "<b>-0.50</b>" in html
    assert "width:100.0%" in html
    assert html.count("class=scored") == 1
    assert "scored" not in bars_html([Hit("a", 0.25, similarities, {})], "maxsim")


@pytest.mark.parametrize(
    ("command", "package", "extra"), [(serve_command, "litserve", "serve"), (app_command, "gradio", "app")]
)
def test_missing_packages_are_named(
    command: Any, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "parallel_decoupling.serving.app", raising=False)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=rf"pip install 'parallel-decoupling\[{extra}\]'$"):
        command.run(None)
