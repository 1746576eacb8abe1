"""The generated benchmark is MMEB's layout with one right answer per row."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from parallel_decoupling.data.readers import MMEB_EVAL, MMEB_TRAIN
from parallel_decoupling.world.benchmark import content_hash, ensure_benchmark
from parallel_decoupling.world.rows import WORLD_TASKS


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_benchmark(tmp_path_factory.mktemp("cache"), train_rows=30, eval_rows=20)


def test_layout_and_columns_are_those_of_mmeb(data_dir: Path) -> None:
    tasks = json.loads((data_dir / "tasks.json").read_text())
    assert set(tasks) == {task.name for task in WORLD_TASKS}
    for task in WORLD_TASKS:
        train_file = data_dir / "MMEB-train" / task.name / "original-00000-of-00001.parquet"
        assert train_file.exists() == task.in_distribution
        if task.in_distribution:
            rows = pq.read_table(train_file).to_pylist()
            folder = f"images/{task.name}/Train/"
            assert len(rows) == 30
            assert tuple(rows[0]) == MMEB_TRAIN
            for row in rows:
                assert row["qry_image_path"] == "" or row["qry_image_path"].startswith(folder)
                for side in ("qry", "pos", "neg"):
                    file = row[f"{side}_image_path"]
                    assert file == "" or (data_dir / "MMEB-train" / file).exists()
        rows = pq.read_table(data_dir / "MMEB-eval" / task.name / "test-00000-of-00001.parquet").to_pylist()
        assert len(rows) == 20
        assert tuple(rows[0]) == MMEB_EVAL[:4]


def test_no_candidate_list_repeats_a_candidate(data_dir: Path) -> None:
    for task in WORLD_TASKS:
        rows = pq.read_table(data_dir / "MMEB-eval" / task.name / "test-00000-of-00001.parquet").to_pylist()
        for row in rows:
            pictures = [
                Image.open(data_dir / "MMEB-eval" / file).tobytes() if file else b""
                for file in row["tgt_img_path"]
            ]
            candidates = list(zip(row["tgt_text"], pictures, strict=True))
            assert len(candidates) >= 4, task.name
            assert len(set(candidates)) == len(candidates), task.name
            assert all((row["qry_img_path"] == "") == ("<|image_1|>" not in row["qry_text"]) for row in rows)


def test_generation_is_a_function_of_the_seed(data_dir: Path, tmp_path: Path) -> None:
    before = (data_dir / "tasks.json").stat().st_mtime_ns
    assert ensure_benchmark(data_dir.parent, train_rows=30, eval_rows=20) == data_dir
    assert (data_dir / "tasks.json").stat().st_mtime_ns == before, "the second call generates nothing"
    again = ensure_benchmark(tmp_path, train_rows=30, eval_rows=20)
    assert again.name == data_dir.name
    files = sorted(path.relative_to(data_dir) for path in data_dir.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in random.Random(0).sample(files, 40):
        assert (data_dir / file).read_bytes() == (again / file).read_bytes()
    other = ensure_benchmark(tmp_path, train_rows=30, eval_rows=20, seed=1)
    table = Path("MMEB-eval/SceneQA/test-00000-of-00001.parquet")
    assert (other / table).read_bytes() != (data_dir / table).read_bytes()


def test_cache_name_depends_on_every_argument() -> None:
    arguments = ((30, 20, 0), (31, 20, 0), (30, 21, 0), (30, 20, 1))
    assert len({content_hash(*each) for each in arguments}) == 4


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        ensure_benchmark(tmp_path, train_rows=5)
