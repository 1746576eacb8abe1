"""The memory of a training step on one process, by arithmetic.

Every number is a floor: what the algorithm must keep, without padding, the allocator's fragments and the
workspace of kernels. Shapes only: a backbone on the meta device is enough. Here: formulas. Elsewhere on
purpose: operations (``training.arithmetic``), which run is meant (``training.plan``); ``benchmarks/plan.py``
compares with measured steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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

FP32, BF16 = 4, 2
"""Bytes."""
NF4 = 0.5 + 1 / 64 + FP32 / (64 * 256)
"""Bytes per value: four bits, one byte of scale for 64 values, one fp32 scale of scales for 256 of those."""
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
    keeps what its activation function and its product meet. Trained LoRA and DoRA keep the input of every
    adapted layer (a copy each, unless nothing is cast) and its low-rank image; with dropout also a byte per
    input; DoRA also both outputs of the layer, one in the dtype of its bias.
    ``full`` keeps the normalised states and the inputs of all linear layers, which share them unless they
    are cast. Copies of weights are not per token: see ``weight_copies``.

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
    cast = element < FP32 or backbone.dtype != torch.float32
    if adapter.kind == "full":
        inputs_of_block = (5 if cast else 2) * stack.hidden + stack.intermediate
        return kept + FP32 * 2 * stack.hidden + element * inputs_of_block
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    inputs = [(name.rsplit(".", 4)[0], p.shape[1]) for name, p in trained.items() if "lora_A" in name]
    kept += element * (
        sum(size for _, size in (inputs if cast else set(inputs))) + adapter.rank * len(inputs)
    )
    if adapter.kind == "dora":
        for name, p in trained.items():
            if "lora_B" in name:
                bias = parameters.get(f"{name.split('.lora_B')[0]}.base_layer.bias")
                kept += p.shape[0] * (element + (element if bias is None else max(element, bias.itemsize)))
    return kept + (sum(size for _, size in inputs) if adapter.dropout else 0)


@dataclass(frozen=True)
class WeightCopies:
    """Bytes of the bfloat16 copies of weights that a forward pass keeps for its backward pass.

    Attributes:
        layer: of one language layer, mean over layers.
        vision: of everything outside the language layers.
    """

    layer: float = 0.0
    vision: float = 0.0


def weight_copies(backbone: Backbone, *, quantized: bool) -> WeightCopies:
    """Copies of linear layers' weights that autocast makes.

    A product with a fp32 weight, trained or frozen, keeps a bfloat16 copy of it for the gradient of its
    input. Lightning switches autocast's cache off, so every forward pass makes its own copies. They go with
    its graph; with gradient checkpointing they live only while their layer runs or is recomputed. DoRA with
    dropout multiplies frozen weights a second time, in a copy whatever their dtype. 4-bit weights leave no
    other copy: they are unpacked again on the way back.

    Args:
        backbone: what is adapted, and the dtype of its weights.
        quantized: whether frozen weights are in 4 bits.

    Relations:
        Without gradient checkpointing, what a further layer of fp32 keeps more than one of bfloat16.
    """
    twice = backbone.adapter.kind == "dora" and backbone.adapter.dropout > 0

    def copies(module: nn.Module) -> int:
        size = 0
        for name, weight in _linear_weights(module):
            in_fp32 = weight.dtype == torch.float32 and not (quantized and "lora_" not in name)
            size += BF16 * weight.numel() * (in_fp32 + (twice and name.endswith("base_layer")))
        return size

    layers = backbone.base.get_submodule(backbone.family.layers)
    of_layers = copies(layers)
    return WeightCopies(layer=of_layers / backbone.num_layers, vision=copies(backbone.base) - of_layers)


def _linear_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, m.weight) for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def weight_sizes(backbone: Backbone, *, quantized: bool) -> dict[int, float]:
    """Bytes of every parameter of the base model, by ``id``.

    Quantized: as bitsandbytes stores NF4 with double quantisation, all linear layers' weights but adapters'
    in ``NF4`` bytes per value; biases, norms, embeddings and convolutions as they are.
    """
    sizes = {id(p): float(p.numel() * p.itemsize) for p in backbone.base.parameters()}
    if quantized:
        frozen_linear = [w for name, w in _linear_weights(backbone.base) if "lora_" not in name]
        sizes |= {id(weight): NF4 * weight.numel() for weight in frozen_linear}
    return sizes


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
    layers: int,
    paths_per_layer: float,
    row_tokens: int,
    prefix_length: int,
    patches: int,
    element: int,
    checkpointing: bool,
    prompt_tokens: int = 0,
    passes: int = 1,
    copies: WeightCopies = WeightCopies(),
) -> dict[str, float]:
    """Bytes that forward passes keep for their backward pass, and those of a layer at work.

    Language model: ``rows * row_tokens * paths_per_layer`` tokens in every layer, ``layer_bytes`` each, and
    the copies of its weights. With checkpointing every layer keeps its input only, and one layer at a time is
    as without; what the vision tower copies then is left out. Vision tower: if it
    trains, per patch and layer the inputs of both norms, the attention's query, key, value and output, and
    twice the width of its MLP. Workspace: two values of that width while a layer of the tower runs, or the
    gradients of the three wide values in the MLP of a language layer that goes back.

    Args:
        backbone: what trains, and the dtype of the residual stream.
        rows: inputs, each with an image.
        layers: of the language model that a gradient passes.
        paths_per_layer: rows of the language model per input, mean over these layers.
        row_tokens: L.
        prefix_length: P.
        patches: of one image.
        element: bytes per value of the matrix products.
        checkpointing: whether layers are recomputed.
        prompt_tokens: of shallow prefixes in all forward passes that are alive; never recomputed.
        passes: forward passes that are alive.
        copies: of weights, in each of them.

    Returns:
        ``activations`` and ``workspace of a layer``.
    """
    language, vision = language_stack(backbone), vision_stack(backbone)
    context = row_tokens + prefix_length
    layer = layer_bytes(backbone, element=element, context=context, keys_per_token=context / row_tokens)
    tokens = rows * row_tokens * paths_per_layer
    stream = language.hidden * backbone.dtype.itemsize
    kept = tokens * (layers * stream + layer if checkpointing else layers * layer)
    kept += copies.layer * (1 if checkpointing else layers * passes)
    if prompt_tokens:
        kept += layers * (prompt_tokens * layer + passes * copies.layer)
    if vision_trains(backbone):
        block = element * (6 * vision.hidden + 2 * vision.intermediate)
        stream = vision.hidden * backbone.dtype.itemsize
        kept += rows * patches * (vision.layers * stream + block if checkpointing else vision.layers * block)
        kept += 0 if checkpointing else passes * copies.vision
    tower, going_back = rows * patches * 2 * vision.intermediate, tokens * 3 * language.intermediate
    return {"activations": kept, "workspace of a layer": element * max(tower, going_back)}
