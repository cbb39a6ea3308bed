# SPDX-License-Identifier: Apache-2.0
"""Requests wait in the order in which they came: few enough, and few of them with their images in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import anyio

from .refusals import RequestError

PREPARED = 2
"""Prompts at once: one that is being answered, and one that is being made meanwhile."""

Result = TypeVar("Result")


class Line:
    """The line in front of a model that answers one request at a time.

    Parameters
    ----------
    length : int
        Requests that may be in it.
    max_bytes : int
        Bytes of all bodies that are on their way to it. They have no place in it yet, so that a slow client keeps
        nobody out.
    """

    def __init__(self, length: int, max_bytes: int) -> None:
        self.length, self.max_bytes = length, max_bytes
        self._arriving = 0
        self.requests = 0
        """Requests in it, the one that is being answered included."""
        self._prepared, self._model = anyio.Semaphore(PREPARED), anyio.Lock()
        # A thread each for good: every thread that runs torch holds a team of threads and a CUDA context of its own.
        self._preparing = ThreadPoolExecutor(1, "plphp-prompts")
        self._answering = ThreadPoolExecutor(1, "plphp-model")

    @property
    def answering(self) -> int:
        """Requests that are being answered: 0 or 1."""
        return int(self._model.locked())

    def check(self) -> None:
        """Raise `RequestError` if it is full."""
        if self.requests >= self.length:
            raise _overloaded(f"{self.requests} requests already, as many as it takes")

    @contextmanager
    def arriving(self) -> Iterator[Callable[[int], None]]:
        """Count a body that is on its way; yields a function that takes the bytes of each part.

        Raises
        ------
        RequestError
            If the line is full, or too many bytes are on their way.
        """
        self.check()
        arrived = 0

        def take(count: int) -> None:
            nonlocal arrived
            if self._arriving + count > self.max_bytes:
                raise _overloaded(f"{self._arriving:,} bytes of other requests on their way")
            arrived += count
            self._arriving += count

        try:
            yield take
        finally:
            self._arriving -= arrived

    @contextmanager
    def place(self) -> Iterator[None]:
        """Stand in the line.

        Raises
        ------
        RequestError
            If it is full.
        """
        self.check()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @asynccontextmanager
    async def prepared(self, work: Callable[[], Result]) -> AsyncIterator[Result]:
        """Wait for room for a prompt, and make it; the room is held as long as the context is open."""
        async with self._prepared:
            yield await _run(self._preparing, work)

    async def answered(self, work: Callable[[], Result]) -> Result:
        """Wait for the model, and answer a prompt with it."""
        async with self._model:
            return await _run(self._answering, work)

    def close(self) -> None:
        """End the threads, once they have nothing to do."""
        self._preparing.shutdown()
        self._answering.shutdown()


def _overloaded(what: str) -> RequestError:
    return RequestError(f"The server has {what}: try again later.", status=503, code="server_overloaded")


async def _run(thread: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    """Run a function in a thread to its end, also if nobody waits for it any more: what it holds stays held."""
    future = asyncio.wrap_future(thread.submit(work))
    with anyio.CancelScope(shield=True):
        await asyncio.wait([future])
    try:
        return future.result()
    finally:
        del future  # its error holds this frame, and with it the prompt and the cache, until they are collected
