"""Retrieval tasks of the embedded world with several right answers, as corpus, queries and judgements.

They are a group of their own: neither in the default mixture nor among the tasks that ``test`` scores unless
they are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
COLUMNS = {"query_text": "query", "candidate_image": "picture", "negative_image": "other"}

Rng = np.random.Generator
Grade = Callable[[Scene], int]


@dataclass(frozen=True)
class AnswerTask:
    """One task; ``ask`` returns texts for a corpus with the grade of a picture, 0 for a wrong answer."""

    name: str
    in_distribution: bool
    instruction: str
    ask: Callable[[Rng, Sequence[Scene], int], dict[str, Grade]]
    held_out: bool = field(default=False, kw_only=True)

    @property
    def entry(self) -> dict[str, Any]:
        """The task's entry in ``tasks.json``."""
        folder = f"{GROUP}/{self.name}"
        about = {"meta_task": "retrieval", "in_distribution": self.in_distribution}
        about |= {"metric": "ndcg@10", "group": GROUP}
        files = {"train_file": f"{folder}/train.parquet"} if self.in_distribution else {}
        files |= {"eval_dir": folder, "image_dir": folder}
        texts = {"query_instruction": self.instruction}
        texts["candidate_instruction"] = "Represent the given picture"
        kept = COLUMNS if self.in_distribution else dict(list(COLUMNS.items())[:2])
        return {**about, **files, "columns": kept, **texts}


def objects(rng: Rng, scenes: Sequence[Scene], count: int) -> dict[str, Grade]:
    """Ask for an object by color and shape, often by size, too; one of another size is half right."""
    kinds = [kind for kind in product(SHAPES, COLORS, (None, *SIZES)) if kind[:2] not in HELD_OUT]
    asked = (kinds[number] for number in rng.permutation(len(kinds)))
    wanted = {
        f"a {f'{size} ' if size else ''}{color} {shape}": partial(_object_grade, shape, color, size)
        for shape, color, size in asked
    }
    there = [text for text, grade in wanted.items() if any(grade(scene) == 2 for scene in scenes)]
    return {text: wanted[text] for text in there[:count]}


def _object_grade(shape: str, color: str, size: str | None, scene: Scene) -> int:
    found = [item for _, item in scene.objects if (item.shape, item.color) == (shape, color)]
    return max((2 if size in (None, item.size) else 1 for item in found), default=0)


def fragments(rng: Rng, scenes: Sequence[Scene], count: int) -> dict[str, Grade]:
    """Ask for one or two parts of a picture's caption."""
    wanted: dict[str, Grade] = {}
    for _ in range(20 * count):
        parts = scenes[rng.integers(len(scenes))].caption().split(", ")
        kept = sorted(rng.permutation(len(parts))[: int(rng.integers(1, 3))].tolist())
        chosen = [parts[number] for number in kept]
        if len(wanted) < count:
            wanted[", ".join(chosen)] = partial(_fragment_grade, chosen)
    return wanted


def _fragment_grade(parts: list[str], scene: Scene) -> int:
    return int(set(parts) <= set(scene.caption().split(", ")))


ANSWER_TASKS = (
    AnswerTask("ObjectPictures", True, "Find all pictures that show", objects),
    AnswerTask("UnseenFragments", False, "Find all pictures that match", fragments, held_out=True),
)
"""The fragments are of captions of combinations, and in a form, that no training row shows."""


def write_answer_task(data_dir: Path, task: AnswerTask, rng: Rng, *, train_rows: int, eval_rows: int) -> None:
    """Write a task's folder: pictures, ``corpus``, ``queries``, ``qrels``, and ``train`` in distribution."""
    folder = data_dir / GROUP / task.name
    scenes = [sample_scene(rng, held_out=task.held_out) for _ in range(2 * eval_rows)]
    files = _write_pictures(folder, "corpus", scenes)
    wanted = task.ask(rng, scenes, eval_rows)
    corpus = [{"corpus-id": str(number), "picture": file} for number, file in enumerate(files)]
    queries = [{"query-id": str(number), "query": text} for number, text in enumerate(wanted)]
    qrels = [
        {"query-id": str(query), "corpus-id": str(number), "score": grade(scene)}
        for query, grade in enumerate(wanted.values())
        for number, scene in enumerate(scenes)
        if grade(scene)
    ]
    tables = {"corpus": corpus, "queries": queries, "qrels": qrels}
    if task.in_distribution:
        tables["train"] = _train_rows(folder, task, rng, train_rows)
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def _train_rows(folder: Path, task: AnswerTask, rng: Rng, count: int) -> list[dict[str, Any]]:
    """Draw rows of up to ``MOST_POSITIVES`` pictures from a small stock, and a wrong one."""
    scenes = [sample_scene(rng, held_out=task.held_out) for _ in range(max(32, count // 4))]
    files = _write_pictures(folder, "train", scenes)
    grades = {
        text: np.array([grade(scene) for scene in scenes])
        for text, grade in task.ask(rng, scenes, count).items()
    }
    rows = []
    for number in rng.integers(len(grades), size=count):
        text, of_scenes = list(grades.items())[number]
        right = rng.permutation(np.flatnonzero(of_scenes == 2))[:MOST_POSITIVES]
        wrong = rng.choice(np.flatnonzero(of_scenes == 0))
        pictures = [files[place] for place in right]
        rows.append({"query": text, "picture": pictures, "other": files[wrong]})
    return rows


def _write_pictures(folder: Path, name: str, scenes: Sequence[Scene]) -> list[str]:
    files = [f"pictures/{name}_{number}.png" for number in range(len(scenes))]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for file, scene in zip(files, scenes, strict=True):
        render(scene).save(folder / file, compress_level=1)
    return files
