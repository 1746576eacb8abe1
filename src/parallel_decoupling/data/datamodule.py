"""The LightningDataModule; every process takes its own share of the rows here, not in Lightning."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from parallel_decoupling import distributed
from parallel_decoupling.data import readers, tasks
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.download import download_eval, download_train
from parallel_decoupling.data.images import ImagePolicy, SquareSize
from parallel_decoupling.data.mixture import Batches, MixtureSampler, Policy
from parallel_decoupling.data.names import printable
from parallel_decoupling.data.row_reader import CANDIDATE, NEGATIVE
from parallel_decoupling.data.row_sources import RowSource, TaskSide
from parallel_decoupling.evaluation.encode import BatchPlan, RowBatches, TokenEstimate
from parallel_decoupling.evaluation.store import (
    AGGREGATE,
    ROWS_PER_SHARD,
    Keeper,
    chosen_columns,
    path_column,
)
from parallel_decoupling.option_types import (
    Names,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_memory,
    checked,
)

EMBEDDED = "mini-mmeb"
"""Value of ``data_dir`` that stands for the benchmark this package generates."""


class MMEBDataModule(LightningDataModule):
    """MMEB, the embedded benchmark in the same layout, or your own data (``docs/data.md``).

    Call ``connect(model)`` before a Trainer uses it; the command line does so. A training batch is a pure
    function of (seed, step): the same for any number of processes and workers, and a resumed run continues
    with exactly the next one. Set the trainer's number of steps as usual; an epoch is one pass over the
    mixture.

    Args:
        data_dir: Folder that holds MMEB-train/ and MMEB-eval/ or a tasks.json, or "mini-mmeb", the
            benchmark that the package generates into its cache.
        train_subsets: Training subsets by folder name; null is all of MMEB-train.
        eval_tasks: Tasks of `test` by folder name; null is all of MMEB-eval (but CIFAR-100, which is not
            one of MMEB's 36) and of data_dir/tasks.json. Those of neither table are of meta-task custom.
            In these lists a group of tasks.json stands for its tasks; null leaves groups out, and "overall"
            names the tasks without one.
        validation_tasks: Tasks that are scored during `fit` and `validate`; none by default.
        batch_size: GLOBAL training batch, divided among all processes, so a multiple of their number.
        eval_batch_size: Rows per evaluation batch and process.
        num_workers: Loader worker processes per process; has no influence on the batches.
        split: Training split, the file name prefix: "original" or "diverse_instruction" in MMEB.
        weights: Share of the mixture per subset (not per row), by name; subsets not named weigh 1.
            Null draws every row once per epoch.
        row_limit: Cap of rows per training subset. VLM2Vec's recipes cap at 50000 or 100000, or not.
        row_limit_by: "sample" draws the rows by the seed, "first" takes the first ones (as VLM2Vec does).
        query_limit: Cap of rows per evaluation task, evenly spaced; for quick looks only.
        policy: "mixed" batches of all subsets, "homogeneous" of one subset each, "sub_batch" of blocks of
            sub_batch_size rows of one subset, or "neighbours" of such blocks that `mine` put together.
        sub_batch_size: Block size of the policies "sub_batch" and "neighbours"; divides batch_size.
        hard_negatives: Candidates per row from the neg_text and neg_image_path columns, but no more than the
            row with most has, or 1; a row with fewer gets padding that matches no query. Warns of a subset
            where no row has any.
        positives: Positives per training row, but no more than the row with most has; a row with fewer gets
            padding, one with more is cut.
        seed: Seed of mixture and row_limit, independent of the trainer's seed.
        image_size: Force every image into a square: "low" (128 pixels), "mid" (672) or "high" (1344), as in
            VLM2Vec. Null leaves that to min_pixels and max_pixels.
        min_pixels: Smallest width times height of an image; the aspect ratio is kept.
        max_pixels: Largest width times height of an image. With both null the processor decides alone.
        max_frames: Frames of a video at most, evenly chosen; 8 as in VLM2Vec.
        max_video_pixels: Largest width times height times frames of a video; null leaves it to the processor.
        missing_images: "error" stops at a row that cannot be embedded, as its image is missing or broken or
            its text is refused; "skip" takes the next row of the subset in training and leaves the row out
            of the score in evaluation, and counts.
        download: Fetch what is not in data_dir from the Hugging Face hub and unpack it, once.
        predict_source: What `predict` embeds in place of the evaluation tasks: a folder of images
            or of Parquet files, or a Parquet, JSONL, CSV or TSV file with columns text, image or both.
        predict_columns: Embeddings to compute: aggregate, path_0, ...; null is the aggregate and all paths.
        predict_instruction: Before every text of predict_source; null is the model's candidate_instruction.
        predict_rows_per_shard: Rows per file of embeddings, which one process batches by length.
    """

    @checked("data.")
    def __init__(
        self,
        data_dir: str = EMBEDDED,
        train_subsets: Names | None = None,
        eval_tasks: Names | None = None,
        validation_tasks: Names = (),
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt = 64,
        num_workers: NonNegativeInt = 0,
        split: str = "original",
        weights: dict[str, PositiveFloat] | None = None,
        row_limit: PositiveInt | None = None,
        query_limit: PositiveInt | None = None,
        policy: Policy = "mixed",
        sub_batch_size: PositiveInt | None = None,
        hard_negatives: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        row_limit_by: readers.LimitBy = "sample",
        image_size: SquareSize | None = None,
        min_pixels: PositiveInt | None = None,
        max_pixels: PositiveInt | None = None,
        missing_images: readers.MissingImages = "error",
        download: bool = False,
        predict_source: str | None = None,
        predict_columns: Names | None = None,
        predict_instruction: str | None = None,
        predict_rows_per_shard: PositiveInt = ROWS_PER_SHARD,
        positives: PositiveInt = 1,
        max_frames: PositiveInt = 8,
        max_video_pixels: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.data_dir, self.split, self.seed, self.download = data_dir, split, seed, download
        self.train_subsets, self.eval_tasks = train_subsets, eval_tasks
        self.validation_tasks = list(validation_tasks)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.weights = num_workers, weights
        check_memory(f"data.num_workers={num_workers}", num_workers * 2.0**26)  # a process' own, at the least
        self.positives, self.hard_negatives = positives, hard_negatives
        self.row_limit, self.row_limit_by, self.query_limit = row_limit, row_limit_by, query_limit
        self.policy, self.sub_batch_size = policy, sub_batch_size
        self.image_size, self.min_pixels, self.max_pixels = image_size, min_pixels, max_pixels
        self.max_frames, self.max_video_pixels = max_frames, max_video_pixels
        self.images = ImagePolicy.from_settings(vars(self))
        self.missing_images = missing_images
        self.predict_source, self.predict_columns = predict_source, predict_columns
        self.predict_instruction = predict_instruction
        self.predict_rows_per_shard = predict_rows_per_shard
        self.train_data: list[readers.TrainSubset] = []
        self.eval_tasks_data: list[tasks.EvalTask] = []
        """The tasks of the current stage."""
        self.rows: list[TaskSide] | list[RowSource] = []
        """What the loaders of validate, test or predict encode, in their order."""
        self._model: Any = None
        self._keeper: Keeper | None = None

    def connect(self, model: Any, keeper: Keeper | None = None) -> "MMEBDataModule":
        """Take the processor and the prompts of a model, give it the settings of this data, return itself.

        Args:
            model: the ``PDFEmbedder`` that the batches are for.
            keeper: knows which embeddings of ``test`` or ``predict`` are on disk; their rows are left out.
        """
        self._model, self._keeper = model, keeper
        model.data_settings = self.settings
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments behind training and evaluation, as plain values; not those of ``predict``."""
        names = inspect.signature(MMEBDataModule).parameters
        return {name: getattr(self, name) for name in names if not name.startswith("predict_")}

    def prepare_data(self) -> None:
        """Make what the stage needs and is not there yet: downloads, the benchmark, mapped tables."""
        stage = None if self.trainer is None else self.trainer.state.fn
        if stage == "predict" and self.predict_source is not None:
            return
        subsets = self.train_subsets if stage == "fit" else []
        wanted = self.validation_tasks if stage in ("fit", "validate") else self.eval_tasks
        if self.download:
            if self.data_dir == EMBEDDED:
                raise ValueError(f"download is for MMEB, {EMBEDDED!r} is generated. Set data_dir.")
            folder = Path(self.data_dir)
            known, there = [*tasks.read_tasks(folder)], tasks.find_train_subsets(folder, self.split)
            tasks.check_names(subsets or (), [*tasks.MMEB_TRAIN_SUBSETS, *there], "training subset")
            wanted = tasks.chosen(wanted, known, folder)
            later = tasks.chosen(self.eval_tasks, known, folder) if stage == "fit" else []
            tasks.check_names([*wanted, *later], known, "evaluation task", self._task_advice)
            trained = [name for name in tasks.MMEB_TRAIN_SUBSETS if subsets is None or name in subsets]
            download_train(folder, trained, self.split)
            download_eval(folder, wanted)
        there = tasks.find_train_subsets(self.folder, self.split)
        for subset in sorted({*tasks.chosen(subsets, there, self.folder)} & {*there}):
            readers.open_train(self.folder, subset, self.split)
        there = tasks.find_eval_tasks(self.folder)
        for task in sorted({*tasks.chosen(wanted, there, self.folder)} & {*there}):
            readers.open_sides(self.folder, tasks.read_tasks(self.folder)[task])

    def setup(self, stage: str) -> None:
        """Open the files that ``stage`` needs; ``fit`` checks the names of ``validate`` and ``test``, too."""
        if stage == "predict" and self.predict_source is not None:
            return
        found = tasks.find_eval_tasks(self.folder)
        names, option = tasks.chosen(self.validation_tasks, found, self.folder), "validation_tasks"
        later = [*tasks.read_tasks(self.folder)] if self.download and stage == "fit" else found
        to_test = tasks.chosen(self.eval_tasks, later, self.folder)
        if stage == "fit":
            tasks.check_names(to_test, later, "evaluation task", self._task_advice)
            self.train_data = self._open_subsets()
        elif stage != "validate":
            names, option = to_test, "eval_tasks"
        if not names and stage != "fit":
            example = f"such as --data.{option} '[{found[0] if found else 'GQA'}]'"
            known = f"Name tasks, {example}. Found: {', '.join(found) or 'none'}."
            raise ValueError(f"Nothing to evaluate: data.{option} is empty. {known}")
        tasks.check_names(names, found, "evaluation task", self._task_advice)
        read, options = readers.read_eval_task, {"must_exist": self.missing_images == "error"}
        self.eval_tasks_data = [read(self.folder, name, self.query_limit, **options) for name in names]
        self._log_custom([each.task for each in self.eval_tasks_data])

    @property
    def _task_advice(self) -> str:
        folder = Path(self.data_dir)
        place = folder / "MMEB-eval" / "<task>" / "test-*.parquet"
        return f"A task is a folder with {place}, or an entry of {folder / 'tasks.json'}."

    def _log_custom(self, scored: Iterable[tasks.Task]) -> None:
        """Say which tasks stand in no table, and what to add for a place in the means."""
        about = {"meta_task": "retrieval", "in_distribution": False}
        rows = {task.name: about for task in scored if task.meta_task == "custom" and task.source is None}
        if rows:
            what = f"{', '.join(rows)}: not in the task table, so counted in the mean of custom tasks alone"
            advice = f"add to {self.folder / 'tasks.json'}, with the right meta-task: {json.dumps(rows)}"
            rank_zero_info(printable(f"{what}. For a place in the other means {advice}"))

    def _open_subsets(self) -> list[readers.TrainSubset]:
        found = tasks.find_train_subsets(self.folder, self.split)
        names = tasks.chosen(self.train_subsets, found, self.folder)
        if not names:
            place = self.folder / "MMEB-train" / "<subset>" / f"{self.split}-*.parquet"
            raise ValueError(f"No training subset {place}. Check data_dir, split and train_subsets.")
        tasks.check_names(names, found, "training subset")
        tasks.check_names(self.weights or (), names, "subset in weights")
        options: dict[str, Any] = {"limit": self.row_limit, "limit_by": self.row_limit_by, "seed": self.seed}
        options |= {"positives": self.positives, "hard_negatives": self.hard_negatives}
        options["missing_images"] = self.missing_images
        subsets = [readers.TrainSubset(self.folder, name, self.split, **options) for name in names]
        for option, side in (("positives", CANDIDATE), ("hard_negatives", NEGATIVE)):
            most = max(1, *(subset.most(side) for subset in subsets))  # more would be padding in every row
            for subset in subsets:
                setattr(subset, option, min(getattr(self, option), most))
        taught = any(subset.table.column(tasks.TEACHER) is not None for subset in subsets)
        if getattr(self._model, "hparams", {}).get("teacher_weight", 0) > 0 and not taught:
            advice = f"Add a column {tasks.TEACHER} (docs/data.md), or set model.teacher_weight to 0."
            raise ValueError(f"No training subset has a teacher's scores. {advice}")
        for subset in subsets if distributed.rank() == 0 else ():
            subset.log_gaps()
        return subsets

    def train_dataloader(self) -> Batches:
        """Batches of this process from the next step on: the trainer's count of processed ones."""
        if self.batch_size == 1 and not self.hard_negatives:
            advice = "Raise batch_size, or set hard_negatives"
            raise ValueError(f"data.batch_size=1 leaves a query nothing to be told apart from. {advice}.")
        weighted = self.weights
        weights = None if weighted is None else [weighted.get(each.subset, 1.0) for each in self.train_data]
        sizes = [len(subset) for subset in self.train_data]
        options: dict[str, Any] = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        options |= {"sub_batch_size": self.sub_batch_size, "seed": self.seed, "weights": weights}
        if self.policy == "neighbours":
            options["orders"] = [subset.neighbour_order() for subset in self.train_data]
        sampler = MixtureSampler(sizes, batch_size=self.batch_size, policy=self.policy, **options)
        options = {"num_workers": self.num_workers, "generator": torch.Generator(), "batch_sampler": sampler}
        collate = readers.TrainCollator(self.collator, self.train_data)
        loader = DataLoader(readers.TrainRows(self.train_data), collate_fn=collate, **options)
        return Batches(loader, sampler, None if self.trainer is None else self._consumed)

    def _consumed(self) -> int:
        """Return the training batches of all epochs so far, which every checkpoint has."""
        trainer: Any = self.trainer
        done = int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        return 0 if trainer.overfit_batches else done  # overfit_batches repeats the first ones

    def val_dataloader(self) -> list[Batches]:
        """Two loaders per task of the stage: queries, then candidates, without embeddings that are kept."""
        columns = tuple(map(path_column, range(self._connected.encoder.num_paths)))
        return self._loaders(self._sides(), columns, self.missing_images == "skip")

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> list[Batches]:
        """Load the rows of predict_source, or else of the evaluation tasks, that are not embedded yet."""
        model, instruction = self._connected, self.predict_instruction
        columns = chosen_columns(self.predict_columns, model.encoder.num_paths)
        numbers = (int(name.removeprefix("path_")) for name in columns if name != AGGREGATE)
        wanted = None if AGGREGATE in columns else tuple(numbers)
        rows: list[TaskSide] | list[RowSource] = self._sides()
        if self.predict_source is not None:
            used = model.candidate_instruction if instruction is None else instruction
            rows = [RowSource(self.predict_source, used)]
        return self._loaders(rows, columns, True, self.predict_rows_per_shard, wanted)

    @property
    def folder(self) -> Path:
        """Where the data is; for the embedded benchmark its place in the cache."""
        if self.data_dir == EMBEDDED:
            from parallel_decoupling.world.benchmark import ensure_benchmark

            return ensure_benchmark()
        if not Path(self.data_dir).is_dir():
            advice = "Give the folder that holds MMEB-train/ and MMEB-eval/"
            known = f"{advice}, or {EMBEDDED!r} for the embedded benchmark."
            raise ValueError(f"data_dir {self.data_dir!r} is not a folder. {known}")
        return Path(self.data_dir)

    @property
    def collator(self) -> Collator:
        """Tokenises for the connected model; pictures as in its training without image settings here."""
        images = self._connected.images if self.images == ImagePolicy() else self.images
        return Collator.of(self._connected.encoder, images=images, limit=self._connected.limit)

    @property
    def _connected(self) -> Any:
        if self._model is None:
            advice = "call data.connect(model) before the Trainer uses it"
            raise ValueError(f"The data does not know the model's processor: {advice}.")
        return self._model

    def _sides(self) -> list[TaskSide]:
        sides = ("query", "candidate")
        return [TaskSide(task, side, self.folder) for task in self.eval_tasks_data for side in sides]

    def _loaders(
        self,
        rows: list[TaskSide] | list[RowSource],
        columns: tuple[str, ...],
        keep_going: bool,
        rows_per_shard: int | None = None,
        paths: tuple[int, ...] | None = None,
    ) -> list[Batches]:
        self.rows, collator, loaders = rows, self.collator, []
        for each in rows:
            finished = frozenset[int]()
            if self._keeper is not None:
                about = {**each.about, "columns": list(columns), "images": collator.images.settings}
                about |= {"num_rows": len(each), "rows_per_shard": rows_per_shard or max(1, len(each))}
                finished = self._keeper.finished(each, about, with_bad_rows=keep_going)
            options: dict[str, Any] = {"rows_per_shard": rows_per_shard, "finished": finished}
            options |= {"rank": distributed.rank(), "world_size": distributed.world_size()}
            plan = BatchPlan(each, TokenEstimate(collator), self.eval_batch_size, **options)
            batches = RowBatches(each, collator, each.where, keep_going=keep_going, paths=paths)
            options = {"num_workers": self.num_workers, "generator": torch.Generator(), "batch_size": None}
            loaders.append(Batches(DataLoader(batches, sampler=plan, **options)))
        return loaders
