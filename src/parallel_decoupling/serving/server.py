"""The server: LitServe's queue and batches around ``Embedder``."""

# No "from __future__ import annotations": LitServe reads the annotations of decode_request as types.
import math
import signal
import threading
from collections.abc import Callable
from multiprocessing.sharedctypes import RawValue
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from litserve import LitAPI, LitServer
from starlette.exceptions import HTTPException
from tqdm import tqdm

from parallel_decoupling.evaluation.embedder import Embedder
from parallel_decoupling.serving.batches import embed_requests
from parallel_decoupling.serving.gate import EMBEDDINGS_PATH, Gate
from parallel_decoupling.serving.requests import (
    Catalog,
    EmbeddingRequest,
    Limits,
    RequestError,
    Selection,
    error_body,
    parse_request,
)
from parallel_decoupling.serving.responses import response_body

BATCH_WAIT_SECONDS = 0.01


class EmbeddingAPI(LitAPI):  # type: ignore[misc]  # litserve has no types
    """What a worker does with a batch of requests.

    Args:
        load: makes the model in the worker's process; must be picklable.
        catalog: names that may be asked for.
        limits: of a request and of a batch.
    """

    def __init__(self, load: Callable[[], Embedder], catalog: Catalog, limits: Limits) -> None:
        super().__init__(
            max_batch_size=limits.batch_requests, batch_timeout=BATCH_WAIT_SECONDS, api_path=EMBEDDINGS_PATH
        )
        self.load, self.catalog, self.limits = load, catalog, limits

    def setup(self, device: str) -> None:
        """Load the model; Ctrl-C, which the terminal sends to every process, is the main process's."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed worker would leave behind
        self.embedder = self.load()
        self.embedder.encoder.to(device)

    def decode_request(self, request: dict[str, Any]) -> EmbeddingRequest:
        """Read a request that the gate let pass."""
        return parse_request(request, self.catalog, self.limits)

    def batch(self, inputs: list[EmbeddingRequest]) -> list[EmbeddingRequest]:
        """Keep the requests as a list."""
        return inputs

    def predict(self, requests: Any) -> Any:
        """Answer a list of requests, each with its own status; a single one where there are no batches."""
        batch = requests if isinstance(requests, list) else [requests]
        results = embed_requests(self.embedder, batch, self.limits.batch_rows)
        responses = [
            JSONResponse(result.to_body(), result.status)
            if isinstance(result, RequestError)
            else JSONResponse(response_body(request, *result))
            for request, result in zip(batch, results, strict=True)
        ]
        return responses if isinstance(requests, list) else responses[0]

    def unbatch(self, output: list[JSONResponse]) -> list[JSONResponse]:
        """Keep the answers as a list."""
        return output

    def encode_response(self, output: JSONResponse) -> JSONResponse:
        """Pass the answer on."""
        return output


def build_server(
    load: Callable[[], Embedder], path: Selection = 0, limits: Limits | None = None
) -> LitServer:
    """Make a server with one worker.

    Args:
        load: makes the model; called once here for its sizes and again in the worker.
        path: what the name ``default`` stands for.
        limits: see ``Limits``.

    Returns:
        A server whose ``closes_at`` is the time (``time.monotonic``) after which the gate refuses.

    Raises:
        ValueError: what ``load`` refuses; the path does not exist.
    """
    limits = limits or Limits()
    encoder = load().encoder
    catalog = Catalog(encoder.num_paths, encoder.embed_dim, encoder.aggregate_dim, path)
    closes_at = RawValue("d", math.inf)
    server = LitServer(
        EmbeddingAPI(load, catalog, limits),
        devices=1,
        timeout=False,
        middlewares=[(Gate, {"catalog": catalog, "limits": limits, "closes_at": closes_at})],
        disable_openapi_url=True,
    )
    server.closes_at = closes_at

    def models() -> dict[str, Any]:
        return catalog.to_body()

    def failed(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)

    server.app.add_api_route("/v1/models", models, methods=["GET"])
    server.app.add_exception_handler(HTTPException, failed)
    return server
