"""The real server in processes of its own, asked by the real client over loopback."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from parallel_decoupling.evaluation.embedder import Embedder
from tests.serving.conftest import Start, said
from tests.serving.test_requests import data_uri
from tests.support.tiny import noise_image

pytestmark = pytest.mark.slow

GUILTY = "<|image_1|> without an image"


def test_concurrent_clients_get_what_encode_gives(checkpoint: Path, start: Start) -> None:
    """32 clients, mixed models and inputs; then refusals; then SIGTERM ends every process."""
    limits = ("--limits.inputs", 3, "--limits.body_bytes", 100_000)
    process, address = start("serve", checkpoint, *limits, answers="/health")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    embedder = Embedder.from_pretrained(checkpoint)
    image = noise_image(40, 30)
    selections: list[Any] = ["aggregate", 0, 1]

    def inputs(number: int, picture: Any) -> list[Any]:
        return [f"a red circle {number}", {"text": "what colour", "image": picture}, {"image": picture}]

    def ask(number: int) -> torch.Tensor:
        model = ("aggregate", "path_0", "path_1")[number % 3]
        answer = client.embeddings.create(model=model, input=inputs(number, data_uri(image)))
        assert answer.usage.prompt_tokens > 0
        return torch.tensor([row.embedding for row in answer.data])

    with ThreadPoolExecutor(32) as pool:
        guilty = [pool.submit(client.embeddings.create, model="default", input=GUILTY) for _ in range(4)]
        answers = list(pool.map(ask, range(32)))
    for number, answer in enumerate(answers):
        expected = embedder.encode(inputs(number, image), paths=selections[number % 3])
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)
    for future in guilty:
        assert isinstance(future.exception(), openai.BadRequestError)
    for options in ({"dimensions": 5}, {"dimensions": 5, "encoding_format": "float"}):
        short = client.embeddings.create(model="default", input="a", **options).data[0].embedding
        whole = embedder.encode(["a"], paths=0)[0, :5]
        torch.testing.assert_close(torch.tensor(short), whole / whole.norm(), atol=1e-5, rtol=0)
    assert [row.id for row in client.models.list()] == ["default", "aggregate", "path_0", "path_1"]
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.embeddings.create(model="gpt", input="a")
    for too_large in (["a"] * 4, "a" * 100_001):
        with pytest.raises(openai.APIStatusError) as refused:
            client.embeddings.create(model="default", input=too_large)
        assert refused.value.status_code == 413
    assert stopped_cleanly(process)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_sigterm_under_load(checkpoint: Path, start: Start) -> None:
    """Requests in flight are answered, later ones are refused or find no server."""
    process, address = start("serve", checkpoint, answers="/health")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def ask(number: int) -> int:
        try:
            client.embeddings.create(model="aggregate", input=[f"a {number}"] * 64)
        except openai.APIStatusError as error:
            return error.status_code
        except openai.APIConnectionError:
            return 0
        return 200

    with ThreadPoolExecutor(16) as pool:
        statuses = [pool.submit(ask, number) for number in range(200)]
        wait(statuses[:8], return_when=FIRST_COMPLETED)
        assert stopped_cleanly(process)
    counts = Counter(status.result() for status in statuses)
    assert set(counts) <= {0, 200, 503}
    assert counts[200] >= 8
    assert counts[0] > 0  # it ended while clients were asking


def test_sigterm_while_loading(checkpoint: Path, start: Start) -> None:
    """The worker is there and does not answer yet."""
    process, _ = start("serve", checkpoint, answers=None)
    end = time.monotonic() + 60
    while time.monotonic() < end and not any("spawn_main" in str(c.cmdline()) for c in children(process)):
        time.sleep(0.05)
    assert stopped_cleanly(process)


def test_full_queue_and_lost_worker(checkpoint: Path, start: Start) -> None:
    """A worker that stands still: 429 above the limit. It is killed: 503, and the server ends with code 1."""
    process, address = start("serve", checkpoint, "--limits.waiting", 3, answers="/health")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    worker = next(child for child in children(process) if "spawn_main" in str(child.cmdline()))
    worker.suspend()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.embeddings.create, model="default", input="a") for _ in range(8)]
        for _ in range(5):
            done, _ = wait(asked, timeout=30, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                assert isinstance(error, openai.RateLimitError)
                assert error.response.headers["retry-after"] == "1"
                asked.remove(future)
            if len(asked) == 3:
                break
        assert len(asked) == 3
        assert not wait(asked, timeout=0.5).done
        before = children(process)
        worker.kill()
        errors = [future.exception() for future in asked]
    assert [getattr(error, "status_code", error) for error in errors] == [503] * 3
    assert process.wait(timeout=60) == 1
    assert not psutil.wait_procs(before, timeout=5)[1]
    assert said(process) == "error: the worker with the model ended with exit code -9\n"


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All descendants."""
    return psutil.Process(process.pid).children(recursive=True)


def stopped_cleanly(process: subprocess.Popen[bytes]) -> bool:
    """SIGTERM ends the process with code 0 and without a word, and everything that it started."""
    before = children(process)
    assert before
    process.terminate()
    code = process.wait(timeout=60)
    left = psutil.wait_procs(before, timeout=5)[1]
    assert (code, said(process)) == (0, "")
    return not left
