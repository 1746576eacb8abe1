"""What stands before the queue: size of the body, number of waiting requests, validity.

A request that would fail must not reach the queue, because there it would fail the batch it is in.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from parallel_decoupling.serving.fetch import inline_images
from parallel_decoupling.serving.requests import Catalog, Limits, RequestError, parse_json, parse_request

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

EMBEDDINGS_PATH = "/v1/embeddings"
POLL_SECONDS = 0.2


class Gate:
    """ASGI middleware that answers bad requests itself.

    Args:
        app: what answers the others.
        catalog: names that may be asked for.
        limits: status 413 above those of size, 429 above the number of waiting requests.
        closes_at: ``value`` is the time (``time.monotonic``) after which requests that are not answered
            have status 503.
    """

    def __init__(self, app: ASGIApp, catalog: Catalog, limits: Limits, closes_at: Any) -> None:
        self.app, self.catalog, self.limits, self.closes_at = app, catalog, limits, closes_at
        self.waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request for embeddings; let everything else pass."""
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", EMBEDDINGS_PATH):
            await self.app(scope, receive, send)
            return
        try:
            if self.waiting >= self.limits.waiting:
                raise RequestError(
                    f"{self.waiting} requests are waiting; try again later", 429, code="queue_full"
                )
            self.waiting += 1
            try:
                body = await self._body(scope, receive)
                body = await asyncio.to_thread(self._check, body)
                await self._pass_on(_as_json(scope), _replay(body, receive), send)
            finally:
                self.waiting -= 1
        except RequestError as error:
            await _refuse(error, scope, receive, send)

    def _check(self, body: bytes) -> bytes:
        """The body with fetched images as data URIs."""
        content = parse_json(body)
        if inline_images(content, self.limits):
            body = json.dumps(content).encode()
        parse_request(content, self.catalog, self.limits)
        return body

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the answer until the server closes; its parts are sent together."""
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        task = asyncio.ensure_future(self.app(scope, receive, keep))
        try:
            while not (await asyncio.wait({task}, timeout=POLL_SECONDS))[0]:
                if time.monotonic() > self.closes_at.value:
                    raise RequestError("the server is ending; ask again later", 503, code="closing")
        finally:
            task.cancel()
        await task
        for message in answer:
            await send(message)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = RequestError(
            f"the body has more than {self.limits.body_bytes} bytes", 413, code="body_too_large"
        )
        if length.isdigit() and int(length) > self.limits.body_bytes:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.limits.body_bytes:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


def _as_json(scope: Scope) -> Scope:
    """The scope with the content type that the body was checked as."""
    headers = [(key, value) for key, value in scope["headers"] if key != b"content-type"]
    return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import JSONResponse

    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    await JSONResponse(error.to_body(), error.status, headers)(scope, receive, send)
