"""The world draws what its captions and answers say."""

from __future__ import annotations

import numpy as np
import pytest

from parallel_decoupling.model.prefixes import META_PROMPTS
from parallel_decoupling.world import glyphs
from parallel_decoupling.world.questions import questions, relation_questions, sample_edit
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
