"""Pages and clips of the embedded world, in the layouts of MMEB-V2: a group of their own, for evaluation."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parallel_decoupling.world.answers import fragments
from parallel_decoupling.world.scenes import POSITIONS, WORDS, Scene, render, sample_item, sample_scene

GROUP = "pages_and_clips"
FILE = "test-00000-of-00001.parquet"
FRAMES = 10
PAGE_ENTRY: dict[str, Any] = {
    **{"meta_task": "retrieval", "in_distribution": False, "metric": "ndcg@5", "group": GROUP},
    "columns": {"query_text": "query", "candidate_image": "image"},
    "query_instruction": "Find a document image that matches the given query:",
    "candidate_instruction": "Understand the content of the provided document image.",
    "language": "english",
}
CLIP_ENTRY: dict[str, Any] = {
    **{"meta_task": "retrieval", "in_distribution": False, "group": GROUP},
    "columns": {"query_text": "caption", "candidate_image": "video_id"},
    "query_instruction": "Find a video that contains the following visual content:",
    "candidate_instruction": "Understand the content of the provided video.",
}


def write_pages_and_clips(data_dir: Path, rng: np.random.Generator, count: int) -> dict[str, dict[str, Any]]:
    """Write all tasks of the group, and return their entries in ``tasks.json``.

    Pictures of ``WordPages`` are bytes in the corpus, those of ``FigurePages`` files named by its ids.
    """
    cells = [tuple(map(str, rng.permutation(WORDS)[:4])) for _ in range(count)]
    words = [replace(sample_scene(rng), cells=each) for each in cells]
    figures = [sample_scene(rng, num_objects=int(rng.integers(2, 4)), word_share=1) for _ in range(count)]
    entries = {}
    for name, pages in (("WordPages", words), ("FigurePages", figures)):
        _write_pages(data_dir / GROUP / name, pages, rng, as_bytes=pages is words)
        entries[name] = {**PAGE_ENTRY, "eval_dir": f"{GROUP}/{name}", "image_dir": f"{GROUP}/{name}"}
    folder = f"{GROUP}/MovingShape"
    _write_clips(data_dir / folder, rng, count // 2)
    clips = {"eval_file": f"{folder}/{FILE}", "image_dir": f"{folder}/frames"}
    return {**entries, "MovingShape": {**CLIP_ENTRY, **clips}}


def _write_pages(folder: Path, pages: list[Scene], rng: np.random.Generator, *, as_bytes: bool) -> None:
    """Write ``corpus``, ``queries``, every fourth in another language, and ``qrels``."""
    wanted = fragments(rng, pages, len(pages))
    tables: dict[str, list[dict[str, Any]]] = {part: [] for part in ("corpus", "queries", "qrels")}
    for part in tables:
        (folder / part).mkdir(parents=True)
    for number, page in enumerate(pages):
        content = io.BytesIO()
        render(page).save(content, "PNG", compress_level=1)
        picture = {"image": {"bytes": content.getvalue(), "path": None}}
        tables["corpus"].append({"corpus-id": number, **(picture if as_bytes else {})})
        if not as_bytes:
            (folder / f"{number}.png").write_bytes(content.getvalue())
    for query, (text, grade) in enumerate(wanted.items()):
        language = "english" if query % 4 else "latin"
        tables["queries"].append({"query-id": query, "query": text, "language": language})
        right = [number for number, page in enumerate(pages) if grade(page)]
        tables["qrels"] += [{"query-id": query, "corpus-id": number, "score": 1} for number in right]
    for part, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / part / FILE)


def _write_clips(folder: Path, rng: np.random.Generator, count: int) -> None:
    """Write a row and a folder of frames for each of some moving shapes."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        item, (start, end) = sample_item(rng), rng.permutation(4)[:2].tolist()
        name = rows.setdefault(
            f"{item} moves from the {POSITIONS[start]} to the {POSITIONS[end]}", f"{len(rows)}"
        )
        (folder / "frames" / name).mkdir(parents=True, exist_ok=True)
        cells = tuple(item if place == start else None for place in range(4))
        for number in range(FRAMES):
            way = 32 * number / (FRAMES - 1)
            offset = round(way * (end % 2 - start % 2)), round(way * (end // 2 - start // 2))
            picture = render(Scene(cells, "white", (offset,) * 4))
            picture.save(folder / "frames" / name / f"frame_{number:04d}.png", compress_level=1)
    table = [{"video_id": name, "caption": caption} for caption, name in rows.items()]
    pq.write_table(pa.Table.from_pylist(table), folder / FILE)
