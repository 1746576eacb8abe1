"""Embeddings of evaluation tasks on disk, so that a test that was stopped goes on with the tasks not done.

A file belongs to one model and one task's rows: its name has a hash of the trainable tensors, of the frozen
backbone, of processor and tokenizer, of the precision and the settings that shape embeddings, and of the
task's prompts and image files. Another checkpoint, other data or another version never finds it. Elsewhere on
purpose: filling a task (``training.evaluation``), which loaders are then short (``data.datamodule``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder
from parallel_decoupling.model.identity import encoder_identity, rows_hash

SHAPING_SETTINGS = (
    "num_paths",
    "prefix_length",
    "prefix_layers",
    "prefix_type",
    "aggregation",
    "adapter",
    "dtype",
    "attention",
    "quantization",
    "image_size",
    "min_pixels",
    "max_pixels",
)
"""Settings of model and data that change embeddings without being weights or rows."""


@dataclass(frozen=True)
class CachedTask:
    """What a file holds.

    Attributes:
        query: ``[Uq, N, D]`` float32; rows whose images could not be read are NaN.
        candidate: ``[Uc, N, D]``.
        missing: by side, those rows.
    """

    query: Tensor
    candidate: Tensor
    missing: dict[str, list[int]]


class EmbeddingCache:
    """A folder of embeddings for one model.

    Args:
        folder: made when something is written; may be shared by any number of models.
        model_hash: from ``model_hash``.
    """

    def __init__(self, folder: Path, model_hash: str) -> None:
        self.folder, self.model_hash = folder, model_hash

    def file(self, task: EvalTask) -> Path:
        """Where a task's embeddings are, or would be."""
        rows = rows_hash((*task.queries, *task.candidates))
        counts = f"{len(task.queries)}-{len(task.candidates)}"
        return self.folder / f"{task.task.name}-{counts}-{self.model_hash[:16]}{rows[:16]}.safetensors"

    def holds(self, task: EvalTask, *, whole: bool) -> bool:
        """Whether a task's embeddings are there; with ``whole``, those with unreadable rows are not."""
        if not self.file(task).is_file():
            return False
        return not whole or not any(self.load(task).missing.values())

    def load(self, task: EvalTask) -> CachedTask:
        """Read a task's embeddings.

        Raises:
            ValueError: the file is not there or cannot be read; says what to do.
        """
        file = self.file(task)
        try:
            with safe_open(file, framework="pt") as content:
                query, candidate = content.get_tensor("query"), content.get_tensor("candidate")
                missing = json.loads(content.metadata()["missing"])
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{task.task.name}: cannot read the cached embeddings {file}: {error}. Delete the file and "
                "run again; every process must see the same folder."
            ) from error
        return CachedTask(query, candidate, missing)

    def save(self, task: EvalTask, content: CachedTask) -> None:
        """Write a task's embeddings at once: a file that was cut short never has the final name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.file(task)
        unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
        tensors = {"query": content.query.contiguous(), "candidate": content.candidate.contiguous()}
        save_file(tensors, unfinished, {"missing": json.dumps(content.missing)})
        unfinished.replace(file)


def model_hash(
    encoder: ParallelEncoder | DualEncoder,
    fingerprint: Mapping[str, Any],
    settings: Mapping[str, Any],
    precision: str,
) -> str:
    """Identify what turns inputs into embeddings.

    Args:
        encoder: its trainable tensors count with all of their bits, the scale of its adapters, its family and
            its processor.
        fingerprint: of the frozen backbone, ``model.identity.backbone_fingerprint``.
        settings: of model and data; those in ``SHAPING_SETTINGS`` count.
        precision: of the Trainer.

    Returns:
        Hexadecimal SHA-256. Versions of this package, torch and transformers count as well.
    """
    shaping = {name: settings.get(name) for name in SHAPING_SETTINGS}
    identity = encoder_identity(encoder, fingerprint=fingerprint, settings=shaping, precision=precision)
    return str(identity["sha256"])
