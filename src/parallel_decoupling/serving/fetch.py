"""Images behind addresses, from hosts that the server's owner names, as data URIs.

Only the named host answers: redirects are refused, a name that resolves to an address of a private network
is refused unless that address is named, and the connection goes to the address that was checked.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from parallel_decoupling.serving.requests import Limits, RequestError

FETCH_SECONDS = 10
"""For all images of a request together."""
_CHUNK_BYTES = 65536


def inline_images(body: Any, limits: Limits) -> bool:
    """Replace every image address in a request's JSON, in place.

    Args:
        body: not checked yet; what has no address stays as it is.
        limits: allowed hosts, and the bytes of all images together (``body_bytes``).

    Returns:
        Whether there was one.

    Raises:
        RequestError: names the input; 413 for too many bytes, else 400.
    """
    value = body.get("input") if isinstance(body, Mapping) else None
    items = value if isinstance(value, list) else [value]
    end, rest, found = time.monotonic() + FETCH_SECONDS, limits.body_bytes, False
    for number, item in enumerate(items[: limits.inputs]):
        url = item.get("image") if isinstance(item, dict) else None
        if limits.allowed_hosts and isinstance(url, str) and url.startswith(("http://", "https://")):
            try:
                data = _fetch(url, limits, rest, end)
            except (OSError, ValueError, http.client.HTTPException) as error:
                status = error.status if isinstance(error, RequestError) else 400
                raise RequestError(f"input[{number}]: {url} not fetched: {error}", status, "input") from error
            rest, found = rest - len(data), True
            item["image"] = "data:image/*;base64," + base64.b64encode(data).decode("ascii")
    return found


def _fetch(url: str, limits: Limits, most: int, end: float) -> bytes:
    parts = urlsplit(url)
    if parts.netloc.lower() not in limits.allowed_hosts:
        raise ValueError(f"allowed hosts are {', '.join(limits.allowed_hosts)}")
    connection = _connect(parts, limits, end)
    try:
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        connection.request("GET", path, headers={"Host": parts.netloc})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}; redirects are not followed")
        data = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            data += chunk
            if len(data) > most:
                raise RequestError(f"more than {most} bytes are left of the request's", 413)
            if time.monotonic() > end:
                raise TimeoutError(f"images take more than {FETCH_SECONDS} s")
        return bytes(data)
    finally:
        connection.close()


def _connect(parts: SplitResult, limits: Limits, end: float) -> http.client.HTTPConnection:
    """A connection to an address that was checked."""
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    named = {urlsplit(f"//{name}").hostname for name in limits.allowed_hosts}
    if not ipaddress.ip_address(address).is_global and address not in named:
        raise ValueError(f"{host} is {address}, which is not a public address")
    timeout = max(0.1, end - time.monotonic())
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    connection.sock = socket.create_connection((address, port), timeout)
    if secure:
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
    return connection
