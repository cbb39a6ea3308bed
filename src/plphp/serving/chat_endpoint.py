# SPDX-License-Identifier: Apache-2.0
"""``/v1/chat/completions``: a request from its first byte to the last of its reply, or until its client leaves."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from plphp.show.tables import summary

from .chat_messages import fetch_images
from .chat_request import ChatRequest, read_request
from .conversation import Conversation
from .conversations import Conversations
from .line import Line
from .metrics import CLIENT_LEFT, Metrics
from .refusals import Refusal, RequestError, refusal_of
from .replies import DONE, Reply, event
from .served_model import Answer, Prompt, ServedModel

logger = logging.getLogger("plphp")
Parts = asyncio.Queue[str | tuple[Prompt, Answer] | Refusal]
"""Pieces of text, and behind them what they were made of, or why there are no more."""
RETRY_SECONDS = "5"


class ChatEndpoint:
    """Answers chats; an ASGI application.

    Parameters
    ----------
    served : ServedModel
        The model.
    model_name : str
        What clients call it.
    line : Line
        Where requests wait.
    metrics : Metrics
        Hears of every request.
    conversations : Conversations
        Those that requests may go on with.
    """

    def __init__(
        self, served: ServedModel, model_name: str, line: Line, metrics: Metrics, conversations: Conversations
    ) -> None:
        self._served, self._model_name, self._line, self._metrics = served, model_name, line, metrics
        self._conversations = conversations
        self._open: set[threading.Event] = set()

    def stop(self) -> None:
        """End all answers at their next token."""
        for left in self._open:
            left.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a request and reply to it."""
        call = _Call(scope, receive, send)
        self._open.add(call.left)
        try:
            await self._reply_or_refuse(call)
        except ClientDisconnect:
            logger.info("A client has left before its reply.")
        finally:
            call.left.set()
            self._open.discard(call.left)
            self._metrics.note_request(call.status, time.perf_counter() - call.started)

    async def _reply_or_refuse(self, call: _Call) -> None:
        try:
            body = await self._body(call)
            with self._line.place():
                request = await self._read(body)
                del body
                await self._converse(call, request)
        except ClientDisconnect:
            raise
        except Exception as error:
            await call.refuse(refusal_of(error))

    async def _converse(self, call: _Call, request: ChatRequest) -> None:
        """Reply to a request, and end its turn of a conversation: it is kept once the whole reply is out."""
        if request.conversation is None:
            return await self._reply(call, _Turn(request))
        conversation = await self._conversations.take(request.conversation)
        try:
            await self._reply(call, _Turn(request, conversation))
        finally:
            self._conversations.give_back(conversation, answered=call.status == 200)

    async def _reply(self, call: _Call, turn: _Turn) -> None:
        async with anyio.create_task_group() as tasks:
            parts: Parts = asyncio.Queue()
            tasks.start_soon(self._produce, turn, parts, call.left)
            tasks.start_soon(call.watch, tasks.cancel_scope)
            try:
                await (self._stream if turn.request.stream else self._send_whole)(call, turn, parts)
            except ClientDisconnect:  # a task group would wrap it
                logger.info("A client has left before the end of its reply.")
            finally:  # also where the server is told to stop: the tasks end with the model's next token
                call.left.set()
                tasks.cancel_scope.cancel()

    async def _body(self, call: _Call) -> bytes:
        limits = self._served.limits
        kind = call.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers let any page send the other kinds here
            raise RequestError(f"The Content-Type must be application/json, got {kind[:100]!r}.", status=415)
        with self._line.arriving() as take:
            return await call.body(limits.max_body_bytes, limits.body_seconds, take)

    async def _read(self, body: bytes) -> ChatRequest:
        limits = self._served.limits
        request = await anyio.to_thread.run_sync(read_request, body, self._model_name, limits)
        await anyio.to_thread.run_sync(fetch_images, request.messages, limits)
        return request

    async def _produce(self, turn: _Turn, parts: Parts, left: threading.Event) -> None:
        """Let the model write an answer, and put its parts."""
        loop = asyncio.get_running_loop()

        def tell(text: str) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, text)

        request, further = turn.request, () if turn.conversation is None else (turn.conversation,)
        try:
            async with self._line.prepared(partial(self._served.prepare, request, *further)) as prompt:
                answer = await self._line.answered(partial(self._served.answer, prompt, request, tell, left, *further))
            if (
                turn.conversation is not None
                and answer.conversation
                and not self._conversations.hold(turn.conversation)
            ):
                answer = replace(answer, conversation=None)
            self._metrics.note_answer(prompt, answer)
            logger.info("%d tokens in answer. %s", answer.tokens, summary(answer.report))
            parts.put_nowait((prompt, answer))
        except Exception as error:
            # Not the error itself: its traceback holds the prompt and the cache.
            parts.put_nowait(refusal_of(error))

    async def _send_whole(self, call: _Call, turn: _Turn, parts: Parts) -> None:
        text, part = "", await parts.get()
        self._metrics.note_first(time.perf_counter() - call.started)
        while isinstance(part, str):
            text += part
            part = await parts.get()
        if isinstance(part, Refusal):
            return await call.refuse(part)
        return await call.send_json(Reply(self._model_name, turn.conversation is not None).whole(text, *part))

    async def _stream(self, call: _Call, turn: _Turn, parts: Parts) -> None:
        reply, part = Reply(self._model_name, turn.conversation is not None), await parts.get()
        # The status goes out with the first part: a request that fails before gets one that says so.
        if not isinstance(part, Refusal):
            self._metrics.note_first(time.perf_counter() - call.started)
            await call.begin_stream()
            await call.send_part(reply.chunk({"role": "assistant", "content": ""}))
        while isinstance(part, str):
            if part:
                await call.send_part(reply.chunk({"content": part}))
            part = await parts.get()
        if isinstance(part, Refusal):
            return await call.refuse(part)
        await call.send_part(reply.last(part[1]))
        if turn.request.include_usage:
            await call.send_part(reply.numbers(*part))
        return await call.send_part(DONE, last=True)


@dataclass(frozen=True)
class _Turn:
    """A request, and the conversation that it goes on with, if any."""

    request: ChatRequest
    conversation: Conversation | None = None


class _Call:
    """An HTTP request and what was sent for it so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.request = Request(scope, receive)
        self.started = time.perf_counter()
        self.left = threading.Event()
        """Set once nobody waits for the reply."""
        self.status = CLIENT_LEFT
        self._scope, self._receive, self._send_on = scope, receive, send
        self._streams = False

    async def body(self, most: int, seconds: float, take: Callable[[int], None]) -> bytes:
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
