"""An ``Embedder`` as a folder to share, with a model card; sentence-transformers can load it, too.

Here: what belongs to an embedder beside its weights, and the files that other libraries look for. Elsewhere:
weights, sizes and their checks (``model.pretrained``), the text of the card (``model_card``), the class that
sentence-transformers makes of it (``sentence_transformers``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel_decoupling.evaluation.model_card import model_card
from parallel_decoupling.evaluation.report import ScoreReport

if TYPE_CHECKING:
    from parallel_decoupling.evaluation.embedder import Embedder

CARD_FILE = "README.md"
SENTENCE_MODULE = "parallel_decoupling.sentence_transformers.PathEmbedding"


def save_embedder(
    embedder: Embedder,
    folder: str | Path,
    *,
    paths: Sequence[int] | None = None,
    merge_adapters: bool = False,
    include_backbone: bool = False,
    run: Mapping[str, Any] | None = None,
    report: ScoreReport | None = None,
) -> None:
    """Write everything: what ``model.pretrained.save_encoder`` writes, prompts, model card.

    Args:
        embedder: see ``Embedder.save_pretrained``, as ``paths``, ``merge_adapters`` and ``include_backbone``.
        folder: made if missing.
        paths: which paths.
        merge_adapters: into the base model.
        include_backbone: write the base model.
        run: settings and progress of the training, plain values, for the card; None is the embedder's own.
        report: scores for the card.

    Raises:
        ValueError: see ``save_encoder``.
    """
    from parallel_decoupling.model import pretrained

    options: dict[str, Any] = {"merge_adapters": merge_adapters, "include_backbone": include_backbone}
    config = pretrained.save_encoder(embedder.encoder, folder, paths=paths, **options)
    config |= input_settings(embedder)
    config["run"] = dict(embedder.run if run is None else run)
    write_sentence_transformers_files(embedder, Path(folder))
    (Path(folder) / CARD_FILE).write_text(model_card(config, report), encoding="utf-8")
    pretrained.write_config(folder, config)


def input_settings(embedder: Embedder) -> dict[str, Any]:
    """What ``config.json`` says of an embedder's inputs, as plain values."""
    return {
        "query_instruction": embedder.query_instruction,
        "candidate_instruction": embedder.candidate_instruction,
        "images": embedder.images.settings,
    }


def write_sentence_transformers_files(embedder: Embedder, folder: Path) -> None:
    """Write ``modules.json`` and ``config_sentence_transformers.json``: one module, two prompts."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": SENTENCE_MODULE}]
    config = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": embedder.query_instruction, "document": embedder.candidate_instruction},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    for name, content in (("modules.json", modules), ("config_sentence_transformers.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
