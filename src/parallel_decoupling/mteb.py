"""An ``Embedder`` as a model for ``mteb.evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.sentence_transformers import Output, as_sentence_transformer

try:
    from mteb.models import SentenceTransformerEncoderWrapper
except ImportError as error:
    raise ImportError("pip install 'parallel-decoupling[mteb]' (version 2)") from error


def mteb_model(
    model: Embedder | str | Path, paths: Output = "aggregate", *, prompts: Mapping[str, str] | None = None
) -> SentenceTransformerEncoderWrapper:
    """Make a model that ``mteb.evaluate`` takes; of a plain ``SentenceTransformer`` it assumes texts only.

    Args:
        model: an embedder, or what ``Embedder.from_pretrained`` takes.
        paths: a path's number, or ``aggregate``.
        prompts: by ``query``, ``document`` or the name of a task or of its type; None is the model's own.
    """
    wrapped = SentenceTransformerEncoderWrapper(as_sentence_transformer(model, paths, prompts=prompts))
    known = {"name": f"parallel-decoupling/{paths}", "revision": "local", "modalities": ["image", "text"]}
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=known)
    return wrapped
