"""From what users have (texts, images, both) to embeddings, and from embeddings to similarities.

Here: recognising inputs, the batched encoding loop, cosine similarity. Deliberately elsewhere:
prompt format and tokenisation (``data.collate``), the model (``model.encoder``), scores (``score``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.images import IMAGE_SUFFIXES
from parallel_decoupling.data.prompts import prompt
from parallel_decoupling.model.matryoshka import check_dim, truncate

if TYPE_CHECKING:
    from parallel_decoupling.data.collate import Collator

INPUT_KEYS = ("text", "image", "images", "instruction")
BATCHES_WITHOUT_PROGRESS = 4

Paths = Literal["all", "aggregate"] | int | Sequence[int]


class PathEncoder(Protocol):
    """What ``encode`` needs of a model; ``ParallelEncoder`` has it."""

    @property
    def num_paths(self) -> int:
        """Number of paths N."""

    @property
    def embed_dim(self) -> int:
        """Dimension D of one path's embedding."""

    @property
    def aggregate_dim(self) -> int:
        """Dimension of the aggregated embedding."""

    def __call__(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed as ``[B, N', D]``; None is all paths."""

    def aggregate(self, embeddings_BND: Tensor) -> Tensor:
        """Combine all paths into one embedding."""

    def eval(self) -> Any:
        """Enter evaluation mode."""

    def modules(self) -> Iterator[nn.Module]:
        """All submodules."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters; the first tells the device."""


def to_raw_inputs(inputs: Iterable[Any], instruction: str | None = None) -> list[RawInput]:
    """Turn texts, images and dictionaries into prompts.

    Args:
        inputs: a list whose items are a text; a PIL image; an image file, as ``Path`` or as a string that
            ends with an image suffix (which is never taken for a text); a dictionary with ``text``,
            ``image`` or ``images``, and optionally its own ``instruction``; or a finished ``RawInput``.
        instruction: put before every text and after the placeholder of every image; a dictionary's own
            instruction wins. Not with a ``RawInput``.

    Returns:
        One ``RawInput`` per item, in order.

    Raises:
        ValueError: ``inputs`` is a single item, the instruction is no text, or an item cannot be used; names
            its index.
    """
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"instruction is a {type(instruction).__name__}; use a string, or None for none")
    if isinstance(inputs, (str, Path, Image.Image, RawInput, Mapping)):
        raise ValueError(
            f"inputs is a single {type(inputs).__name__}; pass a list, for example [{_short(inputs)}]"
        )
    return [_raw_input(item, instruction, f"input {index}") for index, item in enumerate(inputs)]


def encode(
    encoder: PathEncoder,
    collator: Collator,
    inputs: Iterable[Any],
    *,
    instruction: str | None = None,
    paths: Paths = "all",
    truncate_dim: int | None = None,
    batch_size: int = 32,
    show_progress: bool | None = None,
) -> Tensor:
    """Embed inputs of any mix of modalities.

    Rows are encoded in batches of similar length, longest first (memory peaks at once), and returned
    in the order given. Runs without gradients, in eval mode, on the device of the encoder; every
    submodule's training mode is restored.

    Args:
        encoder: the model.
        collator: tokenises for that model.
        inputs: see ``to_raw_inputs``.
        instruction: see ``to_raw_inputs``.
        paths: ``"all"``; ``"aggregate"``; one path's number (the cost of the plain backbone); or several.
        truncate_dim: keep this many coordinates of every path, renormalised; the aggregate is that of the
            shorter paths. None keeps all D. Made for models trained with ``matryoshka_dims``.
        batch_size: rows per forward call, at least 1.
        show_progress: None shows a bar on a terminal when there are more than a few batches.

    Returns:
        CPU float32, unit norm: ``[B, N', D]`` for ``"all"`` or a sequence of ``N'`` paths, in its order;
        ``[B, D]`` for one path or the aggregate of all (``[B, N * D]`` if the encoder concatenates). With
        ``truncate_dim`` it takes the place of D.

    Raises:
        ValueError: an input (names its index), a path, the dimension or the batch size is not usable.

    Relations:
        ``paths=n`` equals column ``n`` of ``paths="all"``. The result does not depend on ``batch_size``.
        ``truncate_dim=D`` changes nothing. A single truncated path is the first ``truncate_dim`` coordinates
        of the whole one, renormalised.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    selected = _selected_paths(paths, encoder.num_paths)
    embed_dim = encoder.embed_dim
    dim = embed_dim if truncate_dim is None else check_dim(truncate_dim, embed_dim, "truncate_dim")
    rows = to_raw_inputs(inputs, instruction)
    order = sorted(
        range(len(rows)), key=lambda row: (len(rows[row].images), len(rows[row].text)), reverse=True
    )
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if show_progress is None:
        show_progress = len(batches) > BATCHES_WITHOUT_PROGRESS and sys.stderr.isatty()
    first_parameter = next(encoder.parameters(), None)
    device = torch.device("cpu") if first_parameter is None else first_parameter.device
    result = torch.empty(len(rows), *_trailing_shape(encoder, paths, selected, dim))
    with _evaluating(encoder), torch.inference_mode():
        for batch in tqdm(batches, desc="encode", unit="batch", leave=False, disable=not show_progress):
            places = [f"input {row}" for row in batch]
            tokenised = collator.encode_inputs([rows[row] for row in batch], places).to(device)
            embeddings_BND = encoder(tokenised, selected)
            if dim < embed_dim:
                embeddings_BND = truncate(embeddings_BND, dim)
            if isinstance(paths, str) and paths == "aggregate":
                embeddings = encoder.aggregate(embeddings_BND)
            else:
                embeddings = embeddings_BND[:, 0] if isinstance(paths, Integral) else embeddings_BND
            result[batch] = embeddings.float().cpu()
    return result


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of every row of ``a`` with every row of ``b``.

    Args:
        a: ``[A, D]``, or ``[A, N, D]`` for the mean cosine over aligned paths.
        b: ``[B, D]`` or ``[B, N, D]``, of the same rank.

    Returns:
        ``[A, B]`` float32 in [-1, 1].

    Raises:
        ValueError: ranks or trailing sizes differ.

    Relations:
        For three dimensions, the mean over n of ``similarity(a[:, n], b[:, n])``.
    """
    if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"similarity of shapes {tuple(a.shape)} and {tuple(b.shape)}; pass [A, D] and [B, D], "
            "or [A, N, D] and [B, N, D], encoded with the same paths"
        )
    paths = a.shape[1] if a.ndim == 3 else 1
    unit_a, unit_b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    return unit_a.flatten(1) @ unit_b.flatten(1).T / paths


def _raw_input(item: Any, instruction: str | None, where: str) -> RawInput:
    if isinstance(item, RawInput):
        if instruction is not None:
            raise ValueError(
                f"{where} is a RawInput, a finished prompt; an instruction cannot be added to it"
            )
        return item
    if isinstance(item, Mapping):
        return _raw_input_from_mapping(item, instruction, where)
    if isinstance(item, (Image.Image, Path)) or (isinstance(item, str) and _is_image_file(item, where)):
        return prompt(images=[_image(item, where)], instruction=instruction)
    if not isinstance(item, str):
        raise ValueError(
            f"{where} is a {type(item).__name__}; use a text, a PIL image, an image file or a dictionary"
        )
    if not item.strip():
        raise ValueError(f"{where} is an empty text")
    return prompt(text=item, instruction=instruction)


def _raw_input_from_mapping(item: Mapping[str, Any], instruction: str | None, where: str) -> RawInput:
    unknown = sorted(str(key) for key in item if key not in INPUT_KEYS)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; use {list(INPUT_KEYS)}")
    if item.get("image") is not None and item.get("images") is not None:
        raise ValueError(f"{where} has both 'image' and 'images'; use one of them")
    text, own_instruction = item.get("text"), item.get("instruction")
    for key, value in (("text", text), ("instruction", own_instruction)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where} has a {type(value).__name__} as {key!r}; use a string")
    images = item.get("images")
    if images is None:
        images = [] if item.get("image") is None else [item["image"]]
    elif isinstance(images, (str, Path, Image.Image)):
        raise ValueError(
            f"{where} has a single {type(images).__name__} as 'images'; pass a list or use 'image'"
        )
    if not images and not (text or "").strip():
        raise ValueError(f"{where} has neither text nor image")
    return prompt(
        text=text,
        images=[_image(image, where) for image in images],
        instruction=instruction if own_instruction is None else own_instruction,
    )


def _is_image_file(text: str, where: str) -> bool:
    """Whether a string names an image; one that only looks like it is an error, not a text."""
    if not text.lower().endswith(IMAGE_SUFFIXES):
        return False
    if not os.path.isfile(text):
        raise ValueError(f"{where}: no image file {text!r}; if this is a text, pass {{'text': {text!r}}}")
    return True


def _image(image: Any, where: str) -> Image.Image | str:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise ValueError(f"{where} has a {type(image).__name__} as image; use a PIL image or an image file")
    if not os.path.isfile(image):
        raise ValueError(f"{where}: no image file {str(image)!r}")
    return str(image)


def _selected_paths(paths: Paths, num_paths: int) -> list[int] | None:
    """Path numbers for the encoder; None is all of them."""
    if isinstance(paths, str):
        if paths not in ("all", "aggregate"):
            raise ValueError(f"paths is {paths!r}; use 'all', 'aggregate', a path number or a list of them")
        return None
    selected = list(paths) if isinstance(paths, Iterable) else [paths]
    if not selected:
        raise ValueError("paths is empty; select at least one path")
    for path in selected:
        whole = isinstance(path, Integral) and not isinstance(path, bool)
        if not whole or not 0 <= path < num_paths:
            raise ValueError(f"there is no path {path!r}; the encoder has paths 0 to {num_paths - 1}")
    return [int(path) for path in selected]


def _trailing_shape(
    encoder: PathEncoder, paths: Paths, selected: list[int] | None, dim: int
) -> tuple[int, ...]:
    if isinstance(paths, str) and paths == "aggregate":
        return (encoder.aggregate_dim // encoder.embed_dim * dim,)
    if isinstance(paths, Integral):
        return (dim,)
    return (encoder.num_paths if selected is None else len(selected), dim)


@contextmanager
def _evaluating(encoder: PathEncoder) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the mode that it had."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _short(item: object) -> str:
    return repr(item) if isinstance(item, str) and len(item) < 40 else "..."
