"""Subcommands without a Trainer: ``cli`` makes options of a function's signature and docstring.

They import what they need when they run, so that help is there at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallel_decoupling.option_types import Port, PositiveInt, checked

if TYPE_CHECKING:
    from rich.table import Table

    from parallel_decoupling.data.collate import Collator
    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.search import Hit, Searcher


@checked()
def search(
    embeddings: str,
    text: str = "",
    image: str | None = None,
    model: str | None = None,
    instruction: str | None = None,
    top_k: PositiveInt = 10,
    scoring: str = "aggregate",
    where: str | None = None,
) -> None:
    """Search embeddings by a text, an image or both.

    Args:
        embeddings: the folder that predict wrote, or what index made of it.
        text: of the query.
        image: file of the query's picture.
        model: checkpoint, run or exported folder; by default the checkpoint that embedded the items, if that
            is beside the folder of embeddings or below it.
        instruction: put before the text; by default the model's own for queries.
        top_k: number of hits.
        scoring: aggregate, path_0 and so on, or with several paths maxsim.
        where: condition on fields in SQL, for an index, such as "colour = 'red' AND size < 3".
    """
    from parallel_decoupling.evaluation.report import console

    if not text and image is None:
        raise ValueError("there is nothing to search for: give --text, --image or both")
    options = {"where": where, "instruction": instruction}
    searcher = open_searcher(embeddings, model)
    (hits,) = searcher.search([{"text": text, "image": image}], top_k, scoring, **options)
    console(columns=160).print(hits_table(hits))


@checked()
def app(
    embeddings: str,
    model: str | None = None,
    image_dir: str | None = None,
    instruction: str | None = None,
    host: str = "127.0.0.1",
    port: Port = 7860,
) -> None:
    """Show a page to search embeddings by text and image until Ctrl-C.

    Args:
        embeddings: the folder that predict wrote, or what index made of it.
        model: checkpoint, run or exported folder; by default the checkpoint that embedded the items, if that
            is beside the folder of embeddings or below it.
        image_dir: folder of pictures with relative names; by default the one that was embedded, likewise.
        instruction: stands in its field at first; by default the model's own for queries.
        host: address to listen on.
        port: port to listen on.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    from parallel_decoupling.app import build_page, show_page

    searcher = open_searcher(embeddings, model)
    pictures = image_dir or searcher.index.metadata.get("image_dir")
    if pictures is None:
        raise ValueError(f"{embeddings} does not say where its pictures are: give --image_dir")
    words = searcher.embedder.query_instruction if instruction is None else instruction
    show_page(build_page(searcher, pictures, words), host, port)


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
        folder: where to write; must be new or empty.
        paths: numbers of the paths to keep, 0 or [0,2]; none keeps all.
        merge_adapters: write a full backbone with the adapters in its weights.
        include_backbone: write the backbone as well; otherwise the folder refers to it by name, unless it is
            a local folder that is not beside this one.
    """
    from parallel_decoupling.evaluation.report import find_scores

    embedder = load_model(model)
    report = find_scores(model, embedder.run)
    embedder.run |= {} if report is None else {"commit": report.run.get("commit")}
    scores = None if report is None else report.content
    chosen = [paths] if isinstance(paths, int) else paths
    embedder.save_pretrained(folder, chosen, merge_adapters, include_backbone=include_backbone, scores=scores)
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    sys.stdout.write(f"{folder}: {len(files)} files, {size:.1f} MB\n")


@checked()
def verify(data_dir: str, sample: PositiveInt | None = 20, model: str = "tiny") -> None:
    """Check a data folder, and exit with 1 if something is wrong.

    Args:
        data_dir: the folder, in MMEB's layout or with a tasks.json; or mini-mmeb.
        sample: training rows, queries and candidates per table that are prepared for an embedding; null
            takes all of them.
        model: must accept the rows; checkpoint, run or exported folder, or a backbone.
    """
    from parallel_decoupling.data.datamodule import MMEBDataModule
    from parallel_decoupling.data.names import printable
    from parallel_decoupling.data.verify import verify as checks_of

    checks = checks_of(MMEBDataModule(data_dir=data_dir).folder, load_collator(model), sample)
    for check in checks:
        lines = [", ".join(f"{count} {what}" for what, count in check.counts.items())]
        lines += [f"note: {note}" for note in check.notes]
        lines += [f"problem: {problem}" for problem in check.problems]
        sys.stdout.writelines(printable(f"{check}: {line}\n") for line in lines if line)
    if any(check.problems for check in checks):
        raise SystemExit(1)


def load_collator(model: str) -> Collator:
    """Return what prepares inputs for a trained model or for a backbone, of which no weights are read."""
    from parallel_decoupling.batch import TokenLimit
    from parallel_decoupling.data.collate import Collator
    from parallel_decoupling.model.backbone import load_backbone
    from parallel_decoupling.model.pretrained import is_pretrained
    from parallel_decoupling.model.run_checkpoint import LAST_CHECKPOINT

    if is_pretrained(model) or Path(model).is_file() or Path(model, LAST_CHECKPOINT).is_file():
        return load_model(model).collator
    backbone = load_backbone(model, meta=True)
    limit = TokenLimit.of(backbone, backbone.processor)
    return Collator.of(backbone, limit=limit)


def load_model(path: str | Path) -> Embedder:
    """Load a checkpoint, run or exported folder onto the first GPU, if there is one."""
    import torch

    from parallel_decoupling.evaluation.embedder import Embedder

    return Embedder.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")


def open_searcher(embeddings: str | Path, model: str | None = None) -> Searcher:
    """Open a folder of embeddings or an index, and a model for it; None is the one that it names."""
    from parallel_decoupling.evaluation.store import Store
    from parallel_decoupling.lance_index import LanceIndex, table_dirs
    from parallel_decoupling.search import ExactIndex, Searcher

    items = LanceIndex(embeddings) if table_dirs(embeddings) else ExactIndex(Store(embeddings))
    named = items.metadata.get("model")
    if model is None and not (named and Path(named).exists()):
        raise ValueError(f"the checkpoint that made {embeddings} is not beside it: give --model")
    return Searcher(load_model(str(model or named)), items)


def hits_table(hits: Sequence[Hit]) -> Table:
    """Show rank, score, id, cosine on each path, and the fields of every hit."""
    from parallel_decoupling.evaluation.report import text_table

    names = [name for hit in hits[:1] for name in (*hit.similarities, *hit.fields)]
    rows = []
    for rank, hit in enumerate(hits, start=1):
        texts = [hit.id, *("" if value is None else str(value) for value in hit.fields.values())]
        item, *fields = (text if len(text) <= 60 else f"{text[:59]}…" for text in texts)
        cosines = [f"{value:.3f}" for value in hit.similarities.values()]
        rows.append([str(rank), f"{hit.score:.3f}", item, *cosines, *fields])
    return text_table("", ["rank", "score", "id", *names], rows)
