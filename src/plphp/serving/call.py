# SPDX-License-Identifier: Apache-2.0
"""An HTTP request: its body, whether its client is still there, and what was sent for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from .line import Line
from .metrics import CLIENT_LEFT
from .options import Limits
from .refusals import Refusal, RequestError
from .replies import DONE, event

RETRY_SECONDS = "5"


class Call:
    """An HTTP request and what was sent for it so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.request = Request(scope, receive)
        self.started = time.perf_counter()
        self.left = threading.Event()
        """Set once nobody waits for the reply."""
        self.status = CLIENT_LEFT
        self._scope, self._receive, self._send_on = scope, receive, send
        self._streams = False

    @property
    def is_empty(self) -> bool:
        """Whether it has no body."""
        headers = self.request.headers
        return headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def json_body(self, limits: Limits, line: Line) -> bytes:
        """Read the body, which has to say that it is JSON, while it counts among those that are on their way.

        Raises
        ------
        RequestError
            If it is of another kind, too large or too slow, or too many are on their way.
        """
        kind = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers let any page send the other kinds here
            raise RequestError(f"The Content-Type must be application/json, got {kind[:100]!r}.", status=415)
        with line.arriving() as take:
            return await self._body(limits.max_body_bytes, limits.body_seconds, take)

    async def _body(self, most: int, seconds: float, take: Callable[[int], None]) -> bytes:
        """Read the body, within limits of size and time; ``take`` gets the bytes of each part."""
        large = RequestError(f"The request is larger than {most:,} bytes.", status=413, code="request_too_large")
        length = self.request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise large
        body = bytearray()
        try:
            with anyio.fail_after(seconds):
                async for part in self.request.stream():
                    take(len(part))
                    body += part
                    if len(body) > most:
                        raise large
        except TimeoutError as error:
            raise RequestError(f"The request has not arrived in {seconds} seconds.", status=408) from error
        return bytes(body)

    async def watch(self, scope: anyio.CancelScope) -> None:
        """Wait until the client leaves, and end everything that is done for it."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        scope.cancel()

    async def send_json(self, values: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a whole reply."""
        await JSONResponse(values, status, headers)(self._scope, self._receive, self._send)
        self.status = status

    async def begin_stream(self) -> None:
        """Send the head of a reply whose parts are events."""
        self._streams = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_part(self, part: bytes, *, last: bool = False, status: int = 200) -> None:
        """Send an event; the request counts under a status once the last one is out."""
        await self._send({"type": "http.response.body", "body": part, "more_body": not last})
        if last:
            self.status = status

    async def refuse(self, refusal: Refusal) -> None:
        """Say why there is no reply, or no more of it."""
        if self._streams:
            await self.send_part(event(refusal.body))
            await self.send_part(DONE, last=True, status=refusal.status)
        else:
            wait = {"retry-after": RETRY_SECONDS} if refusal.status == 503 else None
            await self.send_json(refusal.body, refusal.status, wait)

    async def _send(self, message: Message) -> None:
        try:
            await self._send_on(message)
        except OSError as error:
            raise ClientDisconnect from error
