"""A training step of the demo against its floor: run as ``python -m benchmarks.step`` in the repository.

Settings are those of ``lightning_configs/demo_paper.yaml`` (unchanged since b5f8398), with one shared adapter
and with an adapter for each path. Processor seconds of one thread, the median over steps. The floor is the
step's multiply-adds without padding (``benchmarks.flops.layer_flops``) at the rate of a large fp32 matrix
product on the same thread.

With ``--other CHECKOUT`` the step of this checkout is compared with that of another commit, such as b5f8398:
both run ``fit`` on this file's settings in turns, for a few and for more steps, and the difference is the
steps' time. The ratio is the other's seconds over this one's: more than 1 is in favour of this checkout. It
uses as many threads as ``OMP_NUM_THREADS`` says.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.flops import layer_flops
from benchmarks.measure import command_seconds
from parallel_decoupling.batch import PairBatch
from parallel_decoupling.data.datamodule import MMEBDataModule
from parallel_decoupling.training.grad_cache import LENGTH_GROUPS, length_groups
from parallel_decoupling.training.module import PDFEmbedder

CONFIG = "lightning_configs/demo_paper.yaml"
WARM_UP = 2
ROWS = 144
"""Of a step: 48 queries, their positives and as many hard negatives."""
SIDE = 2048


class Timer(Callback):
    """Processor seconds of every step, and what it works on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[tuple[int, int, int]] = []
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        """Count tokens and patches, and start the clock."""
        lengths = batch.inputs.lengths
        groups = length_groups(lengths, LENGTH_GROUPS)
        padded = sum(len(rows) * int(lengths[rows].max()) for rows in groups)
        patches = sum(len(row["pixel_values"]) for row in batch.inputs.vision if row)
        self.tokens.append((int(lengths.sum()), padded, patches))
        self._start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.process_time() - self._start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--other", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3, help="with --other")
    args = parser.parse_args()
    if args.other is not None:
        against(args.other, args.rounds, args.steps)
        return
    steps = WARM_UP + args.steps
    torch.set_num_threads(1)
    rate = matrix_rate()
    print(f"one thread; a {SIDE} x {SIDE} fp32 product: {rate / 1e9:.0f} GFLOP/s; {steps - WARM_UP} steps")
    print(f"\n{'demo step, 3 paths':<28}{'seconds':>9}{'floor':>9}{'tokens':>9}{'padded':>9}{'passes':>9}")
    plain = {"mi": {"kind": "none"}, "mi_weight": 0.0}
    for name, changes in {
        "one adapter, vCLUB": {},
        "one adapter, no penalty": plain,
        "an adapter each, no penalty": {**plain, "adapter": {"per_path": True}},
    }.items():
        module, timer = measured(changes, steps)
        real, padded, patches = (round(statistics.mean(each)) for each in zip(*timer.tokens, strict=True))
        floor = flops(module, real, patches) / rate
        seconds = statistics.median(timer.seconds[WARM_UP:])
        print(f"{name:<28}{seconds:>9.2f}{floor:>9.2f}{real:>9}{padded:>9}{LENGTH_GROUPS:>9}")


def against(other: Path, rounds: int, steps: int) -> None:
    """Compare a step of both checkouts, by the clock and of the processor."""
    folders = {"other": other.resolve(), "this": Path.cwd()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
    for _ in range(rounds):
        for name, folder in folders.items():
            few, many = (fit_seconds(folder, count) for count in (WARM_UP, WARM_UP + steps))
            seconds[name].append(((many[0] - few[0]) / steps, (many[1] - few[1]) / steps))
    for place, kind in enumerate(("by the clock", "of the processor")):
        own, others = ([each[place] for each in seconds[name]] for name in ("this", "other"))
        ratios = sorted(theirs / ours for theirs, ours in zip(others, own, strict=True))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        shown = f"this {statistics.median(own):.2f} s, other {statistics.median(others):.2f} s"
        print(f"step {kind}: {shown}; other / this {statistics.median(ratios):.2f} ({spread}), goal 1.80")


def fit_seconds(checkout: Path, steps: int) -> tuple[float, float]:
    """Run ``fit`` of a checkout; return its seconds by the clock and of the processor."""
    config = str(Path(CONFIG).resolve())
    return command_seconds(checkout, "fit", "--config", config, "--trainer.max_steps", str(steps))


def measured(changes: dict[str, Any], steps: int) -> tuple[PDFEmbedder, Timer]:
    """Train some steps of the demo."""
    with open(CONFIG) as file:
        config = yaml.safe_load(file)
    model: dict[str, Any] = config["model"]
    for name, value in changes.items():
        model[name] = {**model[name], **value} if name == "adapter" else value
    seed_everything(config["seed_everything"], verbose=False)
    module, data, timer = PDFEmbedder(**model), MMEBDataModule(**config["data"]), Timer()
    data.connect(module)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=[timer], **silent).fit(module, data)
    return module, timer


def flops(module: PDFEmbedder, tokens: int, patches: int) -> float:
    """Return the floating-point operations of a step: frozen layers forward and back, vision forward only."""
    backbone = module.encoder.backbone
    width, paths = backbone.num_layers * backbone.hidden_size, module.encoder.num_paths
    context = module.encoder.prefix_length + tokens / ROWS
    text = layer_flops(backbone.layers, width, paths * tokens, context, forward=1, backward=1)
    return text + layer_flops(backbone.vision_tower, 0, patches, 0, forward=1, backward=0)


def matrix_rate() -> float:
    """Return the floating-point operations per second of a large product, the best of five."""
    one, other = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    times = []
    for _ in range(5):
        start = time.process_time()
        one @ other
        times.append(time.process_time() - start)
    return 2 * SIDE**3 / min(times)


if __name__ == "__main__":
    main()
