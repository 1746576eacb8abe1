"""Writes small folders in MMEB's layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
    pq.write_table(pa.Table.from_pylist(list(rows)), file)


def write_image(file: Path, colour: str = "red", size: tuple[int, int] = (16, 16)) -> str:
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
