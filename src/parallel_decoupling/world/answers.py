"""Retrieval tasks of the embedded world beside ``overall``: pictures, pages and clips.

``several_answers`` has several right answers, as corpus, queries and judgements; ``pages_and_clips`` stands
in the layouts of MMEB-V2, for evaluation alone. Neither is in the default mixture or scored by ``test``
unless it is named.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parallel_decoupling.world import scenes as world
from parallel_decoupling.world.scenes import HELD_OUT, SHAPES, Rng, Scene, render, sample_item, sample_scene

GROUP, PAGES = "several_answers", "pages_and_clips"
MOST_POSITIVES, FRAMES = 4, 10
FILE = "test-00000-of-00001.parquet"

Rows = list[dict[str, Any]]
Graded = dict[str, list[int]]  # by text the grade of every picture as an answer to it, 0 for a wrong one


def objects(rng: Rng, scenes: Sequence[Scene], count: int) -> Graded:
    """Ask for an object by color and shape, often by size, too; one of another size is half right."""
    kinds = [kind for kind in product(SHAPES, world.COLORS, ("", *world.SIZES)) if kind[:2] not in HELD_OUT]
    wanted: Graded = {}
    for shape, color, size in (kinds[number] for number in rng.permutation(len(kinds))):
        grades = [_grade(scene, shape, color, size) for scene in scenes]
        if len(wanted) < count and 2 in grades:
            wanted[" ".join(filter(None, ("a", size, color, shape)))] = grades
    return wanted


def _grade(scene: Scene, shape: str, color: str, size: str) -> int:
    found = [item for _, item in scene.objects if (item.shape, item.color) == (shape, color)]
    return max((2 if size in ("", item.size) else 1 for item in found), default=0)


def fragments(rng: Rng, scenes: Sequence[Scene], count: int) -> Graded:
    """Ask for one or two parts of a picture's caption."""
    captions, wanted = [scene.caption().split(", ") for scene in scenes], Graded()
    for _ in range(20 * count):
        parts = captions[int(rng.integers(len(scenes)))]
        kept = sorted(rng.permutation(len(parts))[: int(rng.integers(1, 3))].tolist())
        chosen = [parts[number] for number in kept]
        if len(wanted) < count:
            wanted[", ".join(chosen)] = [int({*chosen} <= {*caption}) for caption in captions]
    return wanted


ANSWER_TASKS: dict[str, tuple[bool, str, Callable[[Rng, Sequence[Scene], int], Graded]]] = {
    "ObjectPictures": (True, "Find all pictures that show", objects),
    "UnseenFragments": (False, "Find all pictures that match", fragments),
}
"""Whether in distribution (others show combinations of no training picture), instruction, and queries."""


def write_answers(data_dir: Path, name: str, rng: Rng, train_rows: int, eval_rows: int) -> dict[str, Any]:
    """Write a task of pictures with several right answers, and return its entry in ``tasks.json``."""
    (is_trained, instruction, ask), place = ANSWER_TASKS[name], f"{GROUP}/{name}"
    folder, columns = data_dir / place, {"query_text": "query", "candidate_image": "picture"}
    entry = {"meta_task": "retrieval", "in_distribution": is_trained, "metric": "ndcg@10", "group": GROUP}
    entry |= {"eval_dir": place, "image_dir": place, "columns": columns}
    scenes = [sample_scene(rng, held_out=not is_trained) for _ in range(2 * eval_rows)]
    files = _write_pictures(folder, "pictures/corpus", scenes)
    wanted = ask(rng, scenes, eval_rows)
    corpus = [{"corpus-id": number, "picture": file} for number, file in enumerate(files)]
    queries = [{"query-id": number, "query": text} for number, text in enumerate(wanted)]
    tables = {"corpus": corpus, "queries": queries, "qrels": _judged(wanted)}
    if is_trained:
        tables["train"] = _train_rows(folder, ask, rng, train_rows)
        entry["train_file"], columns["negative_image"] = f"{place}/train.parquet", "other"
    write_tables(folder, {f"{part}.parquet": rows for part, rows in tables.items()})
    entry["query_instruction"] = instruction
    return entry | {"candidate_instruction": "Represent the given picture"}


def _train_rows(folder: Path, ask: Callable[..., Graded], rng: Rng, count: int) -> Rows:
    """Draw rows of up to ``MOST_POSITIVES`` pictures from a small stock, and a wrong one."""
    scenes = [sample_scene(rng) for _ in range(max(32, count // 4))]
    files = np.array(_write_pictures(folder, "pictures/train", scenes))
    rows, wanted = [], [(text, np.array(grades)) for text, grades in ask(rng, scenes, count).items()]
    for number in rng.integers(len(wanted), size=count):
        text, grades = wanted[number]
        right, wrong = rng.permutation(files[grades == 2]), rng.choice(files[grades == 0])
        rows.append({"query": text, "picture": right[:MOST_POSITIVES].tolist(), "other": str(wrong)})
    return rows


def write_pages_and_clips(data_dir: Path, rng: Rng, count: int) -> dict[str, dict[str, Any]]:
    """Write all tasks of that group, and return their entries in ``tasks.json``.

    Pictures of ``WordPages`` are bytes in the corpus, those of ``FigurePages`` files named by its ids.
    """
    cells = [tuple(map(str, rng.permutation(world.WORDS)[:4])) for _ in range(count)]
    words = [replace(sample_scene(rng), cells=each) for each in cells]
    figures = [sample_scene(rng, num_objects=int(rng.integers(2, 4)), word_share=1) for _ in range(count)]
    entries, about = {}, {"meta_task": "retrieval", "in_distribution": False}
    for name, pages in (("WordPages", words), ("FigurePages", figures)):
        _write_pages(data_dir / PAGES / name, pages, rng, as_bytes=pages is words)
        entry = {**about, "metric": "ndcg@5", "group": PAGES}
        entry["columns"] = {"query_text": "query", "candidate_image": "image"}
        entry["query_instruction"] = "Find a document image that matches the given query:"
        entry["candidate_instruction"] = "Understand the content of the provided document image."
        entry |= dict.fromkeys(("eval_dir", "image_dir"), f"{PAGES}/{name}")
        entries[name] = entry | {"language": "english"}
    folder = f"{PAGES}/MovingShape"
    _write_clips(data_dir / folder, rng, count // 2)
    clips = {**about, "group": PAGES, "published": "MSR-VTT"}
    clips["query_instruction"] = "Find a video that contains the following visual content:"
    clips["candidate_instruction"] = "Understand the content of the provided video."
    clips |= {"eval_file": folder, "image_dir": f"{folder}/frames"}
    return {**entries, "MovingShape": clips}


def _write_pages(folder: Path, pages: list[Scene], rng: Rng, *, as_bytes: bool) -> None:
    """Write ``corpus``, ``queries``, every fourth in another language, and ``qrels``."""
    wanted, corpus = fragments(rng, pages, len(pages)), Rows()
    folder.mkdir(parents=True)
    for number, page in enumerate(pages):
        content = io.BytesIO()
        render(page).save(content, "PNG", compress_level=1)
        picture = {"image": {"bytes": content.getvalue(), "path": None}}
        corpus.append({"corpus-id": number, **(picture if as_bytes else {})})
        if not as_bytes:
            (folder / f"{number}.png").write_bytes(content.getvalue())
    queries = [
        {"query-id": number, "query": text, "language": "english" if number % 4 else "latin"}
        for number, text in enumerate(wanted)
    ]
    tables = {"corpus": corpus, "queries": queries, "qrels": _judged(wanted)}
    write_tables(folder, {f"{part}/{FILE}": rows for part, rows in tables.items()})


def _write_clips(folder: Path, rng: Rng, count: int) -> None:
    """Write a row and a folder of frames for each of some moving shapes, as MSR-VTT has them."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        item, (start, end) = sample_item(rng), rng.permutation(4)[:2].tolist()
        caption = f"{item} moves from the {world.POSITIONS[start]} to the {world.POSITIONS[end]}"
        name = rows.setdefault(caption, f"{len(rows)}")
        cells, clip = tuple(item if place == start else None for place in range(4)), list[Scene]()
        for number in range(FRAMES):
            way = 32 * number / (FRAMES - 1)
            offset = round(way * (end % 2 - start % 2)), round(way * (end // 2 - start // 2))
            clip.append(Scene(cells, "white", (offset,) * 4))
        _write_pictures(folder, f"frames/{name}/frame", clip, digits=4)
    table = [{"video_id": name, "caption": text} for text, name in rows.items()]
    write_tables(folder, {"test_1k/test/0000.parquet": table})


def _judged(wanted: Graded) -> Rows:
    """Return the judgement of every right answer."""
    return [
        {"query-id": query, "corpus-id": number, "score": grade}
        for query, grades in enumerate(wanted.values())
        for number, grade in enumerate(grades)
        if grade
    ]


def write_tables(folder: Path, tables: Mapping[str, Rows]) -> None:
    """Write Parquet files by name, with the folders that they are in."""
    for name, rows in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name)


def _write_pictures(folder: Path, name: str, scenes: Sequence[Scene], digits: int = 1) -> list[str]:
    files = [f"{name}_{number:0{digits}}.png" for number in range(len(scenes))]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for file, scene in zip(files, scenes, strict=True):
        render(scene).save(folder / file, compress_level=1)
    return files
