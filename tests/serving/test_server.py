"""The real server in processes of its own, asked by the real client over loopback."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from parallel_decoupling.training.loading import load_embedder
from tests.serving.conftest import Start
from tests.serving.test_requests import data_uri
from tests.support.tiny import noise_image

pytestmark = pytest.mark.slow


def test_concurrent_clients_get_what_encode_gives(checkpoint: Path, start: Start) -> None:
    """32 clients, mixed models and inputs; then refusals; then SIGTERM ends every process."""
    process, address = start("serve", checkpoint, "--limits.inputs", 3, answers="/health")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    embedder = load_embedder(checkpoint)
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
        answers = list(pool.map(ask, range(32)))
    for number, answer in enumerate(answers):
        expected = embedder.encode(inputs(number, image), paths=selections[number % 3])
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)
    for options in ({"dimensions": 5}, {"dimensions": 5, "encoding_format": "float"}):
        short = client.embeddings.create(model="default", input="a", **options).data[0].embedding
        whole = embedder.encode(["a"], paths=0)[0, :5]
        torch.testing.assert_close(torch.tensor(short), whole / whole.norm(), atol=1e-5, rtol=0)
    assert [row.id for row in client.models.list()] == ["default", "aggregate", "path_0", "path_1"]
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.embeddings.create(model="gpt", input="a")
    with pytest.raises(openai.APIStatusError) as refused:
        client.embeddings.create(model="default", input=["a"] * 4)
    assert refused.value.status_code == 413
    process.terminate()
    assert process.wait(timeout=60) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
