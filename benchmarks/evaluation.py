"""Seconds of ``test`` on the embedded benchmark, and what batches of similar length save.

Run as ``OMP_NUM_THREADS=1 python -m benchmarks.evaluation [--other CHECKOUT]`` from the repository root.

1. Encoding all queries and candidates of the 15 tasks in this process: rows in the order of the task against
   batches of rows of similar length, as ``test`` makes them. The ratio says what length buckets save.
2. With ``--other``, the whole command ``test`` (start-up, encoding, scores, files) of this checkout against
   the same command of another one, in turns, on untrained weights. The ratio is the other's seconds over
   this one's: more than 1 is in favour of this checkout.

Numbers are medians over the rounds, by the clock and of the processor (steadier beside other work).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.measure import command_seconds
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.evaluation.encode import BatchPlan, RowBatches, TokenEstimate
from parallel_decoupling.training.module import PDFEmbedder

CONFIG = Path("lightning_configs") / "demo.yaml"


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--query_limit", type=int, default=100, help="queries per task")
    options = parser.parse_args()
    buckets(options.rounds, options.query_limit)
    if options.other is not None:
        commands(options.other, options.rounds, options.query_limit)


def buckets(rounds: int, query_limit: int) -> None:
    """Encode every task in order and by length."""
    model = PDFEmbedder("tiny", num_paths=3, prefix_init="random").eval()
    data = MMEBDataModule(query_limit=query_limit).connect(model)
    data.prepare_data()
    data.setup("test")
    data.test_dataloader()
    estimates = {"in order": lambda row: 0.0, "by length": TokenEstimate(data.collator)}
    seconds: dict[str, list[float]] = {name: [] for name in estimates}
    padded = dict.fromkeys(estimates, 0)
    for round_number in range(rounds):
        for name, estimate in estimates.items():
            start = time.process_time()
            for rows in data.rows:
                batches = RowBatches(rows, data.collator, rows.where)
                for place in BatchPlan(rows, estimate, data.eval_batch_size):
                    with torch.inference_mode():
                        inputs = batches[place].inputs
                        model(inputs)
                    if round_number == 0:
                        padded[name] += inputs.tokens["input_ids"].numel()
            seconds[name].append(time.process_time() - start)
    ratio = statistics.median(seconds["in order"]) / statistics.median(seconds["by length"])
    tokens = padded["in order"] / padded["by length"]
    print(f"encoding all tasks, in order / by length: {ratio:.2f} of processor time, {tokens:.2f} of tokens")


def commands(other: Path, rounds: int, query_limit: int) -> None:
    """Run ``test`` of both checkouts in turns."""
    places = {"other": other.resolve(), "this": Path.cwd()}
    clock: dict[str, list[float]] = {name: [] for name in places}
    processor: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(rounds):
        for name, folder in places.items():
            limit = ("--data.query_limit", str(query_limit))
            by_clock, of_processor = command_seconds(folder, "test", "--config", str(CONFIG), *limit)
            clock[name].append(by_clock)
            processor[name].append(of_processor)
    for kind, seconds in (("clock", clock), ("processor time", processor)):
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        shown = ", ".join(f"{name} {value:.1f} s" for name, value in medians.items())
        print(f"test, {kind}: {shown}; other / this {medians['other'] / medians['this']:.2f}")


if __name__ == "__main__":
    main()
