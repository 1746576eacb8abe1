"""From B rows to N * B: the hooks that repeat a batch once per path, path-major."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parallel_decoupling.model.attention import PathStates

CALL: ContextVar[PathStates | None] = ContextVar("path_states", default=None)
"""The paths that this thread computes at the moment: every call has its own, on shared modules."""


def _repeat(value: Any, batch_size: int, num_paths: int) -> Any:
    """Repeat each tensor with ``batch_size`` rows, also inside a tuple; leave all else alone."""
    if isinstance(value, tuple):
        return tuple(_repeat(item, batch_size, num_paths) for item in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch_size:
        return value
    return value.repeat(num_paths, *(1 for _ in value.shape[1:]))


def hand_down(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give this call's paths to the language model, which hands them to its layers: a forward pre-hook."""
    return args, {**kwargs, "path_states": CALL.get()}


def enter_layer(
    layer_index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Go from B to N * B rows at the first prefixed layer: a forward pre-hook of every decoder layer.

    The layer at ``first_layer`` repeats the hidden states; it and all above repeat the mask and position
    embeddings, which the language model computed for ``B`` rows. Without ``path_states`` it does nothing.
    """
    states: PathStates | None = kwargs.get("path_states")
    if states is None or states.num_paths == 1 or layer_index < states.first_layer:
        return None
    hidden, *rest = args
    if layer_index == states.first_layer:
        batch_size = hidden.shape[0]
        hidden = _repeat(hidden, batch_size, states.num_paths)
    else:
        batch_size = hidden.shape[0] // states.num_paths
    repeated = {}
    for name, value in kwargs.items():
        make = partial(_repeat, value, batch_size, states.num_paths)
        repeated[name] = states.once("repeat", value, make) if isinstance(value, Tensor | tuple) else value
    return (hidden, *rest), repeated


@contextmanager
def calling(states: PathStates | None) -> Iterator[None]:
    """Let this thread compute these paths within the block."""
    before = CALL.set(states)
    try:
        yield
    finally:
        CALL.reset(before)


def same_call() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts of a checkpointed layer's two runs: the second knows the paths of the first.

    The backward pass runs a layer's ``forward`` again, without hooks, and on a GPU in another thread.
    """
    return nullcontext(), calling(CALL.get())


def pooled_only(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Run the last layer's MLP on the pooled token of each row of ``[R, L, D]``; zeros for all others.

    After the last attention no other token's state is read. Without ``pooled`` it is the MLP itself.
    """
    call = CALL.get()
    if call is None or call.pooled is None:
        return mlp(hidden)
    token_R = call.pooled.repeat(len(hidden) // len(call.pooled))
    row_R = torch.arange(len(hidden), device=hidden.device)
    output_R1D = mlp(hidden[row_R, token_R].unsqueeze(1))
    return torch.zeros_like(hidden, dtype=output_R1D.dtype).index_put((row_R, token_R), output_R1D[:, 0])


def deepstack(
    process: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, mask: Tensor, visual: Tensor
) -> Tensor:
    """Add image features (Qwen3-VL) to the rows of every path; ``process`` does it for the rows of one."""
    num_paths = hidden.shape[0] // mask.shape[0]
    return process(hidden, mask.repeat(num_paths, 1), visual.repeat(num_paths, 1))
