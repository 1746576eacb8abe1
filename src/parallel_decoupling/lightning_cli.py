"""The LightningCLI behind ``cli``: defaults of a run, and which value wins when a checkpoint is given.

A value that is typed (in a config file or as an option) wins over the checkpoint's, the checkpoint's wins
over a default, and every typed value that differs is shown. One exception: ``validate``, ``test`` and
``predict`` cannot load trained parameters into another structure, so what shapes them is taken from the
checkpoint (``training.settings``).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from parallel_decoupling.evaluation.run import EmbeddingWriter, PathPictures, Scoring
from parallel_decoupling.evaluation.store import Keeper, VectorType
from parallel_decoupling.model.encoder import absolute_name
from parallel_decoupling.model.pretrained import read_checkpoint
from parallel_decoupling.plan import plan_tables
from parallel_decoupling.training.callbacks import LAST_FILE, console
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.settings import CONFIGS, is_fixed

log = logging.getLogger(__name__)

FIT_CONFIG = "config.yaml"

SAVE_EVERY = 50
"""Main steps after which ``last.ckpt`` is renewed inside an epoch."""

HARMLESS_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Total length of `list` across ranks is zero",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed from",
    "Couldn't infer the batch indices fetched from your dataloader",
)
"""Of Lightning: about itself, no validation tasks, resuming in a folder, rows that carry their places."""


def run(args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; ``plan`` takes the options of ``fit``.

    Raises:
        ValueError: options that cannot work, Lightning's own among them.
    """
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    try:
        if args[0] == "plan":
            PlanCLI(["fit", *args[1:]])
        else:
            RunCLI(list(args))
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


class _Parser(LightningArgumentParser):
    """Does not list all options before an error; ``--help`` does."""

    def print_usage(self, *args: Any, **options: Any) -> None:
        """Print nothing: a tip and the error follow."""


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration of a fit without the checkpoint that it resumed, which another run must not."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **options: Any) -> None:
        if options["config_filename"] == FIT_CONFIG:
            config = config.clone()
            config["ckpt_path"] = None
        super().__init__(parser, config, **options)


class RunCLI(LightningCLI):
    """LightningCLI with this package's model and data, and everything of a run in one folder.

    Without a logger of your own, ``trainer.default_root_dir`` is that folder: TensorBoard's files,
    ``config.yaml``, ``checkpoints/last.ckpt``, ``scores.json``. ``config.yaml`` is that of ``fit`` and can be
    given to ``fit`` again; the other subcommands write theirs beside it, as ``test_config.yaml``.
    """

    def __init__(self, args: list[str]) -> None:
        self.typed: Any = None
        super().__init__(
            PDFEmbedder,
            MMEBDataModule,
            parser_class=_Parser,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True, "config_filename": _config_file(args[0])},
            trainer_defaults={"use_distributed_sampler": False, "default_root_dir": "runs/default"},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"allow_abbrev": False},  # a mistyped option must not pass for another one
            args=args,
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the score table says it better
        if subcommand == "test":
            parser.add_argument(
                "--embeddings_dir",
                type=str | None,
                default=None,
                help="Keep the embeddings in this folder, so that a stopped test resumes.",
            )
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
            parser.add_argument(
                "--output_dir",
                type=str | None,
                default=None,
                help="Folder of the embeddings; null is `embeddings` in trainer.default_root_dir.",
            )
            parser.add_argument(
                "--output_dtype", type=VectorType, default="float32", help="Type of the stored numbers."
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and parse again without defaults: what is left was typed."""
        self.config = parser.parse_args(args)
        self.typed = parser.parse_args(args, defaults=False)

    def instantiate_classes(self) -> None:
        """Refuse what cannot work, then build."""
        config = self.config[self.config.subcommand]
        _check(config)
        if self.config.subcommand == "fit" and not config.ckpt_path and not config.trainer.fast_dev_run:
            _check_nothing_is_overwritten(config.trainer)
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Hand model and data to each other and to the callbacks; add TensorBoard and ``last.ckpt``.

        The user's own logger and checkpoint callbacks replace the defaults. A store of embeddings is not a
        run: nothing is logged, and the configuration goes where the embeddings go.
        """
        config = self._get(self.config_init, "trainer")
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        keeper = self._keeper()
        self.datamodule.connect(self.model, keeper)
        callbacks += [Scoring(self.datamodule, keeper), PathPictures()]
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
            options["save_on_train_epoch_end"] = True  # else validations take the place of a run's end
            callbacks.append(ModelCheckpoint(filename="step={step}", save_last=True, **options))
            callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=SAVE_EVERY, **options))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _keeper(self) -> Keeper | None:
        """Open the folder of embeddings of ``predict``, or the one that ``test`` was given."""
        if self.config.subcommand == "predict":
            root_dir = self._get(self.config_init, "trainer")["default_root_dir"]
            output_dir = Path(self._get(self.config_init, "output_dir") or Path(root_dir, "embeddings"))
            file = self._get(self.config_init, "ckpt_path")
            model = None if file is None else os.path.abspath(file)
            dtype = self._get(self.config_init, "output_dtype")
            return Keeper(output_dir, lambda: {**self.model.about(), "model": model}, dtype=dtype)
        folder = self._get(self.config_init, "embeddings_dir") if self.config.subcommand == "test" else None
        return None if folder is None else Keeper(folder, self.model.about, replace=True)

    def before_predict(self) -> None:
        """Warn of a model that nothing has trained."""
        if self._get(self.config_init, "ckpt_path") is None:
            log.warning(
                "predict without --ckpt_path: the embeddings are those of the model before any training"
            )

    def predict(self, model: PDFEmbedder, datamodule: MMEBDataModule, **options: Any) -> None:
        """Predict over ``data.predict_source``, or else over the evaluation tasks."""
        self.trainer.predict(model, datamodule=datamodule, **options)

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint, take over its settings that were not typed, and show those that differ."""
        config = self.config[self.config.subcommand]
        file = self._checkpoint_file(config)
        config["ckpt_path"] = None if file is None else str(file)
        if file is None:
            return
        try:
            content = read_checkpoint(file)
        except ValueError as error:
            raise ValueError(f"--ckpt_path {error}") from error
        differences = []
        for part, stored in (
            ("model", content.get("hyper_parameters", {})),
            ("data", content.get("data", {})),
        ):
            differences += self._merge(part, stored)
        if differences:
            _show(differences, file)

    def _merge(self, part: str, stored: Mapping[str, Any]) -> list[tuple[str, Any, Any, str]]:
        """Settings of one part; returns (name, yours, the checkpoint's, which is used) where they differ."""
        subcommand = self.config.subcommand
        config = self.config[subcommand][part]
        typed = dict((self.typed.get(subcommand, {}).get(part) or {}).items())
        differences = []
        for name, value in _leaves(stored):
            if not any(
                name == key or key.startswith(f"{name}.") or name.startswith(f"{key}.") for key in typed
            ):
                config[name] = value
                continue
            yours = config[name]
            if _comparable(name, yours) == _comparable(name, value):
                continue
            fixed = part == "model" and subcommand != "fit" and is_fixed(name)
            if fixed:
                config[name] = value
            differences.append((f"{part}.{name}", yours, value, "the checkpoint's" if fixed else "yours"))
        return differences

    def _checkpoint_file(self, config: Any) -> Path | None:
        """Resolve ``ckpt_path``; ``last`` is the run's own, and a fit without one starts from the beginning.

        Raises:
            ValueError: if there is no such file.
        """
        wanted = config.get("ckpt_path")
        if not wanted:
            return None
        folder = _checkpoint_dir(config["trainer"]) if wanted == "last" else Path()
        if folder is None:
            raise ValueError(
                "--ckpt_path last: this logger numbers its runs, so give the checkpoint file instead."
            )
        file = folder / LAST_FILE if wanted == "last" else Path(wanted)
        if file.is_file():
            return file
        if wanted == "last" and self.config.subcommand == "fit":
            rank_zero_info(
                f"--ckpt_path last: {file} is not there yet, so this run starts from the beginning."
            )
            return None
        raise ValueError(
            f"--ckpt_path {wanted}: there is no checkpoint file {file}. Give a file, "
            "or 'last' together with the trainer.default_root_dir of the run."
        )


def _config_file(subcommand: str) -> str:
    return FIT_CONFIG if subcommand == "fit" else f"{subcommand}_config.yaml"


class PlanCLI(RunCLI):
    """Parses what ``fit`` would, and prints its plan instead of building anything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the plan's own option."""
        parser.add_argument("--gpu_memory_gib", type=float, default=80.0, help="Memory of each GPU.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse under the plan's name."""
        self._parser("fit").prog = "lightning plan"
        super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand].as_dict()
        parts = (config["model"], config["data"], config["trainer"])
        console().print(*plan_tables(*parts, gpu_memory_gib=config["gpu_memory_gib"]), sep="\n")


def _check(config: Any) -> None:
    """Refuse values of the Trainer that Lightning would stop at with a traceback.

    Raises:
        ValueError: the first one found.
    """
    trainer = config.trainer
    if trainer.gradient_clip_val:
        raise ValueError(
            "trainer.gradient_clip_val: this model clips by itself; use model.optimizer.clip_norm instead."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "trainer.accumulate_grad_batches: in-batch negatives do not add up over batches. Set a larger "
            "data.batch_size with model.query_chunk_size and model.candidate_chunk_size (GradCache) instead."
        )


def _check_nothing_is_overwritten(trainer: Any) -> None:
    folder = _checkpoint_dir(trainer)
    if folder is not None and (folder / LAST_FILE).exists():
        raise ValueError(
            f"{folder / LAST_FILE} is there already, and this fit would overwrite it. Resume it with "
            "--ckpt_path last, choose another --trainer.default_root_dir, or remove the folder."
        )


def _checkpoint_dir(trainer: Any) -> Path | None:
    """Where this configuration's run keeps its checkpoints; ``None`` if its logger numbers runs."""
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        dirpath = (callback.get("init_args") or {}).get("dirpath")
        if callback["class_path"].endswith(".ModelCheckpoint") and dirpath:
            return Path(dirpath)
    logger = trainer.get("logger")
    if logger in (None, True, False):
        return Path(trainer["default_root_dir"]) / "checkpoints"
    arguments = (logger[0] if isinstance(logger, list) else logger).get("init_args") or {}
    places = [arguments.get(name) for name in ("save_dir", "name", "version")]
    parts = [place for place in places if isinstance(place, str)]
    return Path(*parts) / "checkpoints" if len(parts) == len(places) else None


_NESTED = [name for name in CONFIGS if name != "family"]
"""Settings whose options are compared one by one; a family is compared whole."""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value and prefix + name in _NESTED:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _comparable(name: str, value: Any) -> Any:
    if name == "backbone":
        return absolute_name(value)
    return list(value) if isinstance(value, tuple) else value


@rank_zero_only
def _show(differences: Sequence[tuple[str, Any, Any, str]], file: Path) -> None:
    table = Table("setting", "yours", "checkpoint's", "used", title=f"Settings that differ from {file}")
    for name, yours, stored, used in differences:
        table.add_row(name, repr(yours), repr(stored), used)
    Console(file=sys.stderr).print(table)
