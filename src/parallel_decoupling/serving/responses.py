"""From embeddings to the body of the answer."""

from __future__ import annotations

import base64
from typing import Any

from torch import Tensor

from parallel_decoupling.serving.requests import EmbeddingRequest


def response_body(request: EmbeddingRequest, embeddings_BD: Tensor, num_tokens: int) -> dict[str, Any]:
    """Write the answer.

    Args:
        request: that is answered.
        embeddings_BD: of its inputs.
        num_tokens: of its inputs, image tokens included.

    Returns:
        OpenAI's ``CreateEmbeddingResponse``; base64 is of little-endian float32.
    """
    data = []
    for index, embedding_D in enumerate(embeddings_BD):
        values: Any = embedding_D.tolist()
        if request.encoding_format == "base64":
            values = base64.b64encode(embedding_D.numpy().astype("<f4").tobytes()).decode("ascii")
        data.append({"object": "embedding", "index": index, "embedding": values})
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}
