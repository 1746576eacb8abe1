"""ParallelEncoder: tokenised inputs to one embedding per path, and their aggregate.

Elsewhere on purpose: the call of the backbone (``backbone``), tokenisation (``data.collate``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.model.attention import PrefixStates
from parallel_decoupling.model.backbone import Backbone, load_backbone
from parallel_decoupling.model.open_clip import PREFIX, OpenCLIPEncoder, is_open_clip, load_open_clip
from parallel_decoupling.model.prefixes import (
    META_PROMPTS,
    DeepPrefixes,
    PrefixLayers,
    ShallowPrefixes,
    prefix_range,
)


def last_token(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the state ``[R, D]`` of each row's last real token.

    Args:
        states: ``[R, L, D]``.
        attention_mask: ``[R, L]``, 1 = real token, padding on either side.
    """
    length = attention_mask.shape[1]
    last_R = length - 1 - attention_mask.flip(1).to(torch.int64).argmax(dim=1)
    return states[torch.arange(states.shape[0], device=states.device), last_R]


class ParallelEncoder(nn.Module):
    """N unit-norm embeddings of each input, one per path, from one forward pass.

    Path n is the backbone with the n-th prefix in its attention layers; the embedding is the last real
    token's state after the final norm, L2-normalised ("ours": the pooling of the VLM2Vec baseline).

    Args:
        backbone: from ``load_backbone``, or from ``meta_backbone`` for its shapes alone. Fresh LoRA weights
            are drawn anew from ``seed``.
        num_paths: N, at least 1.
        prefix_length: P, tokens per prefix. 0 (no prefix) only with ``num_paths=1``.
        prefix_layers: first layer with a prefix, 0 to ``backbone.num_layers - 1``, or ``[start, stop]``:
            layers start to stop - 1 have one. The layers below are shared by all paths and computed once;
            those above see no prefix, but every path.
        prefix_type: ``"deep"`` trains keys and values of each of these layers, ``"shallow"`` input embeddings
            alone, whose keys and values the language model computes (prompt tuning; all layers).
        prefix_init: ``"meta"`` starts path n from the backbone's own states of ``META_PROMPTS[n]``,
            ``"random"`` from normal noise at the scale of the backbone's states. Embeddings in place of
            states with ``"shallow"``.
        aggregation: ``"mean"``, ``"concat"`` or ``"learned"`` (trainable softmax weights).
        seed: of random prefixes and LoRA weights.

    Raises:
        ValueError: for sizes out of range, or more paths than meta-prompts.

    Relations:
        ``num_paths=1, prefix_length=0`` equals the stock backbone with last-token pooling.
        N paths in one forward equal N forwards with one path.
        ``prefix_type="shallow"`` equals the stock backbone on [prompt embeddings; tokens], and at the start,
        with ``prefix_init="meta"``, ``"deep"``.
        ``aggregation="learned"`` equals ``"mean"`` at the start.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_paths: int = 4,
        prefix_length: int = 8,
        prefix_layers: PrefixLayers = 0,
        prefix_type: Literal["deep", "shallow"] = "deep",
        prefix_init: Literal["meta", "random"] = "meta",
        aggregation: Literal["mean", "concat", "learned"] = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_paths = num_paths
        self.prefix_length = prefix_length
        self.prefix_type = prefix_type
        self.prefix_layers = prefix_layers
        self.prefix_range = prefix_range(prefix_layers, backbone.num_layers)
        self.aggregation = aggregation
        self._check_sizes(prefix_init)
        self.embed_dim: int = backbone.hidden_size
        self.aggregate_dim: int = self.embed_dim * (num_paths if aggregation == "concat" else 1)
        self.processor: Any = backbone.processor
        self.image_token: str = backbone.image_token
        backbone.reset_adapters(seed)
        self.prefixes: DeepPrefixes | ShallowPrefixes | None = None
        if prefix_length:
            make = self._make_deep if prefix_type == "deep" else self._make_shallow
            self.prefixes = make(prefix_init, seed)
        self.path_logits = nn.Parameter(torch.zeros(num_paths)) if aggregation == "learned" else None

    def _check_sizes(self, prefix_init: str) -> None:
        for name, known, value in (
            ("prefix_type", ("deep", "shallow"), self.prefix_type),
            ("prefix_init", ("meta", "random"), prefix_init),
            ("aggregation", ("mean", "concat", "learned"), self.aggregation),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.num_paths < 1 or self.prefix_length < 0:
            raise ValueError(
                f"num_paths must be at least 1 and prefix_length at least 0, "
                f"got {self.num_paths} and {self.prefix_length}"
            )
        if self.prefix_length == 0 and self.num_paths > 1:
            raise ValueError(
                f"prefix_length=0 makes all {self.num_paths} paths the same; set num_paths=1 or a prefix"
            )
        if self.prefix_type == "shallow" and len(self.prefix_range) < self.backbone.num_layers:
            raise ValueError(
                "prefix_type='shallow' enters at the input and reaches every layer: set prefix_layers=0, "
                f"got {self.prefix_layers}"
            )
        if prefix_init == "meta" and self.num_paths > len(META_PROMPTS):
            raise ValueError(
                f"num_paths={self.num_paths} but there are {len(META_PROMPTS)} meta-prompts; "
                "use prefix_init='random' for more paths"
            )

    def _make_deep(self, prefix_init: str, seed: int) -> DeepPrefixes:
        backbone, length, layers = self.backbone, self.prefix_length, self.prefix_range
        with torch.device("meta" if backbone.is_meta else "cpu"):
            prefixes = DeepPrefixes(
                num_paths=self.num_paths,
                num_layers=len(layers),
                num_key_value_heads=backbone.num_key_value_heads,
                prefix_length=length,
                head_dim=backbone.head_dim,
            )
        if backbone.is_meta:
            return prefixes
        prompts, min_length = self._start(prefix_init)
        states = [backbone.text_states(text, min_length)[layers.start : layers.stop] for text in prompts]
        if prefix_init == "meta":
            prefixes.init_from_states(torch.stack([state[..., :length, :] for state in states]))
        else:
            scale_Y2 = torch.cat(states, dim=3).std(dim=(2, 3, 4))
            prefixes.init_random(scale_Y2, torch.Generator().manual_seed(seed))
        return prefixes

    def _make_shallow(self, prefix_init: str, seed: int) -> ShallowPrefixes:
        backbone, length = self.backbone, self.prefix_length
        sizes = {"num_paths": self.num_paths, "prefix_length": length, "hidden_size": backbone.hidden_size}
        with torch.device("meta" if backbone.is_meta else "cpu"):
            prefixes = ShallowPrefixes(**sizes)
        if backbone.is_meta:
            return prefixes
        prompts, min_length = self._start(prefix_init)
        embeddings = [backbone.text_embeddings(text, min_length) for text in prompts]
        if prefix_init == "meta":
            prefixes.init_from_embeddings(torch.stack([each_TD[:length] for each_TD in embeddings]))
        else:
            prefixes.init_random(torch.cat(embeddings).std(), torch.Generator().manual_seed(seed))
        return prefixes

    def _start(self, prefix_init: str) -> tuple[tuple[str, ...], int]:
        """Return the meta-prompts that prefixes or their scale start from, and their least length."""
        if prefix_init == "random":
            return META_PROMPTS, 1
        return META_PROMPTS[: self.num_paths], self.prefix_length

    def prefix_parameters(self) -> Iterator[nn.Parameter]:
        """Return the trainable prefixes."""
        return iter(()) if self.prefixes is None else self.prefixes.parameters()

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Return the trainable weights of the backbone: adapters, or all of them with ``kind="full"``."""
        return (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)

    def aggregation_parameters(self) -> Iterator[nn.Parameter]:
        """Return the trainable path weights of ``aggregation="learned"``."""
        return iter(()) if self.path_logits is None else iter((self.path_logits,))

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Embed the inputs, one embedding per path.

        Args:
            inputs: ``B`` tokenised rows.
            paths: path numbers wanted, in that order; None is all. One path costs one row per input.

        Returns:
            ``[B, N', D]`` fp32, unit norm, ``N'`` the number of wanted paths.

        Raises:
            ValueError: when ``paths`` is empty or names a path that does not exist.

        Relations:
            ``forward(inputs, [i])`` equals column ``i`` of ``forward(inputs)``.
        """
        chosen = list(range(self.num_paths) if paths is None else paths)
        whole = all(isinstance(path, Integral) and not isinstance(path, bool) for path in chosen)
        if not chosen or not whole or not all(0 <= path < self.num_paths for path in chosen):
            raise ValueError(f"paths must name some of 0 to {self.num_paths - 1}, got {chosen}")
        vision = _concatenate(inputs.vision)
        states_RLD = self.backbone(inputs.tokens, vision, self._prefix_states(chosen))
        mask_RL = inputs.tokens["attention_mask"].repeat(len(chosen), 1)
        pooled_NBD = last_token(states_RLD, mask_RL).reshape(len(chosen), -1, self.embed_dim)
        return F.normalize(pooled_NBD.transpose(0, 1).float(), dim=-1)

    def _prefix_states(self, paths: Sequence[int]) -> PrefixStates | None:
        if self.prefixes is None:
            return None
        if isinstance(self.prefixes, ShallowPrefixes):
            prompts_NPD = self.prefixes.prompts(paths, self.backbone.dtype)
            return PrefixStates(self.backbone.prompt_states(prompts_NPD))
        return self.prefixes.states(paths, self.prefix_range.start, self.backbone.dtype)

    def aggregate(self, embeddings: Tensor) -> Tensor:
        """Combine embeddings ``[B, N, D]`` of all paths into ``[B, D]``, or ``[B, N * D]`` for concat.

        Raises:
            ValueError: when learned weights meet another number of paths.

        Relations:
            With one path it equals that path. The dot product of two concatenations is the mean over
            paths of the cosines of aligned paths.
        """
        if self.aggregation == "concat":
            return F.normalize(embeddings.float().flatten(1), dim=-1)
        if self.path_logits is None:
            return F.normalize(embeddings.float().mean(dim=1), dim=-1)
        if embeddings.shape[1] != self.num_paths:
            raise ValueError(
                f"learned aggregation weights {self.num_paths} paths, got embeddings of {embeddings.shape[1]}"
            )
        weight_N = self.path_logits.float().softmax(dim=0)
        return F.normalize(torch.einsum("n,bnd->bd", weight_N, embeddings.float()), dim=-1)


Encoder: TypeAlias = ParallelEncoder | OpenCLIPEncoder


def build_encoder(backbone: str, loading: Mapping[str, Any], paths: Mapping[str, Any]) -> Encoder:
    """Load a backbone and put its encoder around it.

    Args:
        backbone: a name of ``load_backbone`` or of ``load_open_clip``.
        loading: options of ``load_backbone``.
        paths: options of ``ParallelEncoder``.

    Raises:
        ValueError: an option that this kind of backbone does not have; what the loaders refuse.
    """
    if is_open_clip(backbone):
        return load_open_clip(backbone, **loading, **paths)
    return ParallelEncoder(load_backbone(backbone, **loading), **paths)


def absolute_name(name: str) -> str:
    """Return a backbone's name with a local folder or weights file in it as an absolute path."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    architecture, slash, weights = name.partition("/")
    if name.startswith(PREFIX) and Path(weights).is_file():
        return f"{architecture}{slash}{Path(weights).resolve()}"
    return name


def truncate(paths: Tensor, dim: int) -> Tensor:
    """Keep the first ``dim`` coordinates of every path and bring them back to unit norm (Matryoshka).

    A shorter aggregate is the aggregate of shorter paths: with ``concat`` it is ``N * dim`` wide.

    Relations:
        ``dim = D`` changes nothing (up to rounding). Truncating twice is truncating once, to the smaller one.
    """
    return F.normalize(paths[..., :dim], dim=-1)


def check_dim(dim: int, embed_dim: int, name: str) -> int:
    """Return ``dim`` as an int.

    Raises:
        ValueError: unless it is a whole number from 1 to ``embed_dim``; ``name`` says where it came from.
    """
    if not isinstance(dim, Integral) or isinstance(dim, bool) or not 1 <= dim <= embed_dim:
        raise ValueError(f"{name}={dim!r}: embeddings have {embed_dim} dimensions; use 1 to {embed_dim}")
    return int(dim)


def nested_dims(dims: Sequence[int] | None, embed_dim: int) -> tuple[int, ...]:
    """Return the distinct dimensions below ``embed_dim`` at which training also contrasts, largest first.

    Raises:
        ValueError: for a dimension that the embeddings do not have.
    """
    checked = {check_dim(dim, embed_dim, "matryoshka_dims") for dim in dims or ()}
    return tuple(sorted(checked - {embed_dim}, reverse=True))


def _concatenate(rows: Sequence[Any]) -> dict[str, Tensor]:
    """Join the rows' image tensors along dim 0, key by key; rows without images add nothing.

    Other dims are filled up with zeros at their end, as the processors themselves pad tiles and pixels.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: _concatenate_padded([row[key] for row in rows if key in row]) for key in keys}


def _concatenate_padded(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(shape, tensor.shape[1:], strict=True)]
        sides = [side for size in reversed(missing) for side in (0, size)]
        padded.append(F.pad(tensor, sides) if any(missing) else tensor)
    return torch.cat(padded)
