"""The server: LitServe's queue and batches around ``Embedder``."""

# No "from __future__ import annotations": LitServe reads the annotations of decode_request as types.
import multiprocessing
import os
import signal
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from litserve import LitAPI, LitServer
from starlette.exceptions import HTTPException

from parallel_decoupling.serving.batches import embed_requests
from parallel_decoupling.serving.gate import EMBEDDINGS_PATH, Gate
from parallel_decoupling.serving.requests import (
    Catalog,
    EmbeddingRequest,
    Limits,
    Selection,
    error_body,
    parse_request,
)
from parallel_decoupling.serving.responses import response_body
from parallel_decoupling.training.loading import load_embedder

BATCH_WAIT_SECONDS = 0.01


class EmbeddingAPI(LitAPI):  # type: ignore[misc]  # litserve has no types
    """What a worker does with a batch of requests.

    Args:
        model: checkpoint or folder.
        catalog: names that may be asked for.
        limits: of a request and of a batch.
    """

    def __init__(self, model: str, catalog: Catalog, limits: Limits) -> None:
        super().__init__(
            max_batch_size=limits.batch_requests, batch_timeout=BATCH_WAIT_SECONDS, api_path=EMBEDDINGS_PATH
        )
        self.model, self.catalog, self.limits = model, catalog, limits

    def setup(self, device: str) -> None:
        """Load the model in the worker's process."""
        self.embedder = load_embedder(self.model)
        self.embedder.encoder.to(device)

    def decode_request(self, request: dict[str, Any]) -> EmbeddingRequest:
        """Read a request that the gate let pass."""
        return parse_request(request, self.catalog, self.limits)

    def batch(self, inputs: list[EmbeddingRequest]) -> list[EmbeddingRequest]:
        """Keep the requests as a list."""
        return inputs

    def predict(self, requests: Any) -> Any:
        """Embed a list of requests; a single request where the server makes no batches."""
        batch = requests if isinstance(requests, list) else [requests]
        results = embed_requests(self.embedder, batch, self.limits.batch_rows)
        bodies = [
            response_body(request, embeddings, num_tokens)
            for request, (embeddings, num_tokens) in zip(batch, results, strict=True)
        ]
        return bodies if isinstance(requests, list) else bodies[0]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Keep the answers as a list."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Pass the answer on."""
        return output


def build_server(model: str, path: Selection = 0, limits: Limits | None = None) -> LitServer:
    """Make a server with one worker.

    Args:
        model: what ``load_embedder`` takes; read once here for its sizes and again in the worker.
        path: what the name ``default`` stands for.
        limits: see ``Limits``.

    Raises:
        ValueError: the model or the path does not exist.
    """
    limits = limits or Limits()
    encoder = load_embedder(model).encoder
    catalog = Catalog(encoder.num_paths, encoder.embed_dim, encoder.aggregate_dim, path)
    server = LitServer(
        EmbeddingAPI(model, catalog, limits),
        devices=1,
        timeout=False,
        middlewares=[(Gate, {"catalog": catalog, "limits": limits})],
        disable_openapi_url=True,
    )

    def models() -> dict[str, Any]:
        return catalog.to_body()

    def failed(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)

    server.app.add_api_route("/v1/models", models, methods=["GET"])
    server.app.add_exception_handler(HTTPException, failed)
    return server


def run_server(server: LitServer, host: str, port: int) -> None:
    """Answer requests until SIGTERM or Ctrl-C; the server's processes end with it."""
    main_process = os.getpid()

    def stop(*_: Any) -> None:
        if os.getpid() == main_process:
            raise KeyboardInterrupt
        raise SystemExit(0)  # a forked process inherits this handler

    signal.signal(signal.SIGTERM, stop)
    try:
        server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
    except KeyboardInterrupt:  # before all workers were ready
        for process in multiprocessing.active_children():
            process.terminate()
