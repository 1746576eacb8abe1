"""Reads files from a disk that is slow, gives less than was asked for, or fails.

``python -m studies.faults.reads`` mounts a FUSE file system over a folder with pictures, tables, a
checkpoint, an exported folder and embeddings (``pip install mfusepy`` and libfuse 2; ``FUSE_LIBRARY_PATH``
names the latter if it is not installed). Every read may wait, be short, or fail with an I/O error, by the
seed of the try. Verdicts: ``right`` (the very same numbers), ``clear`` (one error that names the file),
``vague``, ``wrong``, ``crash`` (a signal, which is how a file fails that is mapped into memory)
and ``hang``. There is one JSON line per try in ``docs/studies/faults/reads.jsonl``; those of the same commit
are skipped.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mfusepy
import pandas
import torch
from PIL import Image

from parallel_decoupling import Embedder
from parallel_decoupling.data.row_sources import RowSource
from parallel_decoupling.evaluation.store import Store
from studies.faults.inputs import RefusedError, isolated, run_command
from studies.faults.kills import CHECKPOINT, OUTPUT_DIR, WORK_DIR, store_of, whole
from studies.results import code_version

RESULTS, PLACE = OUTPUT_DIR / "reads.jsonl", WORK_DIR / "reads"
FILES, MOUNT = PLACE / "files", PLACE / "mount"
KINDS = ("slow", "short", "failing")
SUFFIXES = (".jsonl", ".csv", ".parquet")
SECONDS = 120  # that a try may take


class FaultyDisk(mfusepy.Operations):
    """Shows a folder, and reads its files in the way of a kind and a seed."""

    use_ns = True

    def __init__(self, root: Path, kind: str, seed: int) -> None:
        self.root, self.kind, self.chance = root.absolute(), kind, random.Random(seed)
        self.share = self.chance.choice((0.2, 0.5, 0.9))  # of the reads that fail

    def _file(self, path: str) -> str:
        return f"{self.root}{path}"

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Return the attributes of the real file."""
        try:
            about = os.lstat(self._file(path))
        except OSError as error:
            raise mfusepy.FuseOSError(error.errno) from error
        names = ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid")
        times = {f"st_{name}time": getattr(about, f"st_{name}time_ns") for name in "amc"}
        return {name: getattr(about, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        """List a folder."""
        return [".", "..", *os.listdir(self._file(path))]

    def open(self, path: str, flags: int) -> int:
        """Open the real file."""
        return os.open(self._file(path), flags)

    def release(self, path: str, fh: int) -> int:
        """Close it."""
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read some of it, late, or not at all."""
        if self.kind == "slow":
            time.sleep(self.chance.uniform(0, 0.05))
        if self.kind == "short":
            size = self.chance.randint(1, max(1, min(size, 50_000)))
        if self.kind == "failing" and self.chance.random() < self.share:
            raise mfusepy.FuseOSError(errno.EIO)
        return os.pread(fh, size, offset)


@contextmanager
def mounted(kind: str, seed: int) -> Iterator[None]:
    """Mount a faulty disk, in a process of its own."""
    MOUNT.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        direct = kind == "short"  # else the system takes a short read for the end of the file
        try:
            mfusepy.FUSE(FaultyDisk(FILES, kind, seed), str(MOUNT), foreground=True, direct_io=direct)
        finally:
            os._exit(0)
    try:
        while not os.path.ismount(MOUNT):
            time.sleep(0.02)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(MOUNT)], check=False)
        os.waitpid(child, 0)


def make_files() -> None:
    """Write what is read."""
    shutil.rmtree(PLACE, ignore_errors=True)
    (FILES / "pictures").mkdir(parents=True)
    for number in range(8):
        Image.effect_noise((300, 200), 60).convert("RGB").save(FILES / "pictures" / f"{number}.png")
    rows = [{"text": f"a text {number} " * 200} for number in range(300)]
    (FILES / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (FILES / "rows.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    pandas.DataFrame(rows).to_parquet(FILES / "rows.parquet")
    shutil.copy(CHECKPOINT, FILES / "last.ckpt")
    shutil.copytree(whole("export")[0], FILES / "export")
    shutil.copytree(store_of(6), FILES / "store")


def actions(embedder: Embedder, place: Path) -> dict[str, Callable[[Path], Any]]:
    """Return what reads files, by name: functions of the folder that holds them."""

    def predict(folder: Path) -> list[torch.Tensor]:
        source, output = folder / "pictures", place / "store"
        options = (f"--ckpt_path={CHECKPOINT}", f"--data.predict_source={source}", f"--output_dir={output}")
        run_command(["predict", *options])
        store = Store(output)
        assert not store.bad_rows, "a row that only this time could not be read is not a bad row"
        return [store.column(name) for name in store.columns]

    def table(folder: Path) -> list[str]:
        sources = [RowSource(folder / f"rows{suffix}") for suffix in SUFFIXES]
        return [source[row].text for source in sources for row in range(len(source))]

    return {
        "pictures": lambda folder: embedder.encode(sorted((folder / "pictures").iterdir())),
        "checkpoint": lambda folder: Embedder.from_pretrained(folder / "last.ckpt").encode(["a red circle"]),
        "export": lambda folder: Embedder.from_pretrained(folder / "export").encode(["a red circle"]),
        "store": lambda folder: [Store(folder / "store").column(f"path_{path}") for path in range(3)],
        "table": table,
        "predict": predict,
    }


def judge(action: Callable[[Path], Any], expected: Any) -> tuple[str, str]:
    """Read once from the faulty disk."""
    try:
        found = action(MOUNT)
    except (ValueError, OSError, RefusedError) as error:
        return ("clear" if str(MOUNT) in str(error) else "vague"), f"{type(error).__name__}: {error}"[:300]
    except Exception as error:
        return "vague", f"{type(error).__name__}: {error}"[:300]
    same = all(map(torch.equal, found, expected)) if not isinstance(found[0], str) else found == expected
    return ("right" if same else "wrong"), ""


def main() -> int:
    """Try what was not tried with this commit, and print the table; the exit code is 1 after a fault."""
    parser = ArgumentParser(prog="python -m studies.faults.reads")
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PARALLEL_DECOUPLING_CACHE"] = str(PLACE / "try" / "cache")
    whole("export")
    make_files()
    place = PLACE / "try"
    known = actions(Embedder.from_pretrained(CHECKPOINT), place)
    expected = {}
    for name, action in known.items():
        shutil.rmtree(place, ignore_errors=True)
        expected[name] = action(FILES)
    commit, _ = code_version()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    results = {(line["kind"], line["what"], line["seed"]): line for line in lines if line["commit"] == commit}
    for seed in range(options.count):
        for kind in KINDS if seed % 5 == 0 else ("failing",):
            for name, action in known.items():
                if (kind, name, seed) in results:
                    continue
                shutil.rmtree(place, ignore_errors=True)
                with mounted(kind, seed):
                    verdict, message = isolated(
                        lambda action=action, name=name: judge(action, expected[name]), SECONDS
                    )
                line = {"kind": kind, "what": name, "seed": seed, "verdict": verdict, "message": message}
                results[kind, name, seed] = {**line, "commit": commit}
                with RESULTS.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(results[kind, name, seed]) + "\n")
    counts = Counter((line["kind"], line["what"], line["verdict"]) for line in results.values())
    for (kind, name, verdict), count in sorted(counts.items()):
        sys.stdout.write(f"{kind:8} {name:11}{verdict:8}{count}\n")
    return int(any(line["verdict"] not in ("right", "clear") for line in results.values()))


if __name__ == "__main__":
    sys.exit(main())
