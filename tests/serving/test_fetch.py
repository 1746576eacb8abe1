"""Images behind addresses, from a server on loopback."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from parallel_decoupling.serving import fetch
from parallel_decoupling.serving.fetch import inline_images
from parallel_decoupling.serving.requests import Catalog, Limits, RequestError, parse_request
from tests.serving.test_requests import data_uri
from tests.support.tiny import noise_image

URI = data_uri(noise_image(8, 8))
PNG = base64.b64decode(URI.partition(",")[2])


class Pictures(BaseHTTPRequestHandler):
    """Pictures, but for a redirect (``/elsewhere``), a long and a slow answer."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        self.send_response({"/elsewhere": 302, "/missing": 404}.get(self.path, 200))
        self.send_header("Location", "/a.png?size=1")
        self.end_headers()
        if self.path == "/slow":
            threading.Event().wait(1)
        elif self.path == "/long":
            self.wfile.write(b"0" * 5000)
        else:
            self.wfile.write(PNG)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pictures() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def limits(*hosts: str, body_bytes: int = 3000) -> Limits:
    return Limits(body_bytes=body_bytes, inputs=2, allowed_hosts=hosts)


def test_pictures_of_an_allowed_host_are_fetched(pictures: Any) -> None:
    """The address becomes the picture's data; the rest of the body stays."""
    host = f"127.0.0.1:{pictures.server_port}"
    body = {"input": [{"text": "a", "image": f"http://{host}/a.png?size=1"}, "b"], "model": "default"}
    assert inline_images(body, limits(host))
    assert pictures.asked == [("/a.png?size=1", host)]
    parsed = parse_request(body, Catalog(1, 8, 8, 0), limits(host))
    assert parsed.inputs[0]["image"].tobytes() == noise_image(8, 8).tobytes()
    assert parsed.inputs[1] == {"text": "b"}


@pytest.mark.parametrize(
    ("path", "message", "status"),
    [
        ("/elsewhere", "status 302", 400),
        ("/missing", "status 404", 400),
        ("/long", "more than 3000 bytes", 413),
        ("/slow", "timed out", 400),
    ],
)
def test_bad_answers(
    pictures: Any, path: str, message: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redirects are not followed; size and time are limited; the input is named."""
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.3)
    host = f"127.0.0.1:{pictures.server_port}"
    with pytest.raises(RequestError, match=rf"input\[0\].*{message}") as caught:
        inline_images({"input": {"image": f"http://{host}{path}"}}, limits(host))
    assert caught.value.status == status
    assert len(pictures.asked) == 1


@pytest.mark.parametrize("allowed", ["example.org", "localhost:{port}"])
def test_other_hosts_and_private_addresses_are_not_asked(pictures: Any, allowed: str) -> None:
    """An allowed name that resolves to a private address does not allow that address."""
    allowed = allowed.format(port=pictures.server_port)
    names = [f"127.0.0.1:{pictures.server_port}", f"localhost:{pictures.server_port}"]
    names.append(f"{allowed}@127.0.0.1:{pictures.server_port}")
    for name in names:
        with pytest.raises(RequestError, match="allowed hosts|not a public address"):
            inline_images({"input": {"image": f"http://{name}/a.png"}}, limits(allowed))
    assert pictures.asked == []


@pytest.mark.parametrize("body", [None, [], {}, {"input": 3}, {"input": [["http://a"]]}])
def test_anything_else_stays(body: Any) -> None:
    """Nothing is fetched without an address, and nothing at all by default."""
    assert not inline_images(body, limits("example.org"))
    address = {"input": {"image": "http://127.0.0.1/a.png"}}
    assert not inline_images(address, Limits())
    with pytest.raises(RequestError, match="only from allowed hosts"):
        parse_request(address, Catalog(1, 8, 8, 0), Limits())
