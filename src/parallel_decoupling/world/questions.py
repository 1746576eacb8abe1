"""Questions with one right answer about a scene, and one-aspect descriptions of it."""

from dataclasses import dataclass, replace

from parallel_decoupling.world import scenes
from parallel_decoupling.world.scenes import POSITIONS, SHAPES, Item, Rng, Scene

COLORS, SIZES = tuple(scenes.COLORS), tuple(scenes.SIZES)


@dataclass(frozen=True)
class Question:
    """A question that asks for a ``factor`` of a scene; ``choices`` are all answers to such questions."""

    factor: str
    text: str
    answer: str
    choices: tuple[str, ...]


def questions(scene: Scene) -> list[Question]:
    """Return every question that has exactly one right answer in this scene."""
    items = [item for _, item in scene.objects]
    shapes, colors = [item.shape for item in items], [item.color for item in items]
    found = [
        Question("count", "how many objects are there?", scenes.NUMBERS[len(items)], scenes.NUMBERS[1:]),
        Question("background", "what color is the background?", scene.background, tuple(scenes.BACKGROUNDS)),
    ]
    if scene.word is not None:
        found.append(Question("text", "what word is written?", scene.word, scenes.WORDS))
        place = POSITIONS[scene.cells.index(scene.word)]
        found.append(Question("position", f"where is the word {scene.word}?", place, POSITIONS))
    for index, item in scene.objects:
        name, place = f"{item.color} {item.shape}", POSITIONS[index]
        if shapes.count(item.shape) == 1:
            found.append(Question("color", f"what color is the {item.shape}?", item.color, COLORS))
        if colors.count(item.color) == 1:
            found.append(Question("shape", f"what shape is the {item.color} object?", item.shape, SHAPES))
        found.append(Question("size", f"what size is the {name}?", item.size, SIZES))
        found.append(Question("position", f"where is the {name}?", place, POSITIONS))
        for factor, choices in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
            text = f"what {factor} is the object at the {place}?"
            found.append(Question(factor, text, getattr(item, factor), choices))
    return found


def relation_questions(scene: Scene) -> list[Question]:
    """Return the questions about the color or shape of an object's neighbor."""
    found = []
    for index, item in scene.objects:
        below, right = index < 2, index % 2 == 0
        for neighbor_index, where in (
            (index + 2 if below else index - 2, "below" if below else "above"),
            (index + 1 if right else index - 1, "right of" if right else "left of"),
        ):
            neighbor = scene.cells[neighbor_index]
            if isinstance(neighbor, Item):
                asked = f"is the object {where} the {item.color} {item.shape}?"
                found.append(Question("relation", f"what color {asked}", neighbor.color, COLORS))
                found.append(Question("relation", f"what shape {asked}", neighbor.shape, SHAPES))
    return found


def sample_edit(rng: Rng, scene: Scene) -> tuple[str, Scene]:
    """Draw an instruction that changes one thing, and the scene after it."""
    index, item = scene.objects[rng.integers(len(scene.objects))]
    name = f"{item.color} {item.shape}"
    others = [other for _, other in scene.objects if other != item]
    taken = scenes.HELD_OUT | {(other.shape, other.color) for other in (item, *others)}
    free = [color for color in COLORS if (item.shape, color) not in taken]
    color = str(rng.choice(free))
    size = "small" if item.size == "large" else "large"
    background = str(rng.choice([name for name in scenes.BACKGROUNDS if name != scene.background]))
    options = [
        (f"make the {name} {color}", scene.with_cell(index, replace(item, color=color))),
        (f"make the {name} {size}", scene.with_cell(index, replace(item, size=size))),
        (f"make the background {background}", replace(scene, background=background)),
    ]
    empty = [i for i, cell in enumerate(scene.cells) if cell is None]
    if empty:
        target = empty[rng.integers(len(empty))]
        moved = scene.with_cell(index, None).with_cell(target, item)
        options.append((f"move the {name} to the {POSITIONS[target]}", moved))
    if others:
        options.append((f"remove the {name}", scene.with_cell(index, None)))
    return options[rng.integers(len(options))]
