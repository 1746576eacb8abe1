"""The LightningCLI behind ``cli``: defaults of a run, and which value wins when a checkpoint is given.

A typed value wins over the checkpoint's, and the checkpoint's over a default; every typed value that differs
is shown. ``validate``, ``test`` and ``predict`` take what shapes trained parameters from the checkpoint.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.report import console, text_table
from parallel_decoupling.evaluation.run import EmbeddingWriter, Scoring
from parallel_decoupling.evaluation.store import Keeper, VectorType
from parallel_decoupling.files import atomic_write, expand_paths, locked
from parallel_decoupling.model.encoder import absolute_name
from parallel_decoupling.model.run_checkpoint import read_checkpoint
from parallel_decoupling.option_types import CountOrAll, NonNegativeInt, PositiveInt, Rule, Seed, check_values
from parallel_decoupling.training import run_folder
from parallel_decoupling.training.callbacks import ProgressLines
from parallel_decoupling.training.module import PDFEmbedder
from parallel_decoupling.training.resuming import Continuity, continue_logs
from parallel_decoupling.training.run_folder import FIT_CONFIG, as_list, is_first_process
from parallel_decoupling.training.settings import CONFIGS, SHAPES_WEIGHTS

log = logging.getLogger(__name__)
CSV_FILE = ExperimentWriter.NAME_METRICS_FILE
SAVE_EVERY = 50  # main steps after which ``last.ckpt`` is renewed inside an epoch

MOST_VALUES = 10_000  # of a configuration file, when what its aliases stand for is written out
NOT_YAML = (yaml.YAMLError, UnicodeDecodeError, RecursionError)
_parse_yaml = get_loader("yaml")
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ImportError, AssertionError)
"""What Lightning raises while it builds a Trainer from options that do not work, here or together."""
HARMLESS_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed from",
    "Total length of `list` across ranks is zero",
)
"""Of Lightning: about itself, resuming in a folder, and a fit without validation tasks."""
CONFIG_DIR = Path(__file__).parent / "configs"  # configurations that come with the package: those of the demo


def run(args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; ``plan`` takes the options of ``fit``.

    If the working folder lacks ``demo.yaml``, that name stands for the one in the package.
    """
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    packaged = {file.name: str(file) for file in CONFIG_DIR.glob("*.yaml") if not Path(file.name).exists()}
    subcommand, *options = [packaged.get(word, word) for word in args]
    words = list(chain.from_iterable(option.split("=", 1) for option in options))
    for file in (value for name, value in pairwise(words) if name in ("-c", "--config")):
        _check_config(os.path.expanduser(file))
    set_loader("yaml", _load_yaml, NOT_YAML)
    try:
        PlanCLI(["fit", *options]) if subcommand == "plan" else RunCLI([subcommand, *options])
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit as stop:
        if isinstance(stop, SIGTERMException):
            raise SystemExit(128 + signal.SIGTERM) from None
        if isinstance(stop.__context__, KeyboardInterrupt):  # which Lightning makes a 1 of
            raise SystemExit(128 + signal.SIGINT) from None
        raise


def _check_config(file: str) -> None:
    """Raise ``ValueError`` for a file that is not UTF-8 or not a table of options."""
    if not Path(file).is_file():
        if Path(file).exists():
            raise ValueError(f"--config: {file} is not a regular file.")
        return  # the parser says so
    try:
        text = Path(file).read_text(encoding="utf-8")
        root, _ = yaml.compose(text, Loader=yaml.SafeLoader), _load_yaml(text)
    except NOT_YAML as error:
        raise ValueError(f"{file} is not YAML in UTF-8: {error}") from error
    sections = {key.value: value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    keys = ("model", "data", "trainer")
    wrong = [key for key in keys if not isinstance(sections.get(key, root), yaml.MappingNode)]
    if wrong:
        raise ValueError(f"{file}: the options of {' and '.join(wrong)} must be 'name: value' lines.")


def _load_yaml(text: str) -> Any:
    """Read options of a file or of the command line as jsonargparse does, unless aliases make them grow."""
    count, nodes = 0, [yaml.compose(text, Loader=yaml.SafeLoader)] if "*" in text else []
    while nodes and count <= MOST_VALUES:  # an alias is the node that it stands for, and may be inside itself
        count, node = count + 1, nodes.pop()
        if not isinstance(node, yaml.ScalarNode):
            nodes += chain.from_iterable(each if isinstance(each, tuple) else (each,) for each in node.value)
    if nodes:
        raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, aliases expanded")
    return _parse_yaml(text)


_NotZero = Annotated[Any, Rule("above 0", lambda value: value != 0)]
_One = Annotated[int, Rule("1: raise data.batch_size with model.chunk_size (GradCache)", lambda n: n == 1)]


def trainer_options(
    accumulate_grad_batches: _One,
    check_val_every_n_epoch: PositiveInt | None,
    default_root_dir: str,
    limit_predict_batches: _NotZero,
    log_every_n_steps: NonNegativeInt | None,
    max_steps: CountOrAll,
    num_nodes: PositiveInt,
    num_sanity_val_steps: CountOrAll | None,
    seed_everything: Seed | bool,
    val_check_interval: _NotZero,
) -> None:
    """Declare the ranges of options that Lightning takes unchecked, or refuses without their name."""


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

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the file whole or not at all."""
        file = Path(trainer.log_dir or "", self.config_filename).absolute()  # all processes must ask
        with ExitStack() as stack:
            if trainer.is_global_zero and not self.already_saved:
                self.config_filename = str(stack.enter_context(atomic_write(file)))
            super().setup(trainer, pl_module, stage)


class RunCLI(LightningCLI):
    """LightningCLI with this package's model and data; ``trainer.default_root_dir`` holds all of a run."""

    def __init__(self, args: list[str]) -> None:
        self.typed: Any = None
        self.wanted = args[0]
        self._steps_before = 0
        file = FIT_CONFIG if args[0] == "fit" else f"{args[0]}_config.yaml"
        saves = None if self.wanted == "predict" else _SaveConfig  # it names absolute paths
        options: dict[str, Any] = {"parser_class": _Parser, "save_config_callback": saves}
        options["save_config_kwargs"] = {"overwrite": True, "config_filename": file}
        options["trainer_defaults"] = {"use_distributed_sampler": False, "default_root_dir": "runs/default"}
        # a mistyped option must not pass for another one, and main prints all errors
        options["parser_kwargs"] = {"allow_abbrev": False, "exit_on_error": False}
        options |= {"auto_configure_optimizers": False, "load_from_checkpoint_support": False}
        with ExitStack() as self._until_the_end:
            super().__init__(PDFEmbedder, MMEBDataModule, seed_everything_default=0, args=args, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommand that was typed alone, as each takes a second to build."""
        return {self.wanted: LightningCLI.subcommands()[self.wanted]}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
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
        self.config = expand_paths(parser.parse_args(args))
        self.typed = expand_paths(parser.parse_args(args, defaults=False))
        more = {"seed_everything": self.given.seed_everything}
        check_values(trainer_options, vars(self.given.trainer) | more)

    @property
    def given(self) -> Any:
        """All options of the subcommand."""
        return self.config[self.wanted]

    def instantiate_classes(self) -> None:
        """Refuse what would overwrite a run, then build."""
        trainer = self.given.trainer
        many, there = str(trainer.devices), max(os.cpu_count() or 1, torch.cuda.device_count())
        if many.isdigit() and int(many) > there:
            raise ValueError(f"trainer.devices={many}: this machine has {there}.")
        if int(trainer.num_nodes) > 1 and not {"MASTER_ADDR", "SLURM_JOB_ID"} & os.environ.keys():
            advice = "start it on each of them with torchrun, or by SLURM"
            raise ValueError(f"trainer.num_nodes={trainer.num_nodes} would wait for others: {advice}.")
        is_new = not trainer.fast_dev_run and self.wanted == "fit" and not self._resumes_here
        if is_new:
            self._check_that_nothing_is_overwritten(trainer)
        super().instantiate_classes()
        for logger in self.trainer.loggers if is_new else ():
            if (file := Path(logger.log_dir or "", CSV_FILE)).is_file():  # which CSVLogger would empty
                raise ValueError(f"{file} is there already: give the logger another folder.")

    @property
    def _resumes_here(self) -> bool:
        """Tell whether the checkpoint is one of the run in this folder."""
        trainer, file = self.given.trainer, Path(self.given.ckpt_path or "/").resolve()
        root, folder = Path(trainer.default_root_dir).resolve(), run_folder.checkpoint_dir(trainer)
        if folder is None:  # this logger numbers its runs, which are below
            return root in file.parents
        return file.parent in (root, folder.resolve())

    def _check_that_nothing_is_overwritten(self, trainer: Any) -> None:
        if files := run_folder.run_files(trainer):
            problem = f"{files[0]} is there already, and this fit would overwrite its run"
            advice = "choose another --trainer.default_root_dir, or remove the folder"
            raise ValueError(f"{problem}. Resume it with --ckpt_path last, {advice}.")
        if is_first_process():
            self._until_the_end.callback(self._forget_run_without_steps, trainer)

    def _forget_run_without_steps(self, trainer: Any) -> None:
        """Remove what a fit has left that failed before its first step: such a folder is not a run."""
        if not hasattr(self, "model") or not self.model.progress.steps_done:
            for file in run_folder.run_files(trainer):
                file.unlink()

    def _written_folders(self) -> list[Path]:
        root = Path(self.given.trainer.default_root_dir)
        if self.wanted == "predict":
            return [Path(self.given.output_dir or root / "embeddings")]
        folders = [root, *map(Path, filter(None, [self.given.get("embeddings_dir")]))]
        checkpoints = run_folder.checkpoint_dir(self.given.trainer) if self.wanted == "fit" else None
        if checkpoints is not None and not checkpoints.resolve().is_relative_to(root.resolve()):
            folders.append(checkpoints)
        return folders

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Connect model, data and callbacks; without the user's own add TensorBoard and ``last.ckpt``."""
        config = self._get(self.config_init, "trainer")
        callbacks, keeper = list(as_list(config.get("callbacks"))), self._keeper()
        self.datamodule.connect(self.model, keeper)
        callbacks += [Scoring(self.datamodule, keeper), ProgressLines()]
        if self.wanted == "predict":
            assert keeper is not None
            callbacks.append(EmbeddingWriter(self.datamodule, keeper))
            kwargs |= {"default_root_dir": str(keeper.root), "logger": config.get("logger") or False}
        elif config.get("logger") in (None, True):
            folder = config["default_root_dir"]
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        wants_files = config.get("enable_checkpointing") is not False and not config.get("fast_dev_run")
        own = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        if wants_files and not any(getattr(callback, "save_last", None) for callback in own):
            options: dict[str, Any] = {"enable_version_counter": False, "auto_insert_metric_name": False}
            options["dirpath"] = run_folder.checkpoint_dir(self.given.trainer)
            options["save_on_train_epoch_end"] = True  # else validations take the place of a run's end
            name = {"filename": "last"} if own else {"filename": "step={step}", "save_last": True}
            callbacks.append(ModelCheckpoint(every_n_epochs=1, **name, **options))
            callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=SAVE_EVERY, **options))
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (*REFUSALS, MisconfigurationException) as error:
            given = ", ".join(self.typed[self.wanted].as_dict().get("trainer", {}))
            raise ValueError(f"one of the trainer's options cannot be used: {error} ({given})") from error

    def _keeper(self) -> Keeper | None:
        """Open the folder of embeddings of ``predict``, or the one that ``test`` was given."""
        given = self.given
        if self.wanted == "predict":
            (folder,) = self._written_folders()
            model = None if given.ckpt_path is None else os.path.abspath(given.ckpt_path)
            return Keeper(folder, lambda: self.model.about() | {"model": model}, dtype=given.output_dtype)
        folder = given.get("embeddings_dir")
        return None if folder is None else Keeper(folder, self.model.about, replace=True)

    def before_fit(self) -> None:
        """Log where the run did that is resumed."""
        if self._resumes_here:
            continue_logs(self.trainer.loggers, self._steps_before - 1)

    def after_fit(self) -> None:
        """Make up for the last validation, or warn, where nothing was left to train."""
        if self.model.progress.steps_done > self._steps_before:
            return
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        due = any(isinstance(each, Continuity) and each.validation_is_due for each in callbacks)
        if due and self.datamodule.validation_tasks:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        elif self._steps_before == 0:
            raise ValueError("nothing was trained: the run ended before its first step (trainer.max_time?)")
        else:
            steps = f"--ckpt_path has all {self._steps_before} main steps of this run"
            rank_zero_warn(f"Nothing was trained: {steps}. Raise trainer.max_steps or max_epochs.")

    def before_predict(self) -> None:
        """Warn of a model that nothing has trained."""
        if self.given.ckpt_path is None:
            log.warning(f"{self.wanted} without --ckpt_path: this is the model before any training")

    before_test = before_validate = before_predict

    def _parse_ckpt_path(self) -> None:
        """Lock what is written, find the checkpoint, and take over its settings that were not typed."""
        given, is_fit = self.given, self.wanted == "fit"
        if not given.trainer.fast_dev_run and is_first_process():
            for folder in self._written_folders():
                self._until_the_end.enter_context(locked(folder))
        file = run_folder.find_checkpoint(given.ckpt_path, given.trainer, is_fit=is_fit)
        given.ckpt_path = file and str(file)
        if file is None:
            return
        content = read_checkpoint(file)
        self._steps_before = content["progress"]["steps_done"]
        stored = {"model": content["hyper_parameters"], "data": content["data"]}
        rows = [row for part, values in stored.items() for row in self._merge(part, values)]
        if rows and is_first_process():
            headings = ("setting", "yours", "checkpoint's", "used")
            Console(file=sys.stderr).print(text_table(f"Settings that differ from {file}", headings, rows))

    def _merge(self, part: str, stored: Mapping[str, Any]) -> Iterator[Sequence[str]]:
        """Merge the settings of one part; yield name, yours, the checkpoint's, and whose is used."""
        config, typed = self.given[part], dict((self.typed.get(self.wanted, {}).get(part) or {}).items())
        for name, value in _leaves(stored):
            if not any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in typed):
                config[name] = value
                continue
            yours = config[name]
            if _comparable(name, yours) == _comparable(name, value):
                continue
            fixed = any(f"{name}.".startswith(f"{known}.") for known in SHAPES_WEIGHTS)
            if fixed := fixed and part == "model" and self.wanted != "fit":
                config[name] = value
            used = "the checkpoint's" if fixed else "yours"
            yield f"{part}.{name}", repr(yours), repr(value), used


class PlanCLI(RunCLI):
    """Parses what ``fit`` would, and prints its plan instead of building anything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the plan's own option."""
        parser.add_argument("--gpu_memory_gib", type=float, default=80.0, help="Memory of each GPU.")

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _written_folders(self) -> list[Path]:
        return []

    def _run_subcommand(self, subcommand: str) -> None:
        from parallel_decoupling.plan import plan_tables

        config = self.config[subcommand].as_dict()
        parts = [config[name] for name in ("model", "data", "trainer", "gpu_memory_gib")]
        console().print(*plan_tables(*parts), sep="\n")


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
