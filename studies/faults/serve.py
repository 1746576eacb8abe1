"""``serve`` under load, with bad requests, a huge one, slow senders, and SIGTERM at the end.

Run as ``OMP_NUM_THREADS=1 python -m studies.faults.serve`` from the repository root; wants about six minutes.
Each part leaves a file in ``runs/faults/serve``, and is not run again while that is there; the table shows
all. The model is the package's tiny backbone with three untrained paths, the server a process of its own.

- load: 64 clients of OpenAI's library, each of which sends its next request when it has its answer, in turns
  of 10 s with good requests alone and with 8 % bad ones (so both see the same state of the machine), 60 s of
  each; every vector is compared with ``encode``. Then all clients send 32 inputs, and the server gets SIGTERM
  when it has them.
- large: small requests, one after the other, without and with a request of 1 MB.
- slow: good requests beside 300 connections that send the head of a request and no body.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
from lightning.pytorch import Trainer
from PIL import Image

from parallel_decoupling import model as model_package
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.training.module import PDFEmbedder

CLIENTS, SEGMENTS, SEGMENT_SECONDS, BAD_SHARE = 64, 6, 10, 0.08
WORDS = ("a", "the", "red", "blue", "small", "large", "circle", "square", "star", "left", "right", "of")
MODELS: dict[str, Any] = {"aggregate": "aggregate", "path_0": 0, "path_2": 2}
LARGE = {"input": ["a " * 16_000] * 32}  # 1 MB
Good = tuple[dict[str, Any], np.ndarray]  # a request, and what encode gives


def make_model(folder: Path) -> Path:
    """Save a checkpoint of an untrained model."""
    backbone = str(Path(model_package.__file__).parent / "tiny")
    trainer = Trainer(default_root_dir=str(folder), logger=False, accelerator="cpu")
    settings: dict[str, Any] = {"num_paths": 3, "prefix_length": 8, "prefix_init": "random"}
    trainer.strategy.connect(PDFEmbedder(backbone=backbone, **settings))
    trainer.save_checkpoint(folder / "model.ckpt", weights_only=True)
    return folder / "model.ckpt"


def data_uri(image: Image.Image, *, part: float = 1.0) -> str:
    """Return a picture as clients send it, or only the beginning of it."""
    file = io.BytesIO()
    image.save(file, "png")
    content = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(content[: int(len(content) * part)]).decode()


def good_requests(checkpoint: Path, count: int = 120) -> list[Good]:
    """Draw requests of one to three texts, pictures and both, and embed them in this process."""
    rng, embedder, requests = random.Random(0), Embedder.from_pretrained(checkpoint), list[Good]()
    for _ in range(count):
        sent: list[Any] = []
        plain: list[Any] = []
        for _ in range(rng.randint(1, 3)):
            text = " ".join(rng.choices(WORDS, k=rng.randint(3, 40)))
            image = Image.effect_noise((rng.randint(32, 96), rng.randint(32, 96)), 60)
            kind = rng.choice(("text", "text", "image", "both"))
            row: dict[str, Any] = {"text": text} if kind == "text" else {"image": image}
            plain.append(row | ({"text": text} if kind == "both" else {}))
            sent.append(text if kind == "text" else {**plain[-1], "image": data_uri(image)})
        name = rng.choice(list(MODELS))
        expected = embedder.encode(plain, paths=MODELS[name]).numpy()
        requests.append(({"model": name, "input": sent}, expected))
    return requests


def bad_requests() -> list[dict[str, Any]]:
    """Return what is not to be embedded, as arguments of an HTTP client's ``request``."""
    thin, noise = Image.new("RGB", (4000, 4)), Image.effect_noise((64, 64), 60)
    bodies: list[Any] = [
        {"input": []},
        {"input": " "},
        {"input": "a", "model": "gpt"},
        {"input": "a", "dimensions": 0},
        {"input": "a", "encoding_format": "hex"},
        {"input": "a", "temperature": 1},
        {"input": ["a", "<|image_1|> b"]},
        {"input": ["a"] * 2049},
        {"input": "a" * 32_001},
        {"input": {"image": data_uri(thin)}},
        {"input": {"image": data_uri(noise, part=0.5)}},
        {"input": {"image": "data:image/png;base64,AAAA"}},
        {"input": {"image": "/etc/hostname"}},
        {"input": {"image": "https://a.example/b.png"}},
        {f"key {number}": number for number in range(50_000)},
        [],
    ]
    contents = [b"", b"{", b'{"input": "half \\ud83d"}', b'{"input": "\xff"}', b"[" * 100_000, b"\x00" * 999]
    heads = [{"content-type": "text/plain"}, {"content-encoding": "gzip"}, {"host": "evil.example"}]
    requests: list[dict[str, Any]] = [{"json": body} for body in bodies]
    requests += [{"content": content} for content in contents]
    requests += [{"json": {"input": "a"}, "headers": head} for head in heads]
    post = {"method": "POST", "url": "/v1/embeddings"}
    others = [
        {**post, "method": "GET"},
        {**post, "url": "/v1/embedding"},
        {"method": "GET", "url": "/v1/models/x"},
    ]
    return [{**post, **request} for request in requests] + others


@contextmanager
def serving(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server until it answers; gives its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "parallel_decoupling",
        "serve",
        str(checkpoint),
        "--port",
        port,
        *options,
    ]
    process, address = subprocess.Popen(command), f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
                if process.poll() is not None:
                    raise
        yield process, address
    finally:
        process.terminate()
        process.wait(timeout=60)


class Clients:
    """Clients of one server, and what they were answered."""

    def __init__(self, address: str, good: list[Good]) -> None:
        self.good, self.bad = good, bad_requests()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
        self.raw = httpx.AsyncClient(base_url=address, timeout=120, limits=limits)
        client = httpx.AsyncClient(timeout=120, limits=limits)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, http_client=client
        )
        self.statuses: Counter[int] = Counter()  # of good requests; 0 without an answer
        self.bad_statuses: Counter[int] = Counter()
        self.wrong_form = self.wrong_vectors = 0
        self.largest_difference = 0.0

    async def ask(self, request: dict[str, Any], expected: np.ndarray | None = None) -> float:
        """Send a good request; returns its seconds."""
        start = time.perf_counter()
        try:
            answer = await self.openai.embeddings.create(**request)
        except openai.APIStatusError as error:
            self.statuses[error.status_code] += 1
            return time.perf_counter() - start
        except openai.APIConnectionError:
            self.statuses[0] += 1
            return time.perf_counter() - start
        seconds = time.perf_counter() - start
        self.statuses[200] += 1
        if expected is not None:
            found = np.asarray([row.embedding for row in answer.data])
            fits = found.shape == expected.shape
            difference = float(abs(found - expected).max()) if fits else np.inf
            self.wrong_vectors += not difference <= 1e-6
            self.largest_difference = max(self.largest_difference, difference)
        return seconds

    async def ask_badly(self, request: dict[str, Any]) -> None:
        """Send a bad request, which is to be refused in OpenAI's form."""
        answer = await self.raw.request(**request)
        self.bad_statuses[answer.status_code] += 1
        try:
            self.wrong_form += answer.json()["error"].keys() != {"message", "type", "param", "code"}
        except (ValueError, KeyError, AttributeError):
            self.wrong_form += 1

    async def num_waiting(self) -> float:
        """Return how many requests have arrived at the server and are not answered yet."""
        return float((await self.raw.get("/metrics")).text.split("parallel_decoupling_waiting ")[1])

    async def load(self, seconds: float, bad_share: float, seed: int) -> list[float]:
        """Let all clients send request after request; returns the seconds of the good ones."""
        end, taken = time.perf_counter() + seconds, list[float]()

        async def one(rng: random.Random) -> None:
            while time.perf_counter() < end:
                if rng.random() < bad_share:
                    await self.ask_badly(rng.choice(self.bad))
                else:
                    taken.append(await self.ask(*rng.choice(self.good)))

        await asyncio.gather(*(one(random.Random(f"{seed} {number}")) for number in range(CLIENTS)))
        return taken


async def load(checkpoint: Path, good: list[Good]) -> dict[str, Any]:
    """Many clients, with and without bad requests, then SIGTERM."""
    with serving(checkpoint) as (process, address):
        clients, memory = Clients(address, good), psutil.Process(process.pid).memory_info
        await clients.load(2 * SEGMENT_SECONDS, BAD_SHARE, -1)
        warm, taken = memory().rss, {0.0: list[float](), BAD_SHARE: list[float]()}
        for segment in range(2 * SEGMENTS):
            share = (0.0, BAD_SHARE)[segment % 2]
            taken[share] += await clients.load(SEGMENT_SECONDS, share, segment)
        grown = memory().rss / warm - 1
        before = clients.statuses.copy()
        requests = [{"model": "aggregate", "input": [f"a circle {number}"] * 32} for number in range(CLIENTS)]
        last = [asyncio.create_task(clients.ask(request)) for request in requests]
        while await clients.num_waiting() + sum(task.done() for task in last) < CLIENTS:
            await asyncio.sleep(0.01)
        in_flight = sum(not task.done() for task in last)
        process.terminate()
        await asyncio.gather(*last)
        code = await asyncio.to_thread(process.wait, 60)
        alone, mixed = (np.percentile(taken[share], 95) for share in (0.0, BAD_SHARE))
        return {
            "good requests": before.total(),
            "of these not answered 200": before.total() - before[200],
            "wrong vectors": clients.wrong_vectors,
            "largest difference from encode": f"{clients.largest_difference:.1e}",
            "bad requests by status": dict(sorted(clients.bad_statuses.items())),
            "refusals not in OpenAI's form": clients.wrong_form,
            "p95 of good requests alone, with bad ones": f"{alone:.2f} s, {mixed:.2f} s",
            "ratio": f"{mixed / alone:.2f}",
            "resident memory after warm-up, growth": f"{warm / 2**20:.0f} MiB, {grown:+.1%}",
            "in flight at SIGTERM": in_flight,
            "of these lost": CLIENTS - (clients.statuses - before)[200],
            "exit code": code,
        }


async def _one_by_one(clients: Clients, stop: Callable[[], bool]) -> list[float]:
    taken = list[float]()
    while not stop():
        taken.append(await clients.ask(*clients.good[len(taken) % len(clients.good)]))
    return taken


async def large(checkpoint: Path, good: list[Good]) -> dict[str, Any]:
    """A request of 1 MB, and small ones meanwhile."""
    with serving(checkpoint, "--limits.seconds", "600") as (_, address):
        clients, start = Clients(address, good), time.perf_counter()
        await _one_by_one(clients, lambda: time.perf_counter() > start + 5)
        alone = await _one_by_one(clients, lambda: time.perf_counter() > start + 15)
        start = time.perf_counter()
        huge = asyncio.create_task(clients.raw.post("/v1/embeddings", json=LARGE, timeout=600))
        await asyncio.sleep(0.5)
        meanwhile = await _one_by_one(clients, huge.done)
        whole = time.perf_counter() - start
        rows = 16_384 // min(4096, 32_000)  # of a forward pass: limits.tokens over the model's max_tokens
        one_pass = whole / (len(LARGE["input"]) / rows)
        return {
            "status and seconds of 1 MB": f"{(await huge).status_code}, {whole:.1f} s",
            "a forward pass of it": f"{one_pass:.2f} s",
            "small requests meanwhile": len(meanwhile),
            "median alone, median and longest meanwhile": f"{np.median(alone):.3f} s, "
            f"{np.median(meanwhile):.2f} s, {max(meanwhile):.2f} s",
            "not answered 200 or wrong": clients.statuses.total()
            - clients.statuses[200]
            + clients.wrong_vectors,
        }


async def slow(checkpoint: Path, good: list[Good]) -> dict[str, Any]:
    """Connections that send a head and no body, and good requests meanwhile."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
    with serving(checkpoint) as (_, address), ExitStack() as stack:
        host, port = address.removeprefix("http://").split(":")
        clients = Clients(address, good)
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(300)
        ]
        for each in connections:
            each.sendall(head)
        start = time.perf_counter()
        await _one_by_one(clients, lambda: time.perf_counter() > start + 10)
        answers = [await asyncio.to_thread(each.recv, 12) for each in connections]
        return {
            "connections without a body": len(connections),
            "their answers": dict(Counter(answer[9:].decode() for answer in answers)),
            "until all are refused": f"{time.perf_counter() - start:.0f} s",
            "good requests meanwhile by status": dict(clients.statuses),
        }


PARTS: dict[str, Callable[[Path, list[Good]], Awaitable[dict[str, Any]]]] = {
    "load": load,
    "large": large,
    "slow": slow,
}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults/serve"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.json" for name in PARTS}
    if not all(file.exists() for file in files.values()):
        checkpoint = make_model(folder)
        good = good_requests(checkpoint)
    for name, file in files.items():
        if not file.exists():
            file.write_text(json.dumps(asyncio.run(PARTS[name](checkpoint, good))))
    print("| part | what | figure |\n| --- | --- | --- |")
    for name, file in files.items():
        for what, figure in json.loads(file.read_text()).items():
            shown = (
                ", ".join(f"{key}: {n}" for key, n in figure.items()) if isinstance(figure, dict) else figure
            )
            print(f"| {name} | {what} | {shown} |")


if __name__ == "__main__":
    main()
