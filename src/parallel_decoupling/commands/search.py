"""``lightning search``: a text, an image or both against an index; a table and an HTML gallery."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser
    from rich.table import Table

    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.index.protocol import Hit, Index

_LONGEST_CELL = 60


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("index_dir", type=str, help="what lightning index wrote")
    parser.add_argument("--text", type=str, help="of the query")
    parser.add_argument("--image", type=str, help="image file of the query")
    parser.add_argument("--model", type=str, help="checkpoint or folder; default: the one named in the index")
    parser.add_argument("--instruction", type=str, help="before the text; default: the model's for queries")
    parser.add_argument("--top_k", type=int, default=10, help="hits")
    parser.add_argument(
        "--scoring", type=str, default="aggregate", help="aggregate, sum, maxsim or path_0, ..."
    )
    parser.add_argument(
        "--where",
        type=dict,
        help="conditions on fields, all must hold: '{color: red, size: [1, 2], year: {min: 1990}}'",
    )
    parser.add_argument("--gallery", type=str, help="HTML file for the hits with their pictures")
    parser.add_argument("--image_dir", type=str, help="where pictures with relative names are")


def run(options: Any) -> None:
    """Print the table and write the gallery."""
    if options.text is None and options.image is None:
        raise ValueError("nothing to search for: give --text, --image or both")
    from rich.console import Console

    from parallel_decoupling.index.gallery import gallery_html
    from parallel_decoupling.index.searcher import Searcher

    embedder, index, image_dir = open_index(options)
    query = {"text": options.text, "image": options.image}
    (hits,) = Searcher(embedder, index).search(
        [{key: value for key, value in query.items() if value is not None}],
        options.top_k,
        options.scoring,
        options.where,
        options.instruction,
    )
    Console(width=None if sys.stdout.isatty() else 160).print(hits_table(hits))
    if options.gallery is not None:
        html = gallery_html(hits, **query, scoring=options.scoring, image_dir=image_dir)
        Path(options.gallery).write_text(html, encoding="utf-8")


def open_index(options: Any) -> tuple[Embedder, Index, str]:
    """Load an index and a model for it; with them the folder of its pictures.

    Args:
        options: ``index_dir``, and what wins over the index's own: ``model``, ``image_dir``.

    Raises:
        ValueError: no index or no model.
    """
    import torch

    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.index.loading import load_index

    index = load_index(options.index_dir)
    metadata = index.settings.metadata
    model = options.model or metadata.get("model")
    if model is None:
        raise ValueError(f"{options.index_dir} does not say which model made it: give --model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image_dir = options.image_dir or metadata.get("image_dir", ".")
    return Embedder.from_pretrained(model).to(device), index, image_dir


def hits_table(hits: Sequence[Hit]) -> Table:
    """Rank, score, id, cosine on each path, and the fields of every hit."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("rank", "score", "id")
    paths = list(hits[0].similarities) if hits else []
    names = list(hits[0].fields) if hits else []
    for path in paths:
        table.add_column(path, justify="right")
    for name in names:
        table.add_column(escape(name), overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        cosines = [f"{hit.similarities[path]:.3f}" for path in paths]
        fields = [escape(_short(hit.fields[name])) for name in names]
        table.add_row(str(rank), f"{hit.score:.3f}", escape(hit.id), *cosines, *fields)
    return table


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 1]}…"
