"""What stands before the queue: size of the body, number of waiting requests, validity.

A request that would fail must not reach the queue, because there it would fail the batch it is in.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from parallel_decoupling.serving.requests import Catalog, Limits, RequestError, parse_json, parse_request

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

EMBEDDINGS_PATH = "/v1/embeddings"


class Gate:
    """ASGI middleware that answers bad requests itself.

    Args:
        app: what answers the others.
        catalog: names that may be asked for.
        limits: status 413 above those of size, 429 above the number of waiting requests.
    """

    def __init__(self, app: ASGIApp, catalog: Catalog, limits: Limits) -> None:
        self.app, self.catalog, self.limits = app, catalog, limits
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
                await asyncio.to_thread(self._check, body)
                await self.app(_as_json(scope), _replay(body, receive), send)
            finally:
                self.waiting -= 1
        except RequestError as error:
            await _refuse(error, scope, receive, send)

    def _check(self, body: bytes) -> None:
        parse_request(parse_json(body), self.catalog, self.limits)

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

    headers = {"retry-after": "1"} if error.status == 429 else None
    await JSONResponse(error.to_body(), error.status, headers)(scope, receive, send)
