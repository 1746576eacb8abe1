"""Encodes in many threads beside a training in the same process, and compares that with calls one by one.

``python -m studies.faults.threads`` trains a model with a learning rate of 0 for a minute, so that its
embeddings stay what they are. Meanwhile six threads, and once 50, encode with it: texts and pictures, other
paths, prompts and sizes of batches. With one thread per operator the embeddings must be the same bit for bit,
with two within 1e-6. There is one JSON line per try in ``docs/studies/faults/threads.jsonl``; those of the
same commit are skipped.
"""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

import torch
from lightning.pytorch import Trainer
from PIL import Image

from parallel_decoupling import MMEBDataModule, PDFEmbedder
from parallel_decoupling import model as model_package
from studies.faults.campaign import run_missing
from studies.faults.kills import OUTPUT_DIR, WORK_DIR

SECONDS, NUM_CALLS, NUM_PATHS = 60, 50, 3
TOLERANCES = {1: 0.0, 2: 1e-6}  # by threads per operator
WORDS = ("a", "red", "blue", "circle", "square", "left", "of", "the", "small", "star")
CALLERS = (6, 50)


def make_model(backbone: str) -> PDFEmbedder:
    """Return a model whose adapters do something, whose training has dropout, and which learns nothing."""
    rates = {"learning_rate": 0.0, "prefix_learning_rate": 0.0}
    settings: dict[str, Any] = {"num_paths": NUM_PATHS, "prefix_length": 4, "optimizer": rates}
    module = PDFEmbedder(backbone=backbone, adapter={"dropout": 0.2, "per_path": True}, **settings)
    with torch.no_grad():
        for parameter in module.encoder.parameter_groups()["adapters"]:
            parameter.add_(0.2 * torch.randn_like(parameter))  # half of them start at zero
    return module


def draw_calls(chance: random.Random) -> list[tuple[list[Any], dict[str, Any]]]:
    """Draw inputs and options of calls that differ."""
    pictures = [Image.effect_noise((size, size), 60).convert("RGB") for size in (32, 48, 64, 96)]
    calls = []
    for _ in range(NUM_CALLS):
        inputs: list[Any] = []
        for _ in range(chance.randint(1, 6)):
            text, picture = " ".join(chance.choices(WORDS, k=chance.randint(1, 30))), chance.choice(pictures)
            inputs.append(chance.choice((text, picture, {"text": text, "image": picture})))
        paths = chance.choice((*range(NUM_PATHS), "aggregate", "all", [2, 0]))
        prompt = chance.choice((None, "find a picture", "Represent the caption:"))
        calls.append(
            (inputs, {"paths": paths, "instruction": prompt, "batch_size": chance.choice((1, 3, 32))})
        )
    return calls


def encode_beside(
    module: PDFEmbedder, data: MMEBDataModule, callers: int, seed: int, max_time: dict[str, int]
) -> tuple[int, list[float]]:
    """Return the steps of a training, and by how much each call beside it differs from the call alone."""
    calls, done = draw_calls(random.Random(seed)), Event()
    alone = [module.encode(inputs, **options) for inputs, options in calls]

    def encode(caller: int) -> list[float]:
        chance, number, found = random.Random(f"{seed} {caller}"), caller, list[float]()
        while not done.is_set():
            inputs, options = calls[number % NUM_CALLS]
            embeddings = module.encode(inputs, **options)
            found.append((embeddings - alone[number % NUM_CALLS]).abs().max().item())
            number = chance.randrange(NUM_CALLS)
        return found

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "use_distributed_sampler": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=WORK_DIR, max_epochs=10**6, max_time=max_time, **quiet)
    with ThreadPoolExecutor(callers) as threads:
        tasks = [threads.submit(encode, caller) for caller in range(callers)]
        try:
            trainer.fit(module, datamodule=data.connect(module))
        finally:
            done.set()
        differences = [each for task in tasks for each in task.result()]
    after = [module.encode(inputs, **options) for inputs, options in calls]
    assert all(map(torch.equal, after, alone)), "the training has changed the weights"
    return trainer.global_step, differences


def measure(operator_threads: int, callers: int, seed: int) -> dict[str, Any]:
    """Encode beside a training for a minute, in this process."""
    torch.set_num_threads(operator_threads)
    torch.manual_seed(seed)
    module = make_model(str(Path(model_package.__file__).parent / "tiny"))
    data = MMEBDataModule(train_subsets=["Scene_t2i"], row_limit=64, batch_size=8)
    steps, differences = encode_beside(module, data, callers, seed, {"seconds": SECONDS})
    wrong = sum(not each <= TOLERANCES[operator_threads] for each in differences)
    enough = steps > 0 and len(differences) >= callers
    about = {"steps": steps, "calls": len(differences), "different": wrong, "largest": max(differences)}
    return {**about, "verdict": "right" if enough and not wrong else "wrong"}


def one_try(kind: str, operator_threads: int, callers: int, seed: int) -> dict[str, Any]:
    """Measure in a new process, as threads of operators are counted once."""
    os.environ["OMP_NUM_THREADS"] = str(operator_threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(measure, operator_threads, callers, seed).result()


def main() -> int:
    """Try what was not tried with this commit, and print the table; the exit code is 1 after a fault."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    tries = [
        {"kind": f"{callers} callers", "operator_threads": threads, "callers": callers, "seed": 0}
        for threads in TOLERANCES
        for callers in CALLERS
    ]
    return run_missing(OUTPUT_DIR / "threads.jsonl", tries, one_try)


if __name__ == "__main__":
    sys.exit(main())
