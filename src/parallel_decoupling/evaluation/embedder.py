"""An encoder with its tokenisation and its default instructions: all that a user of embeddings needs.

Here: the public ``encode`` methods, without Lightning. Elsewhere on purpose: the loop behind them
(``evaluation.encode``), training (``training.module``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.evaluation import encode as encoding

if TYPE_CHECKING:
    from parallel_decoupling.model.dual_encoder import DualEncoder
    from parallel_decoupling.model.encoder import ParallelEncoder


class Embedder:
    """Embeds texts, images and both with one path, several, all, or their aggregate.

    Args:
        encoder: the model.
        query_instruction: default instruction of ``encode_query``.
        candidate_instruction: default instruction of ``encode_candidate``.
        images: what happens to a picture before the processor sees it: nothing by default, and as in
            training for a model that was trained.

    Attributes:
        run: what trained the weights, as plain values; empty if not known.
    """

    def __init__(
        self,
        encoder: ParallelEncoder | DualEncoder,
        query_instruction: str = "",
        candidate_instruction: str = "",
        images: ImagePolicy | None = None,
    ) -> None:
        self.encoder = encoder
        self.images = images or ImagePolicy()
        self.query_instruction, self.candidate_instruction = query_instruction, candidate_instruction
        self.run: dict[str, Any] = {}

    def to(self, device: torch.device | str) -> Embedder:
        """Move the weights, and with them what ``encode`` computes; embeddings come back on the CPU."""
        self.encoder.to(device)
        return self

    def encode(
        self,
        inputs: Iterable[str | Path | Mapping[str, Any] | Any],
        *,
        instruction: str | None = None,
        paths: encoding.Paths = "all",
        truncate_dim: int | None = None,
        batch_size: int = 32,
        show_progress: bool | None = None,
    ) -> Tensor:
        """Embed texts, images and dictionaries of both, on the CPU in the order given.

        Args:
            inputs: a list of texts, PIL images, image files, or dictionaries with ``text``, ``image`` or
                ``images``, and ``instruction``. A string that ends like an image file is one, and must exist.
            instruction: put before every text or after every image; a dictionary's own one wins.
            paths: ``all`` or a list of numbers for ``[B, N', D]``; ``aggregate`` (of all paths) for
                ``[B, D]`` (``[B, N*D]`` if the encoder concatenates); a number for ``[B, D]``.
            truncate_dim: keep the first so many coordinates of every path in place of all D, renormalised;
                the aggregate is that of the shorter paths.
            batch_size: rows per forward pass.
            show_progress: whether to show a bar; by default for long lists on a terminal.

        Returns:
            float32, unit norm.

        Raises:
            ValueError: an input (named by its index), a path, the dimension or the batch size is not usable.
        """
        from parallel_decoupling.model.dual_encoder import DualEncoder

        processor, image_token = self.encoder.processor, self.encoder.image_token
        collator = Collator(processor, image_token=image_token, images=self.images)
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress": show_progress}
        options |= {"instruction": instruction, "paths": paths, "truncate_dim": truncate_dim}
        embeddings = encoding.encode(self.encoder, collator, inputs, **options)
        if isinstance(self.encoder, DualEncoder):
            warn_of_cut_texts(self.encoder.take_text_counts(), self.encoder.processor.context_length)
        return embeddings

    def encode_query(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        """``encode`` with ``query_instruction`` unless ``instruction`` is given."""
        return self.encode(inputs, **{"instruction": self.query_instruction or None, **options})

    def encode_candidate(self, inputs: Iterable[Any], **options: Any) -> Tensor:
        """``encode`` with ``candidate_instruction`` unless ``instruction`` is given."""
        return self.encode(inputs, **{"instruction": self.candidate_instruction or None, **options})

    @staticmethod
    def similarity(a: Tensor, b: Tensor) -> Tensor:
        """Cosines of all pairs ``[A, B]``; mean over aligned paths for ``[A, N, D]`` and ``[B, N, D]``."""
        return encoding.similarity(a, b)

    def save_pretrained(
        self,
        folder: str | Path,
        paths: Sequence[int] | None = None,
        merge_adapters: bool = False,
        *,
        include_backbone: bool = False,
    ) -> None:
        """Write a folder to share: safetensors, processor, ``config.json`` and a model card.

        Args:
            folder: made if missing; must not hold a model yet.
            paths: which paths, in that order; None is all. The aggregate is then that of these paths.
            merge_adapters: write a full backbone with the adapters in its weights.
            include_backbone: write the backbone, too; otherwise the folder refers to it by name.

        Raises:
            ValueError: a folder that holds a model, a path that does not exist, weights that are not written.

        Relations:
            ``from_pretrained`` gives the same embeddings bit for bit in the same dtype, path n those of
            ``paths[n]``; with ``merge_adapters`` up to rounding.
        """
        from parallel_decoupling.evaluation.sharing import save_embedder

        options: dict[str, Any] = {"merge_adapters": merge_adapters, "include_backbone": include_backbone}
        save_embedder(self, folder, paths=paths, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Embedder:
        """Load what ``save_pretrained`` wrote, on the CPU: without Lightning, pickle and network.

        Raises:
            ValueError: files that are missing or changed, or another backbone than the one trained on.
        """
        from parallel_decoupling.model.pretrained import load_encoder

        encoder, config = load_encoder(folder)
        images = ImagePolicy.from_settings(config.get("images") or config["run"].get("data", {}))
        embedder = cls(encoder, config["query_instruction"], config["candidate_instruction"], images)
        embedder.run = config["run"]
        return embedder


def warn_of_cut_texts(counts: Tensor, context_length: int) -> None:
    """Say how many texts did not fit into an OpenCLIP model; ``counts`` are texts and cut texts."""
    texts, cut = counts.tolist()
    if cut:
        warnings.warn(
            f"{cut} of {texts} texts have more than the {context_length} tokens that this text tower takes; "
            "the rest of each was cut off.",
            stacklevel=3,
        )
