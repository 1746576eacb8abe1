"""Refuses connections and look-ups outside this machine in every process that has this on its path."""

import ipaddress
import socket
import sys
from contextlib import suppress
from typing import Any

HERE = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()}


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    with suppress(ValueError):
        ipaddress.ip_address(host)
        if "connect" not in event and "send" not in event:  # nobody is asked what a number means
            return
    if host not in HERE:
        raise AssertionError(f"tests use no network: {host}")


sys.addaudithook(refuse)
