"""A checkpoint of a tiny model, and a process of the command line until its port answers."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fit import make_trainer, small_embedder

Start = Callable[..., tuple[subprocess.Popen[bytes], str]]


@pytest.fixture(scope="session")
def checkpoint(tiny_backbone_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with two paths."""
    folder = tmp_path_factory.mktemp("served")
    trainer = make_trainer(folder)
    trainer.strategy.connect(small_embedder(tiny_backbone_dir))
    trainer.save_checkpoint(folder / "tiny.ckpt", weights_only=True)
    return folder / "tiny.ckpt"


@pytest.fixture
def start() -> Iterator[Start]:
    """``start("serve", ...)`` runs a subcommand on a free port: the process and its address."""
    started = []

    def run(*arguments: object, answers: str = "/") -> tuple[subprocess.Popen[bytes], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "parallel_decoupling", *map(str, arguments), "--port", str(port)]
        process = subprocess.Popen(command)
        started.append(process)
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            try:
                urllib.request.urlopen(address + answers, timeout=5).close()
                return process, address
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"{command} does not answer, exit code {process.poll()}")

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
