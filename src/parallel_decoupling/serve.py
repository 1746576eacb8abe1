"""Embeddings over HTTP in OpenAI's form: one process with FastAPI, uvicorn, and a thread for the model."""

import asyncio
import base64
import json
import logging
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from parallel_decoupling.batch import RawInput
from parallel_decoupling.data.names import unique_keys
from parallel_decoupling.data.prompts import to_raw_inputs
from parallel_decoupling.data.unusable import doubled
from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.evaluation.encode import TokenEstimate, encode_rows
from parallel_decoupling.option_types import Names, Port, checked
from parallel_decoupling.serve_limits import Body, Input, Limits, RequestError, TimedProtocol, refusal, within

Output = int | Literal["aggregate"]  # what a model name stands for: a path's number, or the aggregate
GRACE_SECONDS = 30  # accepted requests have so long after SIGTERM to be answered
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_JSON = ("application/json", "application/x-www-form-urlencoded")  # the latter is what curl -d says
_LIMITS = Limits()
log = logging.getLogger(__name__)

Embedded = tuple[Tensor, int]  # [D], and number of tokens


@dataclass(eq=False)
class Row:
    """An input that waits for its embedding."""

    number: int  # in its request
    raw: RawInput
    tokens: float  # at most
    kind: tuple[Output, int | None, bool]  # with truncate_dim, and whether its request fills several passes
    answer: Future[Embedded] = field(default_factory=Future)


class Server:
    """Checks requests, and embeds together those that wait together.

    The model name ``default`` stands for ``path``; a ``ValueError`` if the model does not have it.
    """

    def __init__(self, embedder: Embedder, path: Output = 0, limits: Limits = _LIMITS) -> None:
        self.embedder, self.limits = embedder, limits
        paths: dict[str, Output] = {f"path_{number}": number for number in range(embedder.num_paths)}
        self.models: dict[str, Output] = {"default": path, "aggregate": "aggregate", **paths}
        if path not in [*paths.values(), "aggregate"]:
            raise ValueError(f"path {path} does not exist; the model has paths 0 to {embedder.num_paths - 1}")
        self._num_requests, self._num_rows, self._seconds = 0, 0, 0.0
        self.statuses: Counter[int] = Counter()  # how many requests were answered with each
        self.num_cut = 0  # texts of which the ends were cut off
        self._waiting: list[deque[Row]] = []  # by request; the next in turn comes first
        self._worker: asyncio.Task[None] | None = None
        # One thread parses: every thread keeps the memory of the largest request that it has seen.
        self._model_thread, self._text_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def answer(self, request: Request) -> bytes:
        """Read a request and embed its inputs; raises ``ValueError`` or ``RequestError`` for a bad one."""
        start, limits = time.monotonic(), self.limits
        content = await within(limits.read_seconds, self._read(request), 408, "the body did not arrive")
        if self._num_requests >= limits.waiting:
            raise RequestError(f"{self._num_requests} requests are waiting; try again later", 429, None)
        self._num_requests += 1
        try:
            return await within(limits.seconds, self.embeddings(content), 503, "not answered")
        finally:
            self._num_requests -= 1
            self._seconds += time.monotonic() - start

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

    async def embeddings(self, content: bytes) -> bytes:
        """Embed the inputs of a body; returns OpenAI's ``CreateEmbeddingResponse``."""
        run = asyncio.get_running_loop().run_in_executor
        body, rows = await run(self._text_thread, self.check, content)
        self._waiting.append(deque(rows))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._embed_waiting())
        try:
            embedded = await asyncio.gather(*(asyncio.wrap_future(row.answer) for row in rows))
        finally:
            for row in rows:  # nobody waits for the others after an error, or when the time is over
                row.answer.cancel()
        return await run(self._text_thread, _response, body, embedded)

    async def _embed_waiting(self) -> None:
        """Embed what waits until nothing does, in forward passes of a row of every request in turn.

        A pass has rows of one kind: a request that fills several passes delays others by one of them at most.
        """
        while waiting := [rows for rows in self._waiting if not rows[0].answer.done()]:
            kind = waiting[0][0].kind
            turns = deque(rows for rows in waiting if rows[0].kind == kind)
            self._waiting = [rows for rows in waiting if rows[0].kind != kind]
            taken, tokens = list[Row](), turns[0][0].tokens
            while (
                turns and len(taken) < self.limits.batch_size and (tokens <= self.limits.tokens or not taken)
            ):
                rows = turns.popleft()
                taken.append(rows.popleft())
                turns.extend([rows] if rows else [])
                tokens += turns[0][0].tokens if turns else 0
            for row, result in zip(taken, await self._results(taken), strict=True):
                if row.answer.done():  # its request has failed, or its time is over
                    continue
                if isinstance(result, BaseException):
                    row.answer.set_exception(result)
                else:
                    row.answer.set_result(result)
                    self._num_rows += 1
            self._waiting += turns  # behind those that came meanwhile

    async def _results(self, rows: Sequence[Row]) -> Sequence[Embedded | BaseException]:
        """Embed rows in the model's thread; where that fails, one by one: the others are answered."""
        run = asyncio.get_running_loop().run_in_executor(self._model_thread, self.embed, rows)
        (results,) = await asyncio.gather(run, return_exceptions=True)
        if not isinstance(results, BaseException):
            return results
        return [results] if len(rows) == 1 else [(await self._results([row]))[0] for row in rows]

    def embed(self, rows: Sequence[Row]) -> Sequence[Embedded | RequestError]:
        """Embed rows of one kind, of several requests; one that cannot be is an error of its request."""
        embedder, (output, dim, _) = self.embedder, rows[0].kind
        options: dict[str, Any] = {"paths": output, "truncate_dim": dim, "batch_size": self.limits.batch_size}
        options |= {"show_progress": False, "keep_going": True}
        encoded = encode_rows(embedder.encoder, embedder.collator, [row.raw for row in rows], **options)
        if doubled(self.num_cut, encoded.num_cut):
            log.warning("texts cut to max_tokens so far: %d", self.num_cut + encoded.num_cut)
        self.num_cut += encoded.num_cut
        results: list[Any] = [*zip(encoded.embeddings, encoded.num_tokens.tolist(), strict=True)]
        for place, why in encoded.bad_rows.items():
            results[place] = RequestError(f"input[{rows[place].number}]: {why}")
        return results

    def output(self, model: str) -> Output:
        """Return what a model name stands for."""
        if model not in self.models:
            raise RequestError(f"no model {model!r}; use {', '.join(self.models)}", 404, "model")
        return self.models[model]

    def check(self, content: bytes) -> tuple[Body, list[Row]]:
        """Parse and check a body, and make rows of its inputs; an error names the key, or the input."""
        with suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # which the next line names
            json.loads(content, object_pairs_hook=unique_keys, parse_int=str)
        body = Body.model_validate_json(content, context=self.limits)
        output, dim = self.output(body.model), self.embedder.embed_dim
        inputs = to_raw_inputs(self._checked(*each) for each in enumerate(body.input))
        tokens = [*map(TokenEstimate(self.embedder.collator, bytes_per_token=1), inputs)]
        joined = self.embedder.encoder.aggregate_dim // dim if output == "aggregate" else 1
        wanted = joined * dim if body.dimensions is None else body.dimensions
        if not 0 < wanted <= joined * dim or wanted % joined:
            message = f"dimensions={wanted}: use a multiple of {joined} up to {joined * dim}"
            raise RequestError(message, param="dimensions")
        kind = output, wanted // joined if body.dimensions else None, sum(tokens) > self.limits.tokens
        return body, [Row(number, inputs[number], tokens[number], kind) for number in range(len(inputs))]

    def _checked(self, number: int, item: Input) -> dict[str, Any]:
        """Return an input as ``Embedder.encode`` takes it."""
        tokenizer, where = self.embedder.encoder.processor.tokenizer, f"input[{number}]"
        if item.tokens:
            if item.text or not all(0 <= token < len(tokenizer) for token in item.tokens):
                raise RequestError(f"{where} has text and tokens, or tokens of another vocabulary")
            item.text = tokenizer.decode(item.tokens)
        if len(item.text) + len(item.instruction or "") > self.limits.characters:
            raise RequestError(f"{where} has more than {self.limits.characters} characters", 413)
        return {"text": item.text, "image": item.image, "instruction": item.instruction}


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


def _response(body: Body, embedded: Sequence[Embedded]) -> bytes:
    vectors: list[Any] = [vector_D.tolist() for vector_D, _ in embedded]
    if body.encoding_format == "base64":  # of little-endian float32
        numbers = [vector_D.numpy().astype("<f4").tobytes() for vector_D, _ in embedded]
        vectors = [base64.b64encode(each).decode("ascii") for each in numbers]
    data = [{"object": "embedding", "index": n, "embedding": each} for n, each in enumerate(vectors)]
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(count for _, count in embedded))
    return to_json({"object": "list", "data": data, "model": body.model, "usage": usage})
