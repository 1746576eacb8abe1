"""A page to search an index by text, image or both, and to see what each path finds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio
from PIL import Image

from parallel_decoupling.data.images import ImageError, load_image
from parallel_decoupling.index.gallery import IMAGE_FIELD
from parallel_decoupling.index.protocol import Hit
from parallel_decoupling.index.searcher import Searcher

HITS = 12
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLE = """
.bars { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }
.bars h4 { margin: 0 0 4px; font-size: 14px; }
.bars div div { display: grid; grid-template-columns: 70px 1fr 44px; gap: 6px; align-items: center;
                font-size: 12px; font-variant-numeric: tabular-nums; }
.bars span { background: #8883; height: 9px; border-radius: 3px; overflow: hidden; }
.bars i { display: block; height: 100%; }
.bars b { text-align: right; font-weight: normal; }
"""


def find(searcher: Searcher, image_dir: Path, text: str, image: Image.Image | None, scoring: str) -> Any:
    """Answer one query.

    Args:
        searcher: model and index.
        image_dir: where pictures with relative names are.
        text: may be empty.
        image: may be None.
        scoring: see ``Index.search``.

    Returns:
        Pictures with captions, and the bars as HTML; nothing without a query.
    """
    query: dict[str, Any] = {"text": text.strip() or None, "image": image}
    query = {key: value for key, value in query.items() if value is not None}
    if not query:
        return [], ""
    (hits,) = searcher.search([query], HITS, scoring)
    pictures = []
    for rank, hit in enumerate(hits, start=1):
        name = hit.fields.get(IMAGE_FIELD)
        caption = f"{rank}. {hit.score:.3f}"
        try:
            picture = load_image(str(image_dir / name)) if name else Image.new("RGB", (64, 64), "#eeeeee")
        except ImageError:
            picture, caption = Image.new("RGB", (64, 64), "#eeeeee"), f"{caption} (picture not readable)"
        pictures.append((picture, caption if name else f"{caption} {hit.id}"))
    return pictures, bars_html(hits)


def bars_html(hits: Sequence[Hit]) -> str:
    """Cosine of query and hit on each path as a bar from 0 to 1, per hit."""
    cards = []
    for rank, hit in enumerate(hits, start=1):
        rows = "".join(
            f"<div>{escape(name)}<span><i style='width:{max(0.0, min(1.0, value)):.1%};"
            f"background:{_COLOURS[number % len(_COLOURS)]}'></i></span><b>{value:.3f}</b></div>"
            for number, (name, value) in enumerate(hit.similarities.items())
        )
        cards.append(f"<div><h4>{rank}. {hit.score:.3f}</h4>{rows}</div>")
    return f"<div class='bars'>{''.join(cards)}</div>"


def build_app(searcher: Searcher, image_dir: str | Path) -> gradio.Blocks:
    """Make the page.

    Args:
        searcher: model and index.
        image_dir: where pictures with relative names are.
    """
    scorings = list(searcher.index.settings.scorings)

    def answer(text: str, image: Image.Image | None, scoring: str) -> Any:
        try:
            return find(searcher, Path(image_dir), text, image, scoring)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    page: gradio.Blocks = gradio.Blocks(title="Search by paths", analytics_enabled=False)
    with page:
        gradio.Markdown(f"## Search {len(searcher.index):,} items by text, image or both")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                text = gradio.Textbox(label="Text", placeholder="a red circle", elem_id="text")
                image = gradio.Image(label="Image", type="pil", sources=["upload", "clipboard"], height=180)
                scoring = gradio.Radio(scorings, value=scorings[0], label="Score by", elem_id="scoring")
                button = gradio.Button("Search", variant="primary", elem_id="search")
            with gradio.Column(scale=3):
                gallery = gradio.Gallery(
                    show_label=False, columns=6, height=310, object_fit="contain", elem_id="gallery"
                )
                gradio.Markdown("Cosine of query and hit on each path")
                bars = gradio.HTML(elem_id="bars")
        gradio.on(
            [button.click, text.submit, scoring.change, image.change],
            answer,
            [text, image, scoring],
            [gallery, bars],
            api_name=False,
        )
    return page


def run_app(app: gradio.Blocks, host: str, port: int) -> None:
    """Show the page until Ctrl-C; fonts are the system's, so that nothing is fetched."""
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app.launch(server_name=host, server_port=port, share=False, theme=theme, css=_STYLE)
