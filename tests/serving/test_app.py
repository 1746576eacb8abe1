"""The page in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from parallel_decoupling.index.torch_index import TorchIndex
from parallel_decoupling.training.loading import load_embedder
from tests.serving.conftest import Start
from tests.support.tiny import noise_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
]


def test_a_query_shows_hits_and_another_scoring_shows_others(
    checkpoint: Path, start: Start, tmp_path: Path
) -> None:
    """Pictures and bars appear, change with the path, and nothing is asked of another host."""
    from playwright.sync_api import sync_playwright

    names = [f"{number}.png" for number in range(20)]
    for number, name in enumerate(names):
        noise_image(32, 32, number).save(tmp_path / name)
    embeddings = load_embedder(checkpoint).encode([{"image": str(tmp_path / name)} for name in names])
    index = TorchIndex(metadata={"model": str(checkpoint), "image_dir": str(tmp_path)})
    index.add(names, embeddings, {"image": names})
    index.save(tmp_path / "index")
    _, address = start("app", tmp_path / "index")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#text textarea").fill("a red circle")
        page.locator("#search").click()
        page.wait_for_selector("#bars .bars")
        page.wait_for_selector("#gallery img")
        before = page.locator("#bars").inner_text()
        assert "path_0" in before
        assert "path_1" in before
        page.get_by_label("path_1", exact=True).check()
        page.wait_for_function("text => document.querySelector('#bars').innerText !== text", arg=before)
        browser.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
