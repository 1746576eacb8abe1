"""Embeddings over HTTP in OpenAI's form: one process with FastAPI, uvicorn, and a thread for the model."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from starlette.exceptions import HTTPException
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import as_picture, load_image
from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.data.unusable import RowError, doubled, one_row
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import TokenEstimate, encode_rows
from parallel_decoupling.option_types import Port, PositiveFloat, PositiveInt, check_values, checked

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
        batch_size: inputs per forward pass, of as many requests.
        tokens: most tokens of a forward pass, unless a single input has more; requests take turns in it.
        seconds: a request that is not answered by then gets status 503.
    """

    body_bytes: PositiveInt = 20_000_000
    inputs: PositiveInt = 256
    characters: PositiveInt = 32_000
    pixels: PositiveInt = 16_000_000
    waiting: PositiveInt = 256
    batch_size: PositiveInt = 32
    tokens: PositiveInt = 16_384
    seconds: PositiveFloat = 120.0

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(Limits, vars(self), "limits.")


_LIMITS = Limits()
log = logging.getLogger(__name__)


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
        super().__init__(status, message, {"retry-after": "1"} if status in (429, 503) else None)
        self.param = param


class Task(NamedTuple):
    """What a checked request asks for; with ``truncate_dim`` so many numbers of each path."""

    rows: list[RawInput]
    output: Output
    truncate_dim: int | None
    first: int = 0  # number of its first row in the request


Result = tuple[Tensor, int] | RequestError  # embeddings [B, D] and number of tokens, or the error


@dataclass
class Waiting:
    """A request that is being embedded, some rows at a time."""

    task: Task
    done: list[tuple[Tensor, int]] = field(default_factory=list)
    num_done: int = 0

    def part(self, size: int) -> Task:
        """Return its next rows."""
        stop = self.num_done + size
        return self.task._replace(rows=self.task.rows[self.num_done : stop], first=self.num_done)


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
        self._waiting: dict[asyncio.Future[Result], Waiting] = {}
        self.num_cut = 0  # texts of which the ends were cut off
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
            body = await asyncio.to_thread(Body.model_validate_json, bytes(content))
            return await asyncio.wait_for(self.embeddings(body), self.limits.seconds)
        except asyncio.TimeoutError as error:
            late = f"not answered within {self.limits.seconds:g} s; send fewer or shorter inputs"
            raise RequestError(late, 503, None) from error
        finally:
            self._num_requests -= 1

    async def embeddings(self, body: Body) -> dict[str, Any]:
        """Embed the inputs of a body; returns OpenAI's ``CreateEmbeddingResponse``."""
        task = await asyncio.to_thread(self.check, body)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[future] = Waiting(task)
        try:
            while not future.done():  # a turn is not stopped: it is that of other requests, too
                await asyncio.shield(self._take_turn(future))
            result = future.result()
        finally:
            del self._waiting[future]
            future.cancel()
        if isinstance(result, RequestError):
            raise result
        vectors: list[Any] = result[0].tolist()
        if body.encoding_format == "base64":  # of little-endian float32
            rows = result[0].numpy().astype("<f4")
            vectors = [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]
        data = [{"object": "embedding", "index": n, "embedding": each} for n, each in enumerate(vectors)]
        usage = dict.fromkeys(("prompt_tokens", "total_tokens"), result[1])
        return {"object": "list", "data": data, "model": body.model, "usage": usage}

    async def _take_turn(self, future: asyncio.Future[Result]) -> None:
        """Embed the next rows of all requests, unless this one is answered by now."""
        async with self._model_is_free:  # first come, first served
            if future.done():
                return
            parts = self._next_rows()
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._model_thread, self.embed, list(parts.values()))
            for each, result in zip(parts, results, strict=True):
                if each.done():  # its time is over
                    continue
                waiting = self._waiting[each] = self._waiting.pop(each)  # behind those that had no turn
                if isinstance(result, RequestError):
                    each.set_result(result)
                    continue
                waiting.done.append(result)
                waiting.num_done += len(result[0])
                if waiting.num_done == len(waiting.task.rows):
                    vectors, counts = zip(*waiting.done, strict=True)
                    each.set_result((torch.cat(vectors), sum(counts)))

    def _next_rows(self) -> dict[asyncio.Future[Result], Task]:
        """Take a row of every request in turn until a forward pass is full."""
        estimate, tokens = TokenEstimate(self.embedder.collator, bytes_per_token=1), 0.0
        sizes: dict[asyncio.Future[Result], int] = defaultdict(int)
        for number, (future, row) in enumerate(self._rows_in_turn()):
            tokens += estimate(row)
            if number and (number == self.limits.batch_size or tokens > self.limits.tokens):
                break
            sizes[future] += 1
        return {future: self._waiting[future].part(size) for future, size in sizes.items()}

    def _rows_in_turn(self) -> Iterator[tuple[asyncio.Future[Result], RawInput]]:
        waiting = [(future, each) for future, each in self._waiting.items() if not future.done()]
        for rows in zip_longest(*(each.task.rows[each.num_done :] for _, each in waiting)):
            yield from ((future, row) for (future, _), row in zip(waiting, rows, strict=True) if row)

    def embed(self, tasks: Sequence[Task]) -> Sequence[Result]:
        """Embed inputs of several requests together; one that cannot be is the error of its request."""
        groups: dict[tuple[Output, int | None], list[Task]] = defaultdict(list)
        for task in tasks:
            groups[task.output, task.truncate_dim].append(task)
        results: dict[int, Result] = {}
        options: dict[str, Any] = {"batch_size": self.limits.batch_size, "show_progress": False}
        for (output, dim), group in groups.items():
            rows = [row for task in group for row in task.rows]
            options |= {"paths": output, "truncate_dim": dim, "keep_going": True}
            encoded = encode_rows(self.embedder.encoder, self.embedder.collator, rows, **options)
            stop = 0
            for task in group:
                start, stop = stop, stop + len(task.rows)
                counts = encoded.num_tokens[start:stop]
                results[id(task)] = encoded.embeddings[start:stop], int(counts.sum())
                if bad := sorted(encoded.bad_rows.keys() & range(start, stop)):
                    why = encoded.bad_rows[bad[0]]
                    results[id(task)] = RequestError(f"input[{task.first + bad[0] - start}]: {why}")
            if doubled(self.num_cut, encoded.num_cut):
                log.warning("texts cut to max_tokens so far: %d", self.num_cut + encoded.num_cut)
            self.num_cut += encoded.num_cut
        return [results[id(task)] for task in tasks]

    def check(self, body: Body) -> Task:
        """Check a request, and decode its images; a ``ValueError`` names the key, or the input's number."""
        if body.model not in self.models:
            raise RequestError(f"no model {body.model!r}; use {', '.join(self.models)}", 404, "model")
        output, limits = self.models[body.model], self.limits
        if not 0 < len(body.input) <= limits.inputs:
            raise RequestError(f"input must have 1 to {limits.inputs} items", 413 if body.input else 400)
        rows = to_raw_inputs(_checked(*each, limits) for each in enumerate(body.input))
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
        if isinstance(error, RowError):
            param = "input"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            place = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
            message = f"{''.join(place).lstrip('.') or 'body'}: {first['msg']}"
            param = place[0][1:] if place else None
        status = getattr(error, "status_code", 400)
        kinds = {429: "rate_limit_error", 503: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        content = {"message": message, "type": kind, "param": param, "code": None}
        return JSONResponse({"error": content}, status, getattr(error, "headers", None))

    return app


@checked()
def serve(
    model: str, host: str = "127.0.0.1", port: Port = 8000, path: Output = 0, limits: Limits = _LIMITS
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
    with one_row(f"{where}: image must be a picture in base64, as data:image/png;base64,...: "):
        image = as_picture(uri) if uri[:5].lower() == "data:" else None  # never a file of this machine
        if not isinstance(image, Image.Image):
            raise ValueError("this is no data URI")
    if math.prod(image.size) > limits.pixels:
        raise RequestError(f"{where}: image has more than {limits.pixels} pixels", 413)
    with one_row(f"{where}: "):
        load_image(image)  # a check; encode does it again, with the model's settings
    return image
