"""``lightning app``: a page to search an index."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("index_dir", type=str, help="what lightning index wrote")
    parser.add_argument("--model", type=str, help="by default the one that the index names")
    parser.add_argument("--image_dir", type=str, help="of pictures with relative names; default: the index's")
    parser.add_argument(
        "--instruction", type=str, help="in its field at first; by default the model's own for queries"
    )
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="of the page")


def run(options: Any) -> None:
    """Show the page until Ctrl-C."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    try:
        from parallel_decoupling.serving.app import build_app, run_app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs Gradio: pip install 'parallel-decoupling[app]'") from error
    from parallel_decoupling.commands.search import open_index
    from parallel_decoupling.index.searcher import Searcher

    embedder, index, image_dir = open_index(options)
    instruction = embedder.query_instruction if options.instruction is None else options.instruction
    run_app(build_app(Searcher(embedder, index), image_dir, instruction), options.host, options.port)
