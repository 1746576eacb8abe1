"""A page to search embeddings by text, image or both, and to see what each path finds."""

from pathlib import Path
from typing import Any

import gradio
from PIL import Image

from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.names import file_of_id
from parallel_decoupling.data.row_sources import IMAGE
from parallel_decoupling.data.unusable import RowError
from parallel_decoupling.search import Searcher

HITS = 12


def find(
    searcher: Searcher, image_dir: Path, instruction: str, text: str, image: Image.Image | None, scoring: str
) -> tuple[list[tuple[Image.Image, str]], list[list[str]]]:
    """Return pictures with captions, and rows of rank, id, score and cosines; none without a query."""
    query = {"text": text.strip() or None, "image": image}
    if query == {"text": None, "image": None}:
        return [], []
    (hits,) = searcher.search([query], HITS, scoring, instruction=instruction.strip())
    pictures, rows = [], []
    for rank, hit in enumerate(hits, start=1):
        name, caption = hit.fields.get(IMAGE), f"{rank}. {hit.score:.3f}"
        picture = Image.new("RGB", (64, 64), "#eeeeee")
        if name:
            try:
                picture = load_image(str(image_dir / file_of_id(name)))
            except RowError:
                caption = f"{caption} (picture cannot be read; see --image_dir)"
        pictures.append((picture, caption if name else f"{caption} {hit.id}"))
        values = (hit.score, *hit.similarities.values())
        rows.append([str(rank), hit.id, *(f"{value:.3f}" for value in values)])
    return pictures, rows


def build_page(searcher: Searcher, image_dir: str | Path, instruction: str = "") -> gradio.Blocks:
    """Make the page; pictures with relative names are in ``image_dir``."""
    scorings = list(searcher.scorings)
    shared = [name for name in searcher.index.columns if name in searcher.scorings and name != "aggregate"]

    def answer(instruction: str, text: str, image: Image.Image | None, scoring: str) -> Any:
        try:
            return find(searcher, Path(image_dir), instruction, text, image, scoring)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    headings = ["rank", "id", "score", *shared]
    return gradio.Interface(
        answer,
        [
            gradio.Textbox(instruction, label="Instruction (before the text)"),
            gradio.Textbox(label="Text", placeholder="what to look for"),
            gradio.Image(label="Image", type="pil", sources=["upload", "clipboard"], height=180),
            gradio.Radio(scorings, value=scorings[0], label="Score by"),
        ],
        [
            gradio.Gallery(show_label=False, columns=6, height=310, object_fit="contain"),
            gradio.Dataframe(headers=headings, label="Cosine of query and hit on each path"),
        ],
        title=f"Search {len(searcher.index):,} items by text, image or both",
        submit_btn="Search",
        flagging_mode="never",
        analytics_enabled=False,
    )


def show_page(page: gradio.Blocks, host: str, port: int) -> None:
    """Show the page until Ctrl-C; fonts are the system's, so that nothing is fetched."""
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(server_name=host, server_port=port, share=False, theme=theme)
