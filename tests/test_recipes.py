"""The recipes of icons and of words turn packages into folders that train; nothing is downloaded."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.readers import TrainSubset, read_eval_task
from parallel_decoupling.data.row_sources import RowSource
from parallel_decoupling.data.tasks import find_eval_tasks, find_train_subsets
from parallel_decoupling.data.verify import verify
from parallel_decoupling.training.module import PDFEmbedder
from recipes import icons, words
from tests.support.families import TEXT_FAMILIES, save_tiny_family
from tests.support.fit import make_trainer, small_data, small_embedder

NAMES = [f"{thing}-{number}" for thing in ("arrow", "box", "cloud", "disk") for number in range(10)]
CATEGORY = {name: ("Weather", "System", "Maps")[number % 3] for number, name in enumerate(NAMES)}
TAGS = {name: ["*new*", f"tag {name[-1]}", f"sort-{CATEGORY[name]}"] for name in NAMES}


def drawings(path: str, width: float) -> Iterator[tuple[str, str]]:
    """Files of one style, a pattern of bars for each name."""
    for number, name in enumerate(NAMES, start=1):
        left = [4 * bit for bit in range(6) if number >> bit & 1]
        bars = "".join(f'<rect x="{x}" y="2" width="{width}" height="20"/>' for x in left)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="currentColor">{bars}</svg>'
        yield path.format(name, "-".join(reversed(name.split("-")))), svg


def package_files() -> dict[str, dict[str, str]]:
    """Four packages as they are published; one names icons the other way around."""
    tabler = {name: {"category": CATEGORY[name], "tags": TAGS[name], "styles": ["outline"]} for name in NAMES}
    mdi = [
        {
            "name": "-".join(reversed(name.split("-"))) + "-outline",
            "aliases": TAGS[name],
            "tags": [CATEGORY[name]],
        }
        for name in NAMES
    ]
    entry = '{{\n name: "{}",\n figma_category: a.{},\n tags: {},\n}}\n'
    labels = [f'a.{label.upper()} = "{label.lower()}";\n' for label in CATEGORY.values()]
    entries = [entry.format(name, CATEGORY[name].upper(), json.dumps(TAGS[name])) for name in NAMES]
    weights = {"regular/{}": 1.0, "fill/{}-fill": 1.3, "duotone/{}-duotone": 1.6}
    drawn = [pair for path, width in weights.items() for pair in drawings(f"assets/{path}.svg", width)]
    return {
        "tabler-icons-3.51.0": {
            "icons.json": json.dumps(tabler),
            **dict(drawings("icons/outline/{}.svg", 1.9)),
        },
        "lucide-static-1.62.0": {"tags.json": json.dumps(TAGS), **dict(drawings("icons/{}.svg", 2.2))},
        "mdi-svg-7.4.47": {"meta.json": json.dumps(mdi), **dict(drawings("svg/{1}-outline.svg", 2.5))},
        "phosphor-icons-core-2.1.1": {"dist/index.mjs": "".join(labels + entries), **dict(drawn)},
    }


def pack(archive: Path, files: dict[str, str]) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture(scope="module")
def packages_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name, files in package_files().items():
        pack(folder / f"{name}.tgz", files)
    return folder


@pytest.fixture(scope="module")
def icons_dir(packages_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "icons"
    icons.ensure_icons(folder, packages_dir, seed=0)
    return folder


def rows_of(icons_dir: Path, table: str) -> list[dict[str, Any]]:
    (file,) = icons_dir.glob(f"{table}/*.parquet")
    return pq.read_table(file).to_pylist()


def facts(image: str) -> frozenset[str]:
    """Words of the name and of the tags that the fake sets give it."""
    (name,) = (name for name in NAMES if concept(name) == concept(image))
    return concept(name) | {"tag", name[-1], "sort", CATEGORY[name].lower()}


def concept(image: str) -> frozenset[str]:
    return icons.words_of(icons.spoken(Path(image).stem))


def icon_set(image: str) -> str:
    return image.split("/")[2]


def test_the_reader_reads_every_table_and_picture(icons_dir: Path) -> None:
    assert find_train_subsets(icons_dir) == ["Icons_category", "Icons_i2i", "Icons_i2tags", "Icons_t2i"]
    for subset in find_train_subsets(icons_dir):
        rows = TrainSubset(icons_dir, subset, hard_negatives=1)
        assert len([rows[index].negatives for index in range(len(rows))]) > 20
    assert len(find_eval_tasks(icons_dir)) == 8
    for task in find_eval_tasks(icons_dir):
        read = read_eval_task(icons_dir, task)
        assert read.task.in_distribution == task.startswith("Icons_")
        assert read.task.meta_task == ("classification" if task.endswith("category") else "retrieval")
        assert len(read.query_of_row) >= 10
        assert all(len(set(row)) == len(row) >= 3 for row in read.candidates_of_row)
    source = RowSource(icons_dir / "icons.parquet")
    assert len(source) == 6 * len(NAMES)
    for row in range(len(source)):
        with Image.open(str(source[row].images[0])) as picture:
            assert (picture.size, picture.mode) == ((icons.PIXELS, icons.PIXELS), "L")
            assert picture.getextrema() == (0, 255)


def test_no_concept_that_is_evaluated_is_trained_and_one_set_never_is(icons_dir: Path) -> None:
    trained, evaluated = set(), set()
    for name in icons.TASKS:
        for row in rows_of(icons_dir, f"MMEB-train/Icons_{name}"):
            trained |= {cell for key, cell in row.items() if key.endswith("image_path")} - {""}
        for part in ("Icons", "NewIcons"):
            rows = rows_of(icons_dir, f"MMEB-eval/{part}_{name}")
            evaluated |= {cell for row in rows for cell in (row["qry_img_path"], *row["tgt_img_path"])} - {""}
            asked = [row["qry_img_path"] or row["tgt_img_path"][0] for row in rows]
            assert {icon_set(image) == "phosphor" for image in asked} == {part == "NewIcons"}
    assert {icon_set(image) for image in trained} == {"tabler", "lucide", "mdi"}
    assert {icon_set(image) for image in evaluated} == {"tabler", "lucide", "mdi", "phosphor"}
    assert {concept(image) for image in trained}.isdisjoint({concept(image) for image in evaluated})


@pytest.mark.parametrize("part", ["Icons", "NewIcons"])
def test_only_the_first_candidate_is_right(icons_dir: Path, part: str) -> None:
    for row in rows_of(icons_dir, f"MMEB-eval/{part}_category"):
        assert [label in facts(row["qry_img_path"]) for label in row["tgt_text"]] == [True, False, False]
    for row in rows_of(icons_dir, f"MMEB-eval/{part}_t2i"):
        words = icons.words_of(row["qry_text"].split(": ")[1])
        assert [words <= facts(image) for image in row["tgt_img_path"]].index(False) == 1
        assert not any(words <= facts(image) for image in row["tgt_img_path"][1:])
        assert len({icon_set(image) for image in row["tgt_img_path"]}) == 1
    for row in rows_of(icons_dir, f"MMEB-eval/{part}_i2tags"):
        right = [icons.words_of(text) <= facts(row["qry_img_path"]) for text in row["tgt_text"]]
        assert right == [True] + [False] * (len(right) - 1)
    for row in rows_of(icons_dir, f"MMEB-eval/{part}_i2i"):
        query, (positive, *negatives) = row["qry_img_path"], row["tgt_img_path"]
        assert concept(positive) == concept(query)
        assert icon_set(positive) not in (icon_set(query), "phosphor")
        assert concept(query) not in {concept(image) for image in negatives}
        assert {icon_set(image) for image in negatives} == {icon_set(positive)}


def test_a_folder_is_a_function_of_the_seed_and_made_once(
    icons_dir: Path, packages_dir: Path, tmp_path: Path
) -> None:
    before = (icons_dir / "tasks.json").stat().st_mtime_ns
    icons.ensure_icons(icons_dir, packages_dir, seed=0)
    assert (icons_dir / "tasks.json").stat().st_mtime_ns == before
    for seed in (0, 1):
        icons.ensure_icons(tmp_path / str(seed), packages_dir, seed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], "nothing unfinished is left"
    files, again, other = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (icons_dir, tmp_path / "0", tmp_path / "1")
    )
    assert files == again
    assert set(files) != set(other), "another seed holds out other concepts"
    with pytest.raises(ValueError, match=r"was not made of .*'seed': 1"):
        icons.ensure_icons(icons_dir, packages_dir, seed=1)


def test_a_picture_that_repeats_another_one_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [icon for icon in icons.read_tabler(package_files()["tabler-icons-3.51.0"])]
    icons.write_data(tmp_path, [*found, *found[:3]], seed=0)
    assert len(rows_of(tmp_path, ".")) == len(NAMES)
    assert "40 icons; 3 left out" in capsys.readouterr().out


def test_names_of_one_concept_in_several_sets() -> None:
    assert concept("brand-github") == concept("github-logo") == concept("github")
    assert concept("arrow-left-circle-outline") == concept("circle-arrow-left")
    assert icons.spoken("logo") == "logo", "a name of nothing but the style stays"
    assert icons.tags_of(["*new*", "Heart-Filled", 2, None, "love"], "heart") == ("2", "love")


def test_npm_is_asked_once_for_a_pinned_version(
    packages_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm is not on the PATH"):
        icons.download("@mdi/svg", tmp_path / "got")
    npm, log = tmp_path / "npm", tmp_path / "log"
    npm.write_text("#!/bin/sh\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(ValueError, match=r"npm pack @mdi/svg@7\.4\.47 failed"):
        icons.download("@mdi/svg", tmp_path / "got")
    packed = packages_dir / "mdi-svg-7.4.47.tgz"
    npm.write_text(f'#!/bin/sh\necho "$2" >> {log}\n/bin/cp {packed} "$5/any.tgz"\n')
    for _ in range(2):
        archive = icons.download("@mdi/svg", tmp_path / "got")
    assert (archive.name, log.read_text()) == (packed.name, "@mdi/svg@7.4.47\n")
    assert list((tmp_path / "got").iterdir()) == [archive]
    assert icons.read_package(archive) == package_files()["mdi-svg-7.4.47"]


LICENCE = "  1 This software and database is being provided to you.  \n"
WORDS = [word for letter in "abcdefghijklmnop" for word in (f"{letter}ent", f"{letter}ish", f"{letter}orn")]


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synsets of two topics, each below the one before, and words that no row is about."""
    lines = [f"{0:08} 03 n 01 entity 0 000 | what there is"]
    for number, word in enumerate(WORDS, start=1):
        head = f"{number:08} {number % 2:02} n 02 {word} 0 old_{word} 0 001 @ {number - 1:08} n 0000"
        lines.append(f'{head} | meaning number {number}; "the {word}s (again) were here"')
    lines += [f"{90 + each:08} 00 n 01 twofold 0 000 | sense {each}" for each in range(2)]
    lines += [f"{95:08} 00 n 01 Berlin 0 000 | a city", f"{96:08} 00 n 01 loop 0 000 | a loop"]
    files = {
        "noun": "\n".join(lines),
        "verb": f"{7:08} 29 v 01 zig 0 000 01 + 02 00 | turn",
        "adj": f"{7:08} 44 a 01 zonal(a) 0 000 | of a region",
        "adv": f"{7:08} 02 r 01 zonally 0 000 | by regions",
    }
    file = tmp_path_factory.mktemp("npm") / "wordnet.tgz"
    pack(file, {f"dict/data.{part}": f"{LICENCE}{text}\n" for part, text in files.items()})
    return file


@pytest.fixture(scope="module")
def words_dir(wordnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "CANDIDATES", 4)
        words.write_words(wordnet, folder)
    return folder


def test_words_of_one_sense_are_read(wordnet: Path) -> None:
    entries = {entry.word: entry for entry in words.read_wordnet(wordnet)}
    assert list(entries) == ["entity", *WORDS, "zig", "zonal", "zonally"]
    entry = entries["aish"]
    assert (entry.definition, entry.topic, entry.kind) == ("meaning number 2", "n00", "aent")
    assert (entry.gap, entry.synonym) == ("the ___ (again) were here", "old aish")
    assert (entries["zig"].topic, entries["zig"].gap, entries["zig"].kind) == ("v29", "", "")


def test_no_word_is_trained_and_evaluated_and_no_other_candidate_is_right(
    wordnet: Path, words_dir: Path
) -> None:
    kept = {entry.word: entry.is_evaluated for entry in words.read_wordnet(wordnet)}
    assert 0 < sum(kept.values()) < len(kept) / 2
    for file, names in (
        ("MMEB-train/Definition_to_word/original-00000-of-00001.parquet", ("pos_text", "neg_text")),
        ("MMEB-eval/Definition_to_word/test-00000-of-00001.parquet", ("tgt_text",)),
    ):
        columns = pq.read_table(words_dir / file).to_pydict()
        for name in names:
            found = columns[name] if name != "tgt_text" else [text for row in columns[name] for text in row]
            assert {kept[word] for word in found} == {name == "tgt_text"}
    rows = pq.read_table(words_dir / "MMEB-eval/Word_to_synonym/test-00000-of-00001.parquet").to_pylist()
    for row in rows:
        word = row["qry_text"].split()[-1]
        assert row["tgt_text"][0] == f"old {word}"
        assert len(set(row["tgt_text"])) == 4


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_model_of_texts_trains_scores_and_comes_back(name: str, words_dir: Path, tmp_path: Path) -> None:
    assert not [problem for check in verify(words_dir, load_collator("tiny")) for problem in check.problems]
    adapter = {"per_path": True}
    module = small_embedder(save_tiny_family(name, tmp_path / "backbone"), adapter=adapter, chunk_size=5)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, small_data(str(words_dir)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.test(module, small_data(str(words_dir)))
    assert set(json.loads((tmp_path / "scores.json").read_text())["tasks"]) == set(words.TASKS)
    again = PDFEmbedder.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(again.encode(WORDS[:3]), module.encode(WORDS[:3]))
