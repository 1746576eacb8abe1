"""From a file or folder that a user names to an ``Embedder``."""

from __future__ import annotations

from pathlib import Path

from parallel_decoupling.retrieval.embedder import Embedder
from parallel_decoupling.training.embedder import PDFEmbedder


def load_embedder(model_path: str | Path) -> Embedder:
    """Load a trained model for encoding, on the CPU.

    Args:
        model_path: a Lightning checkpoint (``runs/demo/checkpoints/last.ckpt``).

    Returns:
        In evaluation mode.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(model_path)
    if not path.is_file():
        raise ValueError(f"no checkpoint {str(path)!r}; name a file such as runs/demo/checkpoints/last.ckpt")
    module = PDFEmbedder.load_from_checkpoint(path, map_location="cpu")
    module.eval()
    return module.embedder
