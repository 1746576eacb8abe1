"""From a folder to the index in it."""

from __future__ import annotations

from pathlib import Path

from parallel_decoupling.index.lance_index import LanceIndex
from parallel_decoupling.index.protocol import Index
from parallel_decoupling.index.settings import IndexSettings
from parallel_decoupling.index.torch_index import TorchIndex


def load_index(folder: str | Path) -> Index:
    """Open a saved index of any kind.

    Raises:
        ValueError: the folder holds none, or its extra is not installed.
    """
    if IndexSettings.from_folder(folder).kind == "lance":
        return LanceIndex.load(folder)
    return TorchIndex.load(folder)
