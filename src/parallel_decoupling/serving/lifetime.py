"""The life of a server: from the first signal that can arrive to the last process that ends.

Three processes belong to it: LitServe's manager of queues, the worker with the model, and uvicorn with the
gate. SIGTERM or Ctrl-C in the main process sets the time after which the gate refuses, ends uvicorn once all
is answered, then the worker, then the manager.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litserve import LitServer

GRACE_SECONDS = 10
"""Requests in flight are waited for so long after SIGTERM; then they get status 503."""


def run_server(build: Callable[[], LitServer], host: str, port: int) -> None:
    """Make a server and answer requests until SIGTERM or Ctrl-C.

    Args:
        build: see ``build_server``.
        host: address to listen on.
        port: to listen on.

    Raises:
        SystemExit: the worker ended by itself, with exit code 1 and a message.
    """
    main_process = os.getpid()
    servers: list[LitServer] = []

    def stop(*_: Any) -> None:
        if os.getpid() != main_process:  # a forked process inherits this handler
            raise SystemExit(0)
        for number in (signal.SIGTERM, signal.SIGINT):  # the second one would end the ending
            signal.signal(number, signal.SIG_IGN)
        for server in servers:
            server.closes_at.value = min(server.closes_at.value, time.monotonic() + GRACE_SECONDS)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    lost: list[int | None] = []
    try:
        server = build()
        servers.append(server)
        server.uvicorn_graceful_timeout = GRACE_SECONDS + 5
        server._monitor_workers = False  # LitServe's own monitor leaves the main process waiting
        threading.Thread(target=_watch_worker, args=(server, lost), daemon=True).start()
        server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
    except KeyboardInterrupt:
        pass  # before the worker was ready; afterwards LitServe ends its processes itself
    finally:
        for server in servers:
            _end_workers(server)
    if lost:
        raise SystemExit(f"error: the worker with the model ended with exit code {lost[0]}")


def _watch_worker(server: LitServer, lost: list[int | None]) -> None:
    """Stop everything when the worker ends without being told to; its requests are refused at once."""
    while not getattr(server, "inference_workers", None):
        time.sleep(0.1)
    (worker,) = server.inference_workers
    wait([worker.sentinel])
    worker.join()
    stopping = server.closes_at.value != float("inf")
    server.closes_at.value = 0
    if not stopping:
        lost.append(worker.exitcode)
        os.kill(os.getpid(), signal.SIGTERM)


def _end_workers(server: LitServer) -> None:
    for worker in getattr(server, "inference_workers", None) or ():
        worker.terminate()
        worker.join()
