"""What ``PDFEmbedder``'s settings shape, their plain values, and the combinations that cannot work.

Plain, because a checkpoint holds them and is read with ``torch.load(weights_only=True)``.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from parallel_decoupling.distributed import world_size
from parallel_decoupling.model.adapters import AdapterConfig
from parallel_decoupling.model.encoder import absolute_name
from parallel_decoupling.model.families import Family
from parallel_decoupling.option_types import check_memory
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig, require
from parallel_decoupling.training.strategies import FSDP2Strategy

CONFIGS: dict[str, Any] = dict(adapter=AdapterConfig, mi=MIConfig, optimizer=OptimizerConfig, family=Family)
"""Settings with options of their own, and the class of these."""

_BATCH = ("batch_size", "hard_negatives", "positives")
_ENCODER = ("num_paths", "prefix_length", "prefix_layers", "prefix_type", "aggregation", "adapter")
SHAPES_WEIGHTS = (*_ENCODER, "mi.kind", "mi.hidden_size", "learn_temperature")
"""Settings that shape what a checkpoint holds: all subcommands but fit take them from there."""
SHAPES_EMBEDDINGS = (*_ENCODER, "dtype", "attention", "quantization", "max_tokens", "long_text")
"""Settings that change embeddings although no weight tells. A dot stands before an option of a config."""


def read_settings(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check all arguments of ``PDFEmbedder``; configs may be objects or the dictionaries of a checkpoint.

    Return the arguments with configs as objects; and as plain values, with local folders as absolute paths.
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
    advice = "set num_paths=1, a prefix_length or adapter.per_path"
    can_differ = prefix_length > 0 or num_paths == 1 or settings["adapter"]["per_path"]
    require(can_differ, f"prefix_length=0 makes all paths the same: {advice}.")
    for name in ("mi_weight", "aggregate_weight", "distillation_weight"):
        message = f"num_paths=1 has no other path to weigh: set {name}=0."
        require(num_paths > 1 or settings[name] == 0, message)
    no_estimator = settings["mi"]["kind"] == "none" and settings["mi_weight"] > 0
    require(not no_estimator, "mi.kind=none leaves nothing to weigh: set mi_weight=0.")
    check_memory(f"num_paths={num_paths}", 16.0 * num_paths * (num_paths - 1) / 2)  # numbers of all pairs


def check_trainer(strategy: Any, precision: str) -> None:
    """Raise ``ValueError`` for another way of sharding than FSDP2, or a precision that does not train."""
    shards = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    problem = "does not work with two optimizers and checkpoints for every layout: use strategy ddp, or fsdp2"
    require(not shards or isinstance(strategy, FSDP2Strategy), f"{type(strategy).__name__} {problem}.")
    problem = f"trainer.precision={precision} does not work with fp32 prefixes and clipping by hand"
    advice = "use 32-true or bf16-mixed, and model.dtype=bfloat16 for a frozen backbone in half the memory"
    require(precision in ("32-true", "bf16-mixed"), f"{problem}: {advice}.")


def check_fit(settings: Mapping[str, Any], data: Mapping[str, Any], encoder: Any, strategy: Any) -> None:
    """Raise ``ValueError`` for weights that would not train, and for a batch that cannot fit on a CPU."""
    check_trained_dtype(settings)
    attention = settings["attention"]
    trains = attention in ("sdpa", "eager") or strategy.root_device.type != "cpu"
    require(trains, f"attention={attention} trains on a GPU only: use model.attention=sdpa.")
    if not data or strategy.root_device.type != "cpu":  # another data module, or a GPU, which says so itself
        return
    paths, (queries, *more) = settings["num_paths"], (data[name] for name in _BATCH)
    candidates = queries * sum(more)
    width = 0 if settings["chunk_size"] else getattr(encoder.backbone, "num_layers", 0)
    numbers = candidates * ((paths + 1) * (queries + encoder.embed_dim) + paths * width * encoder.embed_dim)
    what = ", ".join(f"data.{name}={data[name]}" for name in _BATCH)
    check_memory(what, 8.0 * numbers / world_size())  # embeddings, scores, states: fp32, and their gradients


def check_trained_dtype(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where weights in half precision would be trained, or gradients pass float16."""
    dtype, is_full = settings["dtype"], settings["adapter"]["kind"] == "full"
    problem = "adapter.kind=full would round most updates away" if is_full else "small gradients become 0"
    advice = "use model.dtype=float32 with trainer.precision=bf16-mixed, or bfloat16 for a frozen backbone"
    is_exact = dtype == "float32" or (dtype == "bfloat16" and not is_full)
    require(is_exact, f"dtype={dtype}: {problem}: {advice}.")
