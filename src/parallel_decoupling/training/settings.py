"""The settings of ``PDFEmbedder`` as plain values, and the combinations that cannot work.

Plain, because a checkpoint holds them and is read with ``torch.load(weights_only=True)``. Here: conversion
and checks that need no model, of the Trainer as well. Elsewhere on purpose: each part's own checks
(``OptimizerConfig``, ``ParallelEncoder``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.model.dual_backbone import absolute_name
from parallel_decoupling.model.families import Family
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig
from parallel_decoupling.training.strategies import FSDP2Strategy

Config = TypeVar("Config", AdapterConfig, Family, MIConfig, OptimizerConfig)

CONFIGS: dict[str, Any] = {
    "adapter": AdapterConfig,
    "mi": MIConfig,
    "optimizer": OptimizerConfig,
    "family": Family,
}
"""Arguments of ``PDFEmbedder`` that have options of their own."""
LOADING = (
    "dtype",
    "attention",
    "adapter",
    "gradient_checkpointing",
    "initial_adapter",
    "quantization",
    "family",
)
"""Arguments of ``PDFEmbedder`` that load a backbone, beside its name and revision."""
PATHS = (
    "num_paths",
    "prefix_length",
    "prefix_layers",
    "prefix_type",
    "prefix_init",
    "aggregation",
    "seed",
)
"""Arguments of ``PDFEmbedder`` that make its encoder from a backbone."""
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
    typed = dict(arguments)
    for name, kind in CONFIGS.items():
        if typed[name] is not None:
            typed[name] = as_config(kind, typed[name], name)
    plain: dict[str, Any] = {
        name: as_plain(typed[name]) if name in CONFIGS and typed[name] else typed[name] for name in typed
    }
    for name in ("backbone", "initial_adapter"):
        if plain[name] is not None:
            plain[name] = absolute_name(plain[name])
    check_settings(plain)
    return typed, plain


def as_config(kind: type[Config], value: Config | Mapping[str, Any], name: str) -> Config:
    """Take a config as it is, or build it from the dictionary that a checkpoint holds.

    Raises:
        ValueError: for a key that ``kind`` does not have.
    """
    if isinstance(value, kind):
        return value
    known = {field.name for field in fields(kind)}
    arguments = dict(value)  # type: ignore[arg-type]
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise ValueError(f"{name} has no option {unknown}; its options are {sorted(known)}.")
    return kind(**arguments)


def as_plain(config: AdapterConfig | Family | MIConfig | OptimizerConfig) -> dict[str, Any]:
    """Turn a config into a dictionary of strings, numbers and lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()
    }


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse impossible combinations, each with one message that says what to change.

    Args:
        settings: all arguments of ``PDFEmbedder``, configs as dictionaries.

    Raises:
        ValueError: the first problem found.
    """
    num_paths, prefix_length = settings["num_paths"], settings["prefix_length"]
    if num_paths < 1 or prefix_length < 0:
        raise ValueError(
            f"num_paths must be 1 or more and prefix_length 0 or more, got {num_paths} and {prefix_length}."
        )
    if prefix_length == 0 and num_paths > 1:
        raise ValueError(
            f"prefix_length=0 makes all {num_paths} paths the same: set num_paths=1 or prefix_length above 0."
        )
    for name in ("mi_weight", "aggregate_weight"):
        if not (math.isfinite(settings[name]) and settings[name] >= 0):
            raise ValueError(f"{name} must be 0 or more, got {settings[name]}.")
    if num_paths == 1 and settings["mi_weight"] > 0:
        raise ValueError("num_paths=1 has no pair of paths to decouple: set mi_weight=0.")
    if num_paths == 1 and settings["aggregate_weight"] > 0:
        raise ValueError("num_paths=1 has no aggregate beside its path: set aggregate_weight=0.")
    if settings["mi_weight"] > 0 and settings["mi"]["kind"] == "none":
        raise ValueError("mi.kind=none leaves nothing to weigh: set mi_weight=0, or choose an estimator.")
    if not (math.isfinite(settings["temperature"]) and settings["temperature"] > 0):
        raise ValueError(
            f"temperature divides the cosines and must be above 0, got {settings['temperature']}."
        )
    for name in ("query_chunk_size", "candidate_chunk_size"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(
                f"{name} must be 1 or more (null: the whole batch at once), got {settings[name]}."
            )


def check_trainer(strategy: Any, precision: str) -> None:
    """Refuse what a Trainer may be given but ``PDFEmbedder`` does not work with.

    Raises:
        ValueError: another way of sharding than FSDP2, or another precision than the two that train.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "strategy fsdp (FSDP1) does not work with two alternating optimizers: use strategy ddp, "
            "or fsdp2 to shard a large backbone."
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise ValueError(
            "ModelParallelStrategy writes checkpoints that only the same layout can read: use strategy "
            "fsdp2, which is the same with checkpoints in one file."
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={precision} does not work with fp32 prefixes and clipping by hand: use "
            f"{' or '.join(PRECISIONS)}, and model.dtype=bfloat16 for a frozen backbone in half the memory."
        )


def check_trained_dtype(settings: Mapping[str, Any]) -> None:
    """Refuse to train weights that are kept in half precision.

    Raises:
        ValueError: ``adapter.kind=full`` with another dtype than float32.
    """
    if settings["adapter"]["kind"] == "full" and settings["dtype"] != "float32":
        raise ValueError(
            f"adapter.kind=full with dtype={settings['dtype']} would round most updates away: use "
            "model.dtype=float32 with trainer.precision=bf16-mixed."
        )
