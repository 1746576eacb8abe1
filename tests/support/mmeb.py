"""Folders in MMEB's layout: writers of their parts, and a tiny benchmark of coloured squares.

Its subsets and tasks are ``colours_i2t``, which asks for the colour's name, and ``colours_t2i``, which asks
for an image of a name. Images are 16 to 64 pixels wide.
"""

import fnmatch
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
SIZES = (16, 32, 48, 64)
NO_NEGATIVE = {"neg_text": "", "neg_image_path": ""}
SHOP_DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
OWN_ENTRY: dict[str, Any] = {
    "meta_task": "vqa",
    "in_distribution": False,
    "train_file": "a.csv",
    "eval_file": "a.csv",
    "columns": {"query_text": "q", "candidate_text": "a"},
}
"""An entry of tasks.json for a file of one's own."""


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


class Hub:
    """Stands in for the hub; notes what is asked for and writes what matches. A branch follows an @."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files, self.asked = files, list[tuple[str, list[str]]]()

    def __call__(
        self, repo: str, *, repo_type: str, local_dir: Path, allow_patterns: list[str], revision: str = ""
    ) -> None:
        assert repo_type == "dataset"
        repo += f"@{revision}" if revision else ""
        self.asked.append((repo, allow_patterns))
        for name, content in self.files[repo].items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(content)


def write_image(file: Path, colour: Any = "red", size: tuple[int, int] = (16, 16)) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return str(file)


def train_row(qry: str = "what\n", pos: str = "that", **cells: Any) -> dict[str, Any]:
    row = {"qry": qry, "qry_image_path": "", "pos_text": pos, "pos_image_path": ""}
    return {**row, **cells}


def eval_row(qry: str, targets: Sequence[str], **cells: Any) -> dict[str, Any]:
    row = {
        "qry_text": qry,
        "qry_img_path": "",
        "tgt_text": list(targets),
        "tgt_img_path": [""] * len(targets),
    }
    return {**row, **cells}


def write_train(data_dir: Path, subset: str, rows: Sequence[dict[str, Any]], split: str = "original") -> None:
    write_rows(data_dir / "MMEB-train" / subset / f"{split}-00000-of-00001.parquet", rows)


def write_eval(data_dir: Path, task: str, rows: Sequence[dict[str, Any]]) -> None:
    write_rows(data_dir / "MMEB-eval" / task / "test-00000-of-00001.parquet", rows)


def write_shop(folder: Path) -> Path:
    """Write ``shop/``, the example of ``SHOP_DOCUMENT``, as it stands there."""
    pattern = r"^`(shop/[^`]+)`:\n\n```\w+\n(.*?)^```"
    files = dict(re.findall(pattern, SHOP_DOCUMENT, flags=re.MULTILINE | re.DOTALL))
    names = ("tasks.json", "train.jsonl", "test.csv", "labels.jsonl")
    assert list(files) == [f"shop/{name}" for name in names]
    for name in ("chair_1", "chair_2", "lamp_1"):
        write_image(folder / "shop" / "photos" / f"{name}.jpg")
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder / "shop"


def save_tiny_mmeb(folder: Path, rows: int = 24) -> str:
    """Write the benchmark with ``rows`` training rows per subset; returns its ``data_dir``."""
    images = {}
    for number in range(rows):
        colour, size = list(COLOURS)[number % 4], SIZES[(number // 4) % 4]
        shade = tuple(max(0, channel - number) for channel in COLOURS[colour])
        name = f"{colour}_{number}.png"
        for place in ("MMEB-train/images", "MMEB-eval"):
            write_image(folder / place / name, shade, (size, size))
        images[name] = f"a {colour} picture"
    ask, find = f"{IMAGE_PLACEHOLDER}\nwhat colour is the picture?\n", "find the picture: "
    show = f"{IMAGE_PLACEHOLDER}\nthe picture\n"
    of_training = [(f"images/{name}", text) for name, text in images.items()]
    i2t = [train_row(ask, text, qry_image_path=file, **NO_NEGATIVE) for file, text in of_training]
    t2i = [train_row(find + text, show, pos_image_path=file, **NO_NEGATIVE) for file, text in of_training]
    write_train(folder, "colours_i2t", i2t)
    write_train(folder, "colours_t2i", t2i)
    four = list(images.items())[:4]
    rotations = [four[start:] + four[:start] for start in range(4)]
    i2t = [eval_row(ask, [text for _, text in row], qry_img_path=row[0][0]) for row in rotations]
    t2i = [eval_row(find + r[0][1], [show] * 4, tgt_img_path=[name for name, _ in r]) for r in rotations]
    write_eval(folder, "colours_i2t", i2t)
    write_eval(folder, "colours_t2i", t2i)
    tasks = {
        "colours_i2t": {"meta_task": "classification", "in_distribution": True},
        "colours_t2i": {"meta_task": "retrieval", "in_distribution": False},
    }
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    return str(folder)


def add_text_subset(data_dir: str, rows: int = 24) -> None:
    """Add the training subset ``texts``, whose queries and candidates have no image."""
    cells = [train_row(f"{number} and one\n", str(number + 1), **NO_NEGATIVE) for number in range(rows)]
    write_train(Path(data_dir), "texts", cells)


def add_judged_task(data_dir: str) -> None:
    """Add ``shades``, of the group ``shown``: pictures of a colour, with grades and a teacher's scores."""
    folder = Path(data_dir) / "shades"
    files = sorted(file.name for file in (Path(data_dir) / "MMEB-eval").glob("*.png"))
    ids, colours = [str(number) for number in range(len(files))], [file.split("_")[0] for file in files]
    grades = [1 + number % 2 for number in range(len(files))]
    shown = [[file for file in files if file.startswith(colour)][:3] for colour in COLOURS]
    parts = {
        "corpus": {"corpus-id": ids, "file": files},
        "queries": {"query-id": list(COLOURS), "text": [f"{colour} ones" for colour in COLOURS]},
        "qrels": {"query-id": colours, "corpus-id": ids, "score": grades},
        "train": {"text": [f"{c} ones" for c in COLOURS] * 4, "file": shown * 4, "scores": [[2, 1, 0]] * 16},
    }
    for part, columns in parts.items():
        (folder / part).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / part / "test-0.parquet")
    entry = {"meta_task": "retrieval", "in_distribution": True, "metric": "ndcg@5", "group": "shown"}
    entry |= {"train_file": "shades/train/test-0.parquet", "eval_dir": "shades", "image_dir": "MMEB-eval"}
    roles = {"query_text": "text", "candidate_image": "file", "teacher_scores": "scores"}
    tasks = json.loads((Path(data_dir) / "tasks.json").read_text())
    tasks["shades"] = {**entry, "columns": roles}
    (Path(data_dir) / "tasks.json").write_text(json.dumps(tasks))
