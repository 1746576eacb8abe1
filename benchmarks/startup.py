"""What starting costs: run as ``python -m benchmarks.startup`` from the repository root.

First the commands: seconds of ``--help``, ``fit --help`` and ``search --help`` over those of importing torch,
lightning and transformers, medians of three. Then MMEB-train.

Writes tables of the published sizes (1.07 million rows in 20 subsets, texts of realistic length, no
pictures) into a temporary folder and starts on them three times: without copies in the cache, with
them, and by decoding the parquet files in every process, which is what the copies are for. Every start is a
process of its own; imports are not counted. Then loader workers read rows of the mixture, and the kernel says
how much memory each process shares (``/proc/<pid>/smaps_rollup``, so Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.data.mixture import MixtureSampler
from parallel_decoupling.data.readers import TrainRows, TrainSubset
from parallel_decoupling.data.tables import default_cache_dir
from parallel_decoupling.data.tasks import MMEB_TRAIN_SUBSETS

ROWS = {
    "ImageNet_1K": 100_000,
    "N24News": 48_988,
    "HatefulMemes": 8_500,
    "VOC2007": 7_844,
    "SUN397": 19_850,
    "OK-VQA": 9_009,
    "A-OKVQA": 17_056,
    "DocVQA": 39_500,
    "InfographicsVQA": 23_900,
    "ChartQA": 28_300,
    "Visual7W": 70_000,
    "VisDial": 123_000,
    "CIRR": 26_100,
    "VisualNews_t2i": 100_000,
    "VisualNews_i2t": 100_000,
    "MSCOCO_t2i": 100_000,
    "MSCOCO_i2t": 113_500,
    "NIGHTS": 16_000,
    "WebQA": 17_000,
    "MSCOCO": 100_000,
}
"""Published rows per subset; those that end in zeros are rounded in the source."""

TEXT_TARGETS = ("ImageNet_1K", "N24News", "HatefulMemes", "VOC2007", "SUN397", "OK-VQA", "A-OKVQA", "DocVQA")
TEXT_TARGETS += ("InfographicsVQA", "ChartQA", "Visual7W", "VisualNews_i2t", "MSCOCO_i2t")
TEXT_QUERIES = ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA")
WORDS = np.array(
    ["the", "red", "dog", "question", "caption", "what", "is", "on", "building", "near", "water", "1990"]
)
BATCH_SIZE = 1024
MEGABYTE = 1 << 20


def write_tables(data_dir: Path, scale: float) -> None:
    """Write every subset in MMEB-train's columns."""
    assert set(ROWS) == set(MMEB_TRAIN_SUBSETS)
    for number, (subset, rows) in enumerate(ROWS.items()):
        rng, count = np.random.default_rng(number), max(1, int(rows * scale))
        images = [f"images/{subset}/Train/{subset}_image_{row}.jpg" for row in range(count)]
        length = 100 if subset == "VisDial" else 12
        texts = [" ".join(words) for words in WORDS[rng.integers(0, len(WORDS), (count, length))]]
        shown = f"{IMAGE_PLACEHOLDER}\nRepresent the given image with the following question: "
        start = (
            "Find me an everyday image that matches the given caption: " if subset in TEXT_QUERIES else shown
        )
        target = [text[:30] for text in texts]
        if subset not in TEXT_TARGETS:
            target = [f"{IMAGE_PLACEHOLDER}\nRepresent the given image.\n"] * count
        columns = {
            "qry": [f"{start}{text}\n" for text in texts],
            "qry_image_path": [""] * count if subset in TEXT_QUERIES else images,
            "pos_text": target,
            "pos_image_path": [""] * count if subset in TEXT_TARGETS else images,
            "neg_text": [""] * count,
            "neg_image_path": [""] * count,
        }
        file = data_dir / "MMEB-train" / subset / "original-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), file, row_group_size=1000)


def start(data_dir: str) -> tuple[TrainRows, MixtureSampler, dict[str, float]]:
    """Open all subsets and plan an epoch; seconds until the tables, the plan and the first row are there."""
    began = time.perf_counter()
    subsets = [TrainSubset(data_dir, name) for name in sorted(ROWS)]
    for subset in subsets:
        subset.reader.images.must_exist = False  # there are no pictures
    opened = time.perf_counter()
    sampler = MixtureSampler([len(subset) for subset in subsets], batch_size=BATCH_SIZE)
    batch = sampler.batch(0)
    planned = time.perf_counter()
    rows = TrainRows(subsets)
    assert rows[batch[0]].query.text
    done = time.perf_counter()
    seconds = {"tables": opened - began, "plan": planned - opened, "row": done - planned}
    return rows, sampler, {**seconds, "first index": done - began}


def memory(pid: int | str = "self") -> dict[str, float]:
    """Megabytes of a process: resident; proportional, where its users divide a shared page; and own.

    Own is what it has written to, so it can be in no other process. Mapped pages of the tables are not.
    """
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) / 1024
    return {
        "resident": fields["Rss"],
        "proportional": fields["Pss"],
        "own": fields["Private_Dirty"],
    }


def measure_start(data_dir: str) -> dict[str, Any]:
    """One start, and the memory that it adds."""
    before = memory()
    *_, seconds = start(data_dir)
    after = memory()
    return {"seconds": seconds, "own": after["own"] - before["own"]}


def measure_parquet(data_dir: str) -> dict[str, Any]:
    """The same rows decoded from parquet in this process."""
    before, began = memory(), time.perf_counter()
    files = sorted(Path(data_dir).glob("MMEB-train/*/*.parquet"))
    tables = [pq.read_table(file, memory_map=True) for file in files]
    assert tables[0].column("qry")[0].as_py()
    seconds = {"first index": time.perf_counter() - began}
    return {"seconds": seconds, "own": memory()["own"] - before["own"]}


def measure_workers(data_dir: str, num_workers: int, batches: int) -> dict[str, Any]:
    """Rows per second and memory while loader workers read batches of the mixture."""
    rows, sampler, _ = start(data_dir)
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=len, num_workers=num_workers)
    iterator: Any = iter(loader)
    next(iterator)
    began, count = time.perf_counter(), 0
    for _ in range(batches):
        count += next(iterator)
    seconds = time.perf_counter() - began
    workers = [memory(worker.pid) for worker in getattr(iterator, "_workers", ())]
    return {"rows_per_second": count / seconds, "main": memory(), "workers": workers}


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Call a function of this module in a fresh interpreter."""
    call = f"{function.__name__}({', '.join(map(repr, arguments))})"
    code = f"import json; from benchmarks.startup import *; print(json.dumps({call}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def print_starts(data_dir: str) -> None:
    """Print seconds and memory of the three ways to start."""
    parquet = sum(file.stat().st_size for file in Path(data_dir).glob("MMEB-train/*/*.parquet"))
    starts = {
        "first start (writes the copies)": in_own_process(measure_start, data_dir),
        "later starts": in_own_process(measure_start, data_dir),
        "decoding parquet instead": in_own_process(measure_parquet, data_dir),
    }
    copies = sum(file.stat().st_size for file in (default_cache_dir() / "tables").glob("*.arrow"))
    rows = sum(pq.read_metadata(file).num_rows for file in Path(data_dir).glob("MMEB-train/*/*.parquet"))
    print(f"{rows:,} rows; parquet {parquet / MEGABYTE:.0f} MB, ", end="")
    print(f"mapped copies {copies / MEGABYTE:.0f} MB (the floor of what must be in memory once)\n")
    names = ("tables", "plan", "row", "first index")
    print(f"{'seconds':<34}" + "".join(f"{name:>13}" for name in names) + f"{'own MB':>13}")
    for name, result in starts.items():
        cells = [f"{result['seconds'][part]:.3f}" if part in result["seconds"] else "" for part in names]
        print(f"{name:<34}" + "".join(f"{cell:>13}" for cell in cells) + f"{result['own']:>13.0f}")
    later, decoding = starts["later starts"], starts["decoding parquet instead"]
    ratio = decoding["seconds"]["first index"] / later["seconds"]["first index"]
    print(f"decoding / later starts: {ratio:.1f} in seconds")


def print_workers(data_dir: str, batches: int) -> None:
    """Print memory and speed over the number of loader workers."""
    print(f"\n{batches} batches of {BATCH_SIZE} random rows; MB per process")
    heads = ("rows/s", "main's own", "worker's own", "worker resident", "all together")
    print(f"{'workers':<10}" + "".join(f"{head:>18}" for head in heads))
    for num_workers in (0, 2, 4):
        result = in_own_process(measure_workers, data_dir, num_workers, batches)
        main, workers = result["main"], result["workers"]
        total = main["proportional"] + sum(worker["proportional"] for worker in workers)
        own = max((worker["own"] for worker in workers), default=float("nan"))
        resident = max((worker["resident"] for worker in workers), default=float("nan"))
        numbers = (result["rows_per_second"], main["own"], own, resident, total)
        print(f"{num_workers:<10}" + "".join(f"{number:>18,.0f}" for number in numbers))


def print_commands() -> None:
    """Print seconds of commands, and their ratio to the imports that a training needs anyway."""

    def seconds(*arguments: str) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    imports = seconds("-c", "import torch, lightning.pytorch, transformers")
    print(f"{'import torch, lightning, transformers':<40}{imports:>8.2f} s")
    for command in ("--help", "fit --help", "search --help"):
        own = seconds("-m", "parallel_decoupling", *command.split())
        print(f"{command:<40}{own:>8.2f} s, ratio {own / imports:.2f}")


def main() -> None:
    """Print the commands' times, write the tables and print both reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published rows")
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    print_commands()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PARALLEL_DECOUPLING_CACHE"] = f"{folder}/cache"
        write_tables(Path(folder), args.scale)
        print_starts(folder)
        print_workers(folder, args.batches)


if __name__ == "__main__":
    main()
