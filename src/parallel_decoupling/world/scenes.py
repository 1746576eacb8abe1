"""Scenes with known factors: sampling, rendering, captions and one-attribute changes.

The background is lit, redder to the right and bluer to the bottom, so that a patch of it tells its place.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageChops, ImageDraw, ImageFont

COLORS = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (35, 75, 225),
    "yellow": (245, 215, 30),
    "purple": (130, 45, 175),
    "orange": (245, 135, 20),
    "cyan": (35, 205, 215),
    "pink": (250, 135, 195),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 17, "large": 28}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {
    "white": (236, 236, 236),
    "gray": (172, 172, 172),
    "beige": (232, 212, 168),
    "mint": (174, 228, 198),
}
WORDS = ("GO", "UP", "NO", "HI", "OK", "ME", "AX", "TV")
NUMBERS = ("zero", "one", "two", "three", "four")

HELD_OUT = frozenset(zip(SHAPES, ("purple", "orange", "cyan", "pink", "green", "red"), strict=True))
"""Shape and color combinations that no training picture or caption shows."""

IMAGE_SIZE, _CELL, _OVERSAMPLE = 64, 32, 8
Rng = np.random.Generator


@dataclass(frozen=True)
class Item:
    """One object of a scene: one of ``SHAPES``, a key of ``COLORS`` and a key of ``SIZES``."""

    shape: str
    color: str
    size: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows; ``cells`` are the quadrants ``POSITIONS``, ``offsets`` those of the drawings."""

    cells: tuple[Item | str | None, ...]
    background: str
    offsets: tuple[tuple[int, int], ...] = ((0, 0),) * 4

    @property
    def objects(self) -> list[tuple[int, Item]]:
        """The objects with their quadrant's index, in reading order."""
        return [(index, cell) for index, cell in enumerate(self.cells) if isinstance(cell, Item)]

    @property
    def word(self) -> str | None:
        """The written word, if the scene has one."""
        return next((cell for cell in self.cells if isinstance(cell, str)), None)

    def caption(self) -> str:
        """Describe every quadrant that is not empty, then the background."""
        parts = [
            f"{cell if isinstance(cell, Item) else f'the word {cell}'} at the {position}"
            for cell, position in zip(self.cells, POSITIONS, strict=True)
            if cell is not None
        ]
        return f"{', '.join(parts)}, on a {self.background} background"

    def with_cell(self, index: int, cell: Item | str | None) -> "Scene":
        """Return the scene with another content of one quadrant."""
        return replace(self, cells=self.cells[:index] + (cell,) + self.cells[index + 1 :])


def sample_item(rng: Rng, *, held_out: bool = False) -> Item:
    """Draw an object; with ``held_out`` from the unseen combinations, else never from them."""
    pairs = _combinations(held_out)
    shape, color = pairs[rng.integers(len(pairs))]
    return Item(shape, color, str(rng.choice(list(SIZES))))


def sample_scene(
    rng: Rng, *, num_objects: int | None = None, word_share: float = 0.35, held_out: bool = False
) -> Scene:
    """Draw a scene of different objects, and with probability ``word_share`` a word if a quadrant is free."""
    if num_objects is None:
        num_objects = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.35, 0.25, 0.1]))
    items: list[Item] = []
    while len(items) < num_objects:
        item = sample_item(rng, held_out=held_out)
        if all((item.shape, item.color) != (other.shape, other.color) for other in items):
            items.append(item)
    quadrants = rng.permutation(4).tolist()
    cells: list[Item | str | None] = [None] * 4
    for item in items:
        cells[quadrants.pop()] = item
    if quadrants and rng.random() < word_share:
        cells[quadrants.pop()] = str(rng.choice(WORDS))
    return Scene(tuple(cells), str(rng.choice(list(BACKGROUNDS))), sample_offsets(rng))


def sample_offsets(rng: Rng) -> tuple[tuple[int, int], ...]:
    """Draw a drawing offset of up to 1 pixel for every quadrant."""
    return tuple((int(dx), int(dy)) for dx, dy in rng.integers(-1, 2, size=(4, 2)))


def change_item(rng: Rng, item: Item, *, held_out: bool = False) -> Item:
    """Change exactly one attribute of an object; into an unseen combination only if ``held_out``."""
    pairs = _combinations(False) + (_combinations(True) if held_out else ())
    options = [Item(shape, item.color, item.size) for shape in SHAPES if (shape, item.color) in pairs]
    options += [Item(item.shape, color, item.size) for color in COLORS if (item.shape, color) in pairs]
    options += [replace(item, size=size) for size in SIZES]
    options = [option for option in options if option != item]
    return options[rng.integers(len(options))]


def change_scene(rng: Rng, scene: Scene, *, held_out: bool = False) -> Scene:
    """Change one attribute of one object, one object's quadrant, the word or the background."""
    kind = rng.choice(["item", "item", "move", "background", "word"])
    objects = scene.objects
    index, item = objects[rng.integers(len(objects))]
    empty = [i for i, cell in enumerate(scene.cells) if cell is None]
    if kind == "move" and empty:
        target = empty[rng.integers(len(empty))]
        return scene.with_cell(index, None).with_cell(target, item)
    if kind == "background":
        others = [name for name in BACKGROUNDS if name != scene.background]
        return replace(scene, background=str(rng.choice(others)))
    if kind == "word" and scene.word is not None:
        others = [word for word in WORDS if word != scene.word]
        return scene.with_cell(scene.cells.index(scene.word), str(rng.choice(others)))
    return scene.with_cell(index, change_item(rng, item, held_out=held_out))


def render(scene: Scene) -> Image.Image:
    """Draw a scene as a 64 x 64 RGB picture."""
    picture = _background(scene.background).copy()
    for index, (cell, (dx, dy)) in enumerate(zip(scene.cells, scene.offsets, strict=True)):
        if cell is not None:
            sprite = _word_sprite(cell) if isinstance(cell, str) else _item_sprite(cell)
            picture.paste(sprite, ((index % 2) * _CELL + dx, (index // 2) * _CELL + dy), sprite)
    return picture


def crop(picture: Image.Image, index: int) -> Image.Image:
    """Cut one quadrant out of a picture: 32 x 32."""
    left, top = (index % 2) * _CELL, (index // 2) * _CELL
    return picture.crop((left, top, left + _CELL, top + _CELL))


@cache
def _combinations(held_out: bool) -> tuple[tuple[str, str], ...]:
    every = [(shape, color) for shape in SHAPES for color in COLORS]
    return tuple(pair for pair in every if (pair in HELD_OUT) == held_out)


@cache
def _background(name: str) -> Image.Image:
    light = np.linspace(-16, 16, IMAGE_SIZE)
    pixels = np.tile(np.array(BACKGROUNDS[name], dtype=np.float64), (IMAGE_SIZE, IMAGE_SIZE, 1))
    pixels[..., 0] += light[None, :]
    pixels[..., 2] += light[:, None]
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@cache
def _item_sprite(item: Item) -> Image.Image:
    side = _CELL * _OVERSAMPLE
    radius = SIZES[item.size] * _OVERSAMPLE / 2
    outline, inside = _mask(item.shape, radius), _mask(item.shape, radius - 2 * _OVERSAMPLE)
    sprite = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    sprite.paste("black", mask=outline)
    if item.shape == "ring":
        rim = _mask("circle", radius - 1.5 * _OVERSAMPLE)
        inside = ImageChops.subtract(rim, _mask("circle", radius * 0.5))
    sprite.paste(COLORS[item.color], mask=inside)
    return sprite.resize((_CELL, _CELL), Image.Resampling.BOX)


def _mask(shape: str, radius: float) -> Image.Image:
    side = _CELL * _OVERSAMPLE
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    center = side / 2
    box = (center - radius, center - radius, center + radius, center + radius)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=int(radius * 0.65))
    elif shape == "square":
        edge = radius * 0.9
        draw.rectangle((center - edge, center - edge, center + edge, center + edge), fill=255)
    elif shape == "cross":
        arm = radius * 0.4
        draw.rectangle((center - arm, center - radius, center + arm, center + radius), fill=255)
        draw.rectangle((center - radius, center - arm, center + radius, center + arm), fill=255)
    else:
        corners, inner = (5, 0.45) if shape == "star" else (3, 0.5)
        points = []
        for step in range(2 * corners):
            distance = radius if step % 2 == 0 else radius * inner
            angle = math.pi * step / corners - math.pi / 2
            points.append((center + distance * math.cos(angle), center + distance * math.sin(angle)))
        draw.polygon(points, fill=255)
    return mask


@cache
def _word_sprite(word: str) -> Image.Image:
    side = _CELL * 4
    sprite, bold = Image.new("RGBA", (side, side), (0, 0, 0, 0)), font("DejaVuSans-Bold", 72)
    ImageDraw.Draw(sprite).text((side / 2, side / 2), word, font=bold, fill="black", anchor="mm")
    return sprite.resize((_CELL, _CELL), Image.Resampling.BOX)


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a face that matplotlib ships, so that pictures are the same on every machine."""
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", size)
