"""Retrieval tasks of the embedded world with several right answers, as corpus, queries and judgements.

They are a group of their own: neither in the default mixture nor among the tasks that ``test`` scores unless
they are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parallel_decoupling.world.scenes import COLORS, HELD_OUT, SHAPES, SIZES, Scene, render, sample_scene

GROUP = "several_answers"
MOST_POSITIVES = 4

Rng = np.random.Generator
Grade = Callable[[Scene], int]


@dataclass(frozen=True)
class AnswerTask:
    """One task; ``ask`` returns texts for a corpus with the grade of a picture, 0 for a wrong answer.

    Pictures out of distribution show combinations that no training picture shows.
    """

    name: str
    in_distribution: bool
    instruction: str
    ask: Callable[[Rng, Sequence[Scene], int], dict[str, Grade]]

    @property
    def entry(self) -> dict[str, Any]:
        """The task's entry in ``tasks.json``."""
        folder, columns = f"{GROUP}/{self.name}", {"query_text": "query", "candidate_image": "picture"}
        entry: dict[str, Any] = {
            "meta_task": "retrieval",
            "in_distribution": self.in_distribution,
            "metric": "ndcg@10",
        }
        entry |= {"group": GROUP, "eval_dir": folder, "image_dir": folder, "columns": columns}
        if self.in_distribution:
            entry["train_file"], columns["negative_image"] = f"{folder}/train.parquet", "other"
        entry["query_instruction"] = self.instruction
        return entry | {"candidate_instruction": "Represent the given picture"}


def objects(rng: Rng, scenes: Sequence[Scene], count: int) -> dict[str, Grade]:
    """Ask for an object by color and shape, often by size, too; one of another size is half right."""
    kinds = [kind for kind in product(SHAPES, COLORS, ("", *SIZES)) if kind[:2] not in HELD_OUT]
    asked = (kinds[number] for number in rng.permutation(len(kinds)))
    wanted: dict[str, Grade] = {}
    for shape, color, size in asked:
        grade = partial(_grade, shape, color, size)
        if len(wanted) < count and any(grade(scene) == 2 for scene in scenes):
            wanted[" ".join(filter(None, ("a", size, color, shape)))] = grade
    return wanted


def _grade(shape: str, color: str, size: str, scene: Scene) -> int:
    found = [item for _, item in scene.objects if (item.shape, item.color) == (shape, color)]
    return max((2 if size in ("", item.size) else 1 for item in found), default=0)


def fragments(rng: Rng, scenes: Sequence[Scene], count: int) -> dict[str, Grade]:
    """Ask for one or two parts of a picture's caption."""
    wanted: dict[str, Grade] = {}
    for _ in range(20 * count):
        parts = scenes[int(rng.integers(len(scenes)))].caption().split(", ")
        kept = sorted(rng.permutation(len(parts))[: int(rng.integers(1, 3))].tolist())
        chosen = [parts[number] for number in kept]
        if len(wanted) < count:
            wanted[", ".join(chosen)] = partial(_has_all, chosen)
    return wanted


def _has_all(parts: list[str], scene: Scene) -> int:
    return int(set(parts) <= set(scene.caption().split(", ")))


ANSWER_TASKS = (
    AnswerTask("ObjectPictures", True, "Find all pictures that show", objects),
    AnswerTask("UnseenFragments", False, "Find all pictures that match", fragments),
)


def write_answer_task(data_dir: Path, task: AnswerTask, rng: Rng, *, train_rows: int, eval_rows: int) -> None:
    """Write a task's folder: pictures, ``corpus``, ``queries``, ``qrels``, and ``train`` in distribution."""
    folder = data_dir / GROUP / task.name
    scenes = [sample_scene(rng, held_out=not task.in_distribution) for _ in range(2 * eval_rows)]
    files = _write_pictures(folder, "corpus", scenes)
    wanted = task.ask(rng, scenes, eval_rows)
    tables: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"corpus-id": number, "picture": file} for number, file in enumerate(files)],
        "queries": [{"query-id": number, "query": text} for number, text in enumerate(wanted)],
        "qrels": [
            {"query-id": query, "corpus-id": number, "score": grade(scene)}
            for query, grade in enumerate(wanted.values())
            for number, scene in enumerate(scenes)
            if grade(scene)
        ],
    }
    if task.in_distribution:
        tables["train"] = _train_rows(folder, task, rng, train_rows)
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def _train_rows(folder: Path, task: AnswerTask, rng: Rng, count: int) -> list[dict[str, Any]]:
    """Draw rows of up to ``MOST_POSITIVES`` pictures from a small stock, and a wrong one."""
    scenes = [sample_scene(rng) for _ in range(max(32, count // 4))]
    files = np.array(_write_pictures(folder, "train", scenes))
    wanted = task.ask(rng, scenes, count).items()
    graded = [(text, np.array([grade(scene) for scene in scenes])) for text, grade in wanted]
    rows = []
    for number in rng.integers(len(graded), size=count):
        text, grades = graded[number]
        right, wrong = rng.permutation(files[grades == 2]), rng.choice(files[grades == 0])
        rows.append({"query": text, "picture": right[:MOST_POSITIVES].tolist(), "other": str(wrong)})
    return rows


def _write_pictures(folder: Path, name: str, scenes: Sequence[Scene]) -> list[str]:
    files = [f"pictures/{name}_{number}.png" for number in range(len(scenes))]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for file, scene in zip(files, scenes, strict=True):
        render(scene).save(folder / file, compress_level=1)
    return files
