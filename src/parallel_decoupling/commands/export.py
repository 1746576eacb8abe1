"""``lightning export``: from a checkpoint to a folder to share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", type=str, help="a checkpoint, the folder of a run, or an exported folder")
    parser.add_argument("folder", type=str, help="where to write; must not hold a model yet")
    parser.add_argument(
        "--paths", type=list[int] | int | None, help="numbers of the paths to keep, 0 or [0,2]; none: all"
    )
    parser.add_argument(
        "--merge_adapters", action="store_true", help="write a full backbone with the adapters in it"
    )
    parser.add_argument(
        "--include_backbone",
        action="store_true",
        help="write the backbone, too; otherwise it is referred to by its name",
    )


def run(options: Any) -> None:
    """Load the model, write the folder and say how large it is."""
    from rich.console import Console

    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.model.pretrained import checkpoint_file, is_pretrained, scores_of

    embedder = Embedder.from_pretrained(options.model)
    scores = None if is_pretrained(options.model) else scores_of(checkpoint_file(options.model))
    if scores is not None:
        embedder.run = {**embedder.run, "commit": scores["run"].get("commit")}
    paths = [options.paths] if isinstance(options.paths, int) else options.paths
    flags = {"merge_adapters": options.merge_adapters, "include_backbone": options.include_backbone}
    embedder.save_pretrained(options.folder, paths, scores=scores, **flags)
    files = [file for file in Path(options.folder).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    message = f"{options.folder}: {len(files)} files, {size / 1e6:.1f} MB"
    Console().print(message, markup=False, highlight=False, soft_wrap=True)
