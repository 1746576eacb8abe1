"""The memory of a training step on one process, by arithmetic.

Every number is a floor: what the algorithm must keep, without padding, the allocator's fragments and the
workspace of kernels. Shapes only: a backbone on the meta device is enough. Here: formulas. Elsewhere on
purpose: operations (``training.arithmetic``), which run is meant (``training.plan``); ``benchmarks/plan.py``
compares with measured steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel_decoupling.model.backbone import Backbone
from parallel_decoupling.objective.mutual_information import MutualInformation
from parallel_decoupling.training.arithmetic import (
    ImageCost,
    image_factor,
    language_stack,
    vision_stack,
    vision_trains,
)
from parallel_decoupling.training.optimization import MIConfig
from parallel_decoupling.training.strategies import sharded_blocks
from parallel_decoupling.training.terms import (
    contrastive_terms,
    estimator_nll,
    frozen,
    gather_pairs,
    mutual_information_terms,
)

FP32 = 4
"""Bytes."""
RGB = 3
"""Values per pixel."""


def pixel_bytes(config: Any, image: ImageCost) -> int:
    """Bytes of one image as the processor gives it, in fp32.

    With a merger (the Qwen-VL families) every patch comes once per frame of ``temporal_patch_size``; with
    any-resolution tiles (LLaVA-1.6) every tile comes at the tower's size.

    Args:
        config: of the backbone.
        image: what ``arithmetic.image_cost`` says of it.

    Relations:
        Equals the bytes of the processor's ``pixel_values`` of such an image.
    """
    vision = config.vision_config
    if image_factor(config) > 1:
        return int(FP32 * RGB * image.patches * vision.temporal_patch_size * vision.patch_size**2)
    return int(FP32 * RGB * image.patches // image.context * vision.image_size**2)


def layer_bytes(backbone: Backbone, *, element: int, context: float, keys_per_token: float) -> float:
    """Bytes per token that the backward pass of one decoder layer needs.

    In order: both norms keep their input in fp32 (and those of query and key heads, where a family has them);
    attention keeps query and output, key and value repeated to all query heads, and its mask; the gated MLP
    keeps what its activation function and its product meet. LoRA and DoRA keep the input of every adapted
    layer (a copy each, unless nothing is cast) and its low-rank image; with dropout also a byte per input;
    DoRA also both outputs of the layer.
    ``full`` keeps the inputs of all linear layers, shared, and the normalised states.

    Args:
        backbone: what is adapted, and how.
        element: bytes per value of the matrix products: 2 under bfloat16, 4 otherwise.
        context: keys that a token meets; the mask's columns.
        keys_per_token: keys and values per token of a row, ``(P + L) / L``.

    Relations:
        Within a few per cent of what autograd saves for a further layer.
    """
    stack, adapter, layer = language_stack(backbone), backbone.adapter, sharded_blocks(backbone)[0]
    parameters = dict(layer.named_parameters())
    norms = 2 * stack.hidden
    if any(name.endswith("q_norm.weight") for name in parameters):
        norms += stack.attention + stack.key_value
    kept = FP32 * norms + element * (2 * stack.attention * (1 + keys_per_token) + context)
    kept += element * 3 * stack.intermediate
    if adapter.kind == "full":
        return kept + element * (4 * stack.hidden + stack.intermediate)
    inputs = [(name.rsplit(".", 4)[0], p.shape[1]) for name, p in parameters.items() if "lora_A" in name]
    cast = element < FP32 or backbone.dtype != torch.float32
    kept += element * (
        sum(size for _, size in (inputs if cast else set(inputs))) + adapter.rank * len(inputs)
    )
    if adapter.kind == "dora":
        kept += element * 2 * sum(p.shape[0] for name, p in parameters.items() if "lora_B" in name)
    return kept + (sum(size for _, size in inputs) if adapter.dropout else 0)


def saved_bytes(function: Callable[[], Any], without: Iterable[Tensor] = ()) -> int:
    """Run ``function`` and add up what autograd keeps for its backward pass, each storage once.

    Args:
        function: its result is dropped.
        without: tensors that exist anyway, such as parameters; their storages do not count.
    """
    storages = [tensor.untyped_storage() for tensor in without]
    known = {storage._cdata for storage in storages}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in known)


def objective_bytes(
    num_paths: int,
    embed_dim: int,
    mi: MIConfig,
    *,
    queries: int,
    candidates: int,
    aggregate_dim: int,
    dims: Sequence[int] = (),
) -> dict[str, int]:
    """Bytes that the objective keeps on every process, which all see all rows; counted on fake tensors.

    Args:
        num_paths: N.
        embed_dim: D.
        mi: the estimator.
        queries: of all processes.
        candidates: of all processes, hard negatives among them.
        aggregate_dim: D'.
        dims: smaller ones of Matryoshka training.

    Returns:
        ``embeddings`` (all rows and aggregates, as received and joined), ``contrastive`` and ``estimator``
        (its fit or its term in the objective, whichever keeps more).
    """
    with FakeTensorMode():
        estimator = MutualInformation(
            mi.kind, num_paths=num_paths, embed_dim=embed_dim, hidden_size=mi.hidden_size
        )
        pairs = gather_pairs(
            torch.zeros(queries, num_paths, embed_dim, requires_grad=True),
            torch.zeros(candidates, num_paths, embed_dim, requires_grad=True),
            torch.zeros(candidates, dtype=torch.int64),
            lambda paths: paths.flatten(1)[:, : aggregate_dim * paths.shape[2] // embed_dim].clone(),
            dims,
        )
        contrastive = saved_bytes(
            lambda: contrastive_terms(pairs, torch.ones(()), symmetric=False, with_aggregate=True)
        )
        fit = saved_bytes(lambda: estimator_nll(estimator, pairs)) if estimator.needs_fit else 0
        with frozen(estimator):
            term = saved_bytes(lambda: mutual_information_terms(estimator, pairs))
    joined = FP32 * (queries + candidates) * (num_paths * embed_dim + aggregate_dim)
    joined += joined * sum(dims) // embed_dim
    return {"embeddings": 2 * joined, "contrastive": contrastive, "estimator": max(term, fit)}


def activation_bytes(
    backbone: Backbone,
    *,
    rows: int,
    paths_per_layer: float,
    row_tokens: int,
    prefix_length: int,
    patches: int,
    element: int,
    checkpointing: bool,
    prompt_tokens: int = 0,
) -> dict[str, float]:
    """Bytes that a forward pass keeps for its backward pass, and those of a layer at work.

    Language model: ``rows * row_tokens * paths_per_layer`` tokens in every layer, ``layer_bytes`` each. With
    checkpointing every layer keeps its input only, and one layer at a time is as without. Vision tower: if it
    trains, per patch and layer the inputs of both norms, the attention's query, key, value and output, and
    twice the width of its MLP. Workspace: two values of that width while a layer of the tower runs, or the
    gradients of the three wide values in the MLP of a language layer that goes back.

    Args:
        backbone: what trains, and the dtype of the residual stream.
        rows: inputs, each with an image.
        paths_per_layer: rows of the language model per input, mean over layers.
        row_tokens: L.
        prefix_length: P.
        patches: of one image.
        element: bytes per value of the matrix products.
        checkpointing: whether layers are recomputed.
        prompt_tokens: of shallow prefixes in all forward passes that are alive; never recomputed.

    Returns:
        ``activations`` and ``workspace of a layer``.
    """
    language, vision = language_stack(backbone), vision_stack(backbone)
    context = row_tokens + prefix_length
    layer = layer_bytes(backbone, element=element, context=context, keys_per_token=context / row_tokens)
    tokens = rows * row_tokens * paths_per_layer
    stream = language.hidden * backbone.dtype.itemsize
    kept = tokens * (language.layers * stream + layer if checkpointing else language.layers * layer)
    kept += prompt_tokens * language.layers * layer
    if vision_trains(backbone):
        block = element * (6 * vision.hidden + 2 * vision.intermediate)
        stream = vision.hidden * backbone.dtype.itemsize
        kept += rows * patches * (vision.layers * stream + block if checkpointing else vision.layers * block)
    tower, going_back = rows * patches * 2 * vision.intermediate, tokens * 3 * language.intermediate
    return {"activations": kept, "workspace of a layer": element * max(tower, going_back)}
