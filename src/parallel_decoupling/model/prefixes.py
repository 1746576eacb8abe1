"""Prefixes: the trainable part that makes one backbone see one input in N ways.

Elsewhere on purpose: how attention uses them (``attention``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parallel_decoupling.model.attention import PrefixStates

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
    """Return the layers with a prefix. Those below run once for all paths, those above once per path.

    Args:
        prefix_layers: the first layer, or ``[start, stop]`` with stop excluded.
        num_layers: of the backbone.

    Raises:
        ValueError: for layers that the backbone does not have, or none at all.

    Relations:
        ``start`` and ``[start, num_layers]`` are the same.
    """
    bounds = (prefix_layers, num_layers) if isinstance(prefix_layers, int) else tuple(prefix_layers)
    whole = all(isinstance(bound, int) for bound in bounds)
    if len(bounds) != 2 or not whole or not 0 <= bounds[0] < bounds[1] <= num_layers:
        raise ValueError(
            f"prefix_layers is the first layer with a prefix, 0 to {num_layers - 1} for this backbone, or "
            f"[start, stop] with 0 <= start < stop <= {num_layers}; got {prefix_layers}"
        )
    return range(*bounds)


class DeepPrefixes(nn.Module):
    """N prefixes of P extra keys and values in every prefixed attention layer.

    Path n attends to ``softmax(q [K_n ; K]^T / sqrt(H)) [V_n ; V]``. Keys are stored after rotary embedding,
    so real tokens keep the positions that they have without a prefix ("ours"; arXiv 2511.01588 states deep
    prefixes, not their positions). Parameters are fp32 whatever the backbone's dtype.

    Args:
        num_paths: N, at least 1, like all sizes.
        num_layers: prefixed layers Y.
        num_key_value_heads: K of the backbone.
        prefix_length: P in tokens.
        head_dim: H of the backbone.
    """

    def __init__(
        self, *, num_paths: int, num_layers: int, num_key_value_heads: int, prefix_length: int, head_dim: int
    ) -> None:
        super().__init__()
        shape = (num_paths, num_layers, 2, num_key_value_heads, prefix_length, head_dim)
        assert min(shape) > 0, f"[N, Y, 2, K, P, H] = {list(shape)}"
        self.key_values = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def init_random(self, scale: Tensor, generator: torch.Generator) -> None:
        """Draw normal keys and values at the standard deviation ``scale`` ``[Y, 2]`` of real ones."""
        _draw(self.key_values, scale[:, :, None, None, None], generator)

    @torch.no_grad()
    def init_from_states(self, states: Tensor) -> None:
        """Copy ``[N, Y, 2, K, P, H]``, e.g. the keys and values of one meta-prompt per path."""
        assert states.shape == self.key_values.shape
        self.key_values.copy_(states)

    def states(self, paths: Sequence[int], first_layer: int, dtype: torch.dtype) -> PrefixStates:
        """Return the chosen paths' prefixes for one forward call.

        Args:
            paths: path numbers, in the order of the rows.
            first_layer: layer that the first stored layer belongs to.
            dtype: of the backbone.
        """
        return PrefixStates(_chosen(self.key_values, paths).to(dtype), first_layer)


class ShallowPrefixes(nn.Module):
    """N prompts of P trainable input embeddings (prompt tuning): a baseline for ``DeepPrefixes``.

    What a layer's attention finds in front of the real keys and values is what the language model itself
    computes there for the prompt, anew in every forward pass, so that gradient flows back through all layers
    to the embeddings. Prompts have positions 0 to P - 1, as a meta-prompt has, and real tokens keep the
    positions that they have without a prompt (both ours). Parameters are fp32 whatever the backbone's dtype.

    Args:
        num_paths: N, at least 1, like all sizes.
        prefix_length: P in tokens.
        hidden_size: D of the backbone.
    """

    def __init__(self, *, num_paths: int, prefix_length: int, hidden_size: int) -> None:
        super().__init__()
        shape = (num_paths, prefix_length, hidden_size)
        assert min(shape) > 0, f"[N, P, D] = {list(shape)}"
        self.embeddings = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def init_random(self, scale: Tensor, generator: torch.Generator) -> None:
        """Draw normal embeddings at the standard deviation ``scale`` (0-dim) of real ones."""
        _draw(self.embeddings, scale, generator)

    @torch.no_grad()
    def init_from_embeddings(self, embeddings: Tensor) -> None:
        """Copy ``[N, P, D]``, e.g. the token embeddings of one meta-prompt per path."""
        self.embeddings.copy_(embeddings)

    def prompts(self, paths: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the embeddings ``[N', P, D]`` of the chosen paths in that order, in the backbone's dtype."""
        return _chosen(self.embeddings, paths).to(dtype)


@torch.no_grad()
def _draw(parameter: Tensor, scale: Tensor, generator: torch.Generator) -> None:
    """Draw one path after the other on the CPU, so that path n does not depend on how many follow it."""
    for path in parameter.unbind():
        noise = torch.randn(path.shape, generator=generator, dtype=torch.float32)
        path.copy_(noise * scale.to("cpu", torch.float32))


def _chosen(parameter: Tensor, paths: Sequence[int]) -> Tensor:
    """Return the rows of the paths in the order wanted; the parameter itself for all of them."""
    if list(paths) == list(range(parameter.shape[0])):
        return parameter
    return parameter[list(paths)]
