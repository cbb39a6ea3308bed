# SPDX-License-Identifier: Apache-2.0
"""``/v1/chat/completions``: a request from its first byte to the last of its reply, or until its client leaves."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass, replace
from functools import partial

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from plphp.show.tables import summary

from .call import Call
from .chat_messages import fetch_images
from .chat_request import ChatRequest, read_request
from .conversation import Conversation
from .conversations import Conversations
from .line import Line
from .metrics import Metrics
from .refusals import Refusal, refusal_of
from .replies import DONE, Reply
from .served_model import Answer, Prompt, ServedModel

logger = logging.getLogger("plphp")
Parts = asyncio.Queue[str | tuple[Prompt, Answer] | Refusal]
"""Pieces of text, and behind them what they were made of, or why there are no more."""


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
        call = Call(scope, receive, send)
        self._open.add(call.left)
        try:
            await self._reply_or_refuse(call)
        except ClientDisconnect:
            logger.info("A client has left before its reply.")
        finally:
            call.left.set()
            self._open.discard(call.left)
            self._metrics.note_request(call.status, time.perf_counter() - call.started)

    async def _reply_or_refuse(self, call: Call) -> None:
        try:
            body = await call.json_body(self._served.limits, self._line)
            with self._line.place():
                request = await anyio.to_thread.run_sync(read_request, body, self._model_name, self._served.limits)
                del body
                await self._converse(call, request)
        except ClientDisconnect:
            raise
        except Exception as error:
            await call.refuse(refusal_of(error))

    async def _converse(self, call: Call, request: ChatRequest) -> None:
        """Reply to a request, and end its turn of a conversation: it is kept once the whole reply is out."""
        if request.conversation is None:
            await anyio.to_thread.run_sync(fetch_images, request.messages, self._served.limits)
            return await self._reply(call, _Turn(request))
        conversation = await self._conversations.take(request.conversation)
        try:
            await anyio.to_thread.run_sync(conversation.fetch_images, request.messages, self._served.limits)
            await self._reply(call, _Turn(request, conversation))
        finally:
            self._conversations.give_back(conversation, answered=call.status == 200)

    async def _reply(self, call: Call, turn: _Turn) -> None:
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

    async def _send_whole(self, call: Call, turn: _Turn, parts: Parts) -> None:
        text, part = "", await parts.get()
        self._metrics.note_first(time.perf_counter() - call.started)
        while isinstance(part, str):
            text += part
            part = await parts.get()
        if isinstance(part, Refusal):
            return await call.refuse(part)
        return await call.send_json(Reply(self._model_name, turn.conversation is not None).whole(text, *part))

    async def _stream(self, call: Call, turn: _Turn, parts: Parts) -> None:
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
