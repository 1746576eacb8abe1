"""Both optimizers: parameter groups, the learning rate schedule, and how long a run is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from parallel_decoupling.distributed import average_gradients, clip_gradients
from parallel_decoupling.objective.vclub import Kind
from parallel_decoupling.option_types import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_values,
)


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError`` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class OptimizerConfig:
    """How the trainables of the embedder are stepped (AdamW).

    Args:
        learning_rate: peak rate of adapters (or the whole backbone), aggregation and temperature.
        prefix_learning_rate: peak rate of the prefixes. Ours: much higher than the adapters', because weak
            prefixes never separate the paths.
        weight_decay: decoupled decay of the adapters; prefixes, aggregation and temperature have none.
        warmup_steps: main steps of a linear rise of both rates, from 1 / (warmup_steps + 1) of the peak.
        schedule: what follows the warm-up: linear or cosine to 0 at the end of the run, or constant.
        clip_norm: largest norm of the whole gradient; 0 does not clip.
    """

    learning_rate: NonNegativeFloat = 5e-5
    prefix_learning_rate: NonNegativeFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_norm: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        check_values(OptimizerConfig, vars(self), "optimizer.")


@dataclass(frozen=True)
class MIConfig:
    """The estimator of the mutual information between paths, and when its term counts.

    Args:
        kind: vclub (default) fits a network q; hsic, crosscov and orthogonal (squared cosine between an
            input's paths) fit nothing; vclub_given_target and orthogonal_given_target leave alone what the
            paths share with their target; none switches the term off.
        hidden_size: width of q's hidden layer, per path pair.
        fit_steps: steps of q on every batch, before the main step.
        warmup_steps: main steps in which only q is fitted and the term has weight 0.
        ramp_steps: main steps after the warm-up over which the weight rises linearly to ``mi_weight``.
        learning_rate: of q (Adam, constant).
    """

    kind: Kind = "vclub"
    hidden_size: PositiveInt = 64
    fit_steps: PositiveInt = 2
    warmup_steps: NonNegativeInt = 50
    ramp_steps: NonNegativeInt = 100
    learning_rate: PositiveFloat = 1e-3

    def __post_init__(self) -> None:
        check_values(MIConfig, vars(self), "mi.")

    def weight_at(self, step: int, weight: float) -> float:
        """Return the weight of the term after ``step`` main steps; ``weight`` is the final one (ours)."""
        if step < self.warmup_steps:
            return 0.0
        if step >= self.warmup_steps + self.ramp_steps:
            return weight
        return weight * (step - self.warmup_steps) / self.ramp_steps


def main_optimizer(groups: Mapping[str, Iterable[nn.Parameter]], config: OptimizerConfig) -> AdamW:
    """Build AdamW over the groups that are not empty; raise ``ValueError`` if all of them are."""
    settings: list[dict[str, Any]] = [
        {"params": members, "name": name, **_group_settings(name, config)}
        for name, parameters in groups.items()
        if (members := list(parameters))
    ]
    advice = "Set prefix_length to 1 or more, or adapter.kind to lora, dora or full."
    require(bool(settings), f"Nothing to train: the backbone is frozen and has no prefix. {advice}")
    return AdamW(settings)


def learning_rate_schedule(optimizer: AdamW, config: OptimizerConfig, total_steps: float) -> LambdaLR:
    """Warm up, then follow ``config.schedule`` down to 0 at ``total_steps`` main steps."""
    problem = f"optimizer.schedule={config.schedule} ends with the run, but the run has no end"
    advice = "set trainer.max_steps or trainer.max_epochs, or optimizer.schedule=constant"
    require(config.schedule == "constant" or math.isfinite(total_steps), f"{problem}: {advice}.")

    def multiplier(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup_steps) / max(1.0, total_steps - config.warmup_steps)
        left = max(0.0, 1.0 - done)
        return left if config.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))

    return LambdaLR(optimizer, multiplier)


def finish_gradients(parameters: Sequence[nn.Parameter], config: OptimizerConfig, step: int) -> Tensor:
    """Average over ranks and clip, and return the norm; raise ``ValueError`` unless it is finite."""
    average_gradients(parameters)
    norm = clip_gradients(parameters, config.clip_norm or math.inf)
    problem = f"The gradient of main step {step} is not finite (norm {float(norm)}); the step is not made"
    advice = "Lower rates or mi_weight, raise the temperature, or use dtype=float32"
    require(bool(norm.isfinite()), f"{problem}. {advice}.")
    return norm


def apply_config(optimizers: Sequence[Any], schedule: Any, config: OptimizerConfig, mi: MIConfig) -> None:
    """Replace the rates and the decay that a checkpoint has restored in optimizers and schedule by these."""
    optimizer, *estimators = optimizers
    for estimator in estimators:
        for group in estimator.param_groups:
            group["lr"] = mi.learning_rate
    for group in optimizer.param_groups:
        settings = _group_settings(group["name"], config)
        group |= {**settings, "initial_lr": settings["lr"]}
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    factors = [multiplier(schedule.last_epoch) for multiplier in schedule.lr_lambdas]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = group["initial_lr"] * factor


def _group_settings(name: str, config: OptimizerConfig) -> dict[str, float]:
    rate = config.prefix_learning_rate if name == "prefixes" else config.learning_rate
    return {"lr": rate, "weight_decay": config.weight_decay if name == "adapters" else 0.0}


def total_steps(trainer: Any) -> float:
    """Return the main steps of the whole run; infinite without ``max_steps`` and ``max_epochs``."""
    steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if trainer.max_epochs not in (None, -1) and trainer.estimated_stepping_batches != math.inf:
        steps = min(steps, trainer.num_training_batches * trainer.max_epochs)
    rule = "trainer.max_steps, max_epochs and limit_train_batches must not be 0"
    found = f"(they are {trainer.max_steps}, {trainer.max_epochs} and {trainer.limit_train_batches})"
    makes_steps = steps > 0 and trainer.limit_train_batches > 0
    require(makes_steps, f"No main step would be made: {rule} {found}.")
    return steps
