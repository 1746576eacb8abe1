"""Write the embedded benchmark to disk in the MMEB layout, once, cached by content hash.

    MMEB-train/<subset>/original-00000-of-00001.parquet    MMEB-train/images/<subset>/Train/*.png
    MMEB-eval/<task>/test-00000-of-00001.parquet           MMEB-eval/<task>/*.png
    tasks.json                                             meta-task and distribution of every task

Columns, image placeholder and the positive at index 0 are MMEB's, so ``data.readers`` reads both alike.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parallel_decoupling.data.tables import default_cache_dir
from parallel_decoupling.world.rows import WORLD_TASKS, Row, Side, WorldTask

TRAIN_ROWS = 1500
EVAL_ROWS = 150
CANDIDATES = 16


def ensure_benchmark(
    cache_dir: str | Path | None = None,
    *,
    train_rows: int = TRAIN_ROWS,
    eval_rows: int = EVAL_ROWS,
    seed: int = 0,
) -> Path:
    """Return the folder of the embedded benchmark, generating it if it is not in the cache.

    The folder's name holds a hash of the generator's source and of the arguments, so a change of
    either makes a new folder. It appears by one rename, so a stopped run leaves nothing half made.

    Args:
        cache_dir: where benchmarks are kept; ``default_cache_dir()`` if None.
        train_rows: rows of every training subset.
        eval_rows: rows of every evaluation task.
        seed: seed of everything drawn.
    """
    if min(train_rows, eval_rows) < CANDIDATES:
        raise ValueError(
            f"train_rows={train_rows} and eval_rows={eval_rows} must each be at least {CANDIDATES}, "
            "so that candidate lists can be filled from other rows"
        )
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    data_dir = root / f"mini-mmeb-{content_hash(train_rows, eval_rows, seed)}"
    if data_dir.exists():
        return data_dir
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=root))
    generate(unfinished, train_rows=train_rows, eval_rows=eval_rows, seed=seed)
    try:
        unfinished.rename(data_dir)
    except OSError:
        if not data_dir.exists():
            raise
        shutil.rmtree(unfinished)
    return data_dir


def content_hash(train_rows: int, eval_rows: int, seed: int) -> str:
    """Hash the generator's source files and arguments."""
    digest = hashlib.blake2b(f"{train_rows} {eval_rows} {seed}".encode(), digest_size=6)
    for source_file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source_file.read_bytes())
    return digest.hexdigest()


def generate(data_dir: Path, *, train_rows: int, eval_rows: int, seed: int) -> None:
    """Write every training subset, every evaluation task and ``tasks.json`` into ``data_dir``."""
    for index, task in enumerate(WORLD_TASKS):
        if task.in_distribution:
            rng = np.random.default_rng([seed, index, 0])
            _write_train(data_dir / "MMEB-train", task, [task.draw(rng) for _ in range(train_rows)])
        rng = np.random.default_rng([seed, index, 1])
        _write_eval(data_dir / "MMEB-eval", task, [task.draw(rng) for _ in range(eval_rows)], rng)
    keys = ("meta_task", "in_distribution")
    table = {task.name: {key: getattr(task, key) for key in keys} for task in WORLD_TASKS}
    (data_dir / "tasks.json").write_text(json.dumps(table, indent=2) + "\n")


class _ImageFiles:
    """Writes pictures into one folder and returns their path as it stands in the tables."""

    def __init__(self, root_dir: Path, folder: str, stem: str) -> None:
        self.root_dir, self.folder, self.stem, self.count = root_dir, folder, stem, 0
        (root_dir / folder).mkdir(parents=True, exist_ok=True)

    def write(self, side: Side) -> str:
        """Save the picture of ``side``; "" if it has none."""
        if side.picture is None:
            return ""
        name = f"{self.folder}/{self.stem}_{self.count}.png"
        side.picture.save(self.root_dir / name, compress_level=1)
        self.count += 1
        return name


def _write_train(train_dir: Path, task: WorldTask, rows: list[Row]) -> None:
    images = _ImageFiles(train_dir, f"images/{task.name}/Train", f"{task.name}_image")
    table = [
        {
            "qry": row.query.text,
            "qry_image_path": images.write(row.query),
            "pos_text": row.positive.text,
            "pos_image_path": images.write(row.positive),
            "neg_text": row.negatives[0].text,
            "neg_image_path": images.write(row.negatives[0]),
        }
        for row in rows
    ]
    _write_table(train_dir / task.name / "original-00000-of-00001.parquet", table)


def _write_eval(eval_dir: Path, task: WorldTask, rows: list[Row], rng: np.random.Generator) -> None:
    images = _ImageFiles(eval_dir, task.name, "image")
    positives = [images.write(row.positive) for row in rows]
    table = []
    for index, row in enumerate(rows):
        negatives = [(side.text, images.write(side)) for side in row.negatives]
        known = {row.positive.meaning, *(side.meaning for side in row.negatives)}
        for other in rng.permutation(len(rows)):
            if task.meta_task == "classification" or len(negatives) + 1 >= CANDIDATES:
                break
            side = rows[other].positive
            if side.meaning not in known:
                known.add(side.meaning)
                negatives.append((side.text, positives[other]))
        table.append(
            {
                "qry_text": row.query.text,
                "qry_img_path": images.write(row.query),
                "tgt_text": [row.positive.text, *(text for text, _ in negatives)],
                "tgt_img_path": [positives[index], *(path for _, path in negatives)],
            }
        )
    _write_table(eval_dir / task.name / "test-00000-of-00001.parquet", table)


def _write_table(file: Path, rows: Sequence[Mapping[str, str | Sequence[str]]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
