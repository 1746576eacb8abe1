"""The server's application in this process: parsing, limits, batches, and answers equal to ``encode``."""

import asyncio
import base64
import io
import json
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")

import uvicorn
from fastapi.testclient import TestClient

from parallel_decoupling.data.images import ImagePolicy
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.serve import Row, Server, build_app
from parallel_decoupling.serve_limits import Limits, RequestError, TimedProtocol
from tests.support.embedders import tiny_embedder
from tests.support.fit import ONE_PATH, small_embedder
from tests.support.tiny import noise_image

LIMITS = Limits(body_bytes=20_000, inputs=3, characters=20, pixels=64)


def data_uri(image: Image.Image) -> str:
    """The image as PNG in a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def clip(tiny_clip_dir: str) -> Embedder:
    return small_embedder(tiny_clip_dir, **ONE_PATH, adapter={"kind": "frozen"}).embedder


def client_of(server: Server) -> TestClient:
    return TestClient(build_app(server), "http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(embedder: Embedder) -> TestClient:
    return client_of(Server(embedder, 1, LIMITS))


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/embeddings", json=body)


def numbers(answer: Any) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    return torch.tensor([each["embedding"] for each in answer.json()["data"]])


@pytest.mark.parametrize("per_path", [False, True])
@pytest.mark.parametrize(
    ("model", "paths"), [(None, 1), ("default", 1), ("path_2", 2), ("aggregate", "aggregate")]
)
def test_answers_are_what_encode_gives(
    model: str | None, paths: Any, per_path: bool, tiny_backbone_dir: str
) -> None:
    """Texts, pictures and both; a string with a picture's name is a text; both number formats."""
    embedder = tiny_embedder(tiny_backbone_dir, per_path=per_path)
    client = client_of(Server(embedder, 1, LIMITS))
    image = noise_image(8, 8)
    inputs = [
        "setup.cfg.png",
        {"text": "b", "image": data_uri(image), "instruction": "find"},
        {"image": data_uri(image)},
    ]
    name = {} if model is None else {"model": model}
    answer = ask(client, input=inputs, **name)
    plain = [{"text": "setup.cfg.png"}, {"text": "b", "image": image, "instruction": "find"}, image]
    expected = embedder.encode(plain, paths=paths)
    torch.testing.assert_close(numbers(answer), expected, atol=3e-7, rtol=0)
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", model or "default")
    assert [each["index"] for each in body["data"]] == [0, 1, 2]
    coded = ask(client, input=inputs, encoding_format="base64", **name).json()
    for item, row in zip(coded["data"], numbers(answer), strict=True):
        found = torch.frombuffer(bytearray(base64.b64decode(item["embedding"])), dtype=torch.float32)
        assert torch.equal(found, row)
    one = [ask(client, input=item, **name).json()["usage"]["prompt_tokens"] for item in inputs]
    assert body["usage"] == {"prompt_tokens": sum(one), "total_tokens": sum(one)}
    assert min(one) > 0


def test_tokens_and_chats_are_what_they_stand_for(client: TestClient, embedder: Embedder) -> None:
    tokenizer, image = embedder.encoder.processor.tokenizer, noise_image(8, 8)
    tokens = tokenizer("a red circle")["input_ids"]
    texts = numbers(ask(client, input=["a red circle", "b"]))
    torch.testing.assert_close(numbers(ask(client, input=tokens)), texts[:1], atol=3e-7, rtol=0)
    mixed = numbers(ask(client, input=[tokens, "b"]))
    torch.testing.assert_close(mixed, texts, atol=3e-7, rtol=0)
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image), "detail": "low"}}]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "b"}]}
    chat = ask(client, messages=[{"role": "system", "content": "find"}, user])
    expected = embedder.encode([{"text": "b", "image": image, "instruction": "find"}], paths=1)
    torch.testing.assert_close(numbers(chat), expected, atol=3e-7, rtol=0)


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
REFUSED: list[tuple[Any, int, str | None, str]] = [  # a body or a call, status, key, and words of the message
    ([], 400, None, "body: Input should be an object"),
    ({}, 400, "input", "either input or"),
    ({"input": []}, 400, "input", "1 to 3 items"),
    ({"input": " "}, 400, "input", "needs a text or an image"),
    ({"input": ["a", {"txt": "b"}]}, 400, "input", "input[1].txt: "),
    ({"input": {"image": "data:image/png;base64,AAAA"}}, 400, "input", "input[0].image: must be a picture"),
    ({"input": {"image": "data:,AA"}}, 400, "input", "as data:image/png;base64,...: this is not a data URI"),
    ({"input": "<|image_1|> a"}, 400, "input", "input[0]: 0 images but 1"),
    ({"input": [1, 10**6]}, 400, "input", "tokens of another vocabulary"),
    ({"input": ["a", [1, -2]]}, 400, "input", "input[1] has text and tokens, or tokens of"),
    ({"messages": "a"}, 400, "messages", "messages: Input should be a valid array"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages", "messages[0].content: Input"),
    (
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        400,
        "messages",
        "messages[0].name: ",
    ),
    ({"messages": [{"role": "user", "content": [PICTURE, PICTURE]}]}, 400, "messages", "one image"),
    ({"messages": [{"role": "system", "content": [PICTURE]}]}, 400, "messages", "the user's"),
    ({"messages": []}, 400, "input", "either input or"),
    (
        {"messages": [{"role": "user", "content": "a"}], "input": "a"},
        400,
        "input",
        "either input or messages",
    ),
    ({"input": {f"key {number}": 0 for number in range(1000)}}, 400, "input", "1000 keys; known are text"),
    ({"input": "a", "model": "path_3"}, 404, "model", "no model 'path_3'; use default, aggregate, path_0"),
    ({"input": "a", "dimensions": 33}, 400, "dimensions", "use a multiple of 1 up to 32"),
    ({"input": "a", "dimensions": 0}, 400, "dimensions", "dimensions=0"),
    ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "temperature": 1}, 400, "temperature", "temperature: "),
    ({"input": ["a"] * 4}, 413, "input", "1 to 3 items"),
    ({"input": ["b", "a" * 21]}, 413, "input", "input[1] has more than 20 characters"),
    ({"input": {"image": data_uri(Image.new("RGB", (13, 5)))}}, 413, "input", "has more than 64 pixels"),
    ({"input": "a" * 20_000}, 413, None, "more than 20000 bytes"),
    ({"method": "GET", "url": "/v1/nothing"}, 404, None, "GET /v1/nothing; the server answers POST /v1/emb"),
    ({"url": "/v1/embeddings/"}, 404, None, "the server answers POST /v1/embeddings"),
    ({"method": "GET", "url": "/v1/models/gpt"}, 404, "model", "no model 'gpt'"),
    ({"method": "GET"}, 405, None, "GET /v1/embeddings; the server answers POST"),
    ({"headers": {"content-type": "text/plain"}}, 415, None, "must be application/json"),
    ({"headers": {"content-encoding": "gzip"}}, 415, None, "without compression"),
    ({"content": b'{"input": "a"'}, 400, None, "body: Invalid JSON"),
    ({"content": b'{"input": "half \\ud83d"}'}, 400, None, "hex escape"),
    ({"headers": {"host": "evil.example"}}, 400, None, "'evil.example' is not allowed; see the option allo"),
    ({"headers": {"host": "user@localhost"}}, 400, None, "'user@localhost' is not allowed"),
]


@pytest.mark.parametrize(("call", "status", "param", "words"), REFUSED)
def test_every_refusal_has_openais_form(
    call: Any, status: int, param: str | None, words: str, client: TestClient
) -> None:
    if not isinstance(call, dict) or not call.keys() & {"method", "url", "headers", "content"}:
        call = {"json": call}
    answer = client.request(**{"method": "POST", "url": "/v1/embeddings", **call})
    error = error_of(answer)
    code = "model_not_found" if "no model" in words else None
    found = (answer.status_code, error["param"], error["type"], error["code"])
    assert found == (status, param, "invalid_request_error", code)
    assert words in error["message"]


def error_of(answer: Any) -> Any:
    """What is in an error of OpenAI's form."""
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_files_of_this_machine_are_never_read(client: TestClient, tmp_path: Path) -> None:
    noise_image(8, 8).save(tmp_path / "x.png")
    for file in (str(tmp_path / "x.png"), f"file://{tmp_path}/x.png", "iVBORw0KGgo="):
        answer = ask(client, input={"image": file})
        assert answer.status_code == 400
        assert "data:image/png;base64,..." in answer.json()["error"]["message"]


@pytest.mark.parametrize("aggregation", ["mean", "concat"])
def test_dimensions_cut_paths_before_they_are_aggregated(aggregation: str, tiny_backbone_dir: str) -> None:
    """The answer has as many numbers as were asked for; of concatenated paths each gives its part."""
    embedder = tiny_embedder(tiny_backbone_dir, aggregation=aggregation)
    client = client_of(Server(embedder))
    step = 3 if aggregation == "concat" else 1
    for model, paths, dimensions, kept in (
        ("aggregate", "aggregate", 5 * step, 5),
        ("aggregate", "aggregate", 32 * step, 32),
        ("path_1", 1, 5, 5),
    ):
        found = numbers(ask(client, input="a red circle", model=model, dimensions=dimensions))
        expected = embedder.encode(["a red circle"], paths=paths, truncate_dim=kept)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for dimensions in (0, 2, 5, 97):
        answer = ask(client, input="a", model="aggregate", dimensions=dimensions)
        if step == 3:
            assert "use a multiple of 3 up to 96" in answer.json()["error"]["message"]


def rows_of(server: Server, *inputs: Any, **body: Any) -> list[Row]:
    return server.check(json.dumps({"input": list(inputs), **body}).encode())[1]


async def sent(server: Server, *inputs: Any, **body: Any) -> Any:
    """The answer to a request, past its head."""
    return json.loads(await server.embeddings(json.dumps({"input": list(inputs), **body}).encode()))


@pytest.mark.parametrize("kind", ["embedder", "clip"])
def test_those_that_wait_are_embedded_together(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most ``batch_size`` while the model is busy; a row that cannot be embedded fails its request alone.

    So does one at which the model itself fails, whatever it shared a pass with.
    """
    embedder: Embedder = request.getfixturevalue(kind)
    server, batches = Server(embedder, limits=replace(Limits(), batch_size=4)), list[int]()
    embed = server.embed

    def noted(rows: Any) -> Any:
        batches.append(len(rows))
        if any(row.raw.text == "a 7" for row in rows):
            raise RuntimeError("the model failed")
        return embed(rows)

    monkeypatch.setattr(server, "embed", noted)

    async def run() -> list[Any]:
        texts = [f"a {number}" if number != 5 else "<|image_1|> a" for number in range(12)]
        return await asyncio.gather(*(sent(server, text) for text in texts), return_exceptions=True)

    answers = asyncio.run(run())
    expected = embedder.encode([f"a {number}" for number in range(12)], paths=0)
    assert isinstance(answers[7], RuntimeError)
    assert isinstance(answers[5], RequestError)
    for number in {*range(12)} - {5, 7}:
        found = torch.tensor(answers[number]["data"][0]["embedding"])
        torch.testing.assert_close(found, expected[number], atol=1e-6, rtol=0)
    assert max(batches) == 4
    assert len(batches) < 12
    assert not server._waiting


def test_too_large_bodies_and_too_many_requests_are_refused(embedder: Embedder) -> None:
    """A body without a declared size is counted while it is read; with a full queue it is not read."""
    server = Server(embedder, limits=Limits(body_bytes=100, waiting=2))
    client = client_of(server)
    for size, status in ((100, 200), (101, 413)):
        body = b'{"input": "a"}'.ljust(size)
        answer = client.post("/v1/embeddings", content=iter([body[:60], body[60:]]))
        assert answer.status_code == status
    server._num_requests = 2
    answer = client.post("/v1/embeddings", content=b"anything")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert server._num_requests == 2


def test_pictures_are_resized_as_by_the_embedder(tiny_backbone_dir: str) -> None:
    embedder = small_embedder(tiny_backbone_dir).embedder
    client, picture = client_of(Server(embedder)), {"image": data_uri(noise_image(40, 30))}
    plain = ask(client, input=picture)
    embedder.images = ImagePolicy("low")
    resized = ask(client, input=picture)
    expected = embedder.encode([noise_image(40, 30)], paths=0)
    torch.testing.assert_close(numbers(resized), expected, atol=1e-6, rtol=0)
    assert resized.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]


def test_a_huge_request_takes_turns_with_the_others(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is bounded by rows and tokens; all get what they would get alone."""
    server, passes = Server(embedder, limits=replace(Limits(), batch_size=8, tokens=150)), list[int]()
    embed = server.embed
    monkeypatch.setattr(server, "embed", lambda rows: passes.append(len(rows)) or embed(rows))
    huge = [f"{number} a red circle left of a blue square" for number in range(16)]  # some 40 bytes each

    async def run() -> list[Any]:
        async def late(text: str) -> Any:
            while not passes:
                await asyncio.sleep(0.001)
            return await sent(server, text, model="aggregate"), len(passes)

        return await asyncio.gather(sent(server, *huge), late("small"), late("other"))

    large, *small = asyncio.run(run())
    assert max(passes) <= 5
    assert all(count <= 4 for _, count in small), "not after all of the large one's passes"
    assert len(passes) >= 5
    found = torch.tensor([each["embedding"] for each in large["data"]])
    torch.testing.assert_close(found, embedder.encode(huge, paths=0), atol=1e-6, rtol=0)
    found = torch.tensor(small[0][0]["data"][0]["embedding"])
    torch.testing.assert_close(found, embedder.encode("small"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("arrives_in", [1, 2, 4, 5])
def test_a_large_request_delays_a_small_one_by_one_pass(
    arrives_in: int, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is counted in tokens by an encoder that does nothing else; small ones come all the time."""
    server, passes = Server(embedder, limits=replace(Limits(), tokens=1000)), list[int]()

    def embed(rows: Any) -> Any:
        passes.append(0)
        time.sleep(0.1)  # a busy machine takes a while to send the small ones
        passes[-1] = sum(len(row.raw.text) for row in rows)
        return [(torch.zeros(4), 1) for _ in rows]

    monkeypatch.setattr(server, "embed", embed)

    async def run() -> int:
        async def small(text: str) -> int:
            while len(passes) < arrives_in:
                await asyncio.sleep(0.001)
            task = asyncio.create_task(sent(server, text))
            while not task.done() and text not in [rows[0].raw.text for rows in server._waiting]:
                await asyncio.sleep(0.001)
            start = sum(passes)
            await task
            return sum(passes) - start

        large = asyncio.create_task(sent(server, *(f"{number:0300}" for number in range(13))))
        delays = await asyncio.gather(*map(small, ("small", "other", "third")))
        await large
        return max(delays)

    assert asyncio.run(run()) <= 1000 + 2 * 15


def test_several_huge_requests_do_not_starve_one_that_comes_later(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests with more rows than a pass, those that had no turn for longest come first."""
    server, served = Server(embedder, limits=replace(Limits(), batch_size=2)), list[str]()
    monkeypatch.setattr(server, "embed", lambda rows: served.extend(row.raw.text for row in rows) or [0, 0])
    requests = [rows_of(server, *(f"{number} {row}" for row in range(2))) for number in range(5)]
    server._waiting = [deque(rows) for rows in requests]
    asyncio.run(server._embed_waiting())
    assert served == [f"{number} {row}" for row in range(2) for number in range(5)]


def test_a_deadline_answers_503_and_the_others_go_on(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(embedder, limits=replace(Limits(), seconds=0.2, batch_size=1))
    embed, slow = server.embed, [True]
    monkeypatch.setattr(server, "embed", lambda tasks: time.sleep(0.5 if slow[0] else 0) or embed(tasks))
    client = client_of(server)
    answer = ask(client, input="a")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], answer.headers["retry-after"]) == (503, "server_error", "1")
    assert error["message"] == "not answered within 0.2 s; send fewer or shorter inputs"
    slow[0], server.limits = False, Limits()
    assert ask(client, input="a").status_code == 200
    assert not server._waiting
    assert server._num_requests == 0


def test_a_row_that_fails_in_the_model_thread_is_its_requests_alone(embedder: Embedder) -> None:
    """The number is the input's place in the request, whatever turn it is embedded in."""
    server = Server(embedder, limits=replace(Limits(), batch_size=2))
    client = client_of(server)
    for bad, why in (("<|image_1|> a", "0 images but 1"), ("a <|image_pad|>", "own image token")):
        answer = ask(client, input=["a", "b", "c", bad, "d"])
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("input[3]: ")
        assert why in answer.json()["error"]["message"]
    thin = data_uri(Image.new("RGB", (2000, 2)))
    message = ask(client, input=["a", {"image": thin}]).json()["error"]["message"]
    assert "an image of 2000 x 2: absolute aspect ratio" in message


def test_texts_with_too_many_tokens_are_cut_and_counted(
    tiny_backbone_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = small_embedder(tiny_backbone_dir, max_tokens=8).embedder
    server, text = Server(embedder), "a red circle " * 50
    client = client_of(server)
    found = ask(client, input=[text, "a", text])
    with pytest.warns(UserWarning, match="more than 8 tokens"):
        expected = embedder.encode([text, "a", text], paths=0)
    torch.testing.assert_close(numbers(found), expected, atol=1e-6, rtol=0)
    assert server.num_cut == 2
    assert "texts cut to max_tokens so far: 2" in caplog.text
    strict = small_embedder(tiny_backbone_dir, max_tokens=8, long_text="error").embedder
    answer = ask(client_of(Server(strict)), input=["a", text])
    assert answer.status_code == 400
    assert "input[1]: " in answer.json()["error"]["message"]


def test_hosts_models_and_metrics(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts by name or pattern, with and without a port; a model by name; counts that Prometheus reads."""
    server = Server(embedder, 1)
    client = TestClient(build_app(Server(embedder), ("::1", "*.Example.com")))
    for host, status in (("[::1]:80", 200), ("a.example.com:1", 200), ("example.com", 400), ("", 400)):
        assert client.get("/health", headers={"host": host}).status_code == status
    client = client_of(server)
    assert client.get("/v1/models/aggregate").json()["id"] == "aggregate"
    assert numbers(ask(client, input=["a", "b"])).shape[0] == 2
    assert ask(client, input=[]).status_code == 400
    monkeypatch.setattr(server, "embed", lambda tasks: 1 / 0)
    failed = ask(client, input="a")
    assert (failed.status_code, error_of(failed)["type"]) == (500, "server_error")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = dict(re.findall(r"^parallel_decoupling_(\S+) ([\d.e-]+)$", answer.text, re.MULTILINE))
    assert float(found.pop("seconds_total")) > 0
    statuses = {f'requests_total{{status="{status}"}}': "1" for status in (200, 400, 500)}
    assert found == {**statuses, "rows_total": "2", "waiting": "0"}


@contextmanager
def listening(server: Server) -> Iterator[int]:
    """Give the port on which a server listens, in a thread."""
    options: Any = {"http": TimedProtocol, "timeout_keep_alive": server.limits.read_seconds}
    real = uvicorn.Server(uvicorn.Config(build_app(server), port=0, log_level="error", **options))
    thread = threading.Thread(target=real.run)
    thread.start()
    while not real.started:
        time.sleep(0.01)
    try:
        yield real.servers[0].sockets[0].getsockname()[1]
    finally:
        real.should_exit = True
        thread.join()


def test_slow_senders_keep_nobody_waiting_and_are_refused(embedder: Embedder) -> None:
    """300 heads without a body or without an end, of which one is sent letter by letter; 429 to nobody."""
    server = Server(embedder, limits=Limits(waiting=1, read_seconds=1.5))
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
    starts = [head, b"", b"no HTTP\r\n\r\n", *[head + b"Content-Length: 14\r\n\r\n{"] * 297]
    with listening(server) as port:
        slow = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in starts]
        for each, start in zip(slow, starts, strict=True):
            each.sendall(start)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as gone:
            gone.sendall(starts[-1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as good:
            good.sendall(head + b'Content-Length: 14\r\n\r\n{"input": "a"}')
            assert good.recv(15).startswith(b"HTTP/1.1 200")
        for _ in range(50):  # more of a head does not give it more time
            if not select.select(slow[:1], [], [], 0.2)[0]:
                slow[0].sendall(b"X")
        assert select.select(slow[:1], [], [], 0)[0]
        statuses = []
        for each in slow:
            with each, each.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
            statuses.append(int(head.split()[1]))
            assert json.loads(body)["error"]["message"]
        assert statuses == [400] * 3 + [408] * 297
        assert server.statuses == {200: 1, 400: 1, 408: 297}  # 400 for the client that went away
    assert server._num_requests == 0


@pytest.mark.slow
@pytest.mark.parametrize("package", ["langchain_openai", "llama_index.embeddings.openai"])
def test_clients_of_other_packages(package: str, embedder: Embedder) -> None:
    """A client's own batches, of texts; LangChain is told not to count tokens by another tokenizer."""
    clients = import_module(package)
    texts = ["a red circle", "a green star", "a text"]
    with listening(Server(embedder, 1)) as port:
        url = f"http://127.0.0.1:{port}/v1"
        if package == "langchain_openai":
            about: dict[str, Any] = {"base_url": url, "check_embedding_ctx_length": False}
            client = clients.OpenAIEmbeddings(model="default", api_key="none", **about)
            found, query = client.embed_documents(texts), client.embed_query(texts[0])
        else:
            client = clients.OpenAIEmbedding(model_name="default", api_key="none", api_base=url)
            found, query = client.get_text_embedding_batch(texts), client.get_query_embedding(texts[0])
    expected = embedder.encode(texts, paths=1)
    torch.testing.assert_close(torch.tensor(found), expected, atol=3e-7, rtol=0)
    torch.testing.assert_close(torch.tensor(query), expected[0], atol=3e-7, rtol=0)
