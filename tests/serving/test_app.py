"""The page in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.index.searcher import PATH_HASHES
from parallel_decoupling.index.torch_index import TorchIndex
from parallel_decoupling.model.identity import path_hashes
from tests.serving.conftest import Start
from tests.support.tiny import noise_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
]


def test_text_image_and_scoring_change_what_is_shown(checkpoint: Path, start: Start, tmp_path: Path) -> None:
    """Pictures and bars follow every part of the query, and nothing is asked of another host."""
    from playwright.sync_api import sync_playwright

    names = [f"{number}.png" for number in range(20)]
    for number, name in enumerate(names):
        noise_image(32, 32, number).save(tmp_path / name)
    embedder = Embedder.from_pretrained(checkpoint)
    metadata = {"model": str(checkpoint), PATH_HASHES: path_hashes(embedder.encoder)}
    embeddings = embedder.encode([{"image": str(tmp_path / name)} for name in names])
    index = TorchIndex(metadata={**metadata, "image_dir": str(tmp_path)})
    index.add(names, embeddings, {"image": names})
    index.save(tmp_path / "index")
    _, address = start("app", tmp_path / "index")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(20_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#text textarea").fill("a red circle")
        page.locator("#search").click()
        page.wait_for_selector("#bars .bars")
        page.wait_for_selector("#gallery img")
        bars = [page.locator("#bars .bars").inner_text()]
        assert "path_0" in bars[0]
        assert "path_1" in bars[0]

        def changed() -> list[str]:
            """Wait for other bars; the addresses of the pictures that are shown then."""
            other = "text => document.querySelector('#bars .bars').innerText !== text"
            page.wait_for_function(other, arg=bars[-1])
            bars.append(page.locator("#bars .bars").inner_text())
            page.wait_for_timeout(300)
            images = page.locator("#gallery img").all()
            return [str(each.get_attribute("src")) for each in images]

        for scoring in ("path_1", "maxsim", "aggregate"):
            page.get_by_label(scoring, exact=True).check()
            by_text = changed()
        page.locator("#image input[type=file]").set_input_files(str(tmp_path / "7.png"))
        by_both = changed()
        page.locator("#text textarea").fill("")
        page.locator("#search").click()
        changed()
        assert bars[-1].startswith("1. 1.000")  # the picture itself
        assert by_text != by_both
        assert bars[0] == bars[3]  # back at the aggregate
        assert len(set(bars)) == len(bars) - 1
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
