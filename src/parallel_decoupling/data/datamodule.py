"""The LightningDataModule that wires ``readers``, ``mixture`` and ``collate`` into ``loaders``.

Options and wiring only: files are read in ``readers``, batches are composed in ``mixture``, tensors are made
in ``collate``. The loaders are no ``torch.utils.data.DataLoader`` to Lightning, so it neither replaces
their sampler nor splits their rows: every process takes its own share here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from parallel_decoupling import distributed
from parallel_decoupling.batch import EncoderInputs, PairBatch
from parallel_decoupling.data.collate import Collator, EvalBatch
from parallel_decoupling.data.download import check_known, download_eval, download_train
from parallel_decoupling.data.images import ImagePolicy, SquareSize
from parallel_decoupling.data.loaders import Batches, EvalBatches, MissingImages, TrainRows
from parallel_decoupling.data.mixture import MixtureSampler
from parallel_decoupling.data.readers import LimitBy, TrainSubset, prepare_tables, read_eval_task
from parallel_decoupling.data.row_loaders import (
    RowBatches,
    RowLoader,
    RowPlan,
    Shards,
    TokenEstimate,
    chosen_columns,
)
from parallel_decoupling.data.row_sources import open_rows
from parallel_decoupling.data.tasks import (
    MMEB_TASKS,
    MMEB_TRAIN_SUBSETS,
    EvalTask,
    check_names,
    find_eval_tasks,
    find_train_subsets,
)

EMBEDDED = "mini-mmeb"
"""Value of ``data_dir`` that stands for the benchmark this package generates."""

_NO_ROWS = EvalBatch(
    EncoderInputs({"input_ids": torch.empty(0, 1).long(), "attention_mask": torch.empty(0, 1).long()}, ()),
    "query",
    torch.empty(0, dtype=torch.int64),
)


class MMEBDataModule(LightningDataModule):
    """MMEB, the embedded benchmark in the same layout, or your own data (``docs/data.md``).

    A training batch is a pure function of (seed, step): the same for any number of processes and
    workers, and a resumed run goes on with exactly the next one. Set the trainer's number of steps
    as usual; an epoch is one pass over the mixture.

    Args:
        data_dir: Folder that holds MMEB-train/ and MMEB-eval/ or a tasks.json, or "mini-mmeb", the
            benchmark that the package generates into its cache.
        train_subsets: Training subsets by folder name; null is all of MMEB-train.
        eval_tasks: Tasks of `test` by folder name; null is all of MMEB-eval that are in the task table
            (MMEB's 36, and those of data_dir/tasks.json).
        validation_tasks: Tasks that are scored during `fit` and `validate`; none by default.
        batch_size: GLOBAL training batch, divided among all processes.
        eval_batch_size: Rows per evaluation batch and process.
        num_workers: Loader worker processes per process; has no influence on the batches.
        split: Training split, the file name prefix: "original" or "diverse_instruction" in MMEB.
        weights: Share of the mixture per subset (not per row), by name; subsets not named weigh 1.
            Null draws every row once per epoch.
        row_limit: Cap of rows per training subset. VLM2Vec's recipes cap at 50000 or 100000, or not.
        row_limit_by: "sample" draws the rows by the seed, "first" takes the first ones (as VLM2Vec does).
        query_limit: Cap of rows per evaluation task, evenly spaced; for quick looks only.
        policy: "mixed" batches of all subsets, "homogeneous" of one subset each, or "sub_batch" of
            blocks of sub_batch_size rows of one subset.
        sub_batch_size: Block size of the policy "sub_batch"; divides batch_size.
        hard_negatives: Candidates per row from the neg_text and neg_image_path columns; a row with fewer gets
            stand-ins that are nobody's negative. Warns of a subset where no row has any.
        seed: Seed of mixture and row_limit, independent of the trainer's seed.
        image_size: Force every image into a square: "low" (128 pixels), "mid" (672) or "high" (1344), as in
            VLM2Vec. Null leaves that to min_pixels and max_pixels.
        min_pixels: Smallest width times height of an image; the aspect ratio is kept.
        max_pixels: Largest width times height of an image. With both null the processor decides alone.
        missing_images: "error" stops at an image that is missing or broken, "skip" takes the next row of
            the subset in training and leaves the row out of the score in evaluation, and counts.
        download: Fetch what is not in data_dir from the Hugging Face hub and unpack it, once.
        embedding_cache: Keep the embeddings of `test` by checkpoint and data, so that a test that was stopped
            goes on with the tasks not done: true for `embeddings` in the run's folder, or a folder.
        predict_source: What `predict` embeds in place of the evaluation tasks: a folder of images, or a
            Parquet, JSONL or CSV file with columns text, image or both (`docs/embedding_files.md`).
        predict_columns: Embeddings to compute: aggregate, path_0, ...; null is the aggregate and all paths.
        predict_instruction: Before every text of predict_source; null is the model's candidate_instruction.
        predict_rows_per_shard: Rows per file of embeddings, which one process batches by length.
    """

    def __init__(
        self,
        data_dir: str = EMBEDDED,
        train_subsets: list[str] | None = None,
        eval_tasks: list[str] | None = None,
        validation_tasks: Sequence[str] = (),
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        split: str = "original",
        weights: dict[str, float] | None = None,
        row_limit: int | None = None,
        query_limit: int | None = None,
        policy: Literal["mixed", "homogeneous", "sub_batch"] = "mixed",
        sub_batch_size: int | None = None,
        hard_negatives: int = 0,
        seed: int = 0,
        row_limit_by: LimitBy = "sample",
        image_size: SquareSize | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        missing_images: MissingImages = "error",
        download: bool = False,
        embedding_cache: bool | str = False,
        predict_source: str | None = None,
        predict_columns: list[str] | None = None,
        predict_instruction: str | None = None,
        predict_rows_per_shard: int = 4096,
    ) -> None:
        super().__init__()
        numbers = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "row_limit": row_limit}
        numbers |= {"query_limit": query_limit, "predict_rows_per_shard": predict_rows_per_shard}
        _check_numbers(numbers, at_least=1)
        numbers = {"hard_negatives": hard_negatives, "num_workers": num_workers, "seed": seed}
        _check_numbers(numbers, at_least=0)
        self.data_dir = data_dir
        self.train_subsets = train_subsets
        self.eval_tasks = eval_tasks
        self.validation_tasks = list(validation_tasks)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.split = split
        self.weights = weights
        self.row_limit = row_limit
        self.query_limit = query_limit
        self.policy: Literal["mixed", "homogeneous", "sub_batch"] = policy
        self.sub_batch_size = sub_batch_size
        self.hard_negatives = hard_negatives
        self.seed = seed
        self.row_limit_by: LimitBy = row_limit_by
        self.image_size = image_size
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.images = ImagePolicy(image_size, min_pixels, max_pixels)
        self.missing_images: MissingImages = missing_images
        self.download = download
        self.embedding_cache = embedding_cache
        self.predict_source = predict_source
        self.predict_columns = predict_columns
        self.predict_instruction = predict_instruction
        self.predict_rows_per_shard = predict_rows_per_shard
        self.finished_shards: Callable[[RowBatches, Shards], Collection[int]] = lambda *_: ()
        """Which shards of predict_source are done already; whoever writes them knows."""
        self.train_data: list[TrainSubset] = []
        self.eval_tasks_data: list[EvalTask] = []
        """The tasks of the current stage, in the order of the evaluation loaders."""
        self._collator: Collator | None = None

    def connect(self, processor: Any, image_token: str) -> None:
        """Set the processor by hand; without it the trainer's module gives its encoder's."""
        self._collator = Collator(processor, image_token=image_token, images=self.images)

    def prepare_data(self) -> None:
        """Make what is needed and not there yet: downloads, the embedded benchmark, mapped tables.

        Lightning calls this on one process per node. Training data only before ``fit``.

        Raises:
            ValueError: a name that neither MMEB nor the folder has, before anything is fetched.
        """
        stage = None if self.trainer is None else self.trainer.state.fn
        if stage == "predict" and self.predict_source is not None:
            return
        subsets = self.train_subsets if stage == "fit" else []
        tasks = self.validation_tasks if stage in ("fit", "validate") else self.eval_tasks
        if self.download:
            if self.data_dir == EMBEDDED:
                raise ValueError(f"download is for MMEB, {EMBEDDED!r} is generated. Set data_dir.")
            folder = Path(self.data_dir)
            named = [*(tasks or ()), *((self.eval_tasks or ()) if stage == "fit" else ())]
            check_known(folder, self.split, subsets or (), named)
            download_train(folder, _of(MMEB_TRAIN_SUBSETS, subsets), self.split)
            download_eval(folder, _of(list(MMEB_TASKS), tasks))
        folder = self._folder()
        subsets = _of(find_train_subsets(folder, self.split), subsets)
        prepare_tables(folder, subsets, self.split, _of(find_eval_tasks(folder), tasks))

    def setup(self, stage: str) -> None:
        """Open the files that ``stage`` needs: fit, validate or test. ``fit`` checks the names of all three.

        Raises:
            ValueError: unknown subset or task, no task to validate or test, or files that do not have MMEB's
                layout.
        """
        if stage == "predict" and self.predict_source is not None:
            return
        folder = self._folder()
        found = find_eval_tasks(folder)
        if stage == "fit":
            to_come = list(MMEB_TASKS) if self.download else []
            check_names(self.eval_tasks or [], [*found, *to_come], "evaluation task")
            self.train_data = self._open_subsets(folder)
        names = self.validation_tasks
        if stage in ("test", "predict"):
            names = found if self.eval_tasks is None else self.eval_tasks
            if self.eval_tasks == []:
                raise ValueError("data.eval_tasks is empty. Name some, or leave it out for all.")
            if not names:
                raise ValueError(f"No evaluation task under {folder / 'MMEB-eval'}. Check data_dir.")
        elif stage == "validate" and not names:
            example = found[0] if found else "GQA"
            raise ValueError(
                "Nothing to validate: data.validation_tasks is empty. Name tasks, such as "
                f"--data.validation_tasks '[{example}]'. Found: {', '.join(found) or 'none'}."
            )
        check_names(names, found, "evaluation task")
        must_exist = self.missing_images == "error"
        self.eval_tasks_data = [
            read_eval_task(folder, name, self.query_limit, must_exist=must_exist) for name in names
        ]

    def train_dataloader(self) -> Batches[PairBatch]:
        """Batches of this process from the next step on: the trainer's count of processed ones."""
        weights = None
        if self.weights is not None:
            weights = [self.weights.get(subset.subset, 1.0) for subset in self.train_data]
        sampler = MixtureSampler(
            [len(subset) for subset in self.train_data],
            batch_size=self.batch_size,
            weights=weights,
            policy=self.policy,
            sub_batch_size=self.sub_batch_size,
            seed=self.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        loader = DataLoader(
            TrainRows(self.train_data, self.missing_images),
            batch_sampler=sampler,
            collate_fn=self.collator,
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )
        return Batches(loader, sampler, None if self.trainer is None else self._consumed)

    def val_dataloader(self) -> list[Batches[EvalBatch]]:
        """One loader per validation task."""
        return [self._eval_loader(task) for task in self.eval_tasks_data]

    def test_dataloader(self) -> list[Batches[EvalBatch]]:
        """One loader per evaluation task; one empty batch for a task whose embeddings are in the cache."""
        cached: set[str] = set()
        if self.embedding_cache and self.trainer is not None:
            module: Any = self.trainer.lightning_module
            folder = self.embedding_cache if isinstance(self.embedding_cache, str) else None
            cached = module.cached_tasks(self.eval_tasks_data, folder)
        return [
            Batches(DataLoader([_NO_ROWS], batch_size=None))  # type: ignore[arg-type]
            if task.task.name in cached
            else self._eval_loader(task)
            for task in self.eval_tasks_data
        ]

    @property
    def folder(self) -> Path:
        """Where the data is; the embedded benchmark's place in the cache."""
        return self._folder()

    def predict_dataloader(self) -> RowLoader | list[Batches[EvalBatch]]:
        """Batches of this process of the rows of predict_source that are not done yet.

        Pictures as in the model's training, unless this datamodule has image settings. Without a
        predict_source those of the evaluation tasks, one loader per task.

        Raises:
            ValueError: a predict_source that cannot be read; unknown predict_columns.
        """
        if self.predict_source is None:
            return [self._eval_loader(task) for task in self.eval_tasks_data]
        assert self.trainer is not None, "predict_dataloader needs the model of a Trainer"
        module: Any = self.trainer.lightning_module
        source = open_rows(self.predict_source)
        shards = Shards(len(source), self.predict_rows_per_shard)
        instruction = self.predict_instruction
        collator = self.collator
        if self.images == ImagePolicy():
            processor, image_token = collator.processor, collator.image_token
            collator = Collator(processor, image_token=image_token, images=module.embedder.images)
        rows = RowBatches(
            source,
            collator,
            module.candidate_instruction if instruction is None else instruction,
            chosen_columns(self.predict_columns, module.encoder.num_paths),
        )
        finished = self.finished_shards(rows, shards)
        place = distributed.rank(), distributed.world_size()
        estimate = TokenEstimate.of(collator)
        plan = RowPlan(source, shards, estimate, finished, self.eval_batch_size, *place)
        return RowLoader(rows, plan, self.num_workers)

    @property
    def collator(self) -> Collator:
        """The connected collator, or one with the processor of the module's encoder."""
        if self._collator is None:
            if self.trainer is None:
                raise ValueError("No processor: call connect(processor, image_token) or use a Trainer.")
            encoder: Any = self.trainer.lightning_module.encoder
            self.connect(encoder.processor, encoder.image_token)
        assert self._collator is not None
        return self._collator

    def _consumed(self) -> int:
        """Training batches processed so far in all epochs; part of every checkpoint.

        ``overfit_batches`` repeats the first ones.
        """
        trainer: Any = self.trainer
        return (
            0 if trainer.overfit_batches else int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        )

    def _folder(self) -> Path:
        if self.data_dir == EMBEDDED:
            from parallel_decoupling.world.benchmark import ensure_benchmark

            return ensure_benchmark()
        folder = Path(self.data_dir)
        if not folder.is_dir():
            raise ValueError(
                f"data_dir {self.data_dir!r} is no folder. Give the folder that holds MMEB-train/ and "
                f"MMEB-eval/, or {EMBEDDED!r} for the embedded benchmark."
            )
        return folder

    def _subset_names(self, folder: Path) -> list[str]:
        found = find_train_subsets(folder, self.split)
        if self.train_subsets == []:
            raise ValueError("data.train_subsets is empty. Name some, or leave it out for all.")
        names = found if self.train_subsets is None else self.train_subsets
        if not names:
            raise ValueError(
                f"No training subset {folder / 'MMEB-train'}/<subset>/{self.split}-*.parquet. "
                "Check data_dir and split."
            )
        check_names(names, found, "training subset")
        check_names(list(self.weights or {}), names, "subset in weights")
        return names

    def _open_subsets(self, folder: Path) -> list[TrainSubset]:
        subsets = []
        for name in self._subset_names(folder):
            subset = TrainSubset(
                folder,
                name,
                self.split,
                self.row_limit,
                limit_by=self.row_limit_by,
                hard_negatives=self.hard_negatives,
                seed=self.seed,
            )
            if distributed.rank() == 0:
                subset.log_gaps()
            subsets.append(subset)
        return subsets

    def _eval_loader(self, task: EvalTask) -> Batches[EvalBatch]:
        batches = EvalBatches(
            task,
            self.collator,
            self.eval_batch_size,
            distributed.rank(),
            distributed.world_size(),
            self.missing_images,
        )
        loader = DataLoader(
            batches, batch_size=None, num_workers=self.num_workers, generator=torch.Generator()
        )
        return Batches(loader)


def _check_numbers(numbers: Mapping[str, int | None], at_least: int) -> None:
    for name, value in numbers.items():
        if value is not None and value < at_least:
            raise ValueError(f"data.{name} must be at least {at_least}, got {value}.")


def _of(there: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Those of the names that are wanted; None is all."""
    return [name for name in there if wanted is None or name in wanted]
