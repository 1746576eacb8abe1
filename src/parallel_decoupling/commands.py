"""The subcommands without a Trainer, one function each: ``cli`` makes options of signature and docstring.

They import what they need when they run, so that help is there at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.search import Hit, Searcher

__all__ = ["app", "compare", "export", "index", "paths", "search", "serve", "verify"]

LONGEST_CELL = 60


def index(
    embeddings: str,
    index_dir: str,
    index_type: Literal["IVF_FLAT", "IVF_SQ", "IVF_PQ", "IVF_RQ"] | None = None,
) -> None:
    """Make a LanceDB index of embeddings.

    Args:
        embeddings: the folder that predict wrote; exact search needs nothing else.
        index_dir: gets the index; one that is there is replaced.
        index_type: approximate search, by LanceDB's names; none compares with every item.
    """
    from parallel_decoupling.evaluation.store import Store
    from parallel_decoupling.lance_index import write_lance_index

    store = Store(embeddings)
    write_lance_index(store, index_dir, index_type)
    _say(f"{index_dir}: {len(store)} items with {', '.join(store.columns)}")


def search(
    embeddings: str,
    text: str | None = None,
    image: str | None = None,
    model: str | None = None,
    instruction: str | None = None,
    top_k: int = 10,
    scoring: str = "aggregate",
    where: str | None = None,
) -> None:
    """Search embeddings by a text, an image or both.

    Args:
        embeddings: the folder that predict wrote, or what index made of it.
        text: of the query.
        image: file of the query's picture.
        model: checkpoint, run or exported folder; by default the checkpoint that embedded the items.
        instruction: put before the text; by default the model's own for queries.
        top_k: number of hits.
        scoring: aggregate, path_0 and so on, or with several paths mean, concat or maxsim.
        where: condition on fields in SQL, for an index, such as "colour = 'red' AND size < 3".
    """
    query = {key: value for key, value in (("text", text), ("image", image)) if value is not None}
    if not query:
        raise ValueError("there is nothing to search for: give --text, --image or both")
    searcher = open_searcher(embeddings, model)
    (hits,) = searcher.search([query], top_k, scoring, where=where, instruction=instruction)
    _console().print(hits_table(hits))


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    path: int | Literal["aggregate"] = 0,
    body_bytes: int = 20_000_000,
    inputs: int = 256,
    characters: int = 32_000,
    pixels: int = 16_000_000,
    waiting: int = 256,
    batch_size: int = 32,
) -> None:
    """Serve embeddings over HTTP in OpenAI's form until SIGTERM or Ctrl-C.

    Args:
        model: checkpoint, run or exported folder.
        host: address to listen on.
        port: port to listen on.
        path: what the model name "default" stands for.
        body_bytes: most bytes in a request.
        inputs: most inputs in a request.
        characters: most characters in an input's text and instruction together.
        pixels: most pixels in an image.
        waiting: most requests that are being answered or wait; further ones get status 429.
        batch_size: inputs per forward pass, and requests that are embedded together.
    """
    try:
        from parallel_decoupling.serve import Limits, run_server
    except ModuleNotFoundError as error:
        raise _missing(error, "serve", "fastapi", "uvicorn") from error

    limits = Limits(body_bytes, inputs, characters, pixels, waiting, batch_size)
    run_server(lambda: load_model(model), path, limits, host, port)


def app(
    embeddings: str,
    model: str | None = None,
    image_dir: str | None = None,
    instruction: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Show a page to search embeddings by text and image until Ctrl-C.

    Args:
        embeddings: the folder that predict wrote, or what index made of it.
        model: checkpoint, run or exported folder; by default the checkpoint that embedded the items.
        image_dir: folder of pictures with relative names; by default the one that was embedded.
        instruction: stands in its field at first; by default the model's own for queries.
        host: address to listen on.
        port: port to listen on.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    try:
        from parallel_decoupling.app import build_page, show_page
    except ModuleNotFoundError as error:
        raise _missing(error, "app", "gradio") from error

    searcher = open_searcher(embeddings, model)
    pictures = image_dir or searcher.index.metadata.get("image_dir") or "."
    words = searcher.embedder.query_instruction if instruction is None else instruction
    show_page(build_page(searcher, pictures, words), host, port)


def compare(*run_dirs: str, output_dir: str | None = None) -> None:
    """Compare one or several tested runs side by side.

    Args:
        run_dirs: runs with a scores.json, or such files; the first is the baseline.
        output_dir: gets comparison.json, .png and .html; none prints the tables only.
    """
    from parallel_decoupling.evaluation.compare import compare_runs

    compare_runs(list(run_dirs), output_dir)


def export(
    model: str,
    folder: str,
    paths: list[int] | int | None = None,
    merge_adapters: bool = False,
    include_backbone: bool = False,
) -> None:
    """Write a model as a folder to share.

    Args:
        model: checkpoint, run or exported folder.
        folder: where to write; must not hold a model yet.
        paths: numbers of the paths to keep, 0 or [0,2]; none keeps all.
        merge_adapters: write a full backbone with the adapters in its weights.
        include_backbone: write the backbone as well; otherwise the folder refers to it by name.
    """
    from parallel_decoupling.model.pretrained import checkpoint_file, is_pretrained, scores_of

    embedder = load_model(model)
    scores = None if is_pretrained(model) else scores_of(checkpoint_file(model))
    if scores is not None:
        embedder.run = {**embedder.run, "commit": scores["run"].get("commit")}
    chosen = [paths] if isinstance(paths, int) else paths
    flags = {"merge_adapters": merge_adapters, "include_backbone": include_backbone}
    embedder.save_pretrained(folder, chosen, scores=scores, **flags)
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    _say(f"{folder}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")


def paths(run: str, output_dir: str | None = None, data_dir: str | None = None) -> None:
    """Show how the paths of a trained model differ.

    Args:
        run: a run folder, or a checkpoint file.
        output_dir: gets paths.json and pictures; by default the folder paths of the run.
        data_dir: pictures to look at; by default the data that the model was trained on.
    """
    from parallel_decoupling.diagnostics.path_analysis import analyse_paths

    analyse_paths(run, output_dir, data_dir)


def verify(data_dir: str, sample: int = 20, output_file: str | None = None) -> None:
    """Check a data folder; exit code 1 when something is wrong.

    Args:
        data_dir: what --data.data_dir takes.
        sample: images to decode per subset and task.
        output_file: gets everything as JSON.
    """
    from parallel_decoupling.data.verify import print_verification

    print_verification(data_dir, sample, output_file)


def load_model(path: str | Path) -> Embedder:
    """Load a checkpoint, run or exported folder onto the first GPU, if there is one."""
    import torch

    from parallel_decoupling.evaluation.embedder import Embedder

    return Embedder.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")


def open_searcher(embeddings: str | Path, model: str | None = None) -> Searcher:
    """Open a folder of embeddings or an index, and a model for it; None is the one that it names.

    Raises:
        ValueError: there are no embeddings, no model is known, or the two do not belong together.
    """
    from parallel_decoupling.evaluation.store import Store
    from parallel_decoupling.lance_index import TABLE, LanceIndex
    from parallel_decoupling.search import ExactIndex, Searcher

    is_lance = Path(embeddings, f"{TABLE}.lance").is_dir()
    items = LanceIndex(embeddings) if is_lance else ExactIndex(Store(embeddings))
    name = model or items.metadata.get("model")
    if name is None:
        raise ValueError(f"{embeddings} does not say which checkpoint it was made with: give --model")
    return Searcher(load_model(name), items)


def hits_table(hits: Sequence[Hit]) -> Table:
    """Show rank, score, id, cosine on each path, and the fields of every hit."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("rank", "score", "id")
    for name in hits[0].similarities if hits else ():
        table.add_column(name, justify="right")
    for name in hits[0].fields if hits else ():
        table.add_column(escape(name), overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        cosines = [f"{value:.3f}" for value in hit.similarities.values()]
        fields = [escape(_short(value)) for value in hit.fields.values()]
        table.add_row(str(rank), f"{hit.score:.3f}", escape(hit.id), *cosines, *fields)
    return table


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _say(message: str) -> None:
    _console().print(message, markup=False, highlight=False, soft_wrap=True)


def _missing(error: ModuleNotFoundError, extra: str, *packages: str) -> Exception:
    """Return what a user is told if a package of an extra is missing; any other error as it is."""
    if error.name not in packages:
        return error
    return ValueError(f"this needs {error.name}: pip install 'parallel-decoupling[{extra}]'")
