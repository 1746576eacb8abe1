"""Write a data set of real icons in MMEB's layout: ``python -m recipes.icons`` (``docs/icons.md``).

npm downloads four published icon sets, resvg draws their SVG files, and the names, tags and categories that
people gave them become rows. Three sets are trained; one is kept for evaluation out of distribution.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

from parallel_decoupling.batch import IMAGE_PLACEHOLDER
from parallel_decoupling.data.readers import MMEB_EVAL, MMEB_TRAIN

PIXELS = 64
"""Side of a picture, which is what the tiny backbone sees."""
CANDIDATES, EVAL_ROWS = 32, 300
HELD_OUT_SET, HELD_OUT_SHARE = "phosphor", 0.25
STYLE_WORDS = frozenset({"brand", "fill", "filled", "logo", "outline"})
"""Words of a name that say how an icon is drawn or where it is filed, not what it shows."""

Rng = np.random.Generator
Files = Mapping[str, str]
"""Texts of a package's files by their names in it."""


@dataclass(frozen=True)
class Icon:
    """A picture and what people wrote about it."""

    icon_set: str
    style: str
    name: str
    tags: tuple[str, ...]
    categories: tuple[str, ...]
    svg: str

    @cached_property
    def concept(self) -> frozenset[str]:
        """The words of the name in any order: sets disagree on ``arrow-left-circle``."""
        return words_of(spoken(self.name))

    @cached_property
    def words(self) -> frozenset[str]:
        """All words of name and tags."""
        return self.concept.union(*map(words_of, self.tags))

    @property
    def image(self) -> str:
        """The picture's place in ``MMEB-train`` or ``MMEB-eval``."""
        return f"images/Icons/{self.icon_set}/{self.style}/{self.name}.png"

    def is_held_out(self, seed: int) -> bool:
        """Return whether the concept is evaluated, and not trained in any set."""
        digest = hashlib.blake2b(f"{seed} {' '.join(sorted(self.concept))}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") / 2**32 < HELD_OUT_SHARE

    def png(self) -> bytes:
        """Draw the icon, black on white."""
        file = io.BytesIO()
        png = resvg_py.svg_to_bytes(
            self.svg, width=PIXELS, height=PIXELS, background="#ffffff", skip_system_fonts=True
        )
        Image.open(io.BytesIO(png)).convert("L").save(file, "png")
        return file.getvalue()


def words_of(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.replace(", ", " ").split())


def spoken(name: str) -> str:
    """Return a name or tag as words, without those of the style unless it has no others."""
    words = name.lower().replace("-", " ").split()
    return " ".join([word for word in words if word not in STYLE_WORDS] or words)


def tags_of(tags: Iterable[Any], name: str) -> tuple[str, ...]:
    """Return the tags that say something else than the name, as words."""
    texts = dict.fromkeys(spoken(str(tag)) for tag in tags if tag is not None)
    return tuple(text for text in texts if text not in ("", "*new*", "*updated*", spoken(name)))


def read_tabler(files: Files) -> Iterator[Icon]:
    """Read ``@tabler/icons``: outlines, and some of them filled."""
    for name, about in json.loads(files["icons.json"]).items():
        tags, categories = tags_of(about["tags"], name), (about["category"].lower(),)
        for style in about["styles"]:
            yield Icon("tabler", style, name, tags, categories, files[f"icons/{style}/{name}.svg"])


def read_lucide(files: Files) -> Iterator[Icon]:
    """Read ``lucide-static``, which has no categories; files without an entry are former names of others."""
    for name, tags in json.loads(files["tags.json"]).items():
        yield Icon("lucide", "outline", name, tags_of(tags, name), (), files[f"icons/{name}.svg"])


def read_mdi(files: Files) -> Iterator[Icon]:
    """Read ``@mdi/svg``: its aliases are tags here, its tags are categories."""
    for about in json.loads(files["meta.json"]):
        name, categories = about["name"], tuple(tag.lower() for tag in about["tags"])
        style = "outline" if "outline" in name.split("-") else "solid"
        yield Icon("mdi", style, name, tags_of(about["aliases"], name), categories, files[f"svg/{name}.svg"])


def read_phosphor(files: Files) -> Iterator[Icon]:
    """Read three weights of ``@phosphor-icons/core``, whose catalogue is a JavaScript module."""
    catalogue = files["dist/index.mjs"]
    labels = dict(re.findall(r'\w\.(\w+) = "([^"]+)"', catalogue))  # the list for figma_category is the last
    entry = re.compile(r'\bname: "([^"]+)",.*?figma_category: \w\.(\w+),\s*tags: (\[.*?\])', re.DOTALL)
    for name, category, tags in entry.findall(catalogue):
        for style, ending in (("regular", ""), ("fill", "-fill"), ("duotone", "-duotone")):
            svg = files[f"assets/{style}/{name}{ending}.svg"]
            yield Icon("phosphor", style, name, tags_of(json.loads(tags), name), (labels[category],), svg)


SETS: dict[str, tuple[str, Callable[[Files], Iterator[Icon]]]] = {
    "@tabler/icons": ("3.51.0", read_tabler),
    "lucide-static": ("1.62.0", read_lucide),
    "@mdi/svg": ("7.4.47", read_mdi),
    "@phosphor-icons/core": ("2.1.1", read_phosphor),
}
"""Version and reader of every package on npm."""


def download(name: str, packages_dir: Path) -> Path:
    """Return a package's archive, which npm fetches if it is not there yet."""
    spec = f"{name}@{SETS[name][0]}"
    archive = packages_dir / f"{re.sub('[@/]+', '-', spec).strip('-')}.tgz"
    if archive.exists():
        return archive
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is not on the PATH. Install Node.js, which brings it: it downloads the icons.")
    packages_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages_dir) as folder:
        done = subprocess.run([npm, "pack", spec, "--silent", "--pack-destination", folder], check=False)
        if done.returncode:
            raise ValueError(f"npm pack {spec} failed, for the reason above. Run the same command again.")
        next(Path(folder).glob("*.tgz")).rename(archive)
    return archive


def read_package(archive: Path) -> Files:
    """Return the texts of an archive's SVG files and catalogues."""
    with tarfile.open(archive) as tar:
        files = ((PurePosixPath(each.name).relative_to("package"), tar.extractfile(each)) for each in tar)
        wanted = (".svg", ".json", ".mjs")
        return {str(name): file.read().decode() for name, file in files if file and name.suffix in wanted}


class Pool:
    """Icons to draw rows from."""

    def __init__(self, icons: Sequence[Icon]) -> None:
        self.icons = icons
        self.of_set: dict[str, list[Icon]] = defaultdict(list)
        self.with_word: dict[tuple[str, str], list[Icon]] = defaultdict(list)
        self.with_concept: dict[frozenset[str], list[Icon]] = defaultdict(list)
        self.categories: dict[str, set[str]] = defaultdict(set)
        for icon in icons:
            self.of_set[icon.icon_set].append(icon)
            self.with_concept[icon.concept].append(icon)
            self.categories[icon.icon_set].update(icon.categories)
            for word in icon.concept:
                self.with_word[icon.icon_set, word].append(icon)

    def others(
        self, rng: Rng, icon: Icon, asked: frozenset[str], icon_set: str, count: int, *, tagged: bool = False
    ) -> list[Icon]:
        """Draw icons of one set that are no answer, up to half of them with a word of the name in common.

        An answer has all words that are asked for, or a name that the icon's name and tags say as well.
        """
        near = [other for word in sorted(icon.concept) for other in self.with_word[icon_set, word]]
        chosen: dict[frozenset[str], Icon] = {}
        for source, limit in ((near, (count + 1) // 2), (self.of_set[icon_set], count)):
            for index in rng.permutation(len(source)):
                if len(chosen) >= limit:
                    break
                other = source[index]
                right = asked <= other.words or other.concept <= icon.words
                if not right and (other.tags or not tagged):
                    chosen.setdefault(other.concept, other)
        return list(chosen.values())


Side = tuple[str, str]
"""Text and picture, as the tables hold them."""
Row = tuple[Side, Side, list[Side]]
"""Query, positive and negatives."""
Draw = Callable[[Rng, Icon, Pool, int], Row | None]
"""Draws a row about an icon with at most so many negatives; None if the icon lacks what it takes."""


def _seen(instruction: str, icon: Icon) -> Side:
    return f"{IMAGE_PLACEHOLDER}\n{instruction}\n", icon.image


def _candidates(icons: Iterable[Icon]) -> list[Side]:
    return [_seen("Represent the given icon", icon) for icon in icons]


def _some_tags(rng: Rng, icon: Icon, count: int) -> str:
    return ", ".join(icon.tags[index] for index in rng.permutation(len(icon.tags))[:count])


def text_to_icon(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Find the icon of a name, or of some tags."""
    text = _some_tags(rng, icon, 3) if icon.tags and rng.random() < 0.5 else spoken(icon.name)
    others = pool.others(rng, icon, words_of(text), icon.icon_set, count)
    positive, *negatives = _candidates((icon, *others))
    return (f"Find an icon that matches the words: {text}\n", ""), positive, negatives


def icon_to_tags(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Find tags of an icon."""
    if not icon.tags:
        return None
    others = pool.others(rng, icon, icon.concept, icon.icon_set, count, tagged=True)
    positive, *texts = (_some_tags(rng, each, 4) for each in (icon, *others))
    wrong: list[Side] = [(text, "") for text in dict.fromkeys(texts) if not words_of(text) <= icon.words]
    return _seen("Find tags that describe the icon", icon), (positive, ""), wrong


def category(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Name a category of an icon among those of its set."""
    if not icon.categories:
        return None
    others = rng.permutation(sorted(pool.categories[icon.icon_set].difference(icon.categories)))[:count]
    negatives: list[Side] = [(str(other), "") for other in others]
    return _seen("Identify the category of the icon", icon), (icon.categories[0], ""), negatives


def icon_to_icon(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Find an icon of the same name in another set, among icons of that set."""
    same = [other for other in pool.with_concept[icon.concept] if other.icon_set != icon.icon_set]
    if not same:
        return None
    answer = same[rng.integers(len(same))]
    others = pool.others(rng, icon, icon.concept, answer.icon_set, count)
    positive, *negatives = _candidates((answer, *others))
    return _seen("Find an icon of the same thing in another style", icon), positive, negatives


TASKS: dict[str, tuple[str, Draw]] = {
    "t2i": ("retrieval", text_to_icon),
    "i2tags": ("retrieval", icon_to_tags),
    "category": ("classification", category),
    "i2i": ("retrieval", icon_to_icon),
}
"""Meta-task and rows. ``Icons_<name>`` is trained, ``NewIcons_<name>`` asks about the set that is not."""


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def train_rows(rng: Rng, draw: Draw, pool: Pool) -> list[dict[str, Any]]:
    """Draw one row per icon, with one hard negative if there is any."""
    drawn = filter(None, (draw(rng, icon, pool, 1) for icon in pool.icons))
    rows = ((*query, *positive, *(*negatives, ("", ""))[0]) for query, positive, negatives in drawn)
    return [dict(zip(MMEB_TRAIN, row, strict=True)) for row in rows]


def eval_rows(rng: Rng, draw: Draw, asked: Pool, pool: Pool) -> list[dict[str, Any]]:
    """Draw at most ``EVAL_ROWS`` rows about icons of one pool with candidates of another."""
    order = rng.permutation(len(asked.icons))
    drawn = filter(None, (draw(rng, asked.icons[index], pool, CANDIDATES - 1) for index in order))
    rows = (
        (*query, *map(list, zip(positive, *wrong, strict=True))) for query, positive, wrong in drawn if wrong
    )
    return [dict(zip(MMEB_EVAL[:4], row, strict=True)) for row in islice(rows, EVAL_ROWS)]


def write_data(data_dir: Path, icons: Iterable[Icon], seed: int) -> None:
    """Write pictures, the tables of all tasks, ``tasks.json``, and ``icons.parquet`` to search in."""
    drawn: dict[bytes, Icon] = {}
    total = 0
    for icon in icons:
        total += 1
        drawn.setdefault(icon.png(), icon)
    print(f"{len(drawn)} icons; {total - len(drawn)} left out, as their picture repeats an earlier one")
    table = []
    for png, icon in drawn.items():
        image = f"{'MMEB-eval' if icon.is_held_out(seed) else 'MMEB-train'}/{icon.image}"
        (data_dir / image).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / image).write_bytes(png)
        row = {key: getattr(icon, key) for key in ("icon_set", "style", "name")}
        name = f"{icon.icon_set}/{icon.style}/{icon.name}"
        table.append({"id": name, "image": image, **row, "tags": ", ".join(icon.tags)})
    _write(data_dir / "icons.parquet", table)
    trained, held_out, new = (
        Pool(
            [
                icon
                for icon in drawn.values()
                if (icon.icon_set == HELD_OUT_SET, icon.is_held_out(seed)) == part
            ]
        )
        for part in ((False, False), (False, True), (True, True))
    )
    entries = {}
    for number, (name, (meta_task, draw)) in enumerate(TASKS.items()):
        rows = train_rows(np.random.default_rng([seed, number, 0]), draw, trained)
        _write(data_dir / f"MMEB-train/Icons_{name}/original-00000-of-00001.parquet", rows)
        for part, (task, asked) in enumerate({f"Icons_{name}": held_out, f"NewIcons_{name}": new}.items(), 1):
            pool = held_out if name == "i2i" else asked
            rows = eval_rows(np.random.default_rng([seed, number, part]), draw, asked, pool)
            _write(data_dir / f"MMEB-eval/{task}/test-00000-of-00001.parquet", rows)
            entries[task] = {"meta_task": meta_task, "in_distribution": asked is held_out}
    (data_dir / "tasks.json").write_text(json.dumps(entries, indent=2) + "\n")


def ensure_icons(data_dir: Path, packages_dir: Path, seed: int) -> None:
    """Build the folder, by one final rename, unless it is there."""
    versions = {name: version for name, (version, _) in SETS.items()}
    made_of = {"seed": seed, "pixels": PIXELS, "resvg_py": metadata.version("resvg_py"), "packages": versions}
    record_file = data_dir / "made_of.json"
    if data_dir.exists():
        if not record_file.exists() or json.loads(record_file.read_text()) != made_of:
            raise ValueError(f"{data_dir} was not made of {made_of}. Remove it, or give another --data_dir.")
        return
    archives = [download(name, packages_dir) for name in SETS]
    readers = [reader for _, reader in SETS.values()]
    icons = (icon for read, file in zip(readers, archives, strict=True) for icon in read(read_package(file)))
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir.parent) as folder:
        unfinished = Path(folder) / data_dir.name
        write_data(unfinished, icons, seed)
        (unfinished / record_file.name).write_text(json.dumps(made_of, indent=2) + "\n")
        unfinished.rename(data_dir)


def main() -> None:
    """Build the data set."""
    parser = argparse.ArgumentParser(description="Write a data set of icons in MMEB's layout.")
    parser.add_argument("--data_dir", type=Path, default=Path("data/icons"))
    parser.add_argument("--packages_dir", type=Path, default=Path("data/icon-packages"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ensure_icons(args.data_dir, args.packages_dir, args.seed)
    print(args.data_dir)


if __name__ == "__main__":
    main()
