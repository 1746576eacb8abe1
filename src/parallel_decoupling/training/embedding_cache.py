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
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from parallel_decoupling.data.tasks import EvalTask
from parallel_decoupling.model.checkpoint import trainable_state
from parallel_decoupling.model.dual_backbone import DualProcessor
from parallel_decoupling.model.dual_encoder import DualEncoder
from parallel_decoupling.model.encoder import ParallelEncoder

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
PACKAGES = ("parallel-decoupling", "torch", "transformers", "open_clip_torch")


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
        key = sha256(f"{self.model_hash} {task_hash(task)}".encode()).hexdigest()[:32]
        return self.folder / f"{task.task.name}-{key}.safetensors"

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
        fingerprint: of the frozen backbone, ``model.checkpoint.backbone_fingerprint``.
        settings: of model and data; those in ``SHAPING_SETTINGS`` count.
        precision: of the Trainer.

    Returns:
        Hexadecimal SHA-256. Versions of this package, torch and transformers count as well.
    """
    about = {
        "settings": {name: settings.get(name) for name in SHAPING_SETTINGS},
        "precision": precision,
        "fingerprint": fingerprint["sha256"],
        "family": None if isinstance(encoder, DualEncoder) else asdict(encoder.backbone.family),
        "adapters": _adapter_scales(encoder),
        "processor": processor_hash(encoder.processor),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    digest = sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(trainable_state(encoder).items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().flatten().view(uint8).numpy().tobytes())
    return digest.hexdigest()


def processor_hash(processor: Any) -> str:
    """Identify a processor and its tokenizer by the files they save, vocabulary included.

    Padding and truncation of the last call, which a tokenizer saves too, do not count. An OpenCLIP
    processor saves nothing: its configuration is in the backbone's fingerprint, its vocabulary counts here.
    """
    digest = sha256()
    if isinstance(processor, DualProcessor):
        tokenizer: Any = getattr(processor.tokenizer, "tokenizer", processor.tokenizer)
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer.encoder
        about = [type(tokenizer).__name__, processor.context_length, sorted(vocabulary.items())]
        return sha256(json.dumps(about).encode()).hexdigest()
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                if file.name == "tokenizer.json":
                    kept = {**json.loads(content), "padding": None, "truncation": None}
                    content = json.dumps(kept, sort_keys=True).encode()
                digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _adapter_scales(encoder: ParallelEncoder | DualEncoder) -> dict[str, Any]:
    """What each LoRA layer multiplies its update with, which no tensor tells."""
    scales = {name: getattr(module, "scaling", None) for name, module in encoder.named_modules()}
    return {name: scale for name, scale in scales.items() if isinstance(scale, dict)}


def task_hash(task: EvalTask) -> str:
    """Identify the inputs to encode: prompts, and image files by path, size and time of change.

    Returns:
        Hexadecimal SHA-256. Which candidates a row has does not count: that needs no new embeddings.
    """
    digest = sha256()
    for side in (task.queries, task.candidates):
        digest.update(f"{len(side)} inputs".encode())
        for row in side:
            digest.update(json.dumps([row.text, [_image(image) for image in row.images]]).encode())
    return digest.hexdigest()


def _image(image: Any) -> list[Any]:
    if not isinstance(image, str):
        return [image.mode, *image.size, sha256(image.tobytes()).hexdigest()]
    try:
        status = os.stat(image)
    except OSError:
        return [os.path.abspath(image), "missing"]
    return [os.path.abspath(image), status.st_size, status.st_mtime_ns]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
