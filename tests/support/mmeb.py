"""A tiny benchmark on disk in MMEB's layout: two training subsets, two evaluation tasks, coloured squares.

``colours_i2t`` asks for the colour's name, ``colours_t2i`` for an image of a name; the evaluation tasks
have the same names. Images are 16 to 64 pixels wide.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
SIZES = (16, 32, 48, 64)
SUBSETS = ("colours_i2t", "colours_t2i")


def save_tiny_mmeb(folder: Path, rows: int = 24) -> str:
    """Write the benchmark with ``rows`` training rows per subset; returns its ``data_dir``."""
    for part in ("MMEB-train/images", "MMEB-eval"):
        (folder / part).mkdir(parents=True)
    images = {}
    for number in range(rows):
        colour, size = list(COLOURS)[number % 4], SIZES[(number // 4) % 4]
        shade = tuple(max(0, channel - number) for channel in COLOURS[colour])
        name = f"{colour}_{number}.png"
        Image.new("RGB", (size, size), shade).save(folder / "MMEB-train" / "images" / name)
        Image.new("RGB", (size, size), shade).save(folder / "MMEB-eval" / name)
        images[name] = f"a {colour} picture"
    ask, find = f"{IMAGE_PLACEHOLDER}\nwhat colour is the picture?\n", "find the picture: "
    show = f"{IMAGE_PLACEHOLDER}\nthe picture\n"
    training = {
        "colours_i2t": [(ask, f"images/{name}", text, "") for name, text in images.items()],
        "colours_t2i": [(find + text, "", show, f"images/{name}") for name, text in images.items()],
    }
    for subset, cells in training.items():
        columns = zip(*[(*row, "", "") for row in cells], strict=True)
        names = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
        _write(folder / "MMEB-train" / subset / "original-00000-of-00001.parquet", names, columns)
    four = list(images.items())[:4]
    rotations = [four[start:] + four[:start] for start in range(4)]
    evaluation = {
        "colours_i2t": [(ask, row[0][0], [text for _, text in row], [""] * 4) for row in rotations],
        "colours_t2i": [(find + row[0][1], "", [show] * 4, [name for name, _ in row]) for row in rotations],
    }
    for task, cells in evaluation.items():
        names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
        _write(folder / "MMEB-eval" / task / "test-00000-of-00001.parquet", names, zip(*cells, strict=True))
    tasks = {
        "colours_i2t": {"meta_task": "classification", "in_distribution": True},
        "colours_t2i": {"meta_task": "retrieval", "in_distribution": False},
    }
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    return str(folder)


def add_text_subset(data_dir: str, rows: int = 24) -> None:
    """Add the training subset ``texts``, whose queries and candidates have no image."""
    cells = [(f"{number} and one\n", "", str(number + 1), "", "", "") for number in range(rows)]
    names = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    file = Path(data_dir) / "MMEB-train" / "texts" / "original-00000-of-00001.parquet"
    _write(file, names, zip(*cells, strict=True))


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
        _write(folder / part / "test-0.parquet", tuple(columns), columns.values())
    entry = {"meta_task": "retrieval", "in_distribution": True, "metric": "ndcg@5", "group": "shown"}
    entry |= {"train_file": "shades/train/test-0.parquet", "eval_dir": "shades", "image_dir": "MMEB-eval"}
    roles = {"query_text": "text", "candidate_image": "file", "teacher_scores": "scores"}
    tasks = json.loads((Path(data_dir) / "tasks.json").read_text())
    tasks["shades"] = {**entry, "columns": roles}
    (Path(data_dir) / "tasks.json").write_text(json.dumps(tasks))


def _write(file: Path, names: tuple[str, ...], columns: object) -> None:
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), file)  # type: ignore[call-overload]
