"""Attention with a prefix: extra keys and values in front of the real ones, for N paths in one pass.

A prefix also stands in front of every window: in a sliding-window layer all tokens see all of it, and the
window counts real tokens alone ("ours"; a filled cache would lose its prefix once the window has passed it).
Rows of a repeated batch are path-major: row ``n * B + b`` is path ``n`` of sample ``b``.
Shapes as in ``batch``; ``R = N * B`` rows.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask

Attended = tuple[Tensor, Tensor | None]
"""What an attention function of transformers returns: outputs ``[R, L, heads, H]``, and weights or None."""


class PathStates:
    """What one forward call hands to every decoder layer as ``path_states``: its paths and their prefixes.

    ``paths`` are the numbers of the N computed paths; ``key_values`` ``[N, Y, 2, K, P, H]`` are keys
    (post-rotary) and values of the layers from ``first_layer`` on, None without prefixes. Layers below it see
    ``B`` rows, the others ``N * B``. ``pooled`` ``[B]`` is the number of the one token of each row whose
    last state is wanted, None for all of them.
    """

    def __init__(self, paths: Sequence[int], key_values: Tensor | None, first_layer: int = 0) -> None:
        self.paths = list(paths)
        self.key_values = key_values
        self.first_layer = first_layer
        self.pooled: Tensor | None = None
        self.num_paths = len(self.paths)
        self.prefix_length = 0 if key_values is None else key_values.shape[4]
        self._memo: dict[tuple[str, int], tuple[Any, Any]] = {}

    def layer(self, layer_index: int) -> tuple[Tensor, Tensor] | None:
        """Return keys and values ``[N, K, P, H]`` of a layer, or None when the layer has no prefix."""
        row = layer_index - self.first_layer
        if self.key_values is None or not 0 <= row < self.key_values.shape[1]:
            return None
        return self.key_values[:, row, 0], self.key_values[:, row, 1]

    def once(self, purpose: str, source: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed once per ``source`` object in this forward call."""
        key = (purpose, id(source))
        if key not in self._memo:
            self._memo[key] = (source, make())  # holding the source keeps its id from being reused
        return self._memo[key][1]


def prepend(prefix: Tensor, states: Tensor) -> Tensor:
    """Put each path's prefix ``[N, K, P, H]`` in front of its rows ``[R, K, L, H]``."""
    states_NBKLH = states.reshape(prefix.shape[0], -1, *states.shape[1:])
    prefix_NBKPH = prefix.to(states.dtype)[:, None].expand(-1, states_NBKLH.shape[1], -1, -1, -1)
    return torch.cat((prefix_NBKPH, states_NBKLH), dim=3).flatten(0, 1)


def extend_mask(mask: Tensor | None, query: Tensor, prefix_length: int, *, causal: bool) -> Tensor:
    """Return a boolean or additive mask ``[R or 1, 1, L, P + L]`` with ``P`` visible columns in front.

    None is plain causal (or no) masking of ``query`` ``[R, heads, L, H]``, which must become explicit: with
    more keys than queries SDPA's own causal mask hides real keys.
    """
    if mask is None:
        mask = torch.ones(1, 1, query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril() if causal else mask
    return F.pad(mask, (prefix_length, 0), value=mask.dtype == torch.bool)


def extend_padding_mask(
    mask: Tensor | None, query: Tensor, prefix_length: int, *, causal: bool
) -> Tensor | None:
    """Return FlashAttention's padding mask ``[R, P + L]``; its causal mask is aligned to the last key."""
    return None if mask is None else F.pad(mask, (prefix_length, 0), value=1)


def extend_block_mask(mask: BlockMask, query: Tensor, prefix_length: int, *, causal: bool) -> BlockMask:
    """Return flex attention's mask of ``B`` rows for all of ``query``: row ``r`` is sample ``r % B``."""
    visible, batch_size = mask.mask_mod, mask.shape[0]

    def extended(row: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        real_key = (key_index - prefix_length).clamp(min=0)
        return (key_index < prefix_length) | visible(row % batch_size, head, query_index, real_key)

    rows, _, length, _ = query.shape
    compiled = query.device.type == "cuda"
    return create_block_mask(
        extended, rows, None, length, prefix_length + length, device=query.device, _compile=compiled
    )


def _attend(
    function: Callable[..., Attended],
    extend: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    path_states: PathStates | None = None,
    **kwargs: Any,
) -> Attended:
    prefix = path_states.layer(cast(Any, module).layer_idx) if path_states else None
    if path_states is None or prefix is None:
        if path_states and isinstance(attention_mask, BlockMask) and len(query) > attention_mask.shape[0]:
            mask = attention_mask  # of B rows: a layer above the prefixes has N * B
            extended = partial(extend_block_mask, mask, query, 0, causal=True)
            attention_mask = path_states.once("mask without prefix", mask, extended)
        return function(module, query, key, value, attention_mask, **kwargs)
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    purpose = f"mask of {query.shape[2]}, causal {causal}"  # None is one object whatever it stands for
    extended = partial(extend, attention_mask, query, path_states.prefix_length, causal=causal)
    mask = path_states.once(purpose, attention_mask, extended)
    return function(module, query, prepend(prefix[0], key), prepend(prefix[1], value), mask, **kwargs)


def _flash(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Attended:
    """Call FlashAttention, whose window would count the prefix: without it where it holds all real tokens."""
    length, window = query.shape[2], kwargs.get("sliding_window")
    if window is not None and key.shape[2] > length:
        if length > window:
            where = f"texts of {length} tokens in layers with a window of {window}"
            advice = "use attention='sdpa' or 'flex_attention'"
            raise ValueError(f"FlashAttention cannot show a prefix to {where}: {advice}.")
        kwargs["sliding_window"] = None
    return flash_attention_forward(module, query, key, *args, **kwargs)


def _family_eager(module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
    """Call the eager attention of the model family that a module comes from."""
    for owner in type(module).__mro__:  # a sharded module is a subclass defined in another file
        function = getattr(sys.modules[owner.__module__], "eager_attention_forward", None)
        if function is not None:
            return cast(Attended, function(module, *args, **kwargs))
    raise ValueError(f"{type(module).__name__} has no eager attention; use attention='sdpa'")


_FLASH = partial(_attend, _flash, extend_padding_mask)
_FLEX = partial(_attend, flex_attention_forward, extend_block_mask)
_FUNCTIONS: dict[str, tuple[str, Any, Any]] = {
    "sdpa": ("prefix_sdpa", partial(_attend, sdpa_attention_forward, extend_mask), sdpa_mask),
    "eager": ("prefix_eager", partial(_attend, _family_eager, extend_mask), eager_mask),
    # transformers finds the kernel by this very name, and without a prefix the function is the stock one
    "flash_attention_2": ("flash_attention_2", _FLASH, flash_attention_mask),
    "flex_attention": ("prefix_flex", _FLEX, flex_attention_mask),
}


for _name, _function, _mask_function in _FUNCTIONS.values():  # on import, so that an unpickled model finds it
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask_function)


def prefix_attention(base: str = "sdpa") -> str:
    """Return the name by which transformers knows prefix attention on top of ``base``, for the text model.

    Relations:
        Without ``path_states`` the result equals ``base``. With them it equals ``base`` with a key/value
        cache filled with the prefix.
    """
    return _FUNCTIONS[base][0]
