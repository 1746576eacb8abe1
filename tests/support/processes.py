"""A function in several processes at once, each with its rank: what ``torchrun`` does, but quick.

The processes are forks of a server that has imported this package and done nothing else. A fork of the tests
themselves would share the memory of every native thread that an earlier test has started.
"""

import os
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist


def run_ranks(
    function: Callable[..., None], *args: Any, processes: int = 2, timeout: float = 300, gloo: bool = False
) -> None:
    """Call ``function(*args)`` in every process; Lightning finds rank and address in the environment.

    With ``gloo`` the processes know each other already.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.support.fit"])
    job = cloudpickle.dumps((function, args))
    ranks = [(rank, processes, port, gloo, dict(os.environ), job) for rank in range(processes)]
    children = [context.Process(target=_run, args=each, daemon=True) for each in ranks]
    for child in children:
        child.start()
    end = time.monotonic() + timeout
    while any(child.is_alive() for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    if any(code != 0 for code in codes):
        raise RuntimeError(f"exit codes {codes} (None: did not end in {timeout} s)")


def _run(rank: int, processes: int, port: int, gloo: bool, environment: dict[str, str], job: bytes) -> None:
    os.environ.clear()
    os.environ |= environment
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function, args = cloudpickle.loads(job)
    if gloo:
        dist.init_process_group("gloo", rank=rank, world_size=processes)
    function(*args)
    if gloo:
        dist.destroy_process_group()
