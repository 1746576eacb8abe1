"""Where the pooled token looks: attention of each path to prefix, image and text, and to image patches.

Here: reading the weights during one encoding pass. Weights exist only in eager attention, so the language
model is switched to it and back; the embeddings stay the same up to rounding. Elsewhere: the attention
functions (``model.attention``), pictures of the maps (``figures``).

Shapes: ``B`` inputs, ``N`` paths, ``Y`` layers, ``R = N * B`` rows (path-major), ``L`` tokens, ``P`` prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.model.attention import register_prefix_attention
from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.model.encoder import ParallelEncoder, last_token

GROUPS = ("prefix", "image", "text")
"""What the keys of a path are; the pooled token itself counts as text."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of the pooled token, mean over heads.

    Attributes:
        mass: ``[N, Y, 3]``, share that goes to each of ``GROUPS``, mean over inputs; sums to 1 over groups.
        patches: per input ``[N, height, width]``, how the share of its image is spread over the image's
            tokens, mean over layers; sums to 1 per path. Empty for backbones whose image tokens are no grid
            (LLaVA-NeXT cuts images into tiles and adds tokens at the ends of lines).
    """

    mass: Tensor
    patches: list[Tensor]


def attention_maps(
    encoder: ParallelEncoder,
    inputs: Sequence[RawInput],
    batch_size: int = 32,
    *,
    images: ImagePolicy | None = None,
) -> AttentionMaps:
    """Run the encoder and read the attention of the token whose state is the embedding.

    Args:
        encoder: left as it was found, in the mode that it has; call ``eval()`` before.
        inputs: each with exactly one image.
        batch_size: rows per forward pass; changes nothing in the result.
        images: what happens to a picture before the processor sees it; nothing by default.

    Raises:
        ValueError: an input has no or several images.

    Relations:
        Equal inputs and equal prefixes give equal maps. With uniform attention, image mass is the share of
        image tokens among the keys.
    """
    for index, item in enumerate(inputs):
        if len(item.images) != 1:
            raise ValueError(f"attention maps: input {index} has {len(item.images)} images; one is needed")
    collator = Collator(encoder.processor, image_token=encoder.image_token, images=images)
    image_id = encoder.processor.tokenizer.convert_tokens_to_ids(encoder.image_token)
    device = next(encoder.parameters()).device
    mass, patches = torch.zeros(()), []
    for start in range(0, len(inputs), batch_size):
        tokenised = collator.encode_inputs(inputs[start : start + batch_size])
        weights_NBYK = pooled_attention(encoder, tokenised.to(device)).cpu()
        is_image_BL = tokenised.tokens["input_ids"] == image_id
        image_NBYL = weights_NBYK[..., encoder.prefix_length :] * is_image_BL[:, None]
        prefix_NBY = weights_NBYK[..., : encoder.prefix_length].sum(dim=-1)
        image_NBY = image_NBYL.sum(dim=-1)
        groups = torch.stack((prefix_NBY, image_NBY, 1 - prefix_NBY - image_NBY), dim=-1)
        mass = mass + groups.sum(dim=1) / len(inputs)
        for row, vision in enumerate(tokenised.vision):
            shares_NT = image_NBYL[:, row].mean(dim=1)[:, is_image_BL[row]]
            grid = token_grid(vision, shares_NT.shape[1])
            if grid is not None:
                shares_NT = shares_NT / shares_NT.sum(dim=1, keepdim=True)
                patches.append(shares_NT.reshape(-1, *grid))
    return AttentionMaps(mass, patches if len(patches) == len(inputs) else [])


@torch.no_grad()
def pooled_attention(encoder: ParallelEncoder, inputs: EncoderInputs) -> Tensor:
    """Attention weights of each row's last real token.

    Returns:
        ``[N, B, Y, P + L]`` fp32, mean over heads, each sums to 1. Layers below ``prefix_layers`` have one
        row for all paths and zeros for the prefix.
    """
    weights: list[Tensor] = []
    mask_BL = inputs.tokens["attention_mask"]
    num_paths, prefix_length = encoder.num_paths, encoder.prefix_length

    def keep(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        rows_RLK = output[1].float().mean(dim=1)
        repeats = len(rows_RLK) // len(mask_BL)
        pooled_RK = last_token(rows_RLK, mask_BL.repeat(repeats, 1))
        missing = mask_BL.shape[1] + prefix_length - pooled_RK.shape[1]
        pooled_RK = torch.nn.functional.pad(pooled_RK, (missing, 0))
        pooled_NBK = pooled_RK.reshape(repeats, len(mask_BL), -1)
        weights.append(pooled_NBK.expand(num_paths, -1, -1))

    layers = cast(Any, encoder.backbone.layers)
    hooks = [layer.self_attn.register_forward_hook(keep) for layer in layers]
    try:
        with _eager(encoder.backbone):
            encoder(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights, dim=2)


def token_grid(vision: Any, num_tokens: int) -> tuple[int, int] | None:
    """Height and width of an image's tokens: the processor's grid after merging, or else a square.

    None when the tokens fill neither.
    """
    if "image_grid_thw" in vision:
        _, height, width = vision["image_grid_thw"][0].tolist()
        merge = isqrt(height * width // num_tokens)
        height, width = height // merge, width // merge
    else:
        height = width = isqrt(num_tokens)
    return (height, width) if height * width == num_tokens else None


@contextmanager
def _eager(backbone: Backbone) -> Iterator[None]:
    """Eager prefix attention inside, the former implementation afterwards."""
    language_model = cast(Any, backbone.language_model)
    former = language_model.config._attn_implementation
    language_model.set_attn_implementation(register_prefix_attention("eager"))
    try:
        yield
    finally:
        language_model.set_attn_implementation(former)
