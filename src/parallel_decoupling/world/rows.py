"""The embedded benchmark's tasks: one function per task that draws a row with hard negatives.

Prompts follow MMEB; tasks out of distribution show what no training row has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.world import glyphs, scenes
from parallel_decoupling.world.questions import Question, questions, relation_questions, sample_edit
from parallel_decoupling.world.scenes import Item, Rng, Scene, change_item, crop, render, sample_scene


@dataclass(frozen=True)
class Side:
    """A query or candidate in the files; candidates of equal ``meaning`` never stand in one list."""

    text: str
    picture: Image.Image | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Row:
    """A query, its positive and hard negatives."""

    query: Side
    positive: Side
    negatives: list[Side]


@dataclass(frozen=True)
class WorldTask:
    """One task; ``draw`` draws a row. It has a training subset of its name if it is ``in_distribution``."""

    name: str
    meta_task: str
    in_distribution: bool
    draw: Callable[[Rng], Row]


def _seen(instruction: str, picture: Image.Image) -> Side:
    return Side(f"{IMAGE_PLACEHOLDER}\n{instruction}\n", picture)


def _answer(text: str) -> Side:
    return Side(text, None, text)


def _picture(scene: Scene) -> Side:
    text = f"{IMAGE_PLACEHOLDER}\nRepresent the given picture\n"
    return Side(text, render(scene), scene.caption())


def _crop(picture: Image.Image, index: int, item: Item) -> Side:
    text = f"{IMAGE_PLACEHOLDER}\nRepresent the given cropped picture\n"
    return Side(text, crop(picture, index), f"{item.color} {item.shape}")


def _distinct(positive: Side, sides: list[Side]) -> list[Side]:
    kept = {positive.meaning: positive}
    for side in sides:
        kept.setdefault(side.meaning, side)
    return list(kept.values())[1:]


def _changes(rng: Rng, scene: Scene, count: int, *, held_out: bool = False) -> list[Scene]:
    return [scenes.change_scene(rng, scene, held_out=held_out) for _ in range(count)]


def object_type(rng: Rng, *, held_out: bool = False) -> Row:
    """Name the two large objects of a picture, among its small ones and other colors and shapes."""
    scene = sample_scene(rng, num_objects=int(rng.integers(3, 5)), word_share=0, held_out=held_out)
    chosen = sorted(rng.permutation(len(scene.objects))[:2].tolist())
    for number, (index, item) in enumerate(scene.objects):
        scene = scene.with_cell(index, replace(item, size="large" if number in chosen else "small"))
    items = [item for _, item in scene.objects]
    first, second = (items[number] for number in chosen)
    small = [item for item in items if item.size == "small"]
    positive = _pair(first, second)
    negatives = [_pair(first, other) for other in small] + [_pair(other, second) for other in small]
    for _ in range(6):
        negatives.append(_pair(change_item(rng, first, held_out=held_out), second))
        negatives.append(_pair(first, change_item(rng, second, held_out=held_out)))
    rng.shuffle(negatives)
    query = _seen("Identify the two large objects in the picture", render(scene))
    return Row(query, positive, _distinct(positive, negatives))


def _pair(first: Item, second: Item) -> Side:
    return _answer(f"{first.color} {first.shape} and {second.color} {second.shape}")


def sign(rng: Rng) -> Row:
    """Name the word that is written in a picture, its place and the background."""
    while (scene := sample_scene(rng, word_share=1)).word is None:
        pass
    word, place, background = scene.word, scenes.POSITIONS[scene.cells.index(scene.word)], scene.background
    positive = _answer(f"{word} at the {place} on {background}")
    negatives = [_answer(f"{word} at the {other} on {background}") for other in scenes.POSITIONS]
    negatives += [_answer(f"{other} at the {place} on {background}") for other in scenes.WORDS]
    negatives += [_answer(f"{word} at the {place} on {other}") for other in scenes.BACKGROUNDS]
    rng.shuffle(negatives)
    query = _seen("Identify the word in the picture, its place and the background", render(scene))
    return Row(query, positive, _distinct(positive, negatives))


def character(rng: Rng, *, unseen: bool = False) -> Row:
    """Name a rendered digit, letter or symbol by its Unicode name; half of them are a coarse scan.

    ``unseen`` is one that no training row shows, in a face never trained on and never coarse.
    """
    characters = [each for each in glyphs.CHARACTERS if (each in glyphs.UNSEEN_CHARACTERS) == unseen]
    font = glyphs.HELD_OUT_FONT if unseen else str(rng.choice(glyphs.TRAINING_FONTS))
    coarse = not unseen and bool(rng.random() < 0.5)
    chosen, *others = rng.permutation(characters)
    picture = glyphs.render_glyph(chosen, font, rng, coarse=coarse)
    query = _seen("Identify the character in the picture", picture)
    negatives = [_answer(glyphs.unicode_name(other)) for other in others]
    return Row(query, _answer(glyphs.unicode_name(chosen)), negatives)


def handwritten_digit(rng: Rng) -> Row:
    """Name a handwritten digit of scikit-learn's data set."""
    pictures, values = glyphs.handwritten_digits()
    index = int(rng.integers(len(pictures)))
    names = [_answer(glyphs.unicode_name(str(value))) for value in range(10)]
    query = _seen("Identify the digit in the picture", pictures[index])
    return Row(query, names[values[index]], _distinct(names[values[index]], names))


def question(rng: Rng, asks: Callable[[Scene], list[Question]]) -> Row:
    """Answer a question about a picture."""
    while not (asked := asks(scene := sample_scene(rng))):
        pass
    factor = str(rng.choice(sorted({each.factor for each in asked})))
    same = [each for each in asked if each.factor == factor]
    chosen = same[rng.integers(len(same))]
    instruction = f"Represent the given picture with the following question: {chosen.text}"
    positive = _answer(chosen.answer)
    negatives = _distinct(positive, [_answer(choice) for choice in chosen.choices])
    return Row(_seen(instruction, render(scene)), positive, negatives)


def scene_to_caption(rng: Rng) -> Row:
    """Find the caption of a picture among captions that differ in one detail."""
    scene = sample_scene(rng)
    positive = _answer(scene.caption())
    negatives = [_answer(other.caption()) for other in _changes(rng, scene, 8)]
    query = _seen("Find a caption that describes the picture", render(scene))
    return Row(query, positive, _distinct(positive, negatives))


def caption_to_scene(rng: Rng, *, held_out: bool = False) -> Row:
    """Find the picture of a caption among pictures that differ in one detail."""
    scene = sample_scene(rng, num_objects=int(rng.integers(1, 4)), held_out=held_out)
    positive = _picture(scene)
    negatives = [_picture(other) for other in _changes(rng, scene, 4, held_out=held_out)]
    query = Side(f"Find a picture that matches the caption: {scene.caption()}\n")
    return Row(query, positive, _distinct(positive, negatives))


def edited_scene(rng: Rng) -> Row:
    """Find the picture that a change of the given one leads to."""
    scene = sample_scene(rng)
    instruction, after = sample_edit(rng, scene)
    positive = _picture(after)
    negatives = [_picture(scene), *(_picture(other) for other in _changes(rng, after, 3))]
    query = _seen(f"Find a picture with the following change: {instruction}", render(scene))
    return Row(query, positive, _distinct(positive, negatives))


def objects_to_scene(rng: Rng) -> Row:
    """Find the picture of a list of objects without sizes and places, a form never trained on."""
    scene = sample_scene(rng, num_objects=int(rng.integers(2, 4)), word_share=0)
    pairs = {(item.color, item.shape) for _, item in scene.objects}
    negatives: list[Side] = []
    while len(negatives) < 4:
        index, item = scene.objects[rng.integers(len(scene.objects))]
        changed = change_item(rng, item)
        if (changed.color, changed.shape) not in pairs:
            negatives.append(_picture(scene.with_cell(index, changed)))
    names = " and ".join(f"a {color} {shape}" for color, shape in sorted(pairs))
    positive = _picture(scene)
    return Row(Side(f"Find a picture that shows {names}\n"), positive, _distinct(positive, negatives))


def object_crop(rng: Rng, *, by_place: bool = False) -> Row:
    """Find the crop of the object that is named by color and shape, or by its place."""
    scene = sample_scene(rng, num_objects=int(rng.integers(2, 5)))
    picture = render(scene)
    index, item = scene.objects[rng.integers(len(scene.objects))]
    positive = _crop(picture, index, item)
    negatives = [_crop(picture, other, its) for other, its in scene.objects if other != index]
    for _ in range(2):
        changed = change_item(rng, item)
        negatives.append(_crop(render(scene.with_cell(index, changed)), index, changed))
    name = f"the object at the {scenes.POSITIONS[index]}" if by_place else f"the {item.color} {item.shape}"
    query = _seen(f"Select the portion of the picture that shows {name}", picture)
    return Row(query, positive, _distinct(positive, negatives))


WORLD_TASKS = (
    WorldTask("ObjectType", "classification", True, object_type),
    WorldTask("Sign", "classification", True, sign),
    WorldTask("Character", "classification", True, character),
    WorldTask("SceneQA", "vqa", True, partial(question, asks=questions)),
    WorldTask("Scene_i2t", "retrieval", True, scene_to_caption),
    WorldTask("Scene_t2i", "retrieval", True, caption_to_scene),
    WorldTask("SceneEdit", "retrieval", True, edited_scene),
    WorldTask("ObjectCrop", "grounding", True, object_crop),
    WorldTask("UnseenObject", "classification", False, partial(object_type, held_out=True)),
    WorldTask("UnseenCharacter", "classification", False, partial(character, unseen=True)),
    WorldTask("HandwrittenDigit", "classification", False, handwritten_digit),
    WorldTask("RelationQA", "vqa", False, partial(question, asks=relation_questions)),
    WorldTask("UnseenScene_t2i", "retrieval", False, partial(caption_to_scene, held_out=True)),
    WorldTask("Objects_t2i", "retrieval", False, objects_to_scene),
    WorldTask("PositionCrop", "grounding", False, partial(object_crop, by_place=True)),
)
