"""Gives commands a disk that fills up, one that is read-only, and one that is not the temporary folder's.

``python -m studies.faults.disks`` mounts small file systems in memory, which needs root. A command that
cannot write must end with exit code 2 and one message with a file, and of a full disk the free space. It
leaves nothing unfinished; checkpoints load, and the old index is whole. When there is space again, the same
command must make what an undisturbed one makes. Verdicts: ``clear`` (all of that), ``right`` (on the third
kind of disk, which nothing may notice) and ``wrong``. Results: ``docs/studies/faults/disks.jsonl``.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from parallel_decoupling import Embedder
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.files import UNFINISHED
from parallel_decoupling.lance_index import LanceIndex
from studies.faults import kills
from studies.faults.campaign import run_missing
from studies.faults.kills import CHECKPOINT, FINISH, NUM_ROWS, OUTPUT_DIR, WORK_DIR, run, store_of, whole

PLACE = WORK_DIR / "disks"
DISK, TEMPORARY = PLACE / "disk", PLACE / "temporary"
NOTE_SIZE = 20_000
KINDS = (("full", 0), ("read-only", 0), ("other", 0), ("full", 1))  # with seeds


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """Mount a file system in memory."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False).returncode:
        raise SystemExit(f"{folder}: this campaign mounts file systems, which needs root.")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def disturbed(kind: str, num_bytes: int) -> Iterator[None]:
    """Let the disk have room for so many bytes only, or make it read-only."""
    options = f"size={shutil.disk_usage(DISK).used + num_bytes}" if kind == "full" else "ro"
    subprocess.run(["mount", "-o", f"remount,{options}", str(DISK)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw,size=64m", str(DISK)], check=True)


def arguments_of(what: str, folder: Path) -> list[str]:
    """Return a command that writes to a folder; ``cache`` is a predict, whose embeddings go elsewhere."""
    if what != "cache":
        return kills.arguments_of(what, folder)
    source = PLACE / "rows.jsonl"
    rows = [{"text": f"text {row}", "note": secrets.token_hex(NOTE_SIZE // 2)} for row in range(NUM_ROWS[1])]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = f"--data.predict_source={source}", f"--output_dir={PLACE / 'output'}"
    return ["predict", f"--ckpt_path={CHECKPOINT}", *places]


def num_bytes_of(what: str) -> int:
    """Return how much a command writes."""
    if what == "cache":
        return NOTE_SIZE * NUM_ROWS[1]
    return sum(file.stat().st_size for file in whole(what)[0].rglob("*") if file.is_file())


def faults_of(kind: str, code: int, messages: str) -> list[str]:
    """Say what is wrong with the end of a command that could not write."""
    said = messages.rpartition("error: ")[2]
    wrong = {
        f"exit code {code}": code != 2,
        "traceback": "Traceback" in messages,
        "not one message": messages.count("error: ") != 1,
        "no file is named": str(DISK) not in said,
        "no free space is named": kind == "full" and "MB free" not in said,
    }
    return [name for name, is_so in wrong.items() if is_so]


def damages_of(what: str, folder: Path) -> list[str]:
    """Say what a command that could not write has damaged or left."""
    wrong = [str(each) for each in PLACE.rglob(f"{UNFINISHED}*")]
    for file in folder.glob("checkpoints/*.ckpt"):
        try:
            Embedder.from_pretrained(file).encode(["a red circle"])
        except ValueError as error:
            wrong.append(str(error))
    is_old = what != "index" or len(LanceIndex(folder)) == NUM_ROWS[0] and not FINISH["index"](folder)
    return wrong if is_old else [*wrong, "not the old index"]


def differences_of(what: str, folder: Path) -> list[str]:
    """Run a command to its end, and say what differs from what an undisturbed one makes."""
    if what in ("fit", "predict", "test"):
        return FINISH[what](folder)  # which runs it
    run(*arguments_of(what, folder))
    if what == "cache":
        found, expected = Store(PLACE / "output"), Store(store_of(NUM_ROWS[1]))
        return [name for name in expected.columns if not found.column(name).equal(expected.column(name))]
    is_new = folder.exists() and (what == "export" or len(LanceIndex(folder)) == NUM_ROWS[1])
    return FINISH[what](folder) if is_new else ["not the new one"]


def one_try(kind: str, what: str, seed: int) -> dict[str, Any]:
    """Run one command on a disk of its own, then again when that is well."""
    shutil.rmtree(PLACE, ignore_errors=True)
    share, folder = random.Random(f"{what} {seed}").uniform(0.1, 0.95), DISK / what
    num_bytes, messages, wrong = int(share * num_bytes_of(what)), "", list[str]()
    environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(TEMPORARY.absolute())}
    environment |= {"PARALLEL_DECOUPLING_CACHE": str(folder)} if what == "cache" else {}
    with mounted(DISK), mounted(TEMPORARY), mock.patch.dict(os.environ, environment):
        if what == "index":
            run("index", str(store_of(NUM_ROWS[0])), str(folder))
        if kind != "other":
            with disturbed(kind, num_bytes):
                process = kills.start(*arguments_of(what, folder))
                messages = process.communicate()[1].decode()
                wrong = faults_of(kind, process.returncode, messages) + damages_of(what, folder)
        try:
            wrong += differences_of(what, folder)
        except RuntimeError as error:
            wrong.append(str(error))
    verdict = "wrong" if wrong else "right" if kind == "other" else "clear"
    said = messages.rpartition("error: ")[2].strip().replace(f"{Path.cwd()}/", "")[:300]
    return {"bytes": num_bytes, "verdict": verdict, "wrong": wrong, "message": said}


def main() -> int:
    """Try what was not tried with this commit, and print the table; the exit code is 1 after a fault."""
    tries = [
        {"kind": kind, "what": what, "seed": seed} for kind, seed in KINDS for what in (*FINISH, "cache")
    ]
    return run_missing(OUTPUT_DIR / "disks.jsonl", tries, one_try)


if __name__ == "__main__":
    sys.exit(main())
