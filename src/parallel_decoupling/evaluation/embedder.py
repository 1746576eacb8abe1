"""An encoder with its tokenisation and its default instructions: all that a user of embeddings needs."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from pydantic import InstanceOf, JsonValue
from torch import Tensor

from parallel_decoupling.batch import LongText, TokenLimit
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.data.prompts import is_single, to_raw_inputs
from parallel_decoupling.evaluation.encode import Paths, encode_rows, undisturbed
from parallel_decoupling.model.encoder import Encoder
from parallel_decoupling.model.pretrained import load_encoder, save_encoder
from parallel_decoupling.option_types import PositiveInt, checked


class Embedder:
    """Embeds texts, images and both with one path, several, all, or their aggregate.

    Args:
        encoder: the model.
        query_instruction: default instruction of ``encode_query``.
        candidate_instruction: default instruction of ``encode_document``.
        images: what happens to a picture before the processor sees it; nothing by default.
        max_tokens: of an input's text and pictures together; None is all positions of the backbone.
        long_text: truncate cuts off the end of a longer text, error refuses it.
        run: what trained the weights, as plain values; empty if not known.

    Attributes:
        num_paths: number of paths N.
        embed_dim: dimension D of one path's embedding.
    """

    @checked()
    def __init__(
        self,
        encoder: Encoder,
        query_instruction: str = "",
        candidate_instruction: str = "",
        images: InstanceOf[ImagePolicy] | None = None,
        max_tokens: PositiveInt | None = None,
        long_text: LongText = "truncate",
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.encoder = encoder
        self.num_paths, self.embed_dim = encoder.num_paths, encoder.embed_dim
        self.images = images or ImagePolicy()
        self.limit = TokenLimit.of(encoder.backbone, encoder.processor, max_tokens, long_text)
        self.query_instruction, self.candidate_instruction = query_instruction, candidate_instruction
        self.run = dict(run or {})

    @classmethod
    @checked()
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> "Embedder":
        """Load a checkpoint, a run folder (its last checkpoint), an exported folder or a hub id's.

        ``revision`` is a hub model's branch, tag or commit, ``dtype`` that of the backbone's weights instead
        of the one that it was trained with. The hub is asked for what the local cache lacks.
        """
        encoder, about = load_encoder(path, revision=revision, dtype=dtype)
        about = {**about, "images": ImagePolicy.from_settings(about["images"])}
        return cls(encoder, **about).to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    @property
    def collator(self) -> Collator:
        """Tokenises for this model."""
        return Collator.of(self.encoder, images=self.images, limit=self.limit)

    @checked()
    def to(self, device: torch.device | str) -> "Embedder":
        """Move the weights; embeddings come back on the CPU."""
        if str(device).startswith("meta"):
            raise ValueError("device='meta' would lose the weights")
        try:
            self.encoder.to(torch.device(device))
        except RuntimeError as error:
            raise ValueError(f"device={device!r} cannot be used: {error}") from error
        return self

    def encode(
        self,
        inputs: Any,
        *,
        instruction: str | None = None,
        paths: Paths = "aggregate",
        truncate_dim: int | None = None,
        batch_size: int = 32,
        show_progress: bool | None = None,
    ) -> Tensor:
        """Embed texts, images and dictionaries of both, on the CPU in the order given.

        ``as_sentence_transformer(embedder).encode(inputs, device=[...])`` shares a list among devices.

        Args:
            inputs: one item or a list. Pictures are PIL images, arrays, tensors, bytes of a file, ``Path``,
                data URIs, and strings that name an existing file that Pillow opens; other strings are texts.
                Dictionaries with ``text``, ``image`` or ``images``, ``video`` (frames or their folder), and
                ``instruction`` leave no doubt.
            instruction: stands after the pictures and before the text; a dictionary's own one wins.
            paths: ``aggregate`` of all paths for ``[B, D]`` (``[B, N*D]`` if the encoder concatenates);
                ``all`` or a list of numbers for ``[B, N', D]``; a number for ``[B, D]``.
            truncate_dim: keep the first so many coordinates of every path, renormalised; the aggregate is
                that of the shorter paths, or with ``aggregation="linear"`` is cut itself.
            batch_size: rows per forward pass.
            show_progress: whether to show a bar; by default for long lists on a terminal.

        Returns:
            float32, unit norm. One item gives its embedding without the batch dimension.

        Raises:
            ValueError: for an input that cannot be embedded, with its index, and for options out of range.
        """
        rows = to_raw_inputs(inputs, instruction)
        options: dict[str, Any] = {"paths": paths, "truncate_dim": truncate_dim}
        options |= {"batch_size": batch_size, "show_progress": show_progress}
        encoded = encode_rows(self.encoder, self.collator, rows, **options)
        if encoded.num_cut:
            advice = "raise max_tokens, shorten them, or refuse them with long_text='error'"
            cut = f"{encoded.num_cut} of {len(rows)} inputs have more than {self.limit.max_tokens} tokens"
            warnings.warn(f"{cut}; the ends of their texts were cut off: {advice}.", stacklevel=2)
        return encoded.embeddings[0] if is_single(inputs) else encoded.embeddings

    def encode_query(self, inputs: Any, **options: Any) -> Tensor:
        """``encode`` with ``query_instruction`` unless ``instruction`` is given."""
        return self.encode(inputs, **{"instruction": self.query_instruction or None, **options})

    def encode_document(self, inputs: Any, **options: Any) -> Tensor:
        """``encode`` with ``candidate_instruction`` unless ``instruction`` is given."""
        return self.encode(inputs, **{"instruction": self.candidate_instruction or None, **options})

    encode_candidate = encode_document

    @staticmethod
    def similarity(a: Tensor, b: Tensor) -> Tensor:
        """Compute all cosines ``[A, B]`` of ``[rows, D]``, or their means over paths of ``[rows, N, D]``."""
        try:
            with undisturbed(torch.device("cpu")):  # arrays and lists of numbers will do
                a, b = torch.as_tensor(a), torch.as_tensor(b)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"similarity takes embeddings, see encode; these are not numbers: {error}"
            ) from error
        if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[1:] != b.shape[1:]:
            advice = "pass [A, D] and [B, D], or [A, N, D] and [B, N, D], encoded with the same paths"
            raise ValueError(f"similarity of shapes {tuple(a.shape)} and {tuple(b.shape)}; {advice}")
        with undisturbed(a.device):
            unit_a, unit_b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
            return unit_a.flatten(1) @ unit_b.flatten(1).T / (a.shape[1] if a.ndim == 3 else 1)

    @checked()
    def save_pretrained(
        self,
        folder: str | Path,
        paths: Sequence[int] | None = None,
        merge_adapters: bool = False,
        *,
        include_backbone: bool = False,
        scores: Mapping[str, JsonValue] | None = None,
        card: Mapping[str, JsonValue] | None = None,
    ) -> None:
        """Write a folder to share: safetensors, processor, ``config.json`` and a model card.

        Args:
            folder: must be new or empty.
            paths: which paths, in that order; None is all. The aggregate is then that of these paths.
            merge_adapters: write a full backbone with the adapters in its weights.
            include_backbone: write the backbone, too; otherwise the folder refers to it by name. One from a
                local folder that is not beside this one is written in any case.
            scores: content of a ``scores.json`` for the card.
            card: values for the head of the card by the hub's names, such as license, datasets, language.
        """
        options: dict[str, Any] = {"paths": paths, "merge_adapters": merge_adapters}
        options |= {"include_backbone": include_backbone, "scores": scores, "card": card}
        about: dict[str, Any] = {"images": self.images.settings, "query_instruction": self.query_instruction}
        about |= {"candidate_instruction": self.candidate_instruction, "run": self.run, **vars(self.limit)}
        save_encoder(self.encoder, folder, **options, **about)

    @checked()
    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, **options: Any
    ) -> str:
        """Upload what ``save_pretrained`` writes with these options; return the address of the commit."""
        api = HfApi()
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder, "model"), **options)
            api.create_repo(repo_id, private=private, exist_ok=True)
            options = {"folder_path": Path(folder, "model"), "revision": revision}
            return str(api.upload_folder(repo_id=repo_id, **options).commit_url)
