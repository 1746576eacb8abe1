from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from parallel_decoupling.index.gallery import gallery_html
from parallel_decoupling.index.protocol import Hit
from tests.support.tiny import noise_image


@pytest.fixture
def hits(tmp_path: Path) -> list[Hit]:
    noise_image(600, 300).save(tmp_path / "wide.png")
    return [
        Hit("a", 0.9, {"path_0": 0.25, "path_1": 0.95}, {"image": "wide.png", "text": "<b>bold</b> & more"}),
        Hit("b", 0.8, {"path_0": 0.75, "path_1": -0.5}, {"image": "missing.png", "text": None}),
        Hit("c", 0.7, {"path_0": 0.1, "path_1": 0.2}, {"image": None, "text": "no picture"}),
    ]


def test_page_has_thumbnails_scores_and_bars(hits: list[Hit], tmp_path: Path) -> None:
    page = gallery_html(hits, text="a <i> query", scoring="maxsim", image_dir=tmp_path)
    (code,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(code))).size == (240, 120)
    assert re.findall(r"<span>(0\.\d{3})</span></h2>", page) == ["0.900", "0.800", "0.700"]
    assert re.findall(r"width:([\d.]+)%;", page) == ["25.0", "95.0", "75.0", "0.0", "10.0", "20.0"]
    assert re.findall(r"<b>(-?[\d.]+)</b>", page) == ["0.950", "0.750"], "the best of each path"
    assert "a &lt;i&gt; query" in page
    assert "<b>bold" not in page
    assert "Cannot read image" in page
    assert "3 hits by maxsim" in page


def test_page_refers_to_no_other_file(hits: list[Hit], tmp_path: Path) -> None:
    page = gallery_html(hits, image=noise_image(40, 40), image_dir=tmp_path)
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page)
    assert page.count("data:image/jpeg") == 2, "the query's picture and one hit's"


def test_page_without_hits() -> None:
    assert "0 hits by aggregate" in gallery_html([], text="nothing")
