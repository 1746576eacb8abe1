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
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
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
"""Side of a picture; the tiny backbone sees pictures of this size."""
CANDIDATES, EVAL_ROWS, HELD_OUT_SHARE = 32, 300, 0.25
HELD_OUT_SET = "phosphor"
STYLE_WORDS = frozenset({"brand", "fill", "filled", "logo", "outline"})
"""Words of a name that say how an icon is drawn or where it is filed, not what it shows."""

Rng = np.random.Generator
Files = Mapping[str, str]
"""Texts of a package's files by their names in it."""


@dataclass(frozen=True)
class Icon:
    """One picture with what people wrote about it; icons of equal ``concept`` have the same name."""

    icon_set: str
    style: str
    name: str
    tags: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    svg: str = field(default="", repr=False)

    @property
    def id(self) -> str:
        """Where the picture lies: set, style and name."""
        return f"{self.icon_set}/{self.style}/{self.name}"

    @cached_property
    def text(self) -> str:
        """The name as words, without those of the style."""
        return spoken(self.name)

    @cached_property
    def concept(self) -> frozenset[str]:
        """The words of the name in any order: sets disagree on ``arrow-left-circle``."""
        return frozenset(self.text.split())

    @cached_property
    def words(self) -> frozenset[str]:
        """All words of name and tags."""
        return self.concept.union(*map(str.split, self.tags))


def spoken(name: str) -> str:
    """Return a name or tag as words, without those of the style unless it has no others."""
    words = name.lower().replace("-", " ").split()
    return " ".join([word for word in words if word not in STYLE_WORDS] or words)


def _tags(tags: Iterable[Any], name: str) -> tuple[str, ...]:
    texts = dict.fromkeys(spoken(str(tag)) for tag in tags if tag is not None)
    return tuple(text for text in texts if text not in ("", "*new*", "*updated*", spoken(name)))


def read_tabler(files: Files) -> Iterator[Icon]:
    """Read ``@tabler/icons``: outlines, and some of them filled."""
    for name, about in json.loads(files["icons.json"]).items():
        tags, categories = _tags(about["tags"], name), (about["category"].lower(),)
        for style in about["styles"]:
            yield Icon("tabler", style, name, tags, categories, files[f"icons/{style}/{name}.svg"])


def read_lucide(files: Files) -> Iterator[Icon]:
    """Read ``lucide-static``, which has no categories; icons without an entry are former names of others."""
    for name, tags in json.loads(files["tags.json"]).items():
        yield Icon("lucide", "outline", name, _tags(tags, name), (), files[f"icons/{name}.svg"])


def read_mdi(files: Files) -> Iterator[Icon]:
    """Read ``@mdi/svg``: its aliases are tags here, its tags are categories."""
    for about in json.loads(files["meta.json"]):
        name, categories = about["name"], tuple(tag.lower() for tag in about["tags"])
        style = "outline" if "outline" in name.split("-") else "solid"
        yield Icon("mdi", style, name, _tags(about["aliases"], name), categories, files[f"svg/{name}.svg"])


def read_phosphor(files: Files) -> Iterator[Icon]:
    """Read three of the weights of ``@phosphor-icons/core``, whose catalogue is a JavaScript module."""
    catalogue = files["dist/index.mjs"]
    labels = dict(re.findall(r'\w\.(\w+) = "([^"]+)"', catalogue))  # the later list, of figma_category, wins
    entries = re.findall(
        r'\bname: "([^"]+)",.*?figma_category: \w\.(\w+),\s*tags: (\[.*?\])', catalogue, re.DOTALL
    )
    for name, category, tags in entries:
        for style, ending in (("regular", ""), ("fill", "-fill"), ("duotone", "-duotone")):
            svg = files[f"assets/{style}/{name}{ending}.svg"]
            yield Icon("phosphor", style, name, _tags(json.loads(tags), name), (labels[category],), svg)


@dataclass(frozen=True)
class Package:
    """An icon set as it is published on npm."""

    name: str
    version: str
    license: str
    read: Callable[[Files], Iterator[Icon]]


PACKAGES = {
    "tabler": Package("@tabler/icons", "3.51.0", "MIT", read_tabler),
    "lucide": Package("lucide-static", "1.62.0", "ISC", read_lucide),
    "mdi": Package("@mdi/svg", "7.4.47", "Apache-2.0", read_mdi),
    "phosphor": Package("@phosphor-icons/core", "2.1.1", "MIT", read_phosphor),
}


def download(package: Package, packages_dir: Path) -> Path:
    """Return the package's archive, which npm fetches if it is not there yet."""
    archive = packages_dir / f"{package.name.replace('/', '-').removeprefix('@')}-{package.version}.tgz"
    if archive.exists():
        return archive
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is not on the PATH. Install Node.js, which brings it: it downloads the icons.")
    packages_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages_dir) as folder:
        spec = f"{package.name}@{package.version}"
        done = subprocess.run([npm, "pack", spec, "--silent", "--pack-destination", folder], check=False)
        if done.returncode:
            raise ValueError(f"npm pack {spec} failed; its message is above. Run it again to go on from here.")
        (packed,) = Path(folder).glob("*.tgz")
        packed.rename(archive)
    return archive


def read_package(archive: Path) -> Files:
    """Return the texts of an archive's SVG files and catalogues."""
    with tarfile.open(archive) as tar:
        files = {PurePosixPath(each.name): each for each in tar if each.isfile()}
        return {
            str(name.relative_to("package")): tar.extractfile(each).read().decode()  # type: ignore[union-attr]
            for name, each in files.items()
            if name.suffix in (".svg", ".json", ".mjs")
        }


def draw(icon: Icon) -> bytes:
    """Return a grey PNG file of the icon, black on white."""
    png = resvg_py.svg_to_bytes(
        svg_string=icon.svg, width=PIXELS, height=PIXELS, background="#ffffff", skip_system_fonts=True
    )
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("L").save(file, "png")
    return file.getvalue()


def is_held_out(icon: Icon, seed: int) -> bool:
    """Return whether a concept is evaluated, and never trained, in every set."""
    digest = hashlib.blake2b(f"{seed} {' '.join(sorted(icon.concept))}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32 < HELD_OUT_SHARE


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


Side = tuple[str, Icon | None]
Row = tuple[Side, Side, list[Side]]
"""Query, positive and negatives."""
Draw = Callable[[Rng, Icon, Pool, int], Row | None]
"""Draws a row about an icon with so many negatives, None if the icon lacks what it takes."""


def _asked(instruction: str, icon: Icon) -> Side:
    return f"{IMAGE_PLACEHOLDER}\n{instruction}\n", icon


def _shown(icon: Icon) -> Side:
    return f"{IMAGE_PLACEHOLDER}\nRepresent the given icon\n", icon


def _some_tags(rng: Rng, icon: Icon, count: int) -> str:
    return ", ".join(icon.tags[index] for index in rng.permutation(len(icon.tags))[:count])


def _words(text: str) -> frozenset[str]:
    return frozenset(text.replace(", ", " ").split())


def text_to_icon(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Find the icon of a name, or of some tags."""
    words = _some_tags(rng, icon, 3) if icon.tags and rng.random() < 0.5 else icon.text
    others = pool.others(rng, icon, _words(words), icon.icon_set, count)
    return (f"Find an icon that matches the words: {words}\n", None), _shown(icon), [*map(_shown, others)]


def icon_to_tags(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Find tags of an icon."""
    if not icon.tags:
        return None
    others = pool.others(rng, icon, icon.concept, icon.icon_set, count, tagged=True)
    positive, *texts = (_some_tags(rng, each, 4) for each in (icon, *others))
    wrong = [(text, None) for text in dict.fromkeys(texts) if not _words(text) <= icon.words]
    return _asked("Find tags that describe the icon", icon), (positive, None), wrong


def category(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Name a category of an icon among those of its set."""
    if not icon.categories:
        return None
    others = rng.permutation(sorted(pool.categories[icon.icon_set].difference(icon.categories)))
    negatives: list[Side] = [(str(other), None) for other in others[:count]]
    return _asked("Identify the category of the icon", icon), (icon.categories[0], None), negatives


def icon_to_icon(rng: Rng, icon: Icon, pool: Pool, count: int) -> Row | None:
    """Find the icon of the same name in another set, among icons of that set."""
    same = [other for other in pool.with_concept.get(icon.concept, ()) if other.icon_set != icon.icon_set]
    if not same:
        return None
    answer = same[rng.integers(len(same))]
    others = pool.others(rng, icon, icon.concept, answer.icon_set, count)
    query = _asked("Find an icon of the same thing in another style", icon)
    return query, _shown(answer), [*map(_shown, others)]


TASKS: dict[str, tuple[str, Draw]] = {
    "t2i": ("retrieval", text_to_icon),
    "i2tags": ("retrieval", icon_to_tags),
    "category": ("classification", category),
    "i2i": ("retrieval", icon_to_icon),
}
"""Meta-task and rows; ``Icons_<name>`` is trained, ``NewIcons_<name>`` asks about the set that is not."""


def _path(icon: Icon | None) -> str:
    return f"images/Icons/{icon.id}.png" if icon else ""


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def train_rows(rng: Rng, draw_row: Draw, pool: Pool) -> list[dict[str, Any]]:
    """Draw one row per icon that has one."""
    drawn = (draw_row(rng, icon, pool, 1) for icon in pool.icons)
    sides = ((query, positive, *(negatives or [("", None)])) for query, positive, negatives in filter(None, drawn))
    cells = ([cell for text, icon in row for cell in (text, _path(icon))] for row in sides)
    return [dict(zip(MMEB_TRAIN, row, strict=True)) for row in cells]


def eval_rows(rng: Rng, draw_row: Draw, asked: Pool, pool: Pool) -> list[dict[str, Any]]:
    """Draw at most ``EVAL_ROWS`` rows about icons of one pool with candidates of another."""
    rows: list[dict[str, Any]] = []
    for index in rng.permutation(len(asked.icons)):
        row = draw_row(rng, asked.icons[index], pool, CANDIDATES - 1)
        if len(rows) < EVAL_ROWS and row and row[2]:
            (text, icon), texts = row[0], [side[0] for side in (row[1], *row[2])]
            cells = (text, _path(icon), texts, [_path(side[1]) for side in (row[1], *row[2])])
            rows.append(dict(zip(MMEB_EVAL, cells, strict=False)))
    return rows


def write_data(data_dir: Path, icons: Iterable[Icon], seed: int) -> None:
    """Write pictures, the tables of all tasks, ``tasks.json``, and ``icons.parquet`` to search in."""
    seen: set[bytes] = set()
    kept: list[Icon] = []
    total = 0
    for total, icon in enumerate(icons, start=1):
        png = draw(icon)
        if png in seen:
            continue
        seen.add(png)
        kept.append(icon)
        file = data_dir / _root(icon, seed) / _path(icon)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
    print(f"{len(kept)} icons; {total - len(kept)} left out, as their picture repeats an earlier one")
    columns = ("icon_set", "style", "name")
    about = [{"id": each.id, "image": f"{_root(each, seed)}/{_path(each)}"} for each in kept]
    table = [
        row | {key: getattr(each, key) for key in columns} | {"tags": ", ".join(each.tags)}
        for row, each in zip(about, kept, strict=True)
    ]
    _write(data_dir / "icons.parquet", table)
    known = [icon for icon in kept if icon.icon_set != HELD_OUT_SET]
    trained = Pool([icon for icon in known if not is_held_out(icon, seed)])
    held_out = Pool([icon for icon in known if is_held_out(icon, seed)])
    new = Pool([icon for icon in kept if icon.icon_set == HELD_OUT_SET and is_held_out(icon, seed)])
    entries = {}
    for number, (name, (meta_task, draw_row)) in enumerate(TASKS.items()):
        rows = train_rows(np.random.default_rng([seed, number, 0]), draw_row, trained)
        _write(data_dir / f"MMEB-train/Icons_{name}/original-00000-of-00001.parquet", rows)
        for part, asked in enumerate((held_out, new)):
            pool, task = held_out if name == "i2i" else asked, f"{('Icons', 'NewIcons')[part]}_{name}"
            rows = eval_rows(np.random.default_rng([seed, number, part + 1]), draw_row, asked, pool)
            _write(data_dir / f"MMEB-eval/{task}/test-00000-of-00001.parquet", rows)
            entries[task] = {"meta_task": meta_task, "in_distribution": asked is held_out}
    (data_dir / "tasks.json").write_text(json.dumps(entries, indent=2) + "\n")


def _root(icon: Icon, seed: int) -> str:
    return "MMEB-eval" if is_held_out(icon, seed) else "MMEB-train"


def ensure_icons(data_dir: Path, packages_dir: Path, seed: int) -> None:
    """Build the folder, by one final rename, unless it is there."""
    versions = {package.name: package.version for package in PACKAGES.values()}
    made_of = {"seed": seed, "pixels": PIXELS, "resvg_py": version("resvg_py"), "packages": versions}
    record_file = data_dir / "made_of.json"
    if data_dir.exists():
        if not record_file.exists() or json.loads(record_file.read_text()) != made_of:
            raise ValueError(f"{data_dir} was not made of {made_of}. Remove it, or give another --data_dir.")
        return
    archives = {name: download(package, packages_dir) for name, package in PACKAGES.items()}
    icons = (icon for name, file in archives.items() for icon in PACKAGES[name].read(read_package(file)))
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=data_dir.parent))
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
