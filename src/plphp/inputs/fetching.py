# SPDX-License-Identifier: Apache-2.0
"""Fetch a file from the public web, within limits of size and time, and from nowhere else.

An address in a chat or a data file is text that somebody wrote, and the machine that reads it may reach what that
person may not: so host names that lead to private, loopback, link-local or otherwise special addresses are refused, at
every redirect, and the connection goes to the very address that was checked, whatever the name resolves to by then.
Proxies of the environment are not used, as they would resolve the name again.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from plphp.errors import LoadError
from plphp.io.quoting import named, one_line

MAX_BYTES = 64 * 2**20
"""Largest file that is fetched."""
SECONDS = 30.0
"""Longest time that a fetch takes, redirects included; the system's look-up of a host name has its own limit."""
MAX_REDIRECTS = 5
"""Redirects that are followed, each to a public host."""

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for the IPv4 address in their last 32 bits (RFC 6052)."""


@dataclass(frozen=True)
class WebAddress:
    """An address that the user allowed to be fetched.

    Parameters
    ----------
    url : str
        The address, with the scheme http or https.

    Raises
    ------
    LoadError
        If it names no host, or another scheme.
    """

    url: str

    def __post_init__(self) -> None:
        _split(self.url)

    def __str__(self) -> str:
        return named(self.url)


def fetch(address: WebAddress, *, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> bytes:
    """Fetch a file.

    Parameters
    ----------
    address : WebAddress
        Where the file is.
    max_bytes : int
        Larger files are refused before they are read in full.
    seconds : float
        Time limit for everything, redirects included.

    Raises
    ------
    LoadError
        If the file cannot be fetched, is too large, takes too long, or its host is not public.
    """
    deadline, url = time.monotonic() + seconds, address.url
    for _ in range(MAX_REDIRECTS + 1):
        try:
            answer = _get(url, max_bytes, deadline)
        except LoadError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= deadline:
                raise LoadError(f"Fetching {address} takes more than {seconds:g} seconds.") from error
            raise LoadError(f"Cannot fetch {named(url)}: {one_line(error)}") from error
        if isinstance(answer, bytes):
            return answer
        url = answer.url
    raise LoadError(f"{address} redirects more than {MAX_REDIRECTS} times.")


def public_addresses(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host, after a check that each of them is public.

    Raises
    ------
    LoadError
        If an address of the host is not on the public internet.
    OSError
        If the host has no address.
    """
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    private = [address for address in addresses if not is_public(address)]
    if private:
        raise LoadError(
            f"{host} is at {private[0]}, which is no public address: plphp fetches from the public internet alone. "
            "Download the file, and give its path."
        )
    return addresses


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet, and not of this machine, its network or a group."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None or ip in _NAT64:  # an IPv4 address in its last 32 bits
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if (
            ip.sixtofour is not None or ip.teredo is not None or ip.is_site_local
        ):  # tunnels to an IPv4 address, and a former kind of private ones
            return False
    # is_global alone is true of multicast groups and of reserved IPv6 addresses.
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_reserved or ip.is_multicast
    return ip.is_global and not special


def _get(url: str, max_bytes: int, deadline: float) -> bytes | WebAddress:
    """Ask for a file once: its bytes, or the address that the server redirects to."""
    parts = _split(url)
    host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
    connection = _Connection(host, port, public_addresses(host, port), parts.scheme == "https", deadline)
    with connection.until_deadline():
        target = quote(parts.path or "/", safe="/%!$&'()*+,;=:@~")
        query = quote(parts.query, safe="/%!$&'()*+,;=:@~?[]")
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "plphp"}
        connection.request("GET", f"{target}?{query}" if query else target, headers=headers)
        with connection.getresponse() as response:
            if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                return WebAddress(urljoin(url, response.headers["Location"]))
            if response.status != 200:
                raise LoadError(f"{named(url)} answers {response.status} {response.reason}.")
            return _body(response, url, max_bytes, deadline)


def _body(response: http.client.HTTPResponse, url: str, max_bytes: int, deadline: float) -> bytes:
    too_large = LoadError(f"The file at {named(url)} is larger than {max_bytes:,} bytes.")
    if response.length is not None and response.length > max_bytes:
        raise too_large
    body = bytearray()
    while part := response.read(min(2**16, max_bytes + 1 - len(body))):
        body += part
        if len(body) > max_bytes:
            raise too_large
    if time.monotonic() >= deadline:  # a body that the deadline cut off looks like its end
        raise TimeoutError
    if response.length:
        raise LoadError(f"The file at {named(url)} ends {response.length:,} bytes early.")
    return bytes(body)


class _Connection(http.client.HTTPConnection):
    """A connection to addresses that were checked, which ends at a deadline whatever the server does."""

    def __init__(self, host: str, port: int, addresses: list[str], encrypted: bool, deadline: float) -> None:
        super().__init__(host, port)
        self.default_port = _PORTS["https" if encrypted else "http"]  # the port that "Host" leaves out
        self._addresses, self._encrypted, self._deadline = addresses, encrypted, deadline
        self._open: socket.socket | None = None  # http.client forgets its own while an answer is still being read
        # A timer, as a socket's own limit starts anew with every byte that arrives.
        self._watch = threading.Timer(max(0.0, deadline - time.monotonic()), self._shut)
        self._watch.daemon = True

    @contextmanager
    def until_deadline(self) -> Iterator[None]:
        """Use the connection, and close it."""
        self._watch.start()
        try:
            yield
        finally:
            self._watch.cancel()
            self.close()

    def connect(self) -> None:
        sock = self._connected()
        if self._encrypted:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = self._open = sock
        if time.monotonic() >= self._deadline:  # the watch has come by already
            raise TimeoutError
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()

    def _shut(self) -> None:
        if self._open is not None:
            with suppress(OSError):  # it is closed already
                # not SSLSocket's own shutdown, which takes the encryption away under the reader
                socket.socket.shutdown(self._open, socket.SHUT_RDWR)

    def _connected(self) -> socket.socket:
        problem: OSError = TimeoutError()
        for address in self._addresses:
            left = self._deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return socket.create_connection((address, self.port), timeout=left)
            except OSError as error:
                problem = error
        raise problem


def _split(url: str) -> SplitResult:
    """Take a web address apart, and refuse a text that is none, or that sends a user name."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host:
            host.encode("idna")
    except ValueError as error:
        raise LoadError(f"{named(url)} is not an address: {one_line(error)}") from error
    if parts.scheme not in _PORTS or not host or port == 0:
        raise LoadError(f"{named(url)} is not an address of the form https://host/path.")
    if parts.username is not None or parts.password is not None:
        raise LoadError(f"The address of {host} has a user name in it, and plphp sends none: download the file first.")
    return parts
