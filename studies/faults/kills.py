"""Kills commands at random moments, and compares what is then there with what undisturbed ones have made.

``python -m studies.faults.kills fit --count 60`` sends SIGKILL, SIGTERM or SIGINT to ``fit``, resumes it, and
compares weights and logged values. ``test`` and ``predict`` resume, too. A killed ``export`` leaves a whole
model or nothing, and an ``index`` that takes the place of an older one is the old one or the new one. A
moment is a second of the process's own time, so that a busy machine does not move it; every other command but
fit is killed just after it has begun to write. There is one JSON line per kill in
``docs/studies/faults/kills.jsonl``; those of the same commit are skipped. A command that ended well in
spite of its signal, or before it, is not counted as killed.
"""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from parallel_decoupling import Embedder
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.files import LOCK_FILE, UNFINISHED, remove_leftovers
from parallel_decoupling.lance_index import LanceIndex
from parallel_decoupling.model.identity import SEAL
from studies.faults.campaign import run_missing

OUTPUT_DIR, WORK_DIR = Path("docs/studies/faults"), Path("runs/faults")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WHOLE = "whole"  # folder in WORK_DIR of what undisturbed commands made
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
FIT = (
    *("fit", "--config", "demo.yaml", '--data.train_subsets=["Scene_t2i"]', "--data.row_limit=16"),
    *("--data.batch_size=8", "--trainer.max_steps=12", "--trainer.log_every_n_steps=1", *QUIET),
    *("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--ckpt_path=last"),
)  # two steps in an epoch, and a checkpoint after each
NUM_ROWS = (6, 10)  # of the store of the old index, and of the new one
FIT_RUN = WORK_DIR / WHOLE / "fit"
CHECKPOINT = FIT_RUN / "checkpoints" / "last.ckpt"


def arguments_of(kind: str, folder: Path) -> list[str]:
    """Return the command of a kind that writes into a folder."""
    if kind == "fit":
        return [*FIT, f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}"]
    if kind == "export":
        return ["export", str(FIT_RUN), str(folder), "--include_backbone=true"]
    if kind == "index":
        return ["index", str(store_of(NUM_ROWS[1])), str(folder)]
    if kind == "predict":
        return [*predict_arguments(NUM_ROWS[1], folder), "--data.predict_rows_per_shard=2"]
    tasks = ("--config", "demo.yaml", '--data.eval_tasks=["Sign", "Character"]', "--data.row_limit=20")
    places = f"--trainer.default_root_dir={folder}", f"--embeddings_dir={folder / 'embeddings'}"
    return ["test", *tasks, *QUIET, f"--ckpt_path={CHECKPOINT}", *places]


def predict_arguments(num_rows: int, folder: Path) -> list[str]:
    """Return the command that embeds so many short texts."""
    source = WORK_DIR / f"rows_{num_rows}.jsonl"
    source.write_text("".join(f'{{"text": "text {row}"}}\n' for row in range(num_rows)))
    options = f"--ckpt_path={CHECKPOINT}", f"--data.predict_source={source}", f"--output_dir={folder}"
    return ["predict", *options, *QUIET]


@cache
def store_of(num_rows: int) -> Path:
    """Return a folder with the embeddings of so many texts."""
    folder = WORK_DIR / WHOLE / f"store_{num_rows}"
    run(*predict_arguments(num_rows, folder))
    return folder


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of this package, which hears SIGINT even if a shell started this in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here is ignored there
    command = [sys.executable, "-m", "parallel_decoupling", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run(*arguments: str) -> float:
    """Run a command to its end; return the seconds that it computed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(*arguments)
    _, messages = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}: {messages.decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@cache
def whole(kind: str) -> tuple[Path, float]:
    """Run a command undisturbed, unless that was done: its folder, and the seconds that it computed."""
    if kind != "fit":
        whole("fit")
    folder = WORK_DIR / WHOLE / kind
    done = folder.with_suffix(".seconds")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        done.write_text(str(run(*arguments_of(kind, folder))))
    return folder, float(done.read_text())


def kill(kind: str, folder: Path, seed: int) -> dict[str, Any]:
    """Start a command and send it a signal at a moment and of a kind that the seed chooses."""
    chance, (_, seconds) = random.Random(seed), whole(kind)
    number, while_writing = signal_of(chance), kind != "fit" and seed % 2 == 1
    moment = chance.uniform(0, 0.3) if while_writing else chance.uniform(0.3, 1.0) * seconds
    process, began = start(*arguments_of(kind, folder)), None if while_writing else 0.0
    while process.poll() is None:
        if began is None and any(folder.parent.rglob(f"{UNFINISHED}*/{LOCK_FILE}")):
            began = computed(process.pid)
        if began is not None and computed(process.pid) - began >= moment:
            break
        time.sleep(0.003)
    ended = process.poll() is not None
    process.send_signal(number)
    process.communicate()
    about = {"signal": int(number), "seconds": round(moment, 2), "while_writing": while_writing}
    return {**about, "ended_before": ended, "exit_code": process.returncode}


def signal_of(chance: random.Random) -> signal.Signals:
    """Draw a signal, the first that is drawn of a seed."""
    return chance.choice(SIGNALS)


def computed(pid: int) -> float:
    """Return the seconds that a process has computed."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def run_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[tuple[str, str], list[str]]]:
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


def finish_fit(folder: Path) -> list[str]:
    """Resume a fit, and say what differs from the undisturbed one."""
    if not (folder / "checkpoints").is_dir() or not any((folder / "checkpoints").glob("*.ckpt")):
        shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint: it starts again
    run(*arguments_of("fit", folder))
    (weights, logged), (expected, values) = run_of(folder), run_of(whole("fit")[0])
    wrong = [name for name, value in expected.items() if not torch.equal(value, weights[name])]
    keys = values.keys() | logged.keys()
    return wrong + [
        f"{step} {name}" for step, name in keys if values.get((step, name)) != logged.get((step, name))
    ]


def finish_export(folder: Path) -> list[str]:
    """Look at what a killed export has left."""
    if not folder.exists():
        return []
    found, expected = (
        Embedder.from_pretrained(each).encode(["a red circle"]) for each in (folder, whole("export")[0])
    )
    return [] if torch.equal(found, expected) else ["embedding"]


def finish_index(folder: Path) -> list[str]:
    """Look at what an index holds: all items of the old one, or of the new one."""
    index = LanceIndex(folder)
    store = Store(store_of(len(index))) if len(index) in NUM_ROWS else None
    if store is None:
        return [f"{len(index)} items"]
    query = {name: store.column(name)[:1] for name in store.columns}
    (hits,) = index.search(query, len(index), "aggregate")
    scores = (store.column("aggregate") @ store.column("aggregate")[0]).sort(descending=True).values
    close = torch.allclose(torch.tensor([hit.score for hit in hits]), scores, atol=1e-5)
    return [] if close else ["scores"]


def finish_predict(folder: Path) -> list[str]:
    """Run predict again, and compare its files."""
    run(*arguments_of("predict", folder))
    found, expected = Store(folder), Store(whole("predict")[0])
    same = [torch.equal(found.column(name), expected.column(name)) for name in expected.columns]
    ids = found.rows(range(len(found))) == expected.rows(range(len(expected)))
    return [] if all(same) and ids else ["embeddings"]


def finish_test(folder: Path) -> list[str]:
    """Run test again, and compare its scores."""
    run(*arguments_of("test", folder))
    found, expected = (json.loads((each / "scores.json").read_text()) for each in (folder, whole("test")[0]))
    of_the_run = ("run", SEAL)  # when and where, and the hash that covers this as well
    return [name for name in expected if name not in of_the_run and found.get(name) != expected[name]]


FINISH = {
    "fit": finish_fit,
    "export": finish_export,
    "index": finish_index,
    "predict": finish_predict,
    "test": finish_test,
}


def one_kill(kind: str, seed: int) -> dict[str, Any]:
    """Kill one command, finish what it began, and say what is wrong and what is left unfinished."""
    place = WORK_DIR / f"{kind}_{seed}"
    folder = place / kind
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if kind == "index":
        run("index", str(store_of(NUM_ROWS[0])), str(folder))
    killed = kill(kind, folder, seed)
    wrong = FINISH[kind](folder)
    for each in (place, folder) if kind in ("export", "index") else ():
        remove_leftovers(each)  # as the next command does that writes there
    left = [str(each) for each in place.rglob(f"{UNFINISHED}*")]
    shutil.rmtree(place)
    return {**killed, "wrong": wrong, "left": left, "ok": not wrong and not left}


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing of one kind; the exit code is 1 if any kill left something wrong."""
    parser = ArgumentParser(prog="python -m studies.faults.kills", description=__doc__)
    parser.add_argument("kind", choices=FINISH)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--signal", choices=[each.name for each in SIGNALS], help="only seeds that draw it")
    options = parser.parse_args(args)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    seeds = (n for n in count() if options.signal in (None, signal_of(random.Random(n)).name))
    tries = [{"kind": options.kind, "seed": seed} for seed in islice(seeds, options.count)]
    return run_missing(OUTPUT_DIR / "kills.jsonl", tries, one_kill)


if __name__ == "__main__":
    sys.exit(main())
