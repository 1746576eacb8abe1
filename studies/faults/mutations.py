"""Changes one thing of what is right: a name, a leaf of a saved file, a cell, an archive.

``python -m studies.faults.mutations`` tries names of tasks, every leaf of a checkpoint, of an exported folder
and of embeddings (taken away, of another type, NaN, zeros, negative, huge, swapped, cut), cells of training
rows, and zip archives. Verdicts are those of ``studies.faults.inputs``; ``right`` is also what gives the very
same embeddings. A file's name as an argument, such as ``embeddings``, stands for its leaves alone. There is
one JSON line per try in ``docs/studies/faults/mutations.jsonl``; those of this commit are not tried again.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from parallel_decoupling import Embedder
from parallel_decoupling.data.download import unpack
from parallel_decoupling.evaluation.store import Store
from studies.faults.inputs import VALUES, Try, run_command, try_all
from studies.faults.kills import CHECKPOINT, OUTPUT_DIR, WORK_DIR, store_of, whole

PLACE = WORK_DIR / "mutations"
RIGHT_NAMES = (
    "x",
    "Task",
    "a-b",
    "a_b",
    "a.b",
    "0",
    "ä",
    "日本",
    "a" * 200,
    "UPPER",
    "a.parquet",
    "con",
    "-x",
)
WRONG_NAMES = (
    *(
        "",
        ".",
        "..",
        "../x",
        "/tmp/x",
        "./x",
        "a/b",
        "a//b",
        "a/",
        "a\\b",
        "..\\x",
        "C:\\x",
        "C:x",
        "a:b",
        "a|b",
    ),
    *(
        "a\0b",
        "\0",
        "a\nb",
        "a\rb",
        "a\tb",
        "\x1b[31m",
        "\x07",
        "\x7f",
        "\u202ea",
        "\u2066a",
        "a\u2028b",
        "\ud83d",
    ),
    *(
        " ",
        " a",
        "a ",
        "a b",
        "a\u00a0b",
        "\u3000",
        ".hidden",
        "..a",
        "...",
        ".x.json",
        "~",
        "~root",
        "~/x",
        "$HOME",
    ),
    *(
        "${x}",
        "%00",
        "%2e%2e",
        "a?b",
        "a*b",
        "*",
        "[a]",
        "{a}",
        "<a>",
        '"a"',
        "'a'",
        "`a`",
        "a;b",
        "a&b",
        "a#b",
        "@a",
    ),
    *(
        "a!b",
        "a=b",
        "a+b",
        "a,b",
        "(a)",
        "a^b",
        "file:///x",
        "https://a.example",
        "a" * 201,
        "ü" * 101,
        "😀",
        "́",
    ),
)
ROW = {"question": "a chair", "photo": "0.png", "title": "Chair", "not": ["1.png"]}


def names() -> Iterator[Try]:
    """Give names to a task of a folder."""
    for name in (*RIGHT_NAMES, *WRONG_NAMES):
        folder = PLACE / "names"

        def check(name: str = name, folder: Path = folder) -> int:
            write_folder(folder, [ROW] * 3, name)
            return run_command(["verify", str(folder)])

        shown = [name.encode("unicode_escape").decode()[:20], name[:20], "name"]
        yield Try("name", repr(name), check, shown, lambda code, name=name: name in RIGHT_NAMES and code == 0)


def write_folder(folder: Path, rows: list[dict[str, Any]], name: str = "Shop") -> None:
    """Write a folder with one training subset."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(3):
        Image.effect_noise((40, 40), 20 + number).convert("RGB").save(folder / f"{number}.png")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"query_text": "question", "candidate_image": "photo", "candidate_text": "title"}
    entry = {"meta_task": "retrieval", "in_distribution": True, "train_file": "train.jsonl"}
    entry["columns"] = columns | {"negative_image": "not"}
    (folder / "tasks.json").write_text(json.dumps({name: entry}))


def cells() -> Iterator[Try]:
    """Change a cell of a training row: the folder is found wrong by row, or right."""
    values = (
        *VALUES,
        "no.png",
        "../x.png",
        "https://a.example/b.png",
        "<|image_1|>",
        "<|image_pad|>",
        ["0.png"],
    )
    for key in ROW:
        for value in values:
            folder = PLACE / "cells"

            def check(key: str = key, value: Any = value, folder: Path = folder) -> int:
                write_folder(folder, [ROW, ROW | {key: value}, ROW])
                return run_command(["verify", str(folder)])

            # 1 is a folder with problems, which are listed
            yield Try("cell", f"{key}={value!r}"[:200], check, ["row 1", key], lambda code: code in (0, 1))


def mutated(value: Any, chance: random.Random) -> Any:
    """Return another value in place of a leaf."""
    others: list[Any] = [None, "text", "", [], {}, -1, 0, 10**12, math.nan, True, [1], {"a": 1}]
    if isinstance(value, torch.Tensor):
        flat = value.clone().flatten()
        if len(flat) and value.is_floating_point():
            flat[chance.randrange(len(flat))] = chance.choice((math.nan, math.inf, 1e9))
        others = [
            flat.reshape(value.shape),
            torch.zeros_like(value),
            -value,
            value.to(torch.int64),
            value[:0],
        ]
        others += [value.flatten(), value.bool(), value.tolist(), None, "text", value.double() + 1]
        others += [value.flatten().flip(0).reshape(value.shape)]
    elif isinstance(value, bool):
        others += [not value]
    elif isinstance(value, int | float):
        others += [value + 1, -value - 1, str(value), float(value) / 2 + 0.3]
    elif isinstance(value, str):
        others += [value + "x", value[:-1], value.swapcase() + " "]
    return chance.choice(
        [
            other
            for other in others
            if other is None
            or type(other) is not type(value)
            or isinstance(other, torch.Tensor)
            or other != value
        ]
    )


def leaves(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the leaves of nested values are."""
    if isinstance(content, dict | list) and content:
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from leaves(content[key], (*place, key))
    else:
        yield place


def with_change(content: Any, place: tuple[Any, ...], chance: random.Random) -> Any:
    """Return a copy of nested values of which one leaf is another, gone, or has an unknown neighbour."""
    changed = copy.deepcopy(content)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    kind = chance.random()
    if kind < 0.15:
        del inner[place[-1]]
    elif kind < 0.2 and isinstance(inner, dict):
        inner["unknown"] = inner[place[-1]]
    else:
        inner[place[-1]] = mutated(inner[place[-1]], chance)
    return changed


def saved_files(embedder: Embedder) -> Iterator[Try]:
    """Change every leaf of a checkpoint, of an exported folder, and of a file of embeddings."""
    expected, copies = embedder.encode(["a"]), PLACE / "copies"
    export, store = whole("export")[0], store_of(6)
    column = Store(store).column("aggregate")

    def same(found: torch.Tensor) -> bool:
        return torch.equal(found, expected) or torch.equal(found, column)

    def tries(name: str, content: Any, load: Callable[[Any], torch.Tensor]) -> Iterator[Try]:
        for place in leaves(content):
            chance = random.Random(f"{name} {place}")
            if place[0] == "columns" and len(place) == 4 and chance.random() > 0.1:
                continue  # of the numbers of a vector a tenth will do
            run = lambda place=place, chance=chance: load(with_change(content, place, chance))  # noqa: E731
            yield Try("leaf", f"{name} {place}", run, [str(copies)], same)

    def fresh(source: Path | None) -> Path:
        shutil.rmtree(copies, ignore_errors=True)
        return Path(shutil.copytree(source, copies)) if source else copies

    def checkpoint(content: Any) -> torch.Tensor:
        fresh(None).mkdir(parents=True)
        torch.save(content, copies / "last.ckpt")
        return Embedder.from_pretrained(copies / "last.ckpt").encode(["a"])

    def settings(content: Any, name: str) -> torch.Tensor:
        (fresh(export) / name).write_text(json.dumps(content))
        return Embedder.from_pretrained(copies).encode(["a"])

    def weights(content: Any) -> torch.Tensor:
        tensors = {name: each.clone() for name, each in content.items() if isinstance(each, torch.Tensor)}
        save_file(tensors, fresh(export) / "model.safetensors")  # which can hold nothing else
        return Embedder.from_pretrained(copies).encode(["a"])

    def embeddings(content: Any) -> torch.Tensor:
        file = next(fresh(store).glob("*.parquet"))
        columns = {name: as_column(cells, kinds.get(name)) for name, cells in content["columns"].items()}
        shortest = min(map(len, columns.values()))
        table = pa.table({name: column[:shortest] for name, column in columns.items()})
        metadata = {key: json.dumps(value) for key, value in content["metadata"].items()}
        pq.write_table(table.replace_schema_metadata(metadata), file)
        return Store(copies).column("aggregate")

    content = torch.load(CHECKPOINT, weights_only=True)
    used = {key: content[key] for key in ("state_dict", "hyper_parameters", "backbone", "data", "progress")}
    yield from tries("checkpoint", used, lambda changed: checkpoint({**content, **changed}))
    for file in (file for file in sorted(export.rglob("*.json")) if file.name != "tokenizer.json"):
        name = str(file.relative_to(export))
        yield from tries(
            name, json.loads(file.read_text()), lambda changed, name=name: settings(changed, name)
        )
    yield from tries("model.safetensors", load_file(export / "model.safetensors"), weights)
    table = pq.read_table(next(store.glob("*.parquet")))
    about = {
        key.decode(): json.loads(value) for key, value in table.schema.metadata.items() if value[:1] == b"{"
    }
    kinds = {field.name: field.type for field in table.schema}
    yield from tries("embeddings", {"metadata": about, "columns": table.to_pydict()}, embeddings)


def as_column(cells: Any, kind: pa.DataType | None) -> pa.Array:
    """Return a column of its own type if the cells fit, else of the type that they have, or of texts."""
    for each in (kind, None):
        try:
            return pa.array(cells, each)
        except (pa.ArrowException, TypeError):
            continue
    return pa.array([str(cell) for cell in cells] if isinstance(cells, list) else [str(cells)])


def archives() -> Iterator[Try]:
    """Unpack archives with names and contents that mean harm, and such as are damaged in one place."""
    target, good = PLACE / "unpacked", {"Shop/a.png": b"x", "Shop/b/c.png": b"y" * 500}
    harmful = [
        {name: b"x"}
        for name in (
            "../x",
            "/tmp/mutations_x",
            "Shop/../../x",
            "Shop/a\\..\\b",
            "C:/x",
            "x" * 300,
            "Shop/" + "y" * 300,
        )
    ]
    harmful += [
        {"Shop": b"file", "Shop/a.png": b"x"},
        {"Shop/a": b"file", "Shop/a/b.png": b"x"},
        {"Other/a.png": b"x"},
    ]
    harmful += [
        {},
        {"Shop/zeros.png": bytes(10**7)},
        {f"Shop/{'d/' * 200}a.png": b"x"},
        {"Shop/a\0b.png": b"x"},
    ]
    contents = [archive_of(good | each) for each in harmful]
    whole_one = archive_of(good)
    for seed in range(80):
        chance = random.Random(seed)
        place = chance.randrange(len(whole_one))
        flipped = bytes([whole_one[place] ^ 1 << chance.randrange(8)])
        contents += [chance.choice((whole_one[:place], whole_one[:place] + flipped + whole_one[place + 1 :]))]

    def run(content: bytes) -> bool:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        (PLACE / "archive.zip").write_bytes(content)
        unpack(PLACE / "archive.zip", target, ["Shop"])
        return True

    def inside(_: Any) -> bool:
        found = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
        outside = [PLACE / "x", WORK_DIR / "x", Path("/tmp/mutations_x"), Path("/x")]
        return not any(file.exists() for file in outside) and all(name.startswith("Shop/") for name in found)

    for number, content in enumerate(contents):
        yield Try("archive", str(number), lambda content=content: run(content), ["archive.zip"], inside)


def archive_of(files: dict[str, bytes]) -> bytes:
    """Return a zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def main() -> int:
    """Try what was not tried with this commit, and print the table; the exit code is 1 after a fault."""
    torch.set_num_threads(1)
    whole("export")
    embedder = Embedder.from_pretrained(CHECKPOINT)
    PLACE.mkdir(parents=True, exist_ok=True)
    write_folder(PLACE / "names", [ROW] * 3)
    run_command(["verify", str(PLACE / "names")])  # what it imports need not be imported again
    sources, parts = [archives(), names(), cells(), saved_files(embedder)], sys.argv[1:]
    chosen = ((each for each in one if not parts or each.given.split()[0] in parts) for one in sources)
    return try_all(chosen, OUTPUT_DIR / "mutations.jsonl")


if __name__ == "__main__":
    sys.exit(main())
