"""``lightning index``: from a table of embeddings to an index."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from parallel_decoupling.index.protocol import Index
    from parallel_decoupling.index.tables import EmbeddingTable


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "embeddings", type=str, help="what lightning predict wrote: a Parquet file or their folder"
    )
    parser.add_argument("index_dir", type=str, help="gets the index; one that is there is replaced")
    parser.add_argument(
        "--kind", type=Literal["torch", "lance"], default="torch", help="exact and built in, or LanceDB"
    )
    parser.add_argument(
        "--precision",
        type=Literal["float32", "int8", "binary"],
        default="float32",
        help="of the first comparison; hits are always scored in float32",
    )
    parser.add_argument("--oversample", type=int, default=4, help="candidates per hit that are scored again")
    parser.add_argument(
        "--approximate", type=bool, default=False, help="kind lance: look at the nearest partitions only"
    )


def run(options: Any) -> None:
    """Write the index and say what is in it."""
    from rich.console import Console
    from tqdm import tqdm

    from parallel_decoupling.index.tables import open_embeddings

    if not Path(options.embeddings).exists():
        raise ValueError(f"{options.embeddings} does not exist; name what lightning predict wrote")
    table = open_embeddings(options.embeddings)
    index = _new_index(options, table)
    index.settings.check_folder(options.index_dir)
    with tqdm(total=table.num_rows, unit="item", disable=not sys.stderr.isatty()) as progress:
        for ids, embeddings, fields in table.batches():
            index.add(ids, embeddings, fields)
            progress.update(len(ids))
    index.save(options.index_dir)
    settings = index.settings
    Console(soft_wrap=True).print(
        f"{options.index_dir}: {len(index)} items, {settings.num_paths} x {settings.dim} "
        f"({', '.join(settings.path_names)}), kind {settings.kind}, precision {settings.precision}",
        markup=False,
        highlight=False,
    )


def _new_index(options: Any, table: EmbeddingTable) -> Index:
    common: dict[str, Any] = {
        "precision": options.precision,
        "oversample": options.oversample,
        "path_names": table.path_names,
        "path_weights": table.path_weights,
        "metadata": table.metadata,
        "concatenated": table.concatenated,
    }
    if options.kind == "lance":
        from parallel_decoupling.index.lance_index import LanceIndex

        return LanceIndex(options.index_dir, options.approximate, **common)
    if options.approximate:
        raise ValueError("--approximate needs --kind lance; the kind torch compares with every item")
    from parallel_decoupling.index.torch_index import TorchIndex

    return TorchIndex(**common)
