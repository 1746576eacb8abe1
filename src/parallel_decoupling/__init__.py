"""Parallel Decoupling Framework (not the document format): several embeddings of each multimodal input.

The public names are imported on first use: ``import parallel_decoupling`` loads neither torch nor Lightning.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel_decoupling.data.datamodule import MMEBDataModule
    from parallel_decoupling.evaluation.embedder import Embedder
    from parallel_decoupling.training.module import PDFEmbedder

__all__ = ["Embedder", "MMEBDataModule", "PDFEmbedder", "__version__"]

_HOMES = {
    "Embedder": "evaluation.embedder",
    "MMEBDataModule": "data.datamodule",
    "PDFEmbedder": "training.module",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("parallel-decoupling")
    if name in _HOMES:
        return getattr(import_module(f"parallel_decoupling.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
