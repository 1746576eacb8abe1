"""The generated benchmark is MMEB's layout with one right answer per row, and draws what it says."""

import hashlib
import json
import random
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from parallel_decoupling.data.readers import MMEB_EVAL, MMEB_TRAIN, TrainSubset, read_eval_task
from parallel_decoupling.data.tasks import chosen, find_eval_tasks, find_train_subsets
from parallel_decoupling.model.prefixes import META_PROMPTS
from parallel_decoupling.world import glyphs
from parallel_decoupling.world.answers import ANSWER_TASKS, GROUP, PAGES
from parallel_decoupling.world.benchmark import content_hash, ensure_benchmark
from parallel_decoupling.world.questions import questions, relation_questions, sample_edit
from parallel_decoupling.world.rows import WORLD_TASKS
from parallel_decoupling.world.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    Item,
    Scene,
    change_item,
    change_scene,
    crop,
    render,
    sample_scene,
)
from recipes.tiny_backbone import aspects
from tests.support.fit import make_trainer, small_data, small_embedder

TABLES_SHA256 = "093a57cfd2f3d9b94fcb493a84b5f970197e6cead429c24d5f110a1115a7ae85"
"""Of the tables of the tasks that ``overall`` counts: no later task may change them."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_benchmark(tmp_path_factory.mktemp("cache"), train_rows=30, eval_rows=20)


def test_layout_and_columns_are_those_of_mmeb(data_dir: Path) -> None:
    tasks = json.loads((data_dir / "tasks.json").read_text())
    names = [*(task.name for task in WORLD_TASKS), *ANSWER_TASKS]
    assert list(tasks) == [*names, "WordPages", "FigurePages", "MovingShape"], "others come after"
    for task in WORLD_TASKS:
        file = data_dir / "MMEB-train" / task.name / "original-00000-of-00001.parquet"
        assert file.exists() == task.in_distribution
        if task.in_distribution:
            assert tuple(pq.read_schema(file).names) == MMEB_TRAIN
            subset, folder = TrainSubset(data_dir, task.name, hard_negatives=1), f"images/{task.name}/Train/"
            assert len([subset[row] for row in range(30)]) == len(subset), "all pictures are there"
            cells = pq.read_table(file)["qry_image_path"].to_pylist()
            assert all(cell == "" or cell.startswith(folder) for cell in cells)
        file = data_dir / "MMEB-eval" / task.name / "test-00000-of-00001.parquet"
        assert tuple(pq.read_schema(file).names) == MMEB_EVAL[:4]
        assert len(read_eval_task(data_dir, task.name).query_of_row) == 20


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
    assert chosen([GROUP], find_eval_tasks(data_dir), data_dir) == list(ANSWER_TASKS)


def test_pictures_with_an_object_are_all_of_its_answers_and_of_no_unseen_combination(data_dir: Path) -> None:
    """The scenes are drawn again; what a query names is found in their captions."""
    seen, unseen = (read_eval_task(data_dir, name) for name in ANSWER_TASKS)
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


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("position", range(4))
def test_object_is_drawn_in_its_color_at_its_place_and_nowhere_else(color: str, position: int) -> None:
    cells: list[Item | str | None] = [None] * 4
    cells[position] = Item("square", color, "large")
    pixels = np.asarray(render(Scene(tuple(cells), "white")))
    for index in range(4):
        left, top = (index % 2) * IMAGE_SIZE // 2, (index // 2) * IMAGE_SIZE // 2
        middle = pixels[top + 16, left + 16].astype(int)
        if index == position:
            assert tuple(middle) == COLORS[color]
        else:  # lit by up to 16 levels of red and blue
            assert np.abs(middle - BACKGROUNDS["white"]).max() <= 16


def test_a_patch_of_background_tells_its_place() -> None:
    red, _, blue = np.moveaxis(np.asarray(render(Scene((None,) * 4, "gray"))).astype(int), 2, 0)
    assert (np.diff(red, axis=1) >= 0).all()
    assert (np.diff(red, axis=0) == 0).all()
    assert (np.diff(blue, axis=0) >= 0).all()
    assert red[0, -1] - red[0, 0] == blue[-1, 0] - blue[0, 0] == 32


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_sizes_are_distinct_pictures(shape: str) -> None:
    def mask(name: str, size: str) -> np.ndarray:
        pixels = np.asarray(crop(render(Scene((Item(name, "red", size), None, None, None), "white")), 0))
        return np.asarray(pixels[..., 1] < 128)

    own = mask(shape, "small")
    assert own.sum() < mask(shape, "large").sum()
    for other in SHAPES:
        if other != shape:
            assert (own ^ mask(other, "small")).sum() >= 15, other


def test_training_scenes_never_show_a_held_out_combination_and_evaluation_scenes_only_those() -> None:
    generator = rng()
    for _ in range(300):
        for changed in (sample_scene(generator), change_scene(generator, sample_scene(generator))):
            assert not {(item.shape, item.color) for _, item in changed.objects} & HELD_OUT
        _, edited = sample_edit(generator, sample_scene(generator))
        assert not {(item.shape, item.color) for _, item in edited.objects} & HELD_OUT
        unseen = sample_scene(generator, held_out=True)
        assert {(item.shape, item.color) for _, item in unseen.objects} <= HELD_OUT


def test_changes_are_of_one_attribute_and_change_the_caption() -> None:
    generator = rng()
    for _ in range(200):
        scene = sample_scene(generator)
        item = scene.objects[0][1]
        other = change_item(generator, item)
        assert (item.shape == other.shape) + (item.color == other.color) + (item.size == other.size) == 2
        assert change_scene(generator, scene).caption() != scene.caption()


def brute_force_answer(text: str, scene: Scene) -> set[str]:
    """Read the question word by word and look at every quadrant."""
    words = text.rstrip("?").split()
    items = scene.objects
    if text.startswith("how many"):
        return {("zero", "one", "two", "three", "four")[len(items)]}
    if text.endswith("the background?"):
        return {scene.background}
    if text.startswith("what word"):
        return {cell for cell in scene.cells if isinstance(cell, str)}
    if text.startswith("where is the word"):
        return {POSITIONS[i] for i, cell in enumerate(scene.cells) if cell == words[-1]}
    attribute = {"color": "color", "shape": "shape", "size": "size", "is": "position"}[words[1]]
    found = [
        (index, item)
        for index, item in items
        if all(word in (item.color, item.shape) for word in words if word in COLORS or word in SHAPES)
        and (" at the " not in text or text.rstrip("?").endswith(POSITIONS[index]))
    ]
    return {
        POSITIONS[index] if attribute == "position" else getattr(item, attribute) for index, item in found
    }


def test_every_question_has_exactly_the_stated_answer() -> None:
    generator = rng()
    asked = 0
    for _ in range(200):
        scene = sample_scene(generator)
        for question in questions(scene):
            asked += 1
            assert brute_force_answer(question.text, scene) == {question.answer}, (question, scene.caption())
            assert question.answer in question.choices
            assert len(set(question.choices)) == len(question.choices)
    assert asked > 1000


def test_relation_questions_name_the_neighbor() -> None:
    red, blue = Item("circle", "red", "small"), Item("star", "blue", "large")
    scene = Scene((red, None, blue, None), "white")
    found = {(question.text, question.answer) for question in relation_questions(scene)}
    assert found == {
        ("what color is the object below the red circle?", "blue"),
        ("what shape is the object below the red circle?", "star"),
        ("what color is the object above the blue star?", "red"),
        ("what shape is the object above the blue star?", "circle"),
    }


def test_edit_instruction_describes_the_change() -> None:
    generator = rng()
    for _ in range(200):
        scene = sample_scene(generator)
        instruction, after = sample_edit(generator, scene)
        changed, last = [i for i in range(4) if scene.cells[i] != after.cells[i]], instruction.split()[-1]
        if instruction.startswith("make the background"):
            assert not changed
            assert after.background == last != scene.background
            continue
        assert after.background == scene.background
        assert len(changed) == (2 if instruction.startswith("move") else 1)
        if instruction.startswith("make"):
            new = after.cells[changed[0]]
            assert isinstance(new, Item)
            assert last in (new.color, new.size)


def test_aspects_are_the_meta_prompts_of_the_prefixes() -> None:
    assert tuple(aspects(sample_scene(rng()))) == META_PROMPTS


def test_every_face_draws_every_character() -> None:
    for face in (*glyphs.TRAINING_FONTS, glyphs.HELD_OUT_FONT):
        drawn = {
            glyphs.render_glyph(each, face, rng(5)).tobytes() for each in (*glyphs.CHARACTERS, "\U0010fffe")
        }
        assert len(drawn) == len(glyphs.CHARACTERS) + 1, "and none as the missing one"


def test_handwritten_digits_are_pictures_with_their_values() -> None:
    pictures, values = glyphs.handwritten_digits()
    assert len(pictures) == len(values) == 1797
    assert pictures[0].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert set(values) == set(range(10))


def test_pages_and_clips_are_read_in_the_layouts_of_mmeb_v2(data_dir: Path) -> None:
    names = chosen([PAGES], find_eval_tasks(data_dir), data_dir)
    *pages, clips = (read_eval_task(data_dir, name) for name in names)
    for task in pages:
        queries = pq.read_table(data_dir / PAGES / task.task.name / "queries").to_pylist()
        english = [row["query"] for row in queries if row["language"] == "english"]
        asked = [query.text.partition("given query: ")[2].strip() for query in task.queries]
        assert asked == english != [row["query"] for row in queries]
        assert all(Image.open(page.images[0]).size == (IMAGE_SIZE, IMAGE_SIZE) for page in task.candidates)
    assert clips.task.source is not None
    assert (clips.task.source.published or {})["set"] == "VLM2Vec/MSR-VTT"
    assert (len(clips.candidates), clips.candidates_of_row[3][0]) == (10, 3)
    assert all(len({Image.open(frame).tobytes() for frame in clip.video}) > 5 for clip in clips.candidates)


def test_pages_and_clips_have_a_mean_of_their_own(
    data_dir: Path, tiny_backbone_dir: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path)
    trainer.test(
        small_embedder(tiny_backbone_dir), small_data(str(data_dir), eval_tasks=["Scene_t2i", PAGES])
    )
    report = trainer.scoring.report
    assert report is not None
    scores = {name: result.score["aggregate"] for name, result in report.tasks.items()}
    assert report.means["overall"]["aggregate"] == scores.pop("Scene_t2i")
    assert len(scores) == 3
    assert report.means[PAGES]["aggregate"] == pytest.approx(fmean(scores.values()))
