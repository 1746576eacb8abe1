"""The page: what it shows for a query, and once in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from parallel_decoupling.app import find
from parallel_decoupling.batch import RawInput
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.identity import path_hashes
from parallel_decoupling.search import ExactIndex, Searcher
from tests.support.servers import Start
from tests.support.stores import save_store
from tests.support.tiny import noise_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def embed_pictures(folder: Path, embedder: Embedder, count: int, **about: Any) -> Searcher:
    """Pictures, of which the last is lost afterwards, and an item without one."""
    files = [folder / f"{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        noise_image(32, 32, number).save(file)
    items = [*files, "a text"]
    store = save_store(
        folder,
        embedder.encode(items, paths="all"),
        {"image": [*(file.name for file in files), None]},
        aggregate=embedder.encode(items, paths="aggregate"),
        path_sha256=path_hashes(embedder.encoder),
        image_dir=str(folder),
        **about,
    )
    files[-1].unlink()
    return Searcher(embedder, ExactIndex(store))


@pytest.fixture(scope="module")
def searcher(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return embed_pictures(tmp_path_factory.mktemp("pictures"), Embedder.from_pretrained(checkpoint), 3)


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
    assert captions.count("(picture cannot be read)") == 1
    assert sum(caption.endswith(" 3") for _, caption in pictures) == 1


def test_the_instruction_goes_before_the_text(searcher: Searcher) -> None:
    """Same hits as for both in one prompt; blanks around do not count; an instruction alone is nothing."""
    _, rows = ask(searcher, instruction=" find: ", text="a red circle ")
    (hits,) = searcher.search([RawInput("find: a red circle\n")], 12, "path_1")
    assert [row[1:3] for row in rows] == [[hit.id, f"{hit.score:.3f}"] for hit in hits]
    assert rows != ask(searcher, text="a red circle")[1]
    assert ask(searcher, instruction="find", text=" ") == ([], [])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_text_image_and_scoring_change_the_hits(checkpoint: Path, start: Start, tmp_path: Path) -> None:
    """Pictures and numbers follow every part of the query, and nothing is asked of another host."""
    from playwright.sync_api import sync_playwright

    searcher = embed_pictures(tmp_path, Embedder.from_pretrained(checkpoint), 20, model=str(checkpoint))
    _, address = start("app", tmp_path)
    table = "document.querySelector('#cosines').innerText.split(/\\s+/).join(' ').trim()"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)

        def wait_for(**query: Any) -> str:
            """Wait for the numbers of a query; returns the addresses of the pictures that are shown then."""
            _, rows = ask(searcher, **query)
            expected = " ".join(cell for row in rows for cell in row)
            page.wait_for_function(f"text => {table}.endsWith(text)", arg=expected)
            page.wait_for_timeout(500)
            images = page.locator("#gallery img").all()
            return " ".join(str(each.get_attribute("src")) for each in images)

        page.locator("#text textarea").fill("a red circle")
        page.locator("#search").click()
        by_text = wait_for(text="a red circle", scoring="aggregate")
        for scoring in ("path_1", "maxsim"):
            page.get_by_label(scoring, exact=True).check()
            wait_for(text="a red circle", scoring=scoring)
        page.locator("#image input[type=file]").set_input_files(str(tmp_path / "7.png"))
        picture = noise_image(32, 32, 7)
        assert wait_for(text="a red circle", image=picture, scoring="maxsim") != by_text
        page.locator("#instruction textarea").fill("find")
        page.locator("#text textarea").fill("")
        page.locator("#search").click()
        wait_for(instruction="find", image=picture, scoring="maxsim")
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
