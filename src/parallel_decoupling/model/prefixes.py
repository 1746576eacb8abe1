"""Prefixes: the trainable part that makes one backbone see one input in N ways."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from parallel_decoupling.option_types import check_memory

META_PROMPTS: tuple[str, ...] = (
    "describe the shapes",
    "describe the colors",
    "describe the positions",
    "read the word",
    "count the objects",
    "describe the background",
    "describe the sizes",
    "describe the picture",
)
"""What path n is told to look at when prefixes start from meta-prompts ("ours")."""

PrefixLayers = int | Sequence[int]
"""The first layer with a prefix, or ``[start, stop]``: layers start to stop - 1 have one."""


def prefix_range(prefix_layers: PrefixLayers, num_layers: int) -> range:
    """Return the layers with a prefix; a ValueError if there are none, or not in the backbone."""
    bounds = (prefix_layers, num_layers) if isinstance(prefix_layers, int) else tuple(prefix_layers)
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= num_layers:
        first = f"the first layer with a prefix, 0 to {num_layers - 1} for this backbone"
        both = f"[start, stop] with 0 <= start < stop <= {num_layers}"
        raise ValueError(f"prefix_layers is {first}, or {both}; got {prefix_layers}")
    return range(*bounds)


class DeepPrefixes(nn.Module):
    """N prefixes of P extra keys and values in every prefixed attention layer, fp32 in any backbone.

    Path n attends to ``softmax(q [K_n ; K]^T / sqrt(H)) [V_n ; V]``. Keys are stored after rotary embedding,
    so real tokens keep the positions that they have without a prefix ("ours"; arXiv 2511.01588 states deep
    prefixes, not their positions). ``shape`` is ``[N, Y, 2, K, P, H]``, Y the number of prefixed layers.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.key_values = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def states(self, paths: Sequence[int], backbone: Any) -> Tensor:
        """Return the keys and values of the chosen paths, in that order, for one forward call."""
        return self.key_values[list(paths)].to(backbone.dtype)


class ShallowPrefixes(nn.Module):
    """N prompts of P trainable input embeddings (prompt tuning): a baseline for ``DeepPrefixes``.

    The language model computes their keys and values anew in every forward pass, with gradient. Prompts have
    positions 0 to P - 1, and real tokens keep the positions that they have without a prompt (both ours).
    ``shape`` is ``[N, P, D]``.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def states(self, paths: Sequence[int], backbone: Any) -> Tensor:
        """Return the keys and values of the chosen paths, in that order, for one forward call."""
        return cast(Tensor, backbone.prompt_states(self.embeddings[list(paths)].to(backbone.dtype)))


@torch.no_grad()
def make_prefixes(
    backbone: Any, prefix_type: str, init: str, seed: int, num_paths: int, length: int, layers: range
) -> DeepPrefixes | ShallowPrefixes:
    """Make the prefixes of a ``Backbone``, started from meta-prompts or at random at their scale.

    Relations:
        A random prefix is the same whatever the number of paths.
    """
    prompts, min_length = META_PROMPTS, 1
    if init == "meta":
        prompts, min_length = META_PROMPTS[:num_paths], length
        if num_paths > len(META_PROMPTS):
            raise ValueError(f"more than {len(META_PROMPTS)} paths need prefix_init='random'")
    is_deep = prefix_type == "deep"
    of_layer = backbone.num_key_value_heads, length, backbone.head_dim
    prefixes: DeepPrefixes | ShallowPrefixes
    with torch.device("meta"):
        if is_deep:
            prefixes = DeepPrefixes(num_paths, len(layers), 2, *of_layer)
        else:
            prefixes = ShallowPrefixes(num_paths, length, backbone.hidden_size)
    if next(backbone.parameters()).is_meta:
        return prefixes
    needed = sum(parameter.nbytes for parameter in prefixes.parameters())
    needed += 4 * min_length**2  # the mask for attention in a meta-prompt
    check_memory(f"num_paths={num_paths} with prefix_length={length}", needed)
    (parameter,) = prefixes.to_empty(device="cpu").parameters()
    if is_deep:  # [Y, 2, K, T, H] of each prompt, else [T, D]
        states = [backbone.text_states(text, min_length)[layers.start : layers.stop] for text in prompts]
    else:
        states = [backbone.text_embeddings(text, min_length) for text in prompts]
    if init == "meta":
        parameter.copy_(torch.stack([state[..., :length, :] for state in states]))
        return prefixes
    own_scale = (2, 3, 4) if is_deep else (0, 1)  # each layer's keys and values
    scale = torch.cat(states, dim=-2).std(dim=own_scale, keepdim=True).cpu()
    generator = torch.Generator().manual_seed(seed)
    for path in parameter:
        path.copy_(scale * torch.randn(path.shape, generator=generator, dtype=torch.float32))
    return prefixes
