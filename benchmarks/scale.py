"""Time and memory over rows, paths, batch and processes: run as ``python -m benchmarks.scale``.

- rows: ``predict`` of 10^4 rows and more, from a Parquet file to float16 files of the aggregate, with a stub
  of the encoder (a sum of random vectors of the tokens, D = 64), so that what is measured is all around it;
- start: the same on ``--start_rows`` rows until the first batch is there;
- paths: forward and backward of the tiny backbone over N, beside N times the language model's share;
- batch: a GradCache step in chunks of 16 over the batch; its memory is to stay what a chunk takes;
- processes: ``predict`` by one and by two processes.

Every measurement is a process of its own. Seconds are of the processor; memory is what a process took at most
beyond what it started with. The disk that the rows need is printed first.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from benchmarks.peers import WORDS, texts
from parallel_decoupling.batch import EncoderInputs
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.run import EmbeddingWriter
from parallel_decoupling.evaluation.store import Keeper, Store
from parallel_decoupling.objective.contrastive import info_nce
from parallel_decoupling.training.grad_cache import encode_in_chunks
from parallel_decoupling.training.module import PDFEmbedder
from tests.support.processes import run_ranks

DIM, CHUNK, MEGABYTE = 64, 16, 1 << 20
BYTES_PER_ROW = 2 * DIM + 60
"""Of the embeddings' files: float16 numbers, and the row's own columns compressed."""


class Stub(PDFEmbedder):
    """Stands in for the encoder: the sum of a random vector for every token."""

    def forward(self, inputs: EncoderInputs, paths: Sequence[int] | None = None) -> Tensor:
        """Return ``[B, 1, D]``."""
        table = torch.randn(1000, DIM, generator=torch.Generator().manual_seed(0))
        ids, mask = inputs.tokens["input_ids"] % len(table), inputs.tokens["attention_mask"]
        return F.normalize((table[ids] * mask[..., None]).sum(dim=1, keepdim=True), dim=-1)


def model(kind: type[PDFEmbedder] = PDFEmbedder, num_paths: int = 1) -> PDFEmbedder:
    """Return the tiny backbone with prefixes."""
    mi: dict[str, Any] = {"mi": {"kind": "none"}, "mi_weight": 0.0, "aggregate_weight": 0.0}
    return kind("tiny", num_paths=num_paths, prefix_init="random", **mi)


def save_rows(folder: Path, count: int) -> Path:
    """Write a table of short texts."""
    rng = random.Random(0)
    rows = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]
    pq.write_table(pa.table({"text": rows}), folder / "rows.parquet")
    return folder / "rows.parquet"


def loaded(file: Path, output_dir: Path) -> tuple[PDFEmbedder, MMEBDataModule, Keeper]:
    """Return what ``predict`` needs."""
    module = model(Stub)
    data = MMEBDataModule(
        predict_source=str(file), predict_columns=["aggregate"], eval_batch_size=256, num_workers=0
    )
    keeper = Keeper(output_dir, module.about, dtype="float16")
    data.connect(module, keeper)
    return module, data, keeper


def predict(file: Path, output_dir: Path, devices: int = 1) -> None:
    """Make a whole run."""
    module, data, keeper = loaded(file, output_dir)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = {"accelerator": "cpu", "devices": devices, "default_root_dir": output_dir}
    options |= {"callbacks": [EmbeddingWriter(data, keeper)], "use_distributed_sampler": False}
    trainer = Trainer(**options, **dict.fromkeys(quiet, False))
    trainer.predict(module, data, return_predictions=False)


def start(file: Path, output_dir: Path) -> None:
    """Open the rows, plan the batches and make the first of them."""
    _, data, _ = loaded(file, output_dir)
    (loader,) = data.predict_dataloader()
    next(iter(loader))


def train(num_paths: int) -> float:
    """Run five forward and backward passes of all paths; return their seconds, without loading."""
    module = model(num_paths=num_paths)
    inputs = tensors(module, 32)
    began = time.process_time()
    for _ in range(5):
        module(inputs).square().sum().backward()
    return time.process_time() - began


def tensors(module: PDFEmbedder, count: int) -> EncoderInputs:
    """Tokenise texts."""
    tokens = dict(module.encoder.processor(text=texts(count, 12, 0), padding=True, return_tensors="pt"))
    return EncoderInputs(tokens, ({},) * count)


def cached_step(batch_size: int) -> None:
    """Take a GradCache step of pairs of the same texts."""
    module, own = model(), torch.arange(batch_size)
    inputs = tensors(module, batch_size).select([*range(batch_size)] * 2)
    encoding = encode_in_chunks(module.encoder, inputs, chunk_size=CHUNK, seed_parts=(0,))
    both = encoding.embeddings.split(batch_size)
    info_nce(*both, positive=own, candidate_ids=own, temperature=0.05).mean().backward()
    encoding.backward()


def measure(function: Callable[[], float | None]) -> dict[str, float]:
    """Call a function in a process of its own; return its seconds by the clock and processor, and memory.

    The processor's are what the function returns, if it does.
    """
    context = get_context("fork")
    results: Any = context.Queue()

    def run() -> None:
        before, began = _peak(), (time.perf_counter(), time.process_time())
        own = function()
        clock, used = (now - then for now, then in zip(_now(), began, strict=True))
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        used += children.ru_utime + children.ru_stime
        used = used if own is None else own
        results.put({"clock": clock, "processor": used, "MB": _peak() - before})

    process = context.Process(target=run)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the measured process ended with exit code {process.exitcode}")
    return dict(results.get())


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _peak() -> float:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE


def show(what: str, result: dict[str, float], **more: float) -> None:
    """Print one line."""
    cells = {**{name: round(value, 1) for name, value in result.items()}, **more}
    print(f"{what:<34}{json.dumps(cells)}", flush=True)


def main() -> None:
    """Print all curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--start_rows", type=int, default=1_000_000)
    parser.add_argument("--paths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    needed = sum(options.rows) * BYTES_PER_ROW + max(*options.rows, options.start_rows) * 200
    print(f"needed disk: about {needed / 1e9:.2f} GB in {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = save_rows(folder, options.start_rows)
        first = measure(partial(start, file, folder / "start"))
        show(f"start on {options.start_rows:,} rows", first)
        show("the same again, tables mapped", measure(partial(start, file, folder / "start")))
        for count in options.rows:
            file = save_rows(folder, count)
            result = measure(partial(predict, file, folder / str(count)))
            size = sum(each.stat().st_size for each in (folder / str(count)).glob("*.parquet"))
            assert len(Store(folder / str(count))) == count
            about = {"rows/s": round(count / result["processor"]), "bytes/row": round(size / count)}
            show(f"predict {count:,} rows", result, **about)
        for processes in (1, 2):
            file, place = save_rows(folder, options.rows[0]), folder / f"processes_{processes}"
            run = partial(run_ranks, predict, file, place, processes, processes=processes)
            show(f"predict by {processes} processes", measure(run))
        base = 0.0
        for paths in options.paths:
            result = measure(partial(train, paths))
            base = base or result["processor"]
            show(f"train N = {paths}", result, over_one_path=round(result["processor"] / base, 2))
        for batch_size in options.batches:
            show(f"GradCache, batch {batch_size}", measure(partial(cached_step, batch_size)))


if __name__ == "__main__":
    main()
