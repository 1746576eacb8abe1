"""A process of the command line until its port answers."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Start = Callable[..., tuple[subprocess.Popen[bytes], str]]


def said(process: subprocess.Popen[bytes]) -> str:
    """What a process of ``start`` has written to its standard error, without the bars of loading weights."""
    assert process.stderr is not None
    process.stderr.seek(0)
    return re.sub(r"\rLoading weights.*|(?<=it/s])\n", "", process.stderr.read().decode()).lstrip("\n")


@contextmanager
def servers(tmp_path: Path) -> Iterator[Start]:
    """Give ``start("serve", ...)``, which runs a subcommand on a free port: the process and its address.

    It returns once ``answers`` does, or at once for None; at the end all processes end.
    """
    started = []

    def run(*arguments: object, answers: str | None = "/") -> tuple[subprocess.Popen[bytes], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "parallel_decoupling", *map(str, arguments), "--port", str(port)]
        errors = (tmp_path / f"errors_{len(started)}.txt").open("wb+")
        process = subprocess.Popen(command, stderr=errors)
        process.stderr = errors
        started.append(process)
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while answers is not None and time.monotonic() < end and process.poll() is None:
            try:
                urllib.request.urlopen(address + answers, timeout=5).close()
                return process, address
            except OSError:
                time.sleep(0.2)
        if answers is None:
            return process, address
        raise RuntimeError(f"{command} does not answer: {said(process)}")

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
