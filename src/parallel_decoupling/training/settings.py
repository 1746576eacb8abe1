"""The one table of ``PDFEmbedder``'s settings, their plain values, and the combinations that cannot work.

Plain, because a checkpoint holds them and is read with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.encoder import absolute_name
from parallel_decoupling.model.families import Family
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig, require
from parallel_decoupling.training.strategies import FSDP2Strategy


@dataclass(frozen=True)
class Setting:
    """What is known of one argument of ``PDFEmbedder``.

    ``shapes_embeddings`` means that it changes embeddings although no weight tells; a ``fixed`` one is taken
    from the checkpoint by all subcommands but ``fit``. ``config`` is the class of its own options.
    """

    group: Literal["backbone", "loading", "paths", "objective", "training", "prompts"]
    shapes_weights: bool = False
    shapes_embeddings: bool = False
    fixed: bool = False
    config: type | None = None


def _structure(group: Any, **more: Any) -> Setting:
    return Setting(group, shapes_weights=True, fixed=True, **more)


SETTINGS: dict[str, Setting] = {
    "backbone": Setting("backbone"),
    "num_paths": _structure("paths", shapes_embeddings=True),
    "prefix_length": _structure("paths", shapes_embeddings=True),
    "prefix_layers": _structure("paths", shapes_embeddings=True),
    "prefix_type": _structure("paths", shapes_embeddings=True),
    "prefix_init": Setting("paths"),
    "aggregation": _structure("paths", shapes_embeddings=True),
    "adapter": _structure("loading", shapes_embeddings=True, config=AdapterConfig),
    "mi": Setting("objective", config=MIConfig),
    "mi.kind": _structure("objective"),
    "mi.hidden_size": _structure("objective"),
    "mi_weight": Setting("objective"),
    "aggregate_weight": Setting("objective"),
    "matryoshka_dims": Setting("objective"),
    "temperature": Setting("objective"),
    "learn_temperature": _structure("objective"),
    "symmetric": Setting("objective"),
    "optimizer": Setting("training", config=OptimizerConfig),
    "query_chunk_size": Setting("training"),
    "candidate_chunk_size": Setting("training"),
    "query_instruction": Setting("prompts"),
    "candidate_instruction": Setting("prompts"),
    "backbone_revision": Setting("backbone"),
    "dtype": Setting("loading", shapes_embeddings=True),
    "attention": Setting("loading", shapes_embeddings=True),
    "gradient_checkpointing": Setting("loading"),
    "initial_adapter": Setting("loading"),
    "quantization": Setting("loading", shapes_embeddings=True),
    "family": Setting("loading", config=Family),
    "seed": Setting("paths"),
}
"""Every argument of ``PDFEmbedder``, and the options inside one that differ from it."""

ARGUMENTS = tuple(name for name in SETTINGS if "." not in name)
CONFIGS: dict[str, Any] = {name: each.config for name, each in SETTINGS.items() if each.config is not None}


def group(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one group of settings."""
    return {each: arguments[each] for each in ARGUMENTS if SETTINGS[each].group == name}


def is_fixed(name: str) -> bool:
    """Tell whether a checkpoint fixes a setting, given by its dotted name, for all but ``fit``."""
    return any(
        each.fixed and (name == known or name.startswith(f"{known}.")) for known, each in SETTINGS.items()
    )


def embedding_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that change embeddings although no weight tells."""
    return {name: settings[name] for name in ARGUMENTS if SETTINGS[name].shapes_embeddings}


PRECISIONS = ("32-true", "bf16-mixed")
"""Values of ``trainer.precision`` that train."""


def read_settings(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check all arguments of ``PDFEmbedder``.

    Args:
        arguments: by name; configs as objects or as the dictionaries that a checkpoint holds.

    Returns:
        The arguments with configs as objects; and as plain values, with local folders as absolute paths.

    Raises:
        ValueError: unknown options, or a combination that cannot work.
    """
    typed, plain = dict(arguments), dict(arguments)
    for name, kind in CONFIGS.items():
        if typed[name] is None:
            continue
        if isinstance(typed[name], Mapping):
            known = {field.name for field in fields(kind)}
            if unknown := sorted(typed[name].keys() - known):
                raise ValueError(f"{name} has no option {unknown}; its options are {sorted(known)}.")
            typed[name] = kind(**typed[name])
        options = asdict(typed[name]).items()
        plain[name] = {key: list(value) if isinstance(value, tuple) else value for key, value in options}
    for name in ("backbone", "initial_adapter"):
        if plain[name] is not None:
            plain[name] = absolute_name(plain[name])
    check_settings(plain)
    return typed, plain


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for impossible combinations; configs are dictionaries here."""
    num_paths, prefix_length = settings["num_paths"], settings["prefix_length"]
    require(num_paths >= 1, f"num_paths must be 1 or more, got {num_paths}.")
    require(prefix_length >= 0, f"prefix_length must be 0 or more, got {prefix_length}.")
    one_path = "prefix_length=0 makes all paths the same: set num_paths=1 or prefix_length above 0."
    require(prefix_length > 0 or num_paths == 1, one_path)
    for name in ("mi_weight", "aggregate_weight"):
        weight = settings[name]
        require(math.isfinite(weight) and weight >= 0, f"{name} must be 0 or more, got {weight}.")
        require(num_paths > 1 or weight == 0, f"num_paths=1 has no other path to weigh: set {name}=0.")
    no_estimator = settings["mi"]["kind"] == "none" and settings["mi_weight"] > 0
    require(not no_estimator, "mi.kind=none leaves nothing to weigh: set mi_weight=0.")
    temperature = settings["temperature"]
    usable = math.isfinite(temperature) and temperature > 0
    require(usable, f"temperature divides the cosines and must be above 0, got {temperature}.")
    for name in ("query_chunk_size", "candidate_chunk_size"):
        size = settings[name]
        require(size is None or size >= 1, f"{name} must be 1 or more (null: the whole batch), got {size}.")


def check_trainer(strategy: Any, precision: str) -> None:
    """Raise ``ValueError`` for another way of sharding than FSDP2, or a precision that does not train."""
    fsdp1 = "strategy fsdp (FSDP1) does not work with two alternating optimizers: use strategy ddp, or fsdp2."
    require(not isinstance(strategy, FSDPStrategy), fsdp1)
    require(
        isinstance(strategy, FSDP2Strategy) or not isinstance(strategy, ModelParallelStrategy),
        "ModelParallelStrategy writes checkpoints that only the same layout can read: use strategy fsdp2.",
    )
    require(
        precision in PRECISIONS,
        f"trainer.precision={precision} does not work with fp32 prefixes and clipping by hand: use "
        f"{' or '.join(PRECISIONS)}, and model.dtype=bfloat16 for a frozen backbone in half the memory.",
    )


def check_trained_dtype(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where weights that are kept in half precision would be trained."""
    require(
        settings["adapter"]["kind"] != "full" or settings["dtype"] == "float32",
        f"adapter.kind=full with dtype={settings['dtype']} would round most updates away: use "
        "model.dtype=float32 with trainer.precision=bf16-mixed.",
    )
