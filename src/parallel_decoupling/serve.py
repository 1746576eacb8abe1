"""Embeddings over HTTP in OpenAI's form: one process with FastAPI, uvicorn, and a thread for the model."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import unquote

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, FailFast, ValidationInfo, field_validator, model_validator
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.images import as_picture, load_image
from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.data.unusable import doubled, one_row
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import TokenEstimate, encode_rows
from parallel_decoupling.option_types import Names, Port, checked
from parallel_decoupling.serve_limits import Limits, RequestError, TimedProtocol, chat_input, refusal, within

Output = int | Literal["aggregate"]  # what a model name stands for: a path's number, or the aggregate
GRACE_SECONDS = 30  # accepted requests have so long after SIGTERM to be answered
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_JSON = ("application/json", "application/x-www-form-urlencoded")  # the latter is what curl -d says
_LIMITS = Limits()
log = logging.getLogger(__name__)


class Known(BaseModel):
    """An object without unknown keys; of too many not every one is an error of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > 20:
            raise ValueError(f"{len(value)} keys; known are {', '.join(cls.model_fields)}")
        return value


class Input(Known):
    """A text (or the model's own tokens of one), an image, or both."""

    text: str = ""
    image: str | None = None
    instruction: str | None = None
    tokens: Annotated[list[int], FailFast()] = []


class Body(Known):
    """The body of a request, as OpenAI's clients send it."""

    input: Annotated[list[Input], FailFast()]
    model: str = "default"
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_chat(cls, value: Any) -> Any:
        if isinstance(value, dict) and "messages" in value and "input" not in value:
            value["input"] = chat_input(value.pop("messages"))
        return value

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, value: Any, info: ValidationInfo) -> Any:
        # strings are texts, never names of files
        single = not isinstance(value, list) or {*map(type, value)} == {int}
        items, limits = [value] if single else value, info.context or _LIMITS
        if not 0 < len(items) <= limits.inputs:
            raise RequestError(f"input must have 1 to {limits.inputs} items", 413 if items else 400)
        kinds: dict[type, str] = {str: "text", list: "tokens"}
        return [{kinds[type(item)]: item} if type(item) in kinds else item for item in items]


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
    is_large: bool = False  # more tokens than a forward pass has
    done: list[tuple[Tensor, int]] = field(default_factory=list)
    num_done: int = 0

    def part(self, size: int) -> Task:
        """Return its next rows."""
        return self.task._replace(rows=self.task.rows[:size], first=self.num_done)


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
        self._num_requests, self._num_rows, self._seconds = 0, 0, 0.0
        self.statuses: Counter[int] = Counter()  # how many requests were answered with each
        self._waiting: dict[asyncio.Future[Result], Waiting] = {}
        self.num_cut = 0  # texts of which the ends were cut off
        self._model_is_free = asyncio.Lock()
        self._model_thread = ThreadPoolExecutor(1)

    async def answer(self, request: Request) -> bytes:
        """Read a request and embed its inputs; raises ``ValueError`` or ``RequestError`` for a bad one."""
        start, limits = time.monotonic(), self.limits
        content = await within(limits.read_seconds, self._read(request), 408, "the body did not arrive")
        if self._num_requests >= limits.waiting:
            raise RequestError(f"{self._num_requests} requests are waiting; try again later", 429, None)
        self._num_requests += 1
        try:
            return await within(limits.seconds, self._embed_content(content), 503, "not answered")
        finally:
            self._num_requests -= 1
            self._seconds += time.monotonic() - start

    async def _embed_content(self, content: bytes) -> bytes:
        body = await asyncio.to_thread(Body.model_validate_json, content, context=self.limits)
        return await asyncio.to_thread(to_json, await self.embeddings(body))

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", _JSON[0]).partition(";")[0].strip().lower()
        if kind not in _JSON or "content-encoding" in request.headers:
            raise RequestError("the body must be application/json without compression", 415, None)
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > self.limits.body_bytes:
                raise RequestError(f"the body has more than {self.limits.body_bytes} bytes", 413, None)
        return bytes(content)

    def metrics(self) -> str:
        """Return counts since the start in Prometheus' text form."""
        counts = [(f'requests_total{{status="{each}"}}', number) for each, number in self.statuses.items()]
        others = {"rows_total": self._num_rows, "seconds_total": self._seconds, "waiting": self._num_requests}
        return "".join(f"parallel_decoupling_{name} {count}\n" for name, count in [*counts, *others.items()])

    async def embeddings(self, body: Body) -> dict[str, Any]:
        """Embed the inputs of a body; returns OpenAI's ``CreateEmbeddingResponse``."""
        task = await asyncio.to_thread(self.check, body)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        tokens = await asyncio.to_thread(lambda: sum(map(self._estimate(), task.rows)))
        self._waiting[future] = Waiting(task, tokens > self.limits.tokens)
        try:
            while not future.done():  # a turn is not stopped: it is that of other requests, too
                await asyncio.shield(self._take_turn(future))
            result = future.result()
        finally:
            del self._waiting[future]
            future.cancel()
        if isinstance(result, RequestError):
            raise result
        return await asyncio.to_thread(_response, body, *result)

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
                self._num_rows += len(result[0])
                del waiting.task.rows[: len(result[0])]  # and their decoded pictures
                if not waiting.task.rows:
                    vectors, counts = zip(*waiting.done, strict=True)
                    each.set_result((torch.cat(vectors), sum(counts)))

    def _next_rows(self) -> dict[asyncio.Future[Result], Task]:
        """Take a row of every request in turn until a forward pass is full.

        Large requests have passes of their own: others wait for such a pass, and never share the next one.
        """
        estimate, tokens = self._estimate(), 0.0
        sizes: dict[asyncio.Future[Result], int] = defaultdict(int)
        for number, (future, row) in enumerate(self._rows_in_turn()):
            tokens += estimate(row)
            if number and (number == self.limits.batch_size or tokens > self.limits.tokens):
                break
            sizes[future] += 1
        return {future: self._waiting[future].part(size) for future, size in sizes.items()}

    def _estimate(self) -> TokenEstimate:
        return TokenEstimate(self.embedder.collator, bytes_per_token=1)

    def _rows_in_turn(self) -> Iterator[tuple[asyncio.Future[Result], RawInput]]:
        waiting = [(future, each) for future, each in self._waiting.items() if not future.done()]
        waiting = [(future, each) for future, each in waiting if each.is_large == waiting[0][1].is_large]
        for rows in zip_longest(*(each.task.rows for _, each in waiting)):
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

    def output(self, model: str) -> Output:
        """Return what a model name stands for."""
        if model not in self.models:
            raise RequestError(f"no model {model!r}; use {', '.join(self.models)}", 404, "model")
        return self.models[model]

    def check(self, body: Body) -> Task:
        """Check a request, and decode its images; a ``ValueError`` names the key, or the input's number."""
        output, limits = self.output(body.model), self.limits
        tokenizer = self.embedder.encoder.processor.tokenizer
        rows = to_raw_inputs(_checked(*each, limits, tokenizer) for each in enumerate(body.input))
        if body.dimensions is None:
            return Task(rows, output, None)
        path_dim = self.embedder.embed_dim
        joined = self.embedder.encoder.aggregate_dim // path_dim if output == "aggregate" else 1
        if not 0 < body.dimensions <= joined * path_dim or body.dimensions % joined:
            message = f"dimensions={body.dimensions}: use a multiple of {joined} up to {joined * path_dim}"
            raise RequestError(message, param="dimensions")
        return Task(rows, output, body.dimensions // joined)


def build_app(server: Server, allowed_hosts: Sequence[str] = LOCAL_HOSTS) -> FastAPI:
    """Make the application; its routes are those that the message for unknown ones names."""

    async def known_host(request: Request) -> None:
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]").lower()
        if not any(fnmatchcase(host, each.lower()) for each in allowed_hosts):
            raise RequestError(f"host {host!r} is not allowed; see the option allowed_hosts", param=None)

    app = FastAPI(openapi_url=None, redirect_slashes=False, dependencies=[Depends(known_host)])
    about = {"object": "model", "created": 0, "owned_by": "parallel-decoupling"}

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        content = await server.answer(request)
        server.statuses[200] += 1
        return Response(content, media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, **about} for name in server.models]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        server.output(name)
        return {"id": name, **about}

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(server.metrics(), media_type="text/plain; version=0.0.4")

    async def refused(request: Request, error: Exception) -> JSONResponse:
        status, content = refusal(error, f"{request.method} {request.url.path}")
        server.statuses[status] += 1
        return JSONResponse(content, status, getattr(error, "headers", None))

    for kind in (HTTPException, ValueError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refused)
    return app


@checked()
def serve(
    model: str,
    host: str = "127.0.0.1",
    port: Port = 8000,
    path: Output = 0,
    limits: Limits = _LIMITS,
    allowed_hosts: Names = (),
) -> None:
    """Serve embeddings over HTTP in OpenAI's form until SIGTERM or Ctrl-C; what was accepted is answered.

    Args:
        model: checkpoint, run or exported folder.
        host: address to listen on.
        port: port to listen on.
        path: what the model name "default" stands for.
        limits: of requests and batches.
        allowed_hosts: by which clients may call the server beside localhost and ``host``: "*.example.com".
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hosts = (*LOCAL_HOSTS, host, *allowed_hosts)
    app = build_app(Server(Embedder.from_pretrained(model).to(device), path, limits), hosts)
    options: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": GRACE_SECONDS}
    options |= {"http": TimedProtocol, "ws": "none", "timeout_keep_alive": limits.read_seconds}
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, **options))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles the signal, and raises it again at the end
    try:
        server.run()
    except SystemExit as stop:  # before it listens, and after it said why
        raise ValueError(f"cannot listen at host {host!r}, port {port}") from stop


def _checked(number: int, item: Input, limits: Limits, tokenizer: Any) -> dict[str, Any]:
    """Return an input as ``Embedder.encode`` takes it, its image decoded."""
    if item.tokens:
        if item.text or not all(0 <= token < len(tokenizer) for token in item.tokens):
            raise RequestError(f"input[{number}] has text and tokens, or tokens of another vocabulary")
        item = item.model_copy(update={"text": tokenizer.decode(item.tokens)})
    where, characters = f"input[{number}]", len(item.text) + len(item.instruction or "")
    if characters > limits.characters:
        raise RequestError(f"{where} has more than {limits.characters} characters", 413)
    if item.image is None and not item.text.strip():
        raise RequestError(f"{where} has neither text nor image")
    image = None if item.image is None else _image(item.image, where, limits)
    return {"text": item.text or None, "image": image, "instruction": item.instruction}


def _image(uri: str, where: str, limits: Limits) -> Image.Image | str:
    with one_row(f"{where}: image must be a picture in base64, as data:image/png;base64,...: "):
        head, comma, data = uri.strip().partition(",")
        head = re.sub(r"\s", "", head).lower()
        if not (comma and head.startswith("data:") and head.endswith(";base64")):
            raise ValueError("this is not a data URI in base64")  # nor is it a file of this machine
        uri = f"data:;base64,{unquote(data)}"
        image: Any = as_picture(uri)
    if math.prod(image.size) > limits.pixels:
        raise RequestError(f"{where}: image has more than {limits.pixels} pixels", 413)
    with one_row(f"{where}: "):
        load_image(image)  # a check; encode does it again, with the model's settings
    return as_picture(uri)  # not decoded: a request may have many


def _response(body: Body, embeddings_BD: Tensor, num_tokens: int) -> dict[str, Any]:
    vectors: list[Any] = embeddings_BD.tolist()
    if body.encoding_format == "base64":  # of little-endian float32
        rows = embeddings_BD.numpy().astype("<f4")
        vectors = [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]
    data = [{"object": "embedding", "index": n, "embedding": each} for n, each in enumerate(vectors)]
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), num_tokens)
    return {"object": "list", "data": data, "model": body.model, "usage": usage}
