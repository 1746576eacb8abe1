"""Deep prefixes: the trainable keys and values that make one backbone see one input in N ways.

Here: the parameters and their initialisation from given statistics or states. Elsewhere: how attention uses
them (``attention``), how the states of a meta-prompt are measured (``backbone``).
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


class DeepPrefixes(nn.Module):
    """N prefixes of P extra keys and values in every prefixed attention layer.

    Path n attends to ``softmax(q [K_n ; K]^T / sqrt(H)) [V_n ; V]``. Keys are stored after rotary embedding,
    so real tokens keep the positions that they have without a prefix ("ours"; arXiv 2511.01588 states deep
    prefixes, not their positions). Parameters are fp32 whatever the backbone's dtype.

    Args:
        num_paths: N, at least 1.
        num_layers: prefixed layers Y, at least 1.
        num_key_value_heads: K of the backbone.
        prefix_length: P in tokens, at least 1.
        head_dim: H of the backbone.

    Raises:
        ValueError: when a size is below 1.
    """

    def __init__(
        self, *, num_paths: int, num_layers: int, num_key_value_heads: int, prefix_length: int, head_dim: int
    ) -> None:
        super().__init__()
        shape = (num_paths, num_layers, 2, num_key_value_heads, prefix_length, head_dim)
        if min(shape) < 1:
            raise ValueError(f"prefixes need sizes of at least 1, got [N, Y, 2, K, P, H] = {list(shape)}")
        self.key_values = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    @torch.no_grad()
    def init_random(self, scale: Tensor, generator: torch.Generator) -> None:
        """Draw normal keys and values at the scale of real ones.

        Args:
            scale: ``[Y, 2]``, standard deviation of real keys and values per layer.
            generator: on the CPU; paths are drawn one after the other, so path n does not depend on how many
                paths follow it.
        """
        for path in self.key_values.unbind():
            noise = torch.randn(path.shape, generator=generator, dtype=torch.float32)
            path.copy_(noise * scale.to("cpu", torch.float32)[:, :, None, None, None])

    @torch.no_grad()
    def init_from_states(self, states: Tensor) -> None:
        """Copy measured keys and values.

        Args:
            states: ``[N, Y, 2, K, P, H]``, e.g. one meta-prompt per path run through the backbone.

        Raises:
            ValueError: when the shape differs.
        """
        if states.shape != self.key_values.shape:
            raise ValueError(
                f"states have shape {list(states.shape)}, prefixes {list(self.key_values.shape)}"
            )
        self.key_values.copy_(states)

    def states(self, paths: Sequence[int], first_layer: int, dtype: torch.dtype) -> PrefixStates:
        """Return the chosen paths' prefixes for one forward call.

        Args:
            paths: path numbers, in the order of the rows.
            first_layer: layer that the first stored layer belongs to.
            dtype: of the backbone.
        """
        chosen: Tensor = self.key_values
        if list(paths) != list(range(chosen.shape[0])):
            chosen = chosen[list(paths)]
        return PrefixStates(chosen.to(dtype), first_layer)
