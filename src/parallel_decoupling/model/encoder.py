"""ParallelEncoder: tokenised inputs to one embedding per path, and their aggregate."""

import os
from collections.abc import Mapping, Sequence
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.adapters import draw_adapters, split_adapters
from parallel_decoupling.model.attention import PathStates
from parallel_decoupling.model.backbone import Backbone, load_backbone
from parallel_decoupling.model.open_clip import PREFIX, OpenCLIPEncoder, is_open_clip, load_open_clip
from parallel_decoupling.model.prefixes import PrefixLayers, make_prefixes, prefix_range
from parallel_decoupling.model.turns import Turns
from parallel_decoupling.option_types import NonNegativeInt, PositiveInt, checked


def last_token(attention_mask: Tensor) -> Tensor:
    """Return the number ``[B]`` of each row's last real token; ``[B, L]`` may be padded on either side."""
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).to(torch.int64).argmax(dim=1)


class ParallelEncoder(nn.Module):
    """N unit-norm embeddings of each input, one per path, from one forward pass.

    Path n is the backbone with the n-th prefix in its attention layers; the embedding is the last real
    token's state after the final norm, L2-normalised ("ours": the pooling of the VLM2Vec baseline).

    ``PDFEmbedder`` documents the options. Layers below the prefixed ones are computed once for all paths,
    those above see no prefix, but every path. Fresh LoRA weights are drawn anew from ``seed``.

    Relations:
        ``num_paths=1, prefix_length=0`` equals the stock backbone with last-token pooling.
        N paths in one forward equal N forwards with one path.
        ``prefix_type="shallow"`` equals the stock backbone on [prompt embeddings; tokens], and at the start,
        with ``prefix_init="meta"``, ``"deep"``.
        ``aggregation="learned"`` and ``"linear"`` equal ``"mean"`` at the start.
    """

    @checked()
    def __init__(
        self,
        backbone: Backbone,
        *,
        num_paths: PositiveInt = 4,
        prefix_length: NonNegativeInt = 8,
        prefix_layers: PrefixLayers = 0,
        prefix_type: Literal["deep", "shallow"] = "deep",
        prefix_init: Literal["meta", "random"] = "meta",
        aggregation: Literal["mean", "concat", "learned", "linear"] = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone, self.turns = backbone, Turns()
        self.num_paths, self.prefix_length, self.prefix_layers = num_paths, prefix_length, prefix_layers
        self.prefix_type, self.aggregation = prefix_type, aggregation
        self.prefix_range = prefix_range(prefix_layers, backbone.num_layers)
        self._check_sizes()
        self.embed_dim: int = backbone.hidden_size
        self.aggregate_dim: int = self.embed_dim * (num_paths if aggregation == "concat" else 1)
        self.processor: Any = backbone.processor
        self.image_token, self.template = backbone.image_token, backbone.template
        if backbone.adapter.per_path:
            split_adapters(backbone.base, num_paths, f"{backbone.family.layers}.", self.prefix_range.start)
        draw_adapters(backbone.base, seed, fresh=backbone.initial_adapter is None)
        size = num_paths, prefix_length, self.prefix_range
        prefixes = make_prefixes(backbone, prefix_type, prefix_init, seed, *size) if prefix_length else None
        self.prefixes = prefixes
        self.path_logits = nn.Parameter(torch.zeros(num_paths)) if aggregation == "learned" else None
        self.path_maps = None
        if aggregation == "linear":
            self.path_maps = nn.Parameter(torch.eye(self.embed_dim).repeat(num_paths, 1, 1))  # [N, D, D]

    def _check_sizes(self) -> None:
        own_adapters = self.backbone.adapter.per_path
        if self.prefix_length == 0 and self.num_paths > 1 and not own_adapters:
            raise ValueError("prefix_length must be 1 or more unless num_paths=1 or adapter.per_path")
        if own_adapters and self.prefix_type == "shallow":
            raise ValueError("adapter.per_path works with prefix_type='deep', not with 'shallow'")
        if self.prefix_type == "shallow" and len(self.prefix_range) < self.backbone.num_layers:
            raise ValueError("prefix_type='shallow' reaches every layer: set prefix_layers=0")

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what trains: ``adapters`` (or the whole backbone), ``prefixes`` and ``aggregation``."""
        return {
            "adapters": [parameter for parameter in self.backbone.parameters() if parameter.requires_grad],
            "prefixes": list(self.prefixes.parameters()) if self.prefixes is not None else [],
            "aggregation": [each for each in (self.path_logits, self.path_maps) if each is not None],
        }

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed ``B`` tokenised rows by the wanted paths, in that order: ``[B, N', D]`` fp32, unit norm.

        Relations:
            ``forward(inputs, [i])`` equals column ``i`` of ``forward(inputs)``.
        """
        chosen = check_paths(paths, self.num_paths)
        key_values = None if self.prefixes is None else self.prefixes.states(chosen, self.backbone)
        states = PathStates(chosen, key_values, self.prefix_range.start)
        states.pooled = last_token(inputs.tokens["attention_mask"])
        states_RLD = self.backbone(inputs.tokens, joined_vision(inputs.vision), states)
        states_NBLD = states_RLD.unflatten(0, (len(chosen), -1))
        pooled_NBD = states_NBLD[:, torch.arange(len(inputs), device=states_RLD.device), states.pooled]
        return F.normalize(pooled_NBD.transpose(0, 1).float(), dim=-1)

    def aggregate(self, embeddings: Tensor) -> Tensor:
        """Combine embeddings ``[B, N, D]`` of all or the first paths to ``[B, D]``; concat to ``[B, N * D]``.

        ``linear`` adds up ``path_n @ path_maps[n]``, of which ``compress`` makes principal directions.

        Relations:
            With one path it equals that path. The dot product of two concatenations is the mean over
            paths of the cosines of aligned paths.
        """
        if self.aggregation == "concat":
            return F.normalize(embeddings.float().flatten(1), dim=-1)
        if self.path_maps is not None and embeddings.shape[1] > 1:
            maps_NDD = self.path_maps[: embeddings.shape[1], : embeddings.shape[2]].float()
            return F.normalize(torch.einsum("bnd,nde->be", embeddings.float(), maps_NDD), dim=-1)
        if self.path_logits is None:
            return F.normalize(embeddings.float().mean(dim=1), dim=-1)
        weight_N = self.path_logits[: embeddings.shape[1]].float().softmax(dim=0)
        return F.normalize(torch.einsum("n,bnd->bd", weight_N, embeddings.float()), dim=-1)


Encoder: TypeAlias = ParallelEncoder | OpenCLIPEncoder


def build_encoder(backbone: str, settings: Mapping[str, Any]) -> Encoder:
    """Build an encoder, or an OpenCLIP model, with those settings that are options of the encoder's parts."""
    loading, paths = (
        {name: settings[name] for name in list(signature(part).parameters)[1:] if name in settings}
        for part in (load_backbone, ParallelEncoder)
    )
    if is_open_clip(backbone):
        return load_open_clip(backbone, **loading, **paths)
    return ParallelEncoder(load_backbone(backbone, **loading), **paths)


def absolute_name(name: str) -> str:
    """Return a backbone's name with a local folder or weights file in it as an absolute path."""
    if os.path.isdir(name):  # False for names that no folder can have
        return str(Path(name).resolve())
    architecture, slash, weights = name.partition("/")
    if name.startswith(PREFIX) and os.path.isfile(weights):
        return f"{architecture}{slash}{Path(weights).resolve()}"
    return name


def truncate(paths: Tensor, dim: int) -> Tensor:
    """Keep the first ``dim`` coordinates of every path and bring them back to unit norm (Matryoshka)."""
    return F.normalize(paths[..., :dim], dim=-1)


def check_paths(paths: Sequence[int] | None, num_paths: int) -> list[int]:
    """Return path numbers as they are, all of them for None; a ValueError if one does not exist."""
    chosen: list[Any] = list(range(num_paths) if paths is None else paths)
    whole = all(isinstance(path, Integral) and not isinstance(path, bool) for path in chosen)
    if not chosen or not whole or min(chosen) < 0 or max(chosen) >= num_paths:
        raise ValueError(f"paths must name some of 0 to {num_paths - 1}, got {chosen}")
    return [int(path) for path in chosen]


def check_dim(dim: int, embed_dim: int, name: str) -> int:
    """Return ``dim`` as an int; a ValueError unless it is whole and from 1 to ``embed_dim``."""
    if not isinstance(dim, Integral) or isinstance(dim, bool) or not 1 <= dim <= embed_dim:
        raise ValueError(f"{name}={dim!r}: embeddings have {embed_dim} dimensions; use 1 to {embed_dim}")
    return int(dim)


def nested_dims(dims: Sequence[int] | None, embed_dim: int) -> tuple[int, ...]:
    """Return the distinct dimensions below ``embed_dim`` at which training also contrasts, largest first."""
    checked = {check_dim(dim, embed_dim, "matryoshka_dims") for dim in dims or ()}
    return tuple(sorted(checked - {embed_dim}, reverse=True))


def joined_vision(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the rows' image tensors along dim 0, key by key, with zeros at the end of other dims."""
    joined = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        tensors = [row[key] for row in rows if key in row]
        sizes = [max(each) for each in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        joined[key] = tensors[0].new_zeros(sum(map(len, tensors)), *sizes)
        for part, tensor in zip(torch.split(joined[key], list(map(len, tensors))), tensors, strict=True):
            part[(slice(None), *map(slice, tensor.shape[1:]))] = tensor
    return joined
