"""Embeddings over HTTP in OpenAI's form: one process with FastAPI, uvicorn, and a thread for the model."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import signal
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from starlette.exceptions import HTTPException
from torch import Tensor

from parallel_decoupling.batch import EncoderInputs, RawInput
from parallel_decoupling.data.collate import Collator
from parallel_decoupling.data.images import load_image
from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import encode
from parallel_decoupling.model.open_clip import OpenCLIPProcessor

Output = int | Literal["aggregate"]  # what a model name stands for: a path's number, or the aggregate
GRACE_SECONDS = 30  # accepted requests have so long after SIGTERM to be answered


@dataclass(frozen=True)
class Limits:
    """What requests may cost.

    Args:
        body_bytes: most bytes in a request.
        inputs: most inputs in a request.
        characters: most characters in an input's text and instruction together.
        pixels: most pixels in an image.
        waiting: most requests that are being answered or wait; further ones get status 429.
        batch_size: inputs per forward pass, and requests that are embedded together.
    """

    body_bytes: int = 20_000_000
    inputs: int = 256
    characters: int = 32_000
    pixels: int = 16_000_000
    waiting: int = 256
    batch_size: int = 32


_LIMITS = Limits()


class Input(BaseModel):
    """A text, an image, or both."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str = ""
    image: str | None = None
    instruction: str | None = None


class Body(BaseModel):
    """The body of a request, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    input: list[Input]
    model: str = "default"
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        # strings are texts, never names of files
        items = value if isinstance(value, list) else [value]
        return [{"text": item} if isinstance(item, str) else item for item in items]


class RequestError(HTTPException):
    """A request that is refused, with its status and the key of the body that is to blame."""

    def __init__(self, message: str, status: int = 400, param: str | None = "input") -> None:
        super().__init__(status, message, {"retry-after": "1"} if status == 429 else None)
        self.param = param


class Task(NamedTuple):
    """What a checked request asks for; with ``truncate_dim`` so many numbers of each path."""

    rows: list[RawInput]
    output: Output
    truncate_dim: int | None


Result = tuple[Tensor, int] | ValueError  # embeddings [B, D] and number of tokens, or the error


class CountingCollator(Collator):
    """Remembers every row's number of tokens, image tokens included."""

    num_tokens: dict[int, int]

    def encode_inputs(self, inputs: Sequence[RawInput], *args: Any, **kwargs: Any) -> EncoderInputs:
        """Tokenise as ``Collator`` does."""
        encoded = super().encode_inputs(inputs, *args, **kwargs)
        self.num_tokens.update(zip(map(id, inputs), encoded.lengths.tolist(), strict=True))
        return encoded


class Server:
    """Checks requests, and embeds together those that wait together.

    The model name ``default`` stands for ``path``; a ``ValueError`` if the model does not have it.
    """

    def __init__(self, embedder: Embedder, path: Output = 0, limits: Limits | None = None) -> None:
        self.embedder, self.limits = embedder, limits or Limits()
        paths: dict[str, Output] = {f"path_{number}": number for number in range(embedder.num_paths)}
        self.models: dict[str, Output] = {"default": path, "aggregate": "aggregate", **paths}
        if path not in [*paths.values(), "aggregate"]:
            raise ValueError(f"there is no path {path}; the model has paths 0 to {embedder.num_paths - 1}")
        self._num_requests = 0
        self._waiting: dict[asyncio.Future[Result], Task] = {}
        self._model_is_free = asyncio.Lock()
        self._model_thread = ThreadPoolExecutor(1)

    async def answer(self, request: Request) -> dict[str, Any]:
        """Read a request and embed its inputs; raises ``ValueError`` or ``RequestError`` for a bad one."""
        if self._num_requests >= self.limits.waiting:
            raise RequestError(f"{self._num_requests} requests are waiting; try again later", 429, None)
        self._num_requests += 1
        try:
            content = bytearray()
            async for chunk in request.stream():
                content += chunk
                if len(content) > self.limits.body_bytes:
                    raise RequestError(f"the body has more than {self.limits.body_bytes} bytes", 413, None)
            return await self.embeddings(await asyncio.to_thread(Body.model_validate_json, bytes(content)))
        finally:
            self._num_requests -= 1

    async def embeddings(self, body: Body) -> dict[str, Any]:
        """Embed the inputs of a body; returns OpenAI's ``CreateEmbeddingResponse``."""
        task = await asyncio.to_thread(self.check, body)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[future] = task
        try:
            async with self._model_is_free:  # first come, first served, so this may have been embedded by now
                if not future.done():
                    await self._embed_oldest()
            result = await future
        finally:
            del self._waiting[future]
        if isinstance(result, ValueError):
            raise result
        vectors: list[Any] = result[0].tolist()
        if body.encoding_format == "base64":  # of little-endian float32
            rows = result[0].numpy().astype("<f4")
            vectors = [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]
        data = [{"object": "embedding", "index": n, "embedding": each} for n, each in enumerate(vectors)]
        usage = dict.fromkeys(("prompt_tokens", "total_tokens"), result[1])
        return {"object": "list", "data": data, "model": body.model, "usage": usage}

    async def _embed_oldest(self) -> None:
        oldest = [future for future in self._waiting if not future.done()][: self.limits.batch_size]
        tasks = [self._waiting[future] for future in oldest]
        results = await asyncio.get_running_loop().run_in_executor(self._model_thread, self.embed, tasks)
        for future, result in zip(oldest, results, strict=True):
            future.set_result(result)

    def embed(self, tasks: Sequence[Task]) -> Sequence[Result]:
        """Embed the inputs of several requests together, or one by one if that fails, as ``encode`` does."""
        encoder, images = self.embedder.encoder, self.embedder.images
        collator = CountingCollator(encoder.processor, image_token=encoder.image_token, images=images)
        collator.num_tokens = {}
        groups: dict[tuple[Output, int | None], list[Task]] = defaultdict(list)
        for task in tasks:
            groups[task.output, task.truncate_dim].append(task)
        embeddings: dict[int, Tensor] = {}
        options: dict[str, Any] = {"batch_size": self.limits.batch_size, "show_progress": False}
        try:
            for (output, dim), group in groups.items():
                rows = [row for task in group for row in task.rows]
                joined = encode(encoder, collator, rows, paths=output, truncate_dim=dim, **options)
                parts = torch.split(joined, [len(task.rows) for task in group])
                embeddings.update(zip(map(id, group), parts, strict=True))
        except ValueError as error:
            return [error] if len(tasks) == 1 else [self.embed([task])[0] for task in tasks]
        counts = [sum(collator.num_tokens[id(row)] for row in task.rows) for task in tasks]
        return [(embeddings[id(task)], count) for task, count in zip(tasks, counts, strict=True)]

    def check(self, body: Body) -> Task:
        """Check a request, and decode its images; a ``ValueError`` names the key, or the input's number."""
        if body.model not in self.models:
            raise RequestError(f"no model {body.model!r}; use {', '.join(self.models)}", 404, "model")
        output, limits = self.models[body.model], self.limits
        if not 0 < len(body.input) <= limits.inputs:
            raise RequestError(f"input must have 1 to {limits.inputs} items", 413 if body.input else 400)
        rows = to_raw_inputs(_checked(*each, limits) for each in enumerate(body.input))
        processor = self.embedder.encoder.processor
        texts = [f"{item.instruction or ''} {item.text}" for item in body.input]
        if isinstance(processor, OpenCLIPProcessor) and processor.cuts(texts):
            raise RequestError(f"a text has more than the {processor.context_length} tokens of this model")
        if body.dimensions is None:
            return Task(rows, output, None)
        path_dim = self.embedder.embed_dim
        joined = self.embedder.encoder.aggregate_dim // path_dim if output == "aggregate" else 1
        if not 0 < body.dimensions <= joined * path_dim or body.dimensions % joined:
            message = f"use a multiple of {joined} up to {joined * path_dim}"
            raise RequestError(message, param="dimensions")
        return Task(rows, output, body.dimensions // joined)


def build_app(server: Server) -> FastAPI:
    """Make the application: ``POST /v1/embeddings``, ``GET /v1/models`` and ``GET /health``."""
    app = FastAPI(openapi_url=None)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> JSONResponse:
        return JSONResponse(await server.answer(request))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {"object": "model", "created": 0, "owned_by": "parallel-decoupling"}
        return {"object": "list", "data": [{"id": name, **about} for name in server.models]}

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.exception_handler(HTTPException)
    @app.exception_handler(ValueError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        message, param = getattr(error, "detail", str(error)), getattr(error, "param", None)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            place = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
            message = f"{''.join(place).lstrip('.') or 'body'}: {first['msg']}"
            param = place[0][1:] if place else None
        status = getattr(error, "status_code", 400)
        kind = "rate_limit_error" if status == 429 else "invalid_request_error"
        content = {"message": message, "type": kind, "param": param, "code": None}
        return JSONResponse({"error": content}, status, getattr(error, "headers", None))

    return app


def serve(
    model: str, host: str = "127.0.0.1", port: int = 8000, path: Output = 0, limits: Limits = _LIMITS
) -> None:
    """Serve embeddings over HTTP in OpenAI's form until SIGTERM or Ctrl-C; what was accepted is answered.

    Args:
        model: checkpoint, run or exported folder.
        host: address to listen on.
        port: port to listen on.
        path: what the model name "default" stands for.
        limits: of requests and batches.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    app = build_app(Server(Embedder.from_pretrained(model).to(device), path, limits))
    options: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": GRACE_SECONDS}
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, **options))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles the signal, and raises it again at the end
    server.run()


def _checked(number: int, item: Input, limits: Limits) -> dict[str, Any]:
    """Return an input as ``Embedder.encode`` takes it, its image decoded."""
    where, characters = f"input[{number}]", len(item.text) + len(item.instruction or "")
    if characters > limits.characters:
        raise RequestError(f"{where} has more than {limits.characters} characters", 413)
    if item.image is None and not item.text.strip():
        raise RequestError(f"{where} has neither text nor image")
    image = None if item.image is None else _image(item.image, where, limits)
    return {"text": item.text or None, "image": image, "instruction": item.instruction}


def _image(uri: str, where: str, limits: Limits) -> Image.Image:
    head, _, data = uri.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestError(f"{where}: image must be a data URI (data:image/png;base64,...)")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if math.prod(image.size) > limits.pixels:
            raise RequestError(f"{where}: image has more than {limits.pixels} pixels", 413)
        load_image(image)  # a check; encode does it again, with the model's settings
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{where}: image cannot be decoded: {error.__cause__ or error}") from error
    return image
