"""FSDP2 for ``PDFEmbedder``: what is sharded, and checkpoints that every layout can read.

Gradients of what is not sharded are averaged by ``distributed.average_gradients``.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from parallel_decoupling.distributed import broadcast_parameters, rank, shard_like, whole
from parallel_decoupling.model.encoder import Encoder, ParallelEncoder
from parallel_decoupling.model.prefixes import ShallowPrefixes


class FSDP2Strategy(ModelParallelStrategy):
    """Shard the language model over all processes (FSDP2); ``trainer.strategy: fsdp2``.

    Unlike its parent it needs no sizes, and its checkpoint is the one file of whole tensors, without the
    frozen backbone, that a single process or DDP would write.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        options: dict[str, Any] = {"process_group_backend": process_group_backend, "timeout": timeout}
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Start the group of all processes; each has its own rows."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Set up as the parent does, and start all processes from the same unsharded parameters."""
        super().setup(trainer)
        assert self.model is not None
        broadcast_parameters(self.model.parameters())

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning restore optimizers through ``load_optimizer_state_dict``."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather nothing: ``PDFEmbedder`` puts what trains into the checkpoint itself."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return whole tensors on the CPU of the first process, nothing elsewhere."""

        def gathered(value: Any) -> Any:
            value = whole(value)
            if not isinstance(value, torch.Tensor):
                return value
            return value.cpu() if rank() == 0 else None  # elsewhere, each whole tensor is freed at once

        state = tree_map(gathered, getattr(optimizer, "optimizer", optimizer).state_dict())
        return state if rank() == 0 else {}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file as any single-process strategy would; the module shards what it takes from it."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its part of the whole state of both optimizers."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    name: shard_like(value, parameters[number])
                    if getattr(value, "shape", None) == parameters[number].shape
                    else value
                    for name, value in values.items()
                }
                for number, values in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": state})


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, checkpoints in one file")


def own_gradients_only(strategy: Any) -> AbstractContextManager[None]:
    """Keep DDP's hooks out of a backward pass; ``average_gradients`` does their work, once."""
    return cast(AbstractContextManager[None], getattr(strategy, "block_backward_sync", nullcontext)())


def shard_encoder(encoder: Encoder, mesh: DeviceMesh) -> None:
    """Shard the language model's weights over ``mesh``, block by block; doing it again changes nothing.

    Everything outside the language model stays whole, as not every process has images, and so do adapters,
    whose gradients are averaged once per step. With ``adapter.kind: full`` the language model trains
    sharded. A ``ValueError`` for what FSDP2 cannot train.
    """
    if not isinstance(encoder, ParallelEncoder) or isinstance(encoder.prefixes, ShallowPrefixes):
        raise ValueError("fsdp2 trains neither OpenCLIP models nor prefix_type=shallow: use strategy ddp.")
    backbone = encoder.backbone
    if isinstance(backbone.base, FSDPModule):
        return
    quantised = [name for name, p in backbone.base.named_parameters() if not p.is_floating_point()]
    if quantised:
        advice = "use strategy ddp, or load the backbone in bfloat16"
        raise ValueError(f"fsdp2 shards floating-point weights, but {quantised[0]} is quantised: {advice}.")
    sharded = set(backbone.language_model.parameters())
    if backbone.adapter.kind != "full":
        sharded = {parameter for parameter in sharded if not parameter.requires_grad}
    kept_whole = set(backbone.base.parameters()) - sharded
    # The weights that a module shows between two calls are always the sharded ones, also after an evaluation.
    for module in (*backbone.layers, backbone.base):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept_whole)
    backbone.layers[0].register_forward_pre_hook(_same_graph_everywhere, prepend=True)


def _same_graph_everywhere(first_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Let the input require a gradient on every process: FSDP2 frees a block's weights when that is there."""
    if torch.is_grad_enabled():
        args[0].requires_grad_()
