"""What works and what it costs on this machine's GPU: run as ``python -m benchmarks.gpu`` (``make gpu``).

Nothing is downloaded. Every section is a process of its own, so one that fails, crashes or takes too long is
reported and the others run; together they have ``--minutes``. Prints one table, writes ``gpu.json`` beside
the sections' logs, and exits with 1 if anything failed. Sections:

- products: large matrix products in bf16, against the card's published peak;
- sdpa, flash_attention_2, flex_attention: embeddings and gradients of the prefixes against fp64 on the CPU,
  with and without prefix and padding, one minus the cosine; a kernel that is not installed is said to be so;
- four_bit: a training step of a 4-bit backbone, if bitsandbytes is installed;
- tests: those marked ``gpu``;
- steps: Qwen2-VL-2B's published geometry with random bf16 weights, LoRA and 1, 2 and 4 paths: seconds and
  peak memory of a training step against ``plan``, and the share of the peak that the model's own operations
  (without those of recomputing) reach;
- grad_cache: batches of 256 and 1024 pairs in chunks;
- encode: images per second of the plain backbone, of one path and of all paths;
- vclub: the estimator's part of a step at D = 1536 and B = 1024.

A floor is what the published peak (or, for an unknown card, the measured products) would take. ``--size
small --device cpu`` goes through the same code in a minute without a GPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_kernels, gpu_model
from benchmarks.gpu_machine import SIZES, Machine, published_peak

SECTIONS = {**gpu_kernels.SECTIONS, **gpu_model.SECTIONS}
FAILED, OUT_OF_TIME = "failed", "out of time"


def run_section(name: str, machine: Machine, log_file: Path, result_file: Path) -> None:
    """Run a section in this process of its own; what it prints goes to its log."""
    with log_file.open("w") as log:
        sys.stdout = sys.stderr = log
        report: dict[str, Any] = {"rows": []}
        try:
            report["rows"] = [asdict(row) for row in SECTIONS[name](machine)]
        finally:  # an error is the section's result, and its traceback goes on to the log
            if error := sys.exc_info()[1]:
                report["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            result_file.write_text(json.dumps(report))


def check(name: str, machine: Machine, output_dir: Path) -> dict[str, Any]:
    """Start a section, wait for it, and return its state, seconds and rows."""
    log_file, result_file = output_dir / f"{name}.log", output_dir / f"{name}.json"
    result_file.unlink(missing_ok=True)
    context = get_context("spawn" if machine.is_cuda else "fork")  # CUDA does not survive a fork
    process = context.Process(target=run_section, args=(name, machine, log_file, result_file))
    start = time.monotonic()
    process.start()
    process.join(max(0.0, machine.deadline - start))
    late = process.is_alive()
    process.kill()
    process.join()
    result: dict[str, Any] = {"state": "ok", "seconds": time.monotonic() - start, "rows": []}
    if result_file.exists() and not late:
        result |= json.loads(result_file.read_text())
    if late:
        result["state"] = OUT_OF_TIME
    elif process.exitcode or not all(row["ok"] for row in result["rows"]):
        result["state"] = FAILED
        if process.exitcode and "reason" not in result:
            result["reason"] = f"the process ended with exit code {process.exitcode}"
    return result


def show(results: dict[str, dict[str, Any]], device: str, peak: float | None) -> None:
    """Print the table of all sections."""
    known = "unknown" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"
    table = Table(
        "section", "what", "value", "beside", "ratio", "", title=f"{device}, published peak {known}"
    )
    for name, result in results.items():
        state = result["state"]
        note = f"{state}, {result['seconds']:.0f} s"
        table.add_row(name, note, "", "", "", result.get("reason", ""), end_section=not result["rows"])
        for number, row in enumerate(result["rows"], start=1):
            beside, ratio = row["beside"], ""
            if beside is not None:
                ratio = f"{row['value'] / beside:.2f}" if beside else ""
                beside = f"{beside:.4g} {row['beside_is']}"
            value = f"{row['value']:.4g} {row['unit']}" if math.isfinite(row["value"]) else ""
            mark = row["note"] if row["ok"] else f"FAILED {row['note']}"
            end = number == len(result["rows"])
            table.add_row("", row["what"], value, beside or "", ratio, mark, end_section=end)
    Console(width=150).print(table)


def main() -> None:
    """Run all sections and print what they found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="full", choices=tuple(SIZES), help="small is a try without a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    deadline, size = time.monotonic() + 60 * options.minutes, SIZES[options.size]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        backbone = size.save_config(Path(folder))
        machine = Machine(options.device, size, backbone, deadline)
        name, peak = "cpu", None
        if options.device == "cuda":  # asked in a process of its own, which gives the memory back
            with get_context("spawn").Pool(1) as pool:
                name = pool.apply(torch.cuda.get_device_name)
            peak = published_peak(name)
        for section in options.sections:
            results[section] = check(section, machine.with_peak(peak, results), options.output_dir)
            print(f"{section}: {results[section]['state']}, {results[section]['seconds']:.0f} s", flush=True)
    report = {"device": name, "peak_flops": peak, "torch": torch.__version__, "sections": results}
    file = options.output_dir / "gpu.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    show(results, name, peak)
    print(f"{file} holds the same, the logs are beside it")
    sys.exit(any(result["state"] != "ok" for result in results.values()))


if __name__ == "__main__":
    main()
