"""The real server in a process of its own, asked by the real client over loopback."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from parallel_decoupling.commands import load_model
from tests.support.servers import Start, said
from tests.support.tiny import noise_image
from tests.test_serve import data_uri

pytestmark = pytest.mark.slow

LIMITS = ("--limits.body_bytes", 100_000)


def connect(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_concurrent_clients_get_what_encode_gives(checkpoint: Path, start: Start) -> None:
    """32 clients, mixed models and inputs, four of them refused; then limits; then SIGTERM."""
    hosts = ("--allowed_hosts", '["a.example", "*.b.example"]')
    process, address = start("serve", checkpoint, *LIMITS, *hosts, answers="/health")
    client, embedder, image = connect(address), load_model(checkpoint), noise_image(40, 30)
    paths: list[Any] = ["aggregate", 0, 1]

    def inputs(number: int, picture: Any) -> list[Any]:
        return [f"a red circle {number}", {"text": "what colour", "image": picture}, {"image": picture}]

    def ask(number: int) -> torch.Tensor:
        model = ("aggregate", "path_0", "path_1")[number % 3]
        answer = client.embeddings.create(model=model, input=inputs(number, data_uri(image)))
        assert answer.usage.prompt_tokens > 0
        return torch.tensor([row.embedding for row in answer.data])

    with ThreadPoolExecutor(36) as pool:
        guilty = [
            pool.submit(client.embeddings.create, model="default", input="<|image_1|> a") for _ in range(4)
        ]
        answers = list(pool.map(ask, range(32)))
    for number, answer in enumerate(answers):
        expected = embedder.encode(inputs(number, image), paths=paths[number % 3])
        torch.testing.assert_close(answer, expected, atol=1e-6, rtol=0)
    for future in guilty:
        assert isinstance(future.exception(), openai.BadRequestError)
    assert [row.id for row in client.models.list()] == ["default", "aggregate", "path_0", "path_1"]
    assert client.models.retrieve("aggregate").id == "aggregate"
    for host, status in (("a.example", 200), ("x.b.example:80", 200), ("c.example", 400)):
        assert httpx.get(f"{address}/metrics", headers={"host": host}).status_code == status
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.embeddings.create(model="gpt", input="a")
    with pytest.raises(openai.APIStatusError, match="more than 100000 bytes"):
        client.embeddings.create(model="default", input="a" * 100_001)
    assert stopped_cleanly(process)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_all_in_flight_are_answered_after_sigterm(checkpoint: Path, start: Start) -> None:
    process, address = start("serve", checkpoint, answers="/health")
    client = connect(address)
    with ThreadPoolExecutor(64) as pool:
        request = {"model": "aggregate", "input": ["a circle"] * 256}
        asked = [pool.submit(client.embeddings.create, **request) for _ in range(64)]
        waiting = 0
        while waiting + sum(each.done() for each in asked) < 64:  # until all are there
            text = httpx.get(f"{address}/metrics", timeout=60).text
            waiting = int(text.split("parallel_decoupling_waiting ")[1].split()[0])
        assert not all(each.done() for each in asked)
        assert stopped_cleanly(process)
        assert [each.exception() for each in asked] == [None] * 64


def test_sigterm_while_loading(checkpoint: Path, start: Start) -> None:
    process, _ = start("serve", checkpoint, answers=None)
    time.sleep(1)
    process.terminate()
    assert process.wait(timeout=60) == -15


def stopped_cleanly(process: subprocess.Popen[bytes]) -> bool:
    """SIGTERM ends the process with code 0 and without a word, and everything that it started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    code = process.wait(timeout=60)
    assert (code, said(process)) == (0, "")
    return not psutil.wait_procs(children, timeout=5)[1]
