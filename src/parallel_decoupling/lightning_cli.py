"""The LightningCLI behind ``cli``: defaults of a run, and which value wins when a checkpoint is given.

A typed value wins over the checkpoint's, and the checkpoint's over a default; every typed value that differs
is shown. ``validate``, ``test`` and ``predict`` take what shapes trained parameters from the checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.run import EmbeddingWriter, Scoring
from parallel_decoupling.evaluation.store import Keeper, VectorType
from parallel_decoupling.model.encoder import absolute_name
from parallel_decoupling.model.pretrained import LAST_CHECKPOINT, read_checkpoint
from parallel_decoupling.training.callbacks import console
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.settings import CONFIGS, FIXED

log = logging.getLogger(__name__)
FIT_CONFIG = "config.yaml"
SAVE_EVERY = 50
"""Main steps after which ``last.ckpt`` is renewed inside an epoch."""

HARMLESS_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed from",
)
"""Of Lightning: about itself, and resuming in a folder."""
CONFIG_DIR = Path(__file__).parent / "configs"
"""Configurations that come with the package: those of the demo."""


def run(args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; ``plan`` takes the options of ``fit``.

    Where there is no file ``demo.yaml``, that name stands for the one in the package.
    """
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    packaged = {file.name: str(file) for file in CONFIG_DIR.glob("*.yaml") if not Path(file.name).exists()}
    subcommand, *options = [packaged.get(word, word) for word in args]
    try:
        PlanCLI(["fit", *options]) if subcommand == "plan" else RunCLI([subcommand, *options])
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


class _Parser(LightningArgumentParser):
    def print_usage(self, *args: Any, **options: Any) -> None:
        """Do not list all options before an error; ``--help`` does."""


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration of a fit without the checkpoint that it resumed, which another run must not."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **options: Any) -> None:
        if options["config_filename"] == FIT_CONFIG:
            config = config.clone()
            config["ckpt_path"] = None
        super().__init__(parser, config, **options)


class RunCLI(LightningCLI):
    """LightningCLI with this package's model and data; ``trainer.default_root_dir`` holds all of a run."""

    def __init__(self, args: list[str]) -> None:
        self.typed: Any = None
        self.wanted = args[0]
        file = FIT_CONFIG if args[0] == "fit" else f"{args[0]}_config.yaml"
        super().__init__(
            PDFEmbedder,
            MMEBDataModule,
            parser_class=_Parser,
            save_config_callback=None if self.wanted == "predict" else _SaveConfig,  # it names absolute paths
            save_config_kwargs={"overwrite": True, "config_filename": file},
            trainer_defaults={"use_distributed_sampler": False, "default_root_dir": "runs/default"},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"allow_abbrev": False},  # a mistyped option must not pass for another one
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommand that was typed alone, as each takes a second to build."""
        return {self.wanted: LightningCLI.subcommands()[self.wanted]}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the score table says it better
        if subcommand == "test":
            about = "Keep the embeddings in this folder, so that a stopped test resumes."
            parser.add_argument("--embeddings_dir", type=str | None, help=about)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
            about = "Folder of the embeddings; null is `embeddings` in trainer.default_root_dir."
            parser.add_argument("--output_dir", type=str | None, help=about)
            about = "Type of the stored numbers."
            parser.add_argument("--output_dtype", type=VectorType, default="float32", help=about)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and parse again without defaults: what is left was typed."""
        self.config = parser.parse_args(args)
        self.typed = parser.parse_args(args, defaults=False)

    def instantiate_classes(self) -> None:
        """Refuse what would overwrite a run, then build."""
        config = self.config[self.config.subcommand]
        if config.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches: negatives do not add up over batches. Raise data.batch_size"
                ", with model.query_chunk_size and model.candidate_chunk_size (GradCache), instead."
            )
        if self.config.subcommand == "fit" and not config.ckpt_path and not config.trainer.fast_dev_run:
            folder = _checkpoint_dir(config.trainer)
            if folder is not None and (file := folder / LAST_CHECKPOINT.name).exists():
                raise ValueError(
                    f"{file} is there already, and this fit would overwrite it. Resume it with --ckpt_path "
                    "last, choose another --trainer.default_root_dir, or remove the folder."
                )
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Connect model, data and callbacks; without the user's own add TensorBoard and ``last.ckpt``."""
        config = self._get(self.config_init, "trainer")
        callbacks, keeper = list(_as_list(config.get("callbacks"))), self._keeper()
        self.datamodule.connect(self.model, keeper)
        callbacks.append(Scoring(self.datamodule, keeper))
        if self.config.subcommand == "predict":
            assert keeper is not None
            callbacks.append(EmbeddingWriter(self.datamodule, keeper))
            kwargs |= {"default_root_dir": str(keeper.root), "logger": config.get("logger") or False}
        elif config.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                config["default_root_dir"], name="", version="", default_hp_metric=False
            )
        wants_files = config.get("enable_checkpointing") is not False and not config.get("fast_dev_run")
        if wants_files and not any(isinstance(callback, Checkpoint) for callback in callbacks):
            options: dict[str, Any] = {"enable_version_counter": False, "auto_insert_metric_name": False}
            options["dirpath"] = Path(config["default_root_dir"]) / LAST_CHECKPOINT.parent
            options["save_on_train_epoch_end"] = True  # else validations take the place of a run's end
            callbacks.append(ModelCheckpoint(filename="step={step}", save_last=True, **options))
            callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=SAVE_EVERY, **options))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _keeper(self) -> Keeper | None:
        """Open the folder of embeddings of ``predict``, or the one that ``test`` was given."""
        config = self.config_init[self.config.subcommand]
        if self.config.subcommand == "predict":
            folder = config.output_dir or Path(config.trainer.default_root_dir, "embeddings")
            model = None if config.ckpt_path is None else os.path.abspath(config.ckpt_path)
            return Keeper(folder, lambda: self.model.about() | {"model": model}, dtype=config.output_dtype)
        folder = config.get("embeddings_dir")
        return None if folder is None else Keeper(folder, self.model.about, replace=True)

    def before_predict(self) -> None:
        """Warn of a model that nothing has trained."""
        if self._get(self.config_init, "ckpt_path") is None:
            log.warning("predict without --ckpt_path: the embeddings are of the model before any training")

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint, take over its settings that were not typed, and show those that differ."""
        config = self.config[self.config.subcommand]
        file = self._checkpoint_file(config)
        config["ckpt_path"] = file and str(file)
        if file is None:
            return
        content = read_checkpoint(file)
        stored = {"model": content["hyper_parameters"], "data": content["data"]}
        rows = [row for part, values in stored.items() for row in self._merge(part, values)]
        if rows:
            _show(rows, f"Settings that differ from {file}")

    def _merge(self, part: str, stored: Mapping[str, Any]) -> Iterator[Sequence[str]]:
        """Merge the settings of one part; yield name, yours, the checkpoint's, and whose is used."""
        subcommand = self.config.subcommand
        config = self.config[subcommand][part]
        typed = dict((self.typed.get(subcommand, {}).get(part) or {}).items())
        for name, value in _leaves(stored):
            if not any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in typed):
                config[name] = value
                continue
            yours = config[name]
            if _comparable(name, yours) == _comparable(name, value):
                continue
            fixed = any(f"{name}.".startswith(f"{known}.") for known in FIXED)
            fixed = fixed and part == "model" and subcommand != "fit"
            if fixed:
                config[name] = value
            used = "the checkpoint's" if fixed else "yours"
            yield f"{part}.{name}", repr(yours), repr(value), used

    def _checkpoint_file(self, config: Any) -> Path | None:
        """Resolve ``ckpt_path``; ``last`` is the run's own, and a fit without one starts anew."""
        wanted = config.get("ckpt_path")
        if not wanted:
            return None
        folder = _checkpoint_dir(config["trainer"]) if wanted == "last" else Path()
        if folder is None:
            raise ValueError("--ckpt_path last: this logger numbers its runs, so give the file instead.")
        file = folder / LAST_CHECKPOINT.name if wanted == "last" else Path(wanted)
        if file.is_file():
            return file
        if wanted == "last" and self.config.subcommand == "fit":
            rank_zero_info(f"--ckpt_path last: {file} is not there yet, so this run starts anew.")
            return None
        raise ValueError(
            f"--ckpt_path {wanted}: there is no checkpoint file {file}. Give a file, "
            "or 'last' together with the trainer.default_root_dir of the run."
        )


class PlanCLI(RunCLI):
    """Parses what ``fit`` would, and prints its plan instead of building anything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the plan's own option."""
        parser.add_argument("--gpu_memory_gib", type=float, default=80.0, help="Memory of each GPU.")

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        from parallel_decoupling.plan import plan_tables

        config = self.config[subcommand].as_dict()
        parts = [config[name] for name in ("model", "data", "trainer", "gpu_memory_gib")]
        console().print(*plan_tables(*parts), sep="\n")


def _as_list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _checkpoint_dir(trainer: Any) -> Path | None:
    """Return the folder of this configuration's checkpoints; None if its own logger numbers runs."""
    for callback in _as_list(trainer.get("callbacks")):
        if callback["class_path"].endswith(".ModelCheckpoint"):
            dirpath = (callback.get("init_args") or {}).get("dirpath")
            if dirpath or trainer.get("logger") not in (None, True, False):
                return dirpath and Path(dirpath)
    return Path(trainer["default_root_dir"]) / LAST_CHECKPOINT.parent


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by dotted name; a family is compared whole."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value and name in CONFIGS and name != "family":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _comparable(name: str, value: Any) -> Any:
    if name == "backbone":
        return absolute_name(value)
    return list(value) if isinstance(value, tuple) else value


@rank_zero_only
def _show(rows: Iterable[Sequence[str]], title: str) -> None:
    table = Table("setting", "yours", "checkpoint's", "used", title=title)
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stderr).print(table)
