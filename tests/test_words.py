"""The recipe of text tasks on a WordNet of a few words, and a model of texts that trains on them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from parallel_decoupling.commands import load_collator
from parallel_decoupling.data.verify import verify
from parallel_decoupling.training.module import PDFEmbedder
from recipes import words
from tests.support.families import TEXT_FAMILIES, save_tiny_family
from tests.support.fit import make_trainer, small_data, small_embedder

LICENCE = "  1 This software and database is being provided to you.  \n"
WORDS = [word for letter in "abcdefghijklmnop" for word in (f"{letter}ent", f"{letter}ish", f"{letter}orn")]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    with tarfile.open(file, "w:gz") as tar:
        for part, text in files.items():
            content = (LICENCE + text + "\n").encode()
            entry = tarfile.TarInfo(f"package/dict/data.{part}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file


@pytest.fixture(scope="module")
def data_dir(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "CANDIDATES", 4)
        words.write_words(archive, folder)
    return folder


def test_words_of_one_sense_are_read(archive: Path) -> None:
    entries = {entry.word: entry for entry in words.read_wordnet(archive)}
    assert list(entries) == ["entity", *WORDS, "zig", "zonal", "zonally"]
    entry = entries["aish"]
    assert (entry.definition, entry.topic, entry.kind) == ("meaning number 2", "n00", "aent")
    assert (entry.gap, entry.synonym) == ("the ___ (again) were here", "old aish")
    assert (entries["zig"].topic, entries["zig"].gap, entries["zig"].kind) == ("v29", "", "")


def test_no_word_is_trained_and_evaluated_and_no_other_candidate_is_right(
    archive: Path, data_dir: Path
) -> None:
    kept = {entry.word: entry.is_evaluated for entry in words.read_wordnet(archive)}
    assert 0 < sum(kept.values()) < len(kept) / 2
    for file, names in (
        ("MMEB-train/Definition_to_word/original-00000-of-00001.parquet", ("pos_text", "neg_text")),
        ("MMEB-eval/Definition_to_word/test-00000-of-00001.parquet", ("tgt_text",)),
    ):
        columns = pq.read_table(data_dir / file).to_pydict()
        for name in names:
            found = columns[name] if name != "tgt_text" else [text for row in columns[name] for text in row]
            assert {kept[word] for word in found} == {name == "tgt_text"}
    rows = pq.read_table(data_dir / "MMEB-eval/Word_to_synonym/test-00000-of-00001.parquet").to_pylist()
    for row in rows:
        word = row["qry_text"].split()[-1]
        assert row["tgt_text"][0] == f"old {word}"
        assert len(set(row["tgt_text"])) == 4


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_model_of_texts_trains_scores_and_comes_back(name: str, data_dir: Path, tmp_path: Path) -> None:
    assert not [problem for check in verify(data_dir, load_collator("tiny")) for problem in check.problems]
    adapter = {"per_path": True}
    module = small_embedder(
        save_tiny_family(name, tmp_path / "backbone"), adapter=adapter, candidate_chunk_size=5
    )
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, small_data(str(data_dir)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.test(module, small_data(str(data_dir)), verbose=False)
    assert set(json.loads((tmp_path / "scores.json").read_text())["tasks"]) == set(words.TASKS)
    again = PDFEmbedder.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(again.encode(WORDS[:3]), module.encode(WORDS[:3]))
