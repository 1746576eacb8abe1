"""An ``Embedder`` as a ``SentenceTransformer`` (its evaluators, prompts, quantization), and for ``mteb``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.identity import encoder_identity

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality_types import Modality
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError("pip install 'parallel-decoupling[sentence-transformers]' (version 6)") from error
if TYPE_CHECKING:
    from mteb.models import SentenceTransformerEncoderWrapper

Output = int | str
"""A path's number, or ``"aggregate"``."""


class PathEmbedding(InputModule):
    """The aggregate or one path of an embedder, as the only module of a ``SentenceTransformer``.

    ``SentenceTransformer.encode(..., paths=0)`` chooses another path, or ``"aggregate"``, for one call.
    Embeddings equal ``embedder.encode(inputs, instruction=prompt, paths=paths)``.
    """

    forward_kwargs = {"paths"}
    modalities: list[Modality] = ["text", "image", ("image", "text"), "message"]
    """With ``message``, one batch may hold texts and images; chat messages themselves are refused."""

    def __init__(self, embedder: Embedder, paths: Output = "aggregate") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedder, self.encoder = embedder, embedder.encoder
        self.paths = self._checked(paths)
        self.collator, self.tokenizer = embedder.collator, embedder.encoder.processor.tokenizer

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Tokenise what ``Embedder.encode`` takes, with ``prompt`` and a space before every text."""
        rows = to_raw_inputs(list(inputs), (prompt or "").strip() or None)
        return {"encoder_inputs": self.collator.encode_inputs(rows)}

    def forward(
        self, features: dict[str, Any], paths: Output | None = None, **options: Any
    ) -> dict[str, Any]:
        """Add ``sentence_embedding`` ``[B, D]``, fp32, unit norm, to ``features``."""
        chosen = self.paths if paths is None else self._checked(paths)
        inputs = features["encoder_inputs"].to(self.embedder.device)
        if isinstance(chosen, int):
            embedding_BD: Tensor = self.encoder(inputs, [chosen])[:, 0]
        else:
            embedding_BD = self.encoder.aggregate(self.encoder(inputs))
        return {**features, "sentence_embedding": embedding_BD}

    def get_embedding_dimension(self) -> int:
        """Return D of one path, or of the aggregate."""
        return self.encoder.embed_dim if isinstance(self.paths, int) else self.encoder.aggregate_dim

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Write the embedder's own files, of a chosen path that path alone; the library writes the others."""
        self.embedder.save_pretrained(output_path, [self.paths] if isinstance(self.paths, int) else None)

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", **options: Any
    ) -> PathEmbedding:
        """Load an exported folder, local or from the hub; of one path it gives that path."""
        names = ("token", "cache_folder", "revision", "local_files_only")
        of_hub = {name: options[name] for name in names if name in options}
        folder = cls.load_dir_path(model_name_or_path, subfolder, **of_hub)
        if folder is None:
            raise ValueError(f"no folder {model_name_or_path!r}")
        embedder = Embedder.from_pretrained(folder)
        return cls(embedder, 0 if embedder.num_paths == 1 else "aggregate")

    def _checked(self, paths: Output) -> Output:
        if paths == "aggregate" or paths in range(self.encoder.num_paths):
            return paths
        last = self.encoder.num_paths - 1
        raise ValueError(f"paths is {paths!r}; use 'aggregate' or a path number, 0 to {last}")


def as_sentence_transformer(
    model: Embedder | str | Path,
    paths: Output = "aggregate",
    *,
    prompts: Mapping[str, str] | None = None,
    truncate_dim: int | None = None,
    device: str | torch.device = "cpu",
) -> SentenceTransformer:
    """Make a ``SentenceTransformer`` of an embedder, a checkpoint, a run or an exported folder.

    Args:
        model: an embedder, which is shared and not copied, or what ``Embedder.from_pretrained`` takes.
        paths: what ``encode`` gives: a path's number, or ``aggregate``.
        prompts: by name; None is ``query`` and ``document``, the embedder's own instructions.
        truncate_dim: numbers to keep of every embedding.
        device: where it runs.
    """
    embedder = model if isinstance(model, Embedder) else Embedder.from_pretrained(model)
    own = {"query": embedder.query_instruction, "document": embedder.candidate_instruction}
    return SentenceTransformer(
        modules=[PathEmbedding(embedder, paths)],
        prompts=dict(own if prompts is None else prompts),
        similarity_fn_name="cosine",
        truncate_dim=truncate_dim,
        device=str(device),
        local_files_only=True,
    )


def mteb_model(
    model: Embedder | str | Path, paths: Output = "aggregate", *, prompts: Mapping[str, str] | None = None
) -> SentenceTransformerEncoderWrapper:
    """Make a model that ``mteb.evaluate`` takes; of a plain ``SentenceTransformer`` it assumes texts only.

    ``prompts`` are by ``query``, ``document`` or the name of a task or of its type; None is the model's own.
    """
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapped = SentenceTransformerEncoderWrapper(as_sentence_transformer(model, paths, prompts=prompts))
    embedding: Any = wrapped.model[0]
    embedder = embedding.embedder
    about = {"paths": paths, "prompts": wrapped.model.prompts, "images": embedder.images.settings}
    known: dict[str, Any] = {"name": f"parallel-decoupling/{paths}", "modalities": ["image", "text"]}
    known["revision"] = encoder_identity(embedder.encoder, **about)["sha256"]  # mteb keeps scores by it
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=known)
    return wrapped
