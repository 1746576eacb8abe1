"""Kills runs at random moments and compares what the same commands then make with an undisturbed run.

``python -m studies.faults.kills fit --count 60`` kills ``fit`` with SIGKILL, SIGTERM or SIGINT, resumes it,
and compares weights and logged values. ``export`` and ``index`` are killed while they write; an index that
takes the place of an older one must then be the old one or the new one. There is one JSON line per kill in
``docs/studies/faults/kills.jsonl``; those of the same commit are skipped.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parallel_decoupling import Embedder
from parallel_decoupling.files import UNFINISHED
from parallel_decoupling.lance_index import LanceIndex
from studies.results import code_version

OUTPUT_DIR, WORK_DIR = Path("docs/studies/faults"), Path("runs/faults")
RESULTS = OUTPUT_DIR / "kills.jsonl"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FIT = [
    *("fit", "--config", "demo.yaml", "--data.row_limit=20", "--data.batch_size=8", "--trainer.max_steps=16"),
    *("--trainer.log_every_n_steps=1", "--trainer.logger=lightning.pytorch.loggers.CSVLogger"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


def command(*arguments: str) -> list[str]:
    """Return the command line of this package."""
    return [sys.executable, "-m", "parallel_decoupling", *arguments]


def run(*arguments: str) -> None:
    """Run a command to its end."""
    subprocess.run(command(*arguments), check=True, capture_output=True)


def kill(arguments: Sequence[str], seconds: float, number: int) -> int:
    """Start a command and send it a signal after some time; return its exit code."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.send_signal(number)
    return process.wait()


def fit_arguments(folder: Path) -> list[str]:
    """Return the fit of one folder, which resumes there what a killed one has left."""
    place = [f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}"]
    return [*FIT, *place, "--ckpt_path=last"]


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[tuple[str, str], list[str]]]:
    """Return the weights of a run, and its logged values by step and name without those of the clock."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    logged: dict[tuple[str, str], list[str]] = {}
    for file in folder.rglob("metrics.csv"):
        with file.open(newline="") as stream:
            for row in csv.DictReader(stream):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        logged.setdefault((row["step"], name), []).append(value)
    return state, logged


def kill_fit(seed: int) -> dict[str, Any]:
    """Kill one fit, resume it, and compare it with one that nothing disturbed."""
    whole, folder, chance = WORK_DIR / "whole", WORK_DIR / f"fit_{seed}", random.Random(seed)
    if not (whole / "done").exists():
        shutil.rmtree(whole, ignore_errors=True)
        start = time.monotonic()
        run(*fit_arguments(whole))
        (whole / "done").write_text(str(time.monotonic() - start))
    seconds = chance.uniform(0.2, 1.0) * float((whole / "done").read_text())
    number = chance.choice(SIGNALS)
    shutil.rmtree(folder, ignore_errors=True)
    code = kill(fit_arguments(folder), seconds, number)
    if not (folder / "checkpoints" / "last.ckpt").exists():
        shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint: it starts again
    run(*fit_arguments(folder))
    (weights, logged), (expected, values) = outcome(folder), outcome(whole)
    differs = [name for name, value in expected.items() if not torch.equal(value, weights[name])]
    left = [str(place) for place in folder.rglob(f"{UNFINISHED}*")]
    result = {"exit_code": code, "tensors": differs, "logs": logged != values, "left": left}
    shutil.rmtree(folder)
    return {
        "signal": int(number),
        "seconds": seconds,
        "ok": not differs and logged == values and not left,
        **result,
    }


def kill_export(seed: int) -> dict[str, Any]:
    """Kill one export: its folder is not there, or it is a model."""
    folder, chance = WORK_DIR / f"export_{seed}", random.Random(seed)
    make_whole()
    shutil.rmtree(folder, ignore_errors=True)
    kill(
        ["export", str(WORK_DIR / "whole"), str(folder), "--include_backbone=true"], chance.uniform(3, 12), 9
    )
    there = folder.exists()
    if there:
        Embedder.from_pretrained(folder).encode(["a red circle"])
    shutil.rmtree(folder, ignore_errors=True)
    return {"there": there, "ok": True}


def kill_index(seed: int) -> dict[str, Any]:
    """Kill an index that takes the place of an older one: it is the old one or the new one."""
    make_whole()
    chance, index_dir = random.Random(seed), WORK_DIR / f"index_{seed}"
    stores = []
    for rows in (3, 5):
        source, store = WORK_DIR / f"rows_{rows}.jsonl", WORK_DIR / f"store_{rows}"
        if not store.exists():
            source.write_text("".join(f'{{"text": "text {row}"}}\n' for row in range(rows)))
            checkpoint = f"--ckpt_path={WORK_DIR / 'whole' / 'checkpoints' / 'last.ckpt'}"
            run("predict", checkpoint, f"--data.predict_source={source}", f"--output_dir={store}")
        stores.append(str(store))
    shutil.rmtree(index_dir, ignore_errors=True)
    run("index", stores[0], str(index_dir))
    kill(["index", stores[1], str(index_dir)], chance.uniform(3, 12), signal.SIGKILL)
    found = len(LanceIndex(index_dir))
    shutil.rmtree(index_dir)
    return {"rows": found, "ok": found in (3, 5)}


def make_whole() -> None:
    """Make the undisturbed run, which the other kinds take their model from."""
    if not (WORK_DIR / "whole" / "done").exists():
        kill_fit(0)


KINDS = {"fit": kill_fit, "export": kill_export, "index": kill_index}


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing of one kind; the exit code is 1 if any kill left something wrong."""
    parser = ArgumentParser(prog="python -m studies.faults.kills", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=30)
    options = parser.parse_args(args)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    commit, _ = code_version()
    of_now = {"kind": options.kind, "commit": commit}
    results = [line for line in map(json.loads, lines) if line.items() >= of_now.items()]
    done = {line["seed"] for line in results}
    for seed in (seed for seed in range(options.count) if seed not in done):
        results.append({**of_now, "seed": seed, **KINDS[options.kind](seed)})
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(results[-1]) + "\n")
    good = sum(result["ok"] for result in results)
    sys.stdout.write(f"{options.kind}: {good} of {len(results)} kills left nothing wrong ({RESULTS})\n")
    return int(good < len(results))


if __name__ == "__main__":
    sys.exit(main())
