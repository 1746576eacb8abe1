"""Parsing of requests, limits, answers and the gate, without a server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from parallel_decoupling.data.images import load_image
from parallel_decoupling.serving.gate import EMBEDDINGS_PATH, Gate
from parallel_decoupling.serving.requests import Catalog, Limits, RequestError, parse_json, parse_request
from parallel_decoupling.serving.responses import response_body

CATALOG = Catalog(num_paths=3, path_dim=8, aggregate_dim=8, default=1)
OPEN = SimpleNamespace(value=math.inf)
LIMITS = Limits(body_bytes=2000, inputs=2, characters=20, pixels=64, waiting=1)


def data_uri(image: Image.Image) -> str:
    """The image as PNG in a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_strings_and_objects_become_inputs() -> None:
    """A string is a text even if it has the name of a file; pixels survive the data URI."""
    image = Image.new("RGB", (8, 8), (200, 10, 30))
    request = parse_request(
        {"input": ["setup.cfg.png", {"text": "b", "image": data_uri(image)}]}, CATALOG, LIMITS
    )
    assert request.inputs[0] == {"text": "setup.cfg.png"}
    assert request.inputs[1]["text"] == "b"
    assert request.inputs[1]["image"].tobytes() == image.tobytes()
    assert parse_request({"input": "a"}, CATALOG, LIMITS).inputs == [{"text": "a"}]


@pytest.mark.parametrize(
    ("model", "selection"), [("default", 1), ("path_2", 2), ("aggregate", "aggregate"), (None, 1)]
)
def test_model_names_select(model: str | None, selection: object) -> None:
    """The name chooses a path or the aggregate."""
    body = {"input": "a"} | ({} if model is None else {"model": model})
    assert parse_request(body, CATALOG, LIMITS).selection == selection


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ([], 400, None),
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [1, 2]}, 400, "input"),
        ({"input": " "}, 400, "input"),
        ({"input": ["a", {"txt": "b"}]}, 400, "input"),
        ({"input": {"text": 3}}, 400, "input"),
        ({"input": {"image": "https://example.org/a.png"}}, 400, "input"),
        ({"input": {"image": "data:image/png;base64,AAAA"}}, 400, "input"),
        ({"input": {"image": "data:image/png;base64,%"}}, 400, "input"),
        ({"input": "a", "model": "path_3"}, 404, "model"),
        ({"input": "a", "dimensions": 9}, 400, "dimensions"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions"),
        ({"input": "a", "dimensions": True}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a", "temperature": 1}, 400, "temperature"),
        ({"input": ["a", "b", "c"]}, 413, "input"),
        ({"input": "a" * 21}, 413, "input"),
        ({"input": {"image": data_uri(Image.new("RGB", (13, 5)))}}, 413, "input"),
    ],
)
def test_bad_requests(body: Any, status: int, param: str | None) -> None:
    """Each has its status and names the key."""
    with pytest.raises(RequestError) as caught:
        parse_request(body, CATALOG, LIMITS)
    assert (caught.value.status, caught.value.param) == (status, param)
    assert set(caught.value.to_body()["error"]) == {"message", "type", "param", "code"}


def test_not_json() -> None:
    """A body that is no JSON has status 400."""
    with pytest.raises(RequestError, match="not JSON"):
        parse_json(b"\xff{")


def test_default_path_must_exist() -> None:
    """A server does not start with a path that the model lacks."""
    with pytest.raises(ValueError, match="no path 3"):
        Catalog(3, 8, 8, 3)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_answers_have_the_embeddings_of_their_inputs(encoding_format: str) -> None:
    """Both formats say the same numbers."""
    request = parse_request({"input": ["a", "b"], "encoding_format": encoding_format}, CATALOG, LIMITS)
    embeddings = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    body = response_body(request, embeddings, 7)
    for row, item in zip(embeddings, body["data"], strict=True):
        value = item["embedding"]
        if encoding_format == "base64":
            value = torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.float32).tolist()
        assert torch.equal(torch.tensor(value), row)
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_dimensions_of_a_concatenated_aggregate_are_shared_by_its_paths() -> None:
    """The answer has as many numbers as were asked for, a third of them from each path."""
    catalog = Catalog(num_paths=3, path_dim=8, aggregate_dim=24, default=1)
    for model, dimensions, kept in (("aggregate", 24, 8), ("aggregate", 3, 1), ("path_0", 5, 5)):
        body = {"input": "a", "model": model, "dimensions": dimensions}
        assert parse_request(body, catalog, LIMITS).truncate_dim == kept
    for dimensions in (0, 2, 5, 27):
        body = {"input": "a", "model": "aggregate", "dimensions": dimensions}
        with pytest.raises(RequestError, match="use 3 to 24, a multiple of 3"):
            parse_request(body, catalog, LIMITS)


@pytest.mark.parametrize("mode", ["I;16", "P", "CMYK", "rotated", "L"])
def test_pictures_are_those_that_encode_reads_from_the_file(mode: str, tmp_path: Path) -> None:
    """16-bit greyscale is scaled, and the orientation is left to the model's settings."""
    pixels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300
    image, options = Image.fromarray(pixels), {"format": "png"}
    if mode != "I;16":
        image = Image.fromarray((pixels // 257).astype(np.uint8)).convert("L" if mode == "rotated" else mode)
    if mode in ("CMYK", "rotated"):
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"format": "tiff"} if mode == "CMYK" else {"format": "png", "exif": exif}
    image.save(tmp_path / "file", **options)
    code = base64.b64encode((tmp_path / "file").read_bytes()).decode()
    body = {"input": {"image": f"data:image/png;base64,{code}"}}
    ((item,),) = (parse_request(body, CATALOG, LIMITS).inputs,)
    for turn in (True, False):
        expected = load_image(str(tmp_path / "file"), turn=turn)
        served = load_image(item["image"], turn=turn)
        assert (served.size, served.tobytes()) == (expected.size, expected.tobytes())
    assert len(set(expected.tobytes())) > 10


def call_gate(gate: Gate, body: bytes, declared: int | None = None) -> tuple[int, Any]:
    """Status and JSON of one request in chunks of 100 bytes."""
    chunks = [body[start : start + 100] for start in range(0, len(body), 100)]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    scope = {"type": "http", "method": "POST", "path": EMBEDDINGS_PATH, "headers": headers}
    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the body that it got."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def test_gate_passes_the_whole_body_and_frees_its_place() -> None:
    """A good request reaches the application unchanged, again and again."""
    gate = Gate(echo, CATALOG, LIMITS, OPEN)
    body = json.dumps({"input": "a", "user": "u" * 500}).encode()
    for _ in range(3):
        assert call_gate(gate, body) == (200, json.loads(body))
    assert call_gate(gate, b"no")[0] == 400
    assert gate.waiting == 0


def test_gate_limits() -> None:
    """413 by the declared and by the true size, 429 with a full queue."""
    gate = Gate(echo, CATALOG, LIMITS, OPEN)
    assert call_gate(gate, b"{}", declared=2001)[0] == 413
    assert call_gate(gate, b" " * 2001)[0] == 413
    gate.waiting = 1
    status, body = call_gate(gate, b'{"input": "a"}')
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_gate_refuses_when_the_server_closes(seconds: float) -> None:
    """A request that is not answered by then has 503, and what answers it is stopped."""
    stopped = []

    async def never(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(True)
            raise

    gate = Gate(never, CATALOG, LIMITS, SimpleNamespace(value=time.monotonic() + seconds))
    status, body = call_gate(gate, b'{"input": "a"}')
    assert (status, body["error"]["type"]) == (503, "server_error")
    assert stopped == [True]
    assert gate.waiting == 0
