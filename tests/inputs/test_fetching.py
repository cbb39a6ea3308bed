# SPDX-License-Identifier: Apache-2.0
"""Files from the web: the limits of address, size and time, against a server on this machine."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from plphp.errors import LoadError
from plphp.inputs import fetching
from plphp.inputs.fetching import WebAddress, fetch, is_public
from plphp.inputs.media import load_image

CERTIFICATE = Path(__file__).with_name("images.test.pem")
"""Of the host images.test, signed by itself, with its key; for these tests alone."""
LOOK_UP = socket.getaddrinfo


class Handler(BaseHTTPRequestHandler):
    """Answers that a path asks for."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        kind, _, rest = self.path.strip("/").partition("/")
        getattr(self, f"answer_{kind.partition('?')[0]}")(rest)

    def answer_picture(self, rest: str) -> None:
        buffer = BytesIO()
        Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(buffer, "PNG")
        self._send(200, buffer.getvalue(), {"Content-Length": str(len(buffer.getvalue()))})

    def answer_missing(self, rest: str) -> None:
        self._send(404, b"")

    def answer_page(self, rest: str) -> None:
        self._send(200, b"<html>no picture</html>")

    def answer_to(self, rest: str) -> None:
        self._send(302, b"", {"Location": unquote(rest)})

    def answer_loop(self, rest: str) -> None:
        self._send(301, b"", {"Location": "/loop"})

    def answer_bytes(self, rest: str) -> None:
        """So many, without saying how many there are."""
        self._send(200, b"a" * int(rest))

    def answer_claims(self, rest: str) -> None:
        self._send(200, b"a" * 10, {"Content-Length": rest})

    def answer_slow(self, rest: str) -> None:
        """A byte now and then: of the head, or of the body."""
        text = b"HTTP/1.0 200 OK\r\nX: " if rest == "head" else b"HTTP/1.0 200 OK\r\n\r\n"
        self.wfile.write(text)
        for _ in range(1200):
            try:
                self.wfile.write(b"a")
            except OSError:
                return
            time.sleep(0.05)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the client has read enough
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def serve(encrypted: bool) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    if encrypted:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server on this machine that stands for a public server, under two names."""
    server = serve(encrypted=False)
    as_public(monkeypatch)
    yield server
    server.shutdown()
    server.server_close()


def as_public(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        return LOOK_UP("127.0.0.1" if host in ("images.test", "second.test") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or is_public(address))


def url(server: ThreadingHTTPServer, path: str, host: str = "images.test") -> str:
    return f"http://{host}:{server.server_port}/{path}"


def test_a_picture(server: ThreadingHTTPServer) -> None:
    address = url(server, "picture/a b.png?c=d e&f=%20#part")
    image = load_image(address, allow_urls=True)
    assert (image.size, image.getpixel((0, 0))) == ((6, 4), (255, 255, 255))
    [(path, headers)] = server.asked  # type: ignore[attr-defined]
    assert path == "/picture/a%20b.png?c=d%20e&f=%20"
    assert headers["Host"] == f"images.test:{server.server_port}"
    assert "Authorization" not in headers


def test_nothing_is_fetched_unless_it_is_allowed(server: ThreadingHTTPServer) -> None:
    sources = [
        url(server, "picture"),
        url(server, "picture").upper(),
        Path(url(server, "picture")),
        {"type": "image", "url": url(server, "picture")},
        {"type": "image_url", "image_url": {"url": url(server, "picture")}},
        {"bytes": None, "path": url(server, "picture")},
    ]
    for source in sources:
        with pytest.raises(LoadError, match="nothing is fetched from the web unless it is allowed"):
            load_image(source)
    assert server.asked == []  # type: ignore[attr-defined]
    for source in sources[:1] + sources[2:]:
        assert load_image(source, allow_urls=True).size == (6, 4)


def test_redirects(server: ThreadingHTTPServer) -> None:
    target = url(server, "picture", "second.test").replace(":", "%3A")
    assert load_image(url(server, f"to/{target}"), allow_urls=True).size == (6, 4)
    assert load_image(url(server, "to//picture"), allow_urls=True).size == (6, 4)  # relative to the host
    with pytest.raises(LoadError, match="redirects more than 5 times"):
        fetch(WebAddress(url(server, "loop")))
    assert len(server.asked) == 4 + 6  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("http%3A//127.0.0.2/a.png", "127.0.0.2 is at 127.0.0.2, which is no public address"),
        ("http%3A//169.254.169.254/latest/meta-data", "no public address"),
        ("http%3A//[%3A%3A1]/a.png", "no public address"),
        ("file%3A///etc/passwd", "is not an address of the form https://host/path"),
        ("data%3Aimage/png;base64,AAAA", "is not an address of the form"),
        ("ftp%3A//images.test/a.png", "is not an address of the form"),
        ("http%3A//user%3Asecret@images.test/", "has a user name in it"),
    ],
)
def test_redirects_to_elsewhere(server: ThreadingHTTPServer, target: str, part: str) -> None:
    with pytest.raises(LoadError, match=part) as caught:
        fetch(WebAddress(url(server, f"to/{target}")))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("missing", "answers 404 Not Found"),
        ("page", "is not an image"),
        ("claims/11", "ends 1 bytes early"),
    ],
)
def test_answers_that_are_no_image(server: ThreadingHTTPServer, path: str, part: str) -> None:
    with pytest.raises(LoadError, match=rf"images\.test.*{part}"):
        load_image(url(server, path), allow_urls=True)


def test_the_limit_of_size(server: ThreadingHTTPServer) -> None:
    assert len(fetch(WebAddress(url(server, "bytes/1000")), max_bytes=1000)) == 1000
    for path in ("bytes/1001", "bytes/30000000", "claims/1001"):
        with pytest.raises(LoadError, match="is larger than 1,000 bytes"):
            fetch(WebAddress(url(server, path)), max_bytes=1000)


@pytest.mark.parametrize("part", ["head", "body"])
def test_the_limit_of_time_is_one_of_the_whole(server: ThreadingHTTPServer, part: str) -> None:
    """Bytes keep arriving, so no single wait is long; the server would take a minute."""
    start = time.monotonic()
    with pytest.raises(LoadError, match=r"slow/.* takes more than 0\.4 seconds"):
        fetch(WebAddress(url(server, f"slow/{part}")), seconds=0.4)
    assert time.monotonic() - start < 30


def test_a_server_that_is_not_there(server: ThreadingHTTPServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(LoadError, match=r"Cannot fetch http://images\.test:\d+/: .*refused"):
            fetch(WebAddress(f"http://images.test:{free.getsockname()[1]}/"))


def test_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*args: Any, **more: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(LoadError, match=r"Cannot fetch http://images\.test/: .*Name or service not known"):
        fetch(WebAddress("http://images.test/"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0", "[::1]"])
def test_this_machine_under_any_name(host: str) -> None:
    server = serve(encrypted=False)
    try:
        with pytest.raises(LoadError, match="no public address"):
            load_image(url(server, "picture", host), allow_urls=True)
        assert server.asked == []  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def test_a_name_that_changes_after_the_check(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the address that was checked: the name is looked up once, and never by the socket."""
    looked_up, connected = [], []
    resolve, connect = socket.getaddrinfo, socket.create_connection

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        if host == "images.test":
            looked_up.append(host)
        return resolve(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", lambda at, **more: connected.append(at) or connect(at, **more))
    load_image(url(server, "picture"), allow_urls=True)
    assert looked_up == ["images.test"]
    assert connected == [("127.0.0.1", server.server_port)]


def test_one_private_address_among_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, **more: Any) -> Any:
        return [(0, 0, 0, "", (address, port)) for address in ("93.184.215.14", "10.0.0.7")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(LoadError, match=r"images\.test is at 10\.0\.0\.7, which is no public address"):
        fetch(WebAddress("https://images.test/a.png"))


def test_the_next_address_is_tried(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "public_addresses", lambda host, port: ["127.0.0.9", "127.0.0.1"])
    assert load_image(url(server, "picture"), allow_urls=True).size == (6, 4)


def test_encryption_is_checked_against_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(encrypted=True)
    as_public(monkeypatch)
    address = f"https://images.test:{server.server_port}/picture"
    try:
        with pytest.raises(LoadError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(WebAddress(address))
        trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
        monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
        assert load_image(address, allow_urls=True).size == (6, 4)
        with pytest.raises(LoadError, match=r"(?i)hostname mismatch"):
            fetch(WebAddress(address.replace("images.test", "second.test")))
        start = time.monotonic()
        with pytest.raises(LoadError, match="takes more than"):
            fetch(WebAddress(address.replace("picture", "slow/body")), seconds=0.5)
        assert time.monotonic() - start < 30
    finally:
        server.shutdown()
        server.server_close()


def test_the_usual_port_is_not_named() -> None:
    for encrypted, port in ((True, 443), (False, 80)):
        connection = fetching._Connection("images.test", port, [], encrypted, 0.0)
        sent: list[bytes] = []
        connection.sock = SimpleNamespace(sendall=sent.append, close=lambda: None)
        connection.request("GET", "/")
        assert b"\r\nHost: images.test\r\n" in b"".join(sent)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.0.1", "169.254.169.254", "172.16.0.1"),
        *("192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "::7f00:1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd12::1", "ff02::1"),
        *("2001:db8::1", "100::1", "64:ff9b:1::a00:1"),
        *("2002:7f00:1::", "2002:0808:0808::1", "2001:0:53aa:64c:0:0:f5ff:fffe"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_itself_in_other_clothes(address: ipaddress.IPv4Address) -> None:
    for prefix in ("::ffff:", "64:ff9b::"):
        assert is_public(f"{prefix}{address}") == is_public(str(address))
    assert not is_public(f"::{address}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("http://", "is not an address of the form"),
        ("https:///a.png", "is not an address of the form"),
        ("http://[::1/a.png", "is not an address"),
        ("http://a:99999/", "is not an address"),
        ("http://a..b/", "is not an address"),
        (f"http://{'a' * 64}.test/", "is not an address"),
        ("https://user:secret@images.test/a.png", "has a user name in it"),
    ],
)
def test_texts_that_are_no_address(text: str, part: str) -> None:
    for allow_urls in (True, False):
        with pytest.raises(LoadError, match=part) as caught:
            load_image(text, allow_urls=allow_urls)
        assert "secret" not in str(caught.value)


def test_a_long_address_is_cut_in_messages() -> None:
    with pytest.raises(LoadError) as caught:
        load_image("https://images.test/" + "a" * 1000)
    assert len(str(caught.value)) < 450
