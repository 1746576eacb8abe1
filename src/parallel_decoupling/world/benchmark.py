"""Write the embedded benchmark to disk in the MMEB layout, once, cached by content hash.

``data.readers`` reads it like MMEB; ``tasks.json`` holds meta-task and distribution of every task.
"""

import hashlib
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from parallel_decoupling.data.tables import default_cache_dir
from parallel_decoupling.files import atomic_write
from parallel_decoupling.world import answers
from parallel_decoupling.world.rows import WORLD_TASKS, Row, Side, WorldTask
from parallel_decoupling.world.scenes import Rng

TRAIN_ROWS, EVAL_ROWS, CANDIDATES = 1500, 150, 16


def ensure_benchmark(
    cache_dir: str | Path | None = None,
    *,
    train_rows: int = TRAIN_ROWS,
    eval_rows: int = EVAL_ROWS,
    seed: int = 0,
) -> Path:
    """Return the embedded benchmark's folder, generating it by one final rename if it is not in the cache."""
    if min(train_rows, eval_rows) < CANDIDATES:
        rule = f"must each be at least {CANDIDATES}, so that other rows can fill candidate lists"
        raise ValueError(f"train_rows={train_rows} and eval_rows={eval_rows} {rule}.")
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    data_dir = root / f"mini-mmeb-{content_hash(train_rows, eval_rows, seed)}"
    if data_dir.exists():
        return data_dir
    try:
        with atomic_write(data_dir) as unfinished:
            generate(unfinished, train_rows=train_rows, eval_rows=eval_rows, seed=seed)
    except OSError:
        if not data_dir.exists():  # which another process may have made by now
            raise
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
    table: dict[str, Any] = {task.name: {key: getattr(task, key) for key in keys} for task in WORLD_TASKS}
    for name in answers.ANSWER_TASKS:
        rng = np.random.default_rng([seed, len(table), 1])
        table[name] = answers.write_answers(data_dir, name, rng, train_rows, eval_rows)
    table |= answers.write_pages_and_clips(data_dir, np.random.default_rng([seed, len(table), 1]), eval_rows)
    (data_dir / "tasks.json").write_text(json.dumps(table, indent=2) + "\n")


def _image_writer(root_dir: Path, folder: str, stem: str) -> Callable[[Side], str]:
    """Return a function that saves the picture of a side and returns its path in the tables, "" for none."""
    numbers = count()
    (root_dir / folder).mkdir(parents=True, exist_ok=True)

    def write(side: Side) -> str:
        if side.picture is None:
            return ""
        name = f"{folder}/{stem}_{next(numbers)}.png"
        side.picture.save(root_dir / name, compress_level=1)
        return name

    return write


def _write_train(train_dir: Path, task: WorldTask, rows: list[Row]) -> None:
    write = _image_writer(train_dir, f"images/{task.name}/Train", f"{task.name}_image")
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    sides = ((row.query, row.positive, row.negatives[0]) for row in rows)
    cells = ([cell for side in row for cell in (side.text, write(side))] for row in sides)
    table = [dict(zip(columns, row, strict=True)) for row in cells]
    answers.write_tables(train_dir / task.name, {"original-00000-of-00001.parquet": table})


def _write_eval(eval_dir: Path, task: WorldTask, rows: list[Row], rng: Rng) -> None:
    write = _image_writer(eval_dir, task.name, "image")
    positives = [write(row.positive) for row in rows]
    table: answers.Rows = []
    for index, row in enumerate(rows):
        negatives = [(side.text, write(side)) for side in row.negatives]
        known = {row.positive.meaning, *(side.meaning for side in row.negatives)}
        for other in rng.permutation(len(rows)):
            if task.meta_task == "classification" or len(negatives) + 1 >= CANDIDATES:
                break
            side = rows[other].positive
            if side.meaning not in known:
                known.add(side.meaning)
                negatives.append((side.text, positives[other]))
        texts, paths = zip((row.positive.text, positives[index]), *negatives, strict=True)
        query = {"qry_text": row.query.text, "qry_img_path": write(row.query)}
        table.append({**query, "tgt_text": list(texts), "tgt_img_path": list(paths)})
    answers.write_tables(eval_dir / task.name, {answers.FILE: table})
