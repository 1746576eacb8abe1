"""Typed containers that pass between the layers, and the package's shape legend.

``B`` local batch, ``G`` gathered batch, ``N`` paths, ``M`` path pairs, ``L`` tokens,
``P`` prefix length, ``Y`` layers, ``K`` key/value heads, ``H`` head dim,
``D`` embedding dim, ``C`` candidates per query. Order at every boundary: batch, path, feature.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

IMAGE_PLACEHOLDER = "<|image_1|>"
"""The image token of every MMEB text (Phi-3's); the collator swaps in the backbone's own."""

VIDEO_PLACEHOLDER = "<|video_1|>"
"""What stands for a video in a text, as long as the placeholder of an image."""

PADDING_ID = torch.iinfo(torch.int64).min
"""In ``candidate_ids``: padding for a missing hard negative, which matches no query."""

LongText = Literal["truncate", "error"]


@dataclass(frozen=True)
class RawInput:
    """One query or candidate before tokenisation; images stand in the text as ``IMAGE_PLACEHOLDER``.

    The first ``fixed`` characters, an instruction and what stands before it, are never cut off. ``video``
    are the frames of a video in their order, which stands in the text once, as ``VIDEO_PLACEHOLDER``.
    """

    text: str
    images: tuple[Image.Image | str, ...] = ()
    fixed: int = field(default=0, compare=False)
    video: tuple[Image.Image | str, ...] = ()

    @property
    def pictures(self) -> tuple[Image.Image | str, ...]:
        """The images and the frames of the video."""
        return self.images + self.video


@dataclass(frozen=True)
class RawPair:
    """Row ``row`` of a training ``subset``; None pads to the numbers of positives and negatives asked for.

    ``positives`` are those besides ``candidate``. ``teacher`` are the scores of candidate, positives and
    negatives in this order, NaN where there are none; empty for none at all.
    """

    query: RawInput
    candidate: RawInput
    negatives: tuple[RawInput | None, ...]
    subset: str
    row: int
    positives: tuple[RawInput | None, ...] = ()
    teacher: tuple[float, ...] = ()


@dataclass(frozen=True)
class EncoderInputs:
    """Tokenised rows for one encoder call.

    ``tokens`` are ``[B, L]`` by processor key, ``input_ids`` and ``attention_mask`` (1 = real token) among
    them; ``vision`` is one mapping per row with that row's image tensors, empty for a text-only row.
    ``num_cut`` rows had more tokens than they may have.
    """

    tokens: Mapping[str, Tensor]
    vision: tuple[Mapping[str, Tensor], ...]
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.vision)

    @property
    def lengths(self) -> Tensor:
        """Count the real (unpadded) tokens of each row, ``[B]``."""
        return self.tokens["attention_mask"].sum(dim=1)

    def select(self, rows: Sequence[int]) -> "EncoderInputs":
        """Return the given rows in that order, padded to the longest of them only."""
        chosen = list(rows)
        used = self.tokens["attention_mask"][chosen].any(dim=0)
        tokens = {key: value[chosen][:, used] for key, value in self.tokens.items()}
        return EncoderInputs(tokens, tuple(self.vision[row] for row in rows))

    def to(self, device: torch.device | str) -> "EncoderInputs":
        """Move every tensor to ``device``."""
        tokens = {key: value.to(device) for key, value in self.tokens.items()}
        vision = tuple({key: value.to(device) for key, value in row.items()} for row in self.vision)
        return replace(self, tokens=tokens, vision=vision)


@dataclass(frozen=True)
class PairBatch:
    """What one training step sees; ``inputs`` are ``B`` queries, their ``B`` positives, then all others.

    A forward pass can then take queries and candidates of similar length. The others stand row by row: the
    positives up to ``num_positives``, then any hard negatives. Equal ``candidate_ids`` (int64) are the same
    target, and ``PADDING_ID`` is none. ``teacher`` ``[B, K]`` are the scores of each row's own candidates,
    NaN where there are none.
    """

    inputs: EncoderInputs
    candidate_ids: Tensor
    subsets: tuple[str, ...]
    num_positives: int = 1
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return len(self.subsets)

    @property
    def query(self) -> EncoderInputs:
        """Return the ``B`` queries."""
        return self.inputs.select(range(len(self)))

    @property
    def candidate(self) -> EncoderInputs:
        """Return the candidates, positives first."""
        return self.inputs.select(range(len(self), len(self.inputs)))

    def to(self, device: torch.device | str) -> "PairBatch":
        """Move every tensor to ``device``."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        ids = self.candidate_ids.to(device)
        return replace(self, inputs=self.inputs.to(device), candidate_ids=ids, teacher=teacher)


@dataclass(frozen=True)
class Template:
    """What a backbone reads around an input: the prompt that it was trained to embed.

    Attributes:
        pattern: a text with {images} before {text}, and perhaps {instruction}, which otherwise stands before
            the text; or chat, the processor's chat template with the instruction as its system message.
        image: what stands for a picture in {images}; null is the backbone's image token.
        instruction: fills {instruction} where an input has none.
        full_stop: ends an instruction that ends without punctuation.
    """

    pattern: str = "chat"
    image: str | None = None
    instruction: str = ""
    full_stop: bool = False

    def __post_init__(self) -> None:
        marks = re.findall("{images}|{text}", self.pattern)
        if self.pattern != "chat" and marks != ["{images}", "{text}"]:
            rule = "must be chat, or hold {images} and later {text}, once each"
            raise ValueError(f"prompt.pattern {rule}, got {self.pattern!r}.")


@dataclass(frozen=True)
class TokenLimit:
    """How many tokens an item may have, and what happens to the text of one that has more.

    Attributes:
        max_tokens: of text, instruction and images together, at most.
        long_text: truncate cuts off the end of the text, but never the instruction, the images and the last
            token, which is pooled; error refuses the item.
    """

    max_tokens: int = sys.maxsize
    long_text: LongText = "truncate"

    @classmethod
    def of(
        cls, backbone: Any, processor: Any, max_tokens: int | None = None, long_text: LongText = "truncate"
    ) -> "TokenLimit":
        """Return the limit for a backbone and its processor; None is all positions that there are."""
        most = getattr(processor, "context_length", None)
        if most is None:
            text = backbone.config.get_text_config()
            most = getattr(text, "max_position_embeddings", None) or sys.maxsize
        elif max_tokens not in (None, most):
            raise ValueError(f"max_tokens={max_tokens}, but this OpenCLIP model has {most}: set it to null.")
        if max_tokens is not None and not (isinstance(max_tokens, int) and 2 <= max_tokens <= most):
            raise ValueError(f"max_tokens={max_tokens!r}: this backbone takes from 2 to {most} tokens.")
        return cls(max_tokens or most, long_text)
