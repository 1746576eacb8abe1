"""Maps over the patches of a picture: where a path looks, and what its embedding depends on.

Shapes: ``B`` inputs, ``N`` paths, ``Y`` layers, ``L`` tokens, ``T`` of them of the image, ``P`` prefix.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.model.attention import prefix_attention
from parallel_decoupling.model.encoder import ParallelEncoder

GROUPS = ("prefix", "image", "text")  # what the keys of a path are; the pooled token counts as text
GRID = 8  # patches per side that are painted over (ours)


def attention_maps(embedder: Embedder, inputs: Sequence[RawInput]) -> tuple[Tensor, list[Tensor]]:
    """Encode inputs of one image each, and read the attention of the token whose state is the embedding.

    Return, means over heads, the shares that go to each of ``GROUPS``, ``[N, Y, 3]``, mean over inputs; and
    per input the share of each image token, ``[N, height, width]``, mean over layers: none if the image's
    tokens form no grid (LLaVA-NeXT cuts tiles).
    """
    encoder, collator = cast(ParallelEncoder, embedder.encoder), embedder.collator
    image_id = encoder.processor.tokenizer.convert_tokens_to_ids(encoder.image_token)
    masses, patches = [], []
    for item in inputs:
        assert len(item.images) == 1, "attention maps need one image per input"
        with recorded_attention(encoder) as weights:
            embedder.encode([item], paths="all")
        weights_NYK, tokenised = torch.stack(weights, dim=1).cpu(), collator.encode_inputs([item])
        prefix_NYP, tokens_NYL = weights_NYK.tensor_split([encoder.prefix_length], dim=-1)
        image_NYT = tokens_NYL[..., tokenised.tokens["input_ids"][0] == image_id]
        prefix_NY, image_NY = prefix_NYP.sum(dim=-1), image_NYT.sum(dim=-1)
        masses.append(torch.stack((prefix_NY, image_NY, 1 - prefix_NY - image_NY), dim=-1))
        share_NT = F.normalize(image_NYT.mean(dim=1), p=1, dim=1)
        grid = token_grid(tokenised.vision[0], share_NT.shape[1])
        if grid is not None:
            patches.append(share_NT.reshape(-1, *grid))
    return torch.stack(masses).mean(dim=0), patches if len(patches) == len(masses) else []


@contextmanager
def recorded_attention(encoder: ParallelEncoder) -> Iterator[list[Tensor]]:
    """Collect by layer the attention ``[N, P + L]`` of the last token, while one input is encoded.

    Layers below ``prefix_layers`` have one row for all paths and zeros for the prefix.
    """
    weights: list[Tensor] = []

    def keep_weights(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        rows_NLK = output[1].float().mean(dim=1)
        missing = rows_NLK.shape[1] + encoder.prefix_length - rows_NLK.shape[2]
        weights.append(F.pad(rows_NLK[:, -1], (missing, 0)).expand(encoder.num_paths, -1))

    language_model, layers = cast(Any, encoder.backbone.language_model), cast(Any, encoder.backbone.layers)
    hooks = [layer.self_attn.register_forward_hook(keep_weights) for layer in layers]
    former = language_model.config._attn_implementation
    language_model.set_attn_implementation(prefix_attention("eager"))  # only it returns weights
    try:
        yield weights
    finally:
        language_model.set_attn_implementation(former)
        for hook in hooks:
            hook.remove()


def token_grid(vision: Any, num_tokens: int) -> tuple[int, int] | None:
    """Return height and width of an image's tokens, by the processor or as a square; None if neither fits."""
    if "image_grid_thw" in vision:
        _, height, width = vision["image_grid_thw"][0].tolist()
        merge = isqrt(height * width // num_tokens)
        height, width = height // merge, width // merge
    else:
        height = width = isqrt(num_tokens)
    return (height, width) if height * width == num_tokens else None


def patch_contributions(embedder: Embedder, pictures: Sequence[Image.Image], instruction: str) -> Tensor:
    """Return ``1 - cosine`` of each path's embedding with and without each patch: ``[B, N, GRID, GRID]``.

    A patch is painted in the picture's median colour, which in most pictures is close to the background.
    """
    variants = [picture for whole in pictures for picture in (whole, *occluded(whole))]
    rows = embedder.encode(variants, instruction=instruction, paths="all", batch_size=64)
    embeddings_BVND = rows.reshape(len(pictures), 1 + GRID**2, *rows.shape[1:])
    change_BVN = 1 - (embeddings_BVND[:, :1] * embeddings_BVND[:, 1:]).sum(dim=-1)
    return change_BVN.transpose(1, 2).reshape(len(pictures), -1, GRID, GRID)


def occluded(picture: Image.Image) -> list[Image.Image]:
    """Return copies of a picture, each with one of ``GRID * GRID`` patches in the median colour."""
    pixels = np.asarray(picture.convert("RGB"))
    median, copies = np.median(pixels.reshape(-1, 3), axis=0).astype(np.uint8), []
    for rows in np.array_split(np.arange(picture.height), GRID):
        for columns in np.array_split(np.arange(picture.width), GRID):
            hidden = pixels.copy()
            hidden[np.ix_(rows, columns)] = median
            copies.append(Image.fromarray(hidden))
    return copies


def map_agreement(maps: Sequence[Tensor]) -> Tensor:
    """Correlate maps ``[N, height, width]`` over patches: ``[N, N]``, mean over pictures; constant maps 0."""
    centred = [map_NHW.flatten(1).double() - map_NHW.double().mean(dim=(1, 2))[:, None] for map_NHW in maps]
    unit = [F.normalize(map_NV, dim=1) for map_NV in centred]
    return torch.stack([map_NV @ map_NV.T for map_NV in unit]).mean(dim=0)
