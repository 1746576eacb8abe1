"""Gives bad inputs to the package, and counts what it makes of them.

``python -m studies.faults.inputs`` tries values for every option of the constructors, command lines, rows,
files that are damaged in one place, and HTTP requests. Verdicts: ``clear`` (one message with option, file,
row or key), ``right`` (rightly accepted), ``vague``, ``silent``, ``traceback``, ``hang``, ``memory`` and
``crash``. There is one JSON line per input in ``docs/studies/faults/inputs.jsonl``; those of the same commit
are not tried again.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import torch
import yaml
from fastapi.testclient import TestClient
from PIL import Image

from parallel_decoupling import Embedder, MMEBDataModule, PDFEmbedder
from parallel_decoupling.cli import main as command_line
from parallel_decoupling.evaluation.store import Store
from parallel_decoupling.model.backbone import AdapterConfig
from parallel_decoupling.option_types import check_values
from parallel_decoupling.serve import Server, build_app
from parallel_decoupling.serve_limits import Limits
from parallel_decoupling.training.optimization import MIConfig, OptimizerConfig
from studies.faults.kills import CHECKPOINT, FIT_RUN, OUTPUT_DIR, WORK_DIR, store_of, whole
from studies.faults.serve import bad_requests
from studies.results import code_version

RESULTS, PLACE = OUTPUT_DIR / "inputs.jsonl", WORK_DIR / "inputs"
SECONDS, GIB = 300, 14  # that an input may take, on a machine that does other work as well
NUM_DAMAGES = 15  # of every file
SAMPLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NUMBERS = (-1, 0, 1, 3, 10**6, 10**12, 2**70, -(2**70), 0.5, 1.5, math.nan, math.inf, -math.inf, True)
TEXTS = ("", " ", "x", "\x1b[31m", "../x", "a\0b", "\ud83d", "x" * 10**6)
VALUES: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, [], [1], [-1], ["a", "a"], {}, {"a": 1})
BODY = {"input": "a", "model": "path_0", "dimensions": 3, "encoding_format": "float", "user": "u"}
ITEM = {"text": "a", "instruction": "b", "image": None}
OWNERS = (PDFEmbedder, MMEBDataModule, AdapterConfig, MIConfig, OptimizerConfig, Limits)


class Try(NamedTuple):
    """An input, what it is given to, and what a clear message names; ``ok`` may look at a result."""

    kind: str
    given: str
    action: Callable[[], Any]
    named: Sequence[str]
    ok: Callable[[Any], bool]


class RefusedError(Exception):
    """A message to the user: a line with exit code 2, or a status 4xx in OpenAI's form."""


def run_command(arguments: Sequence[str]) -> int:
    """Run a command in this process; raises ``RefusedError`` with its message."""
    errors, stream = io.StringIO(), sys.stderr
    sys.stderr = errors
    try:
        command_line(list(arguments))
    except SystemExit as stop:
        found = errors.getvalue().rpartition("error: ")
        if stop.code == 2 and found[1]:
            raise RefusedError(found[2].strip()) from stop
        return int(stop.code or 0)
    finally:
        sys.stderr = stream
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def options() -> Iterator[Try]:
    """Try values of all kinds for every option, in Python."""
    for owner in OWNERS:
        function: Any = owner.__init__ if owner in OWNERS[:2] else owner
        for name in [each for each in inspect.signature(owner).parameters if each != "self"]:
            for value in VALUES:
                arguments = {**_defaults(owner), name: value}

                def is_declared(_: Any, function: Any = function, arguments: Any = arguments) -> bool:
                    return check_values(function, arguments) is None

                made = lambda owner=owner, name=name, value=value: owner(**{name: value})  # noqa: E731
                yield Try("option", f"{owner.__name__}.{name}={value!r}"[:200], made, [name], is_declared)


def _defaults(owner: Any) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(owner).parameters.items()}


def commands() -> Iterator[Try]:
    """Run command lines that cannot work, or that only seem so."""
    names = {"run": str(FIT_RUN), "ckpt": str(CHECKPOINT), "store": str(store_of(6)), "place": str(PLACE)}
    for number, (line, named) in enumerate(SAMPLES["commands"].items()):
        words = [_filled(word, names) for word in line.split(" ")]
        if line.startswith(("fit --config demo", "test --config demo")):
            folder = f"--trainer.default_root_dir={PLACE / f'run_{number}'}"
            words[3:3] = ["--trainer.max_steps=1", "--data.row_limit=8", "--data.batch_size=4", folder]
        code = {"right": 0, "problems": 1}.get(named)
        expected = lambda found, code=code: found == code  # noqa: E731
        yield Try("command", line, lambda words=words: run_command(words), [_filled(named, names)], expected)


def _filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def rows() -> Iterator[Try]:
    """Embed a table with a bad row: it is listed with its reason, or the file is refused by name."""
    for number, row in enumerate(SAMPLES["rows"]):
        file, folder = PLACE / f"rows_{number}{row.get('suffix', '.jsonl')}", PLACE / f"rows_{number}"
        content = row["content"] if "alone" in row else f'{{"text": "good"}}\n{row["content"]}\n'
        file.write_bytes(content.encode(row.get("encoding", "utf-8")))
        words = [
            "predict",
            f"--ckpt_path={CHECKPOINT}",
            f"--data.predict_source={file}",
            f"--output_dir={folder}",
        ]

        def listed(_: Any, folder: Path = folder, row: Any = row) -> bool:
            return len(Store(folder).bad_rows) == row.get("bad")

        yield Try("rows", f"{number} {row}", lambda words=words: run_command(words), [file.name], listed)


def items(embedder: Embedder) -> Iterator[Try]:
    """Call ``encode`` with items of all kinds; what is embedded is finite."""
    texts = {value for value in TEXTS if value.strip() and value != TEXTS[-2]}
    picture, frame = Image.new("RGB", (8, 8)), pandas.DataFrame({"text": ["a"]})
    good = [picture, np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), {"text": "a", "image": picture}]
    good += [Image.fromarray(np.zeros((8, 8), kind)) for kind in ("float32", "int32", "uint16", "bool")]
    bad = [
        frame,
        frame["text"],
        {"a"},
        {}.keys(),
        {"text": ["a"]},
        {"image": frame},
        b"x",
        io.BytesIO(),
        object(),
    ]
    bad += [np.zeros((2, 2, 9)), torch.zeros(0, 3), Image.new("RGB", (6000, 20)), "https://a.example/b.png"]
    bad += [
        "<|image_1|> a",
        Path("nowhere.png"),
        {"text": "a", "other": 1},
        "data:image/png;base64,AAAA",
        lambda: 1,
    ]
    for item in (*VALUES, *good, *bad):
        is_good = any(item is each for each in good) or (isinstance(item, str) and item in texts)

        def finite(result: torch.Tensor, is_good: bool = is_good) -> bool:
            return is_good and bool(result.isfinite().all())

        call = lambda item=item: embedder.encode(["a", item])  # noqa: E731
        yield Try("item", repr(item)[:200], call, ["input 1", "pass "], finite)


def requests(embedder: Embedder) -> Iterator[Try]:
    """Send bad requests, and good ones of which one value is changed."""
    server = Server(embedder, limits=replace(Limits(), characters=5000, body_bytes=2 * 10**6))
    client = TestClient(build_app(server), "http://localhost", raise_server_exceptions=False)

    def send(request: dict[str, Any]) -> int:
        answer = client.request(**{"method": "POST", "url": "/v1/embeddings", **request})
        if not 400 <= answer.status_code < 500:
            assert answer.status_code == 200, answer.text
            return 200
        raise RefusedError(answer.json()["error"]["message"])

    tries: list[tuple[Any, bool, str]] = [(each, False, "") for each in bad_requests()]
    for value in VALUES:
        is_text = isinstance(value, str) and 0 < len(value.strip()) < 5000 and value != TEXTS[-2]
        text_or_none = is_text or value is None or (isinstance(value, str) and not value.strip())
        fine = {
            "input": is_text or value in (["a", "a"], [1]),  # texts, or tokens
            "model": False,
            "dimensions": value in (1, 3, None) and value is not True,
        }
        fine |= {
            "encoding_format": False,
            "user": value is None or isinstance(value, str) and value != TEXTS[-2],
        }
        bodies = [({**BODY, name: value}, fine[name], name) for name in BODY] + [
            ({**BODY, "x": value}, False, "x")
        ]
        fine = {"text": is_text, "instruction": text_or_none, "image": value is None}
        bodies += [({**BODY, "input": ["b", {**ITEM, name: value}]}, fine[name], name) for name in ITEM]
        tries += [({"content": json.dumps(body).encode()}, good, name) for body, good, name in bodies]
    for request, good, name in tries:
        named, shown = [name, "input[1]", "keys", "JSON"], f"{name} {request!r}"[:200]
        accepted = lambda code, good=good: good  # noqa: E731
        yield Try("request", shown, lambda request=request: send(request), named, accepted)


def damages(embedder: Embedder) -> Iterator[Try]:
    """Damage one place of a checkpoint, an exported folder and a store, and load it."""
    expected, column = embedder.encode(["a"]), Store(store_of(6)).column("aggregate")
    export, store = whole("export")[0], store_of(6)

    def same(found: torch.Tensor) -> bool:
        return torch.equal(found, expected) or torch.equal(found, column)

    files = [
        CHECKPOINT,
        *sorted(file for file in export.rglob("*") if file.is_file()),
        *store.glob("*.parquet"),
    ]
    for file in files:
        for number in range(NUM_DAMAGES):
            chance, copy = random.Random(f"{file.name}{number}"), PLACE / "damaged"

            def load(file: Path = file, chance: Any = chance, copy: Path = copy) -> torch.Tensor:
                shutil.rmtree(copy, ignore_errors=True)
                folder = file.parent if file != CHECKPOINT else None
                root = export if export in file.parents else folder
                shutil.copytree(root, copy) if root else copy.mkdir()
                target = copy / (file.relative_to(root) if root else file.name)
                target.unlink(missing_ok=True)
                target.write_bytes(damage(file.read_bytes(), chance))
                if root == store:
                    return Store(copy).column("aggregate")
                return Embedder.from_pretrained(target if root is None else copy).encode(["a"])

            yield Try("damage", f"{file.name} {number}", load, [str(copy)], same)


def damage(content: bytes, chance: random.Random) -> bytes:
    """Cut, empty, repeat, flip a bit, write zeros or change a digit."""
    place = chance.randrange(max(1, len(content)))
    kind = chance.choice(("cut", "empty", "twice", "bit", "bit", "bit", "zeros", "digit", "key"))
    if kind in ("digit", "key"):
        found = list(re.finditer(rb"\d" if kind == "digit" else rb'"\w+":', content))
        if not found:
            return content[:place]
        at = chance.choice(found)
        new = b"%d" % ((int(at[0]) + 1) % 10) if kind == "digit" else b'"other":'
        return content[: at.start()] + new + content[at.end() :]
    flipped = bytes([content[place] ^ 1 << chance.randrange(8)]) if content else b"x"
    middle = {"bit": flipped, "zeros": bytes(64)}.get(kind, b"")
    whole = {"cut": content[:place], "empty": b"", "twice": content * 2}
    return whole.get(kind, content[:place] + middle + content[place + len(middle) :])


def make_files() -> None:
    """Write the files that samples name."""
    shutil.rmtree(PLACE, ignore_errors=True)
    (PLACE / "full").mkdir(parents=True)
    os.mkfifo(PLACE / "pipe")
    Image.effect_noise((64, 64), 60).convert("RGB").save(PLACE / "good.png")
    Image.new("RGB", (6000, 20)).save(PLACE / "thin.png")
    grows = "a: &a [1,1,1,1,1,1,1,1,1]\n"
    for one, two in pairwise("abcdefghij"):
        grows += f"{two}: &{two} [{','.join([f'*{one}'] * 9)}]\n"
    files: dict[str, bytes] = {
        "full/x": b"x",
        "page.png": b"<html>",
        "empty.png": b"",
        "binary.yaml": bytes(range(256)),
    }
    files |= {"good.jsonl": b'{"text": "a"}', "half.png": (PLACE / "good.png").read_bytes()[:2000]}
    files |= {
        "null.yaml": b"model: null",
        "list.yaml": b"[1, 2]",
        "open.yaml": b"model: [",
        "itself.yaml": b"&a [*a]",
    }
    files |= {
        "growing.yaml": grows.encode(),
        "latin1.yaml": "caf\xe9: 1".encode("latin-1"),
        "utf16.yaml": "a: 1".encode("utf-16"),
    }
    for name, content in files.items():
        (PLACE / name).write_bytes(content)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB * 2**30,) * 2)


def isolated(judge: Callable[[], tuple[str, str]], seconds: float = SECONDS) -> tuple[str, str]:
    """Return verdict and message of an input that is tried in a process of its own, which may crash."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        torch.set_num_threads(
            1
        )  # torch renews the pool that it inherits at its first use: not in two threads
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(null, stream)
        os.write(write, json.dumps(judge()).encode()[:60_000])
        os._exit(0)
    os.close(write)
    end = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.002)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(read, "rb") as stream:
        found = stream.read()
    verdict, message = json.loads(found) if found else ("crash" if ended[0] else "hang", str(ended[1]))
    return verdict, message


def _judge_here(each: Try) -> tuple[str, str]:
    try:
        result = each.action()
    except (ValueError, OSError, RefusedError) as error:
        plain = isinstance(error, RefusedError) or not isinstance(error, UnicodeError)
        named = any(name in str(error) for name in each.named)
        return ("clear" if named and plain else "vague"), f"{type(error).__name__}: {error}"[:1000]
    except MemoryError:
        return "memory", ""
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = traceback.format_exception_only(error)[-1].partition("\n")[0]
        return "traceback", f"{Path(place.filename).name}, {place.name}: {said}"
    try:
        return ("right" if each.ok(result) else "silent"), repr(result)[:200]
    except ValueError as error:
        return "silent", str(error)[:1000]


def try_all(sources: Iterable[Iterator[Try]], results_file: Path) -> int:
    """Try what was not tried with this commit, and print the table; return 1 after a fault."""
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    commit, _ = code_version()
    lines = results_file.read_text().splitlines() if results_file.exists() else []
    results = {
        (line["kind"], line["input"]): line for line in map(json.loads, lines) if line["commit"] == commit
    }
    for each in (each for source in sources for each in source):
        if (each.kind, each.given) not in results:
            here = partial(_judge_here, each)
            verdict, message = here() if each.kind == "option" else isolated(here)
            line = {"kind": each.kind, "input": each.given, "verdict": verdict, "message": message[:200]}
            results[each.kind, each.given] = {**line, "commit": commit}
            with results_file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**line, "commit": commit}) + "\n")
    counts = Counter((line["kind"], line["verdict"]) for line in results.values())
    for (kind, verdict), count in sorted(counts.items()):
        sys.stdout.write(f"{kind:10}{verdict:12}{count}\n")
    good = sum(count for (_, verdict), count in counts.items() if verdict in ("clear", "right"))
    sys.stdout.write(f"{good} of {len(results)} clear or rightly accepted\n")
    return int(good < len(results))


def main() -> int:
    """Try inputs of all kinds; the exit code is 1 after a fault."""
    torch.set_num_threads(1)
    _limit_memory()
    whole("export")
    make_files()
    embedder = Embedder.from_pretrained(CHECKPOINT)
    sources = (requests(embedder), items(embedder), rows(), commands(), options(), damages(embedder))
    return try_all(sources, RESULTS)


if __name__ == "__main__":
    sys.exit(main())
