"""The generated benchmark is MMEB's layout with one right answer per row."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from parallel_decoupling.data.readers import MMEB_EVAL, MMEB_TRAIN, TrainSubset, read_eval_task
from parallel_decoupling.data.tasks import chosen, find_eval_tasks, find_train_subsets
from parallel_decoupling.world.answers import ANSWER_TASKS, GROUP
from parallel_decoupling.world.benchmark import content_hash, ensure_benchmark
from parallel_decoupling.world.rows import WORLD_TASKS
from parallel_decoupling.world.scenes import HELD_OUT, sample_scene

TABLES_SHA256 = "093a57cfd2f3d9b94fcb493a84b5f970197e6cead429c24d5f110a1115a7ae85"
"""Of the tables of the tasks that ``overall`` counts: no later task may change them."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_benchmark(tmp_path_factory.mktemp("cache"), train_rows=30, eval_rows=20)


def test_layout_and_columns_are_those_of_mmeb(data_dir: Path) -> None:
    tasks = json.loads((data_dir / "tasks.json").read_text())
    assert list(tasks) == [task.name for task in (*WORLD_TASKS, *ANSWER_TASKS)], "others come after"
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


def test_the_tables_of_the_tasks_of_overall_are_what_they_always_were(data_dir: Path) -> None:
    digest = hashlib.sha256()
    for file in sorted(data_dir.glob("MMEB-*/*/*.parquet")):
        rows = pq.read_table(file).to_pylist()
        digest.update(json.dumps([str(file.relative_to(data_dir)), rows]).encode())
    assert digest.hexdigest() == TABLES_SHA256
    names = {task.name: task.in_distribution for task in WORLD_TASKS}
    assert chosen(None, find_eval_tasks(data_dir), data_dir) == list(names)
    trained = chosen(None, find_train_subsets(data_dir), data_dir)
    assert trained == sorted(name for name in names if names[name]), "the mixture of demo.yaml"
    assert chosen([GROUP], find_eval_tasks(data_dir), data_dir) == [task.name for task in ANSWER_TASKS]


def test_pictures_with_an_object_are_all_of_its_answers_and_of_no_unseen_combination(data_dir: Path) -> None:
    """The scenes are drawn again; what a query names is found in their captions."""
    seen, unseen = (read_eval_task(data_dir, task.name) for task in ANSWER_TASKS)
    for task, held_out in ((seen, False), (unseen, True)):
        rng = np.random.default_rng([0, 15 + held_out, 1])
        captions = [sample_scene(rng, held_out=held_out).caption() for _ in task.candidates]
        assert len(captions) == 40
        for query, answers in zip(task.queries, task.relevance_of_row or (), strict=True):
            wanted = re.sub(r"Find all pictures that (show|match) ", "", query.text).strip()
            if held_out:
                right = {
                    n: 1.0
                    for n, each in enumerate(captions)
                    if set(wanted.split(", ")) <= set(each.split(", "))
                }
            else:
                words = wanted.split()[1:]
                right = {n: 2.0 for n, each in enumerate(captions) if " ".join(words) in each}
                if len(words) == 3:
                    half = {n: 1.0 for n, each in enumerate(captions) if " ".join(words[1:]) in each}
                    right = half | right
            assert answers == right, query
        text = " ".join(query.text for query in task.queries)
        assert any(f"{color} {shape}" in text for shape, color in HELD_OUT) == held_out
    subset = TrainSubset(data_dir, "ObjectPictures", positives=4, hard_negatives=1)
    assert len(subset) == 30
    texts = " ".join(subset[row].query.text for row in range(30))
    assert not any(f"{color} {shape}" in texts for shape, color in HELD_OUT)
    assert any(subset[row].positives[0] for row in range(30))
