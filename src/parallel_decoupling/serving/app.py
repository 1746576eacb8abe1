"""A page to search an index by text, image or both, and to see what each path finds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio
from PIL import Image

from parallel_decoupling.data.images import ImageError, load_image
from parallel_decoupling.index.gallery import IMAGE_FIELD, bar_html
from parallel_decoupling.index.protocol import Hit
from parallel_decoupling.index.searcher import Searcher

HITS = 12
_STYLE = """
.bars { display: grid; grid-template-columns: repeat(6, 1fr); gap: 14px 12px; }
.bars h4 { margin: 0 0 4px; font-size: 13px; }
.bars div div { display: grid; grid-template-columns: 42px 1fr 30px; gap: 4px; align-items: center;
                font-size: 11px; font-variant-numeric: tabular-nums; }
.bars div.scored { font-weight: bold; }
.bars span { background: #8883; height: 8px; border-radius: 3px; overflow: hidden; }
.bars i { display: block; height: 100%; }
.bars b { text-align: right; font-weight: inherit; }
footer { display: none !important; }
@media (max-width: 900px) { .bars { grid-template-columns: repeat(2, 1fr); } }
"""


def find(
    searcher: Searcher, image_dir: Path, instruction: str, text: str, image: Image.Image | None, scoring: str
) -> Any:
    """Answer one query.

    Args:
        searcher: model and index.
        image_dir: where pictures with relative names are.
        instruction: put before the text; may be empty.
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
    (hits,) = searcher.search([query], HITS, scoring, instruction=instruction.strip())
    pictures = []
    for rank, hit in enumerate(hits, start=1):
        name = hit.fields.get(IMAGE_FIELD)
        caption = f"{rank}. {hit.score:.3f}"
        try:
            picture = load_image(str(image_dir / name)) if name else Image.new("RGB", (64, 64), "#eeeeee")
        except ImageError:
            picture, caption = Image.new("RGB", (64, 64), "#eeeeee"), f"{caption} (picture not readable)"
        pictures.append((picture, caption if name else f"{caption} {hit.id}"))
    return pictures, bars_html(hits, scoring)


def bars_html(hits: Sequence[Hit], scoring: str) -> str:
    """Cosine of query and hit on each path as a bar from 0 to 1, per hit; the path of the scoring is bold."""
    cards = []
    for rank, hit in enumerate(hits, start=1):
        rows = ""
        for number, (name, value) in enumerate(hit.similarities.items()):
            mark = " class=scored" if name == scoring else ""
            rows += f"<div{mark}>{escape(name)}{bar_html(number, value)}<b>{value:.2f}</b></div>"
        cards.append(f"<div><h4>{rank}. {hit.score:.3f}</h4>{rows}</div>")
    return f"<div class='bars'>{''.join(cards)}</div>"


def build_app(searcher: Searcher, image_dir: str | Path, instruction: str = "") -> gradio.Blocks:
    """Make the page.

    Args:
        searcher: model and index.
        image_dir: where pictures with relative names are.
        instruction: that stands in its field at first.
    """
    scorings = list(searcher.scorings)

    def answer(instruction: str, text: str, image: Image.Image | None, scoring: str) -> Any:
        try:
            return find(searcher, Path(image_dir), instruction, text, image, scoring)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    page: gradio.Blocks = gradio.Blocks(title="Search by paths", analytics_enabled=False)
    with page:
        gradio.Markdown(f"## Search {len(searcher.index):,} items by text, image or both")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                prefix = gradio.Textbox(
                    instruction, label="Instruction (before the text)", elem_id="instruction"
                )
                text = gradio.Textbox(label="Text", placeholder="what to look for", elem_id="text")
                image = gradio.Image(
                    label="Image", type="pil", sources=["upload", "clipboard"], height=180, elem_id="image"
                )
                scoring = gradio.Radio(scorings, value=scorings[0], label="Score by", elem_id="scoring")
                button = gradio.Button("Search", variant="primary", elem_id="search")
            with gradio.Column(scale=3):
                gallery = gradio.Gallery(
                    show_label=False, columns=6, height=310, object_fit="contain", elem_id="gallery"
                )
                gradio.Markdown("Cosine of query and hit on each path, in the order of the pictures")
                bars = gradio.HTML(elem_id="bars")
        gradio.on(
            [button.click, prefix.submit, text.submit, scoring.change, image.change],
            answer,
            [prefix, text, image, scoring],
            [gallery, bars],
            api_name=False,
        )
    return page


def run_app(app: gradio.Blocks, host: str, port: int) -> None:
    """Show the page until Ctrl-C; fonts are the system's, so that nothing is fetched."""
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app.launch(server_name=host, server_port=port, share=False, theme=theme, css=_STYLE)
