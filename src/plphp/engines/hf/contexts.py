# SPDX-License-Identifier: Apache-2.0
"""Which of the sessions on a model a call belongs to.

A session belongs to the context (`contextvars`) that opened it, and to all that inherit it: tasks of an event loop and
``asyncio.to_thread`` do, plain threads and executors do not. A plain thread that was started while one session is open
joins it, as ``generate`` runs in a thread beside a streamer. Whatever else runs outside of the contexts of the open
sessions could be meant for one of them or for none, and is refused.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from plphp.errors import CacheStateError

POOLS = ("concurrent.futures.thread", "multiprocessing.pool", "anyio._backends._asyncio")
"""Modules whose threads work for whoever comes, so that when they were started says nothing."""


class Session(Protocol):
    """What is known here of an open session (`plphp.engines.hf.session.Session`)."""

    closed: bool

    def note(self, report: Any) -> None:
        """Keep the report of a finished ``generate``; None while one is running."""

    def note_unpruned(self) -> None:
        """Count a pass of the model that no `PrunedCache` took part in."""

    def warn_unpruned(self, frames: int) -> None:
        """Warn, at a place so many frames above, if the model ran inside the session without plphp."""

    def close(self) -> None:
        """End the session."""

    def run_generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``generate`` with a new `PrunedCache`."""


_opened: ContextVar[tuple[Session, ...]] = ContextVar("plphp_sessions", default=())
_generating: ContextVar[bool] = ContextVar("plphp_generating", default=False)


@contextmanager
def generating() -> Iterator[None]:
    """While open, what the model runs belongs to a ``generate`` that plphp looks after."""
    token = _generating.set(True)
    try:
        yield
    finally:
        _generating.reset(token)


def is_generating() -> bool:
    """Whether a ``generate`` that plphp looks after is running in this context."""
    return _generating.get()


class OpenSessions:
    """The sessions that are open on one model."""

    def __init__(self) -> None:
        self._applied: weakref.ref[Session] | None = None
        self._lock = threading.Lock()
        self._openers: dict[Session, tuple[int, Any]] = {}
        self._threads: dict[Session, weakref.WeakSet[threading.Thread]] = {}

    @property
    def applied(self) -> Session | None:
        """That of `plphp.apply`, which counts for every caller without a session of its own; the model holds it."""
        return None if self._applied is None else self._applied()

    @applied.setter
    def applied(self, session: Session | None) -> None:
        self._applied = None if session is None else weakref.ref(session)

    def open(self, session: Session) -> None:
        """Add a session to this context."""
        with self._lock:
            self._openers[session] = threading.get_ident(), _task()
            self._threads[session] = weakref.WeakSet(threading.enumerate())
        _opened.set((*(opened for opened in _opened.get() if not opened.closed), session))

    def close(self, session: Session) -> None:
        """Forget a session."""
        with self._lock:
            self._openers.pop(session, None)
            self._threads.pop(session, None)
        if session in _opened.get():
            _opened.set(tuple(opened for opened in _opened.get() if opened is not session))

    def here(self) -> Session | None:
        """The session of this context or thread, or the applied one.

        Raises
        ------
        CacheStateError
            If sessions are open, and it cannot be told whether this call is meant for one of them.
        """
        session, doubt = self._find()
        if doubt:
            raise CacheStateError(
                f"{doubt}, so plphp cannot tell whose settings count here. Run the call in the context of its session "
                "(asyncio.to_thread, or contextvars.copy_context().run in an executor), open a session for it, "
                "use plphp.apply for all callers of the model, or plphp.PLPHPConfig(method='none') for one that is not "
                "to be pruned."
            )
        return session

    def here_or_none(self) -> Session | None:
        """The same; None where it cannot be told."""
        return self._find()[0]

    def _find(self) -> tuple[Session | None, str]:
        """The session of this call, and why it cannot be told."""
        with self._lock:
            innermost = self._innermost()
            if innermost is not None:
                return innermost, ""
            if not self._openers:
                return self.applied, ""
            if len(set(self._openers.values())) > 1:
                return None, f"{len(self._openers)} plphp sessions are open on this model, none of them in this context"
            session = list(self._openers)[-1]  # of one thread and task, so that they stand inside each other
            if self.applied is not None:
                return None, "a plphp session is open on this model in another context, beside plphp.apply"
            if _is_plain_thread() and threading.current_thread() not in self._threads[session]:
                return session, ""
            return None, "a plphp session is open on this model in another context"

    def _innermost(self) -> Session | None:
        """The newest open session of this context on this model."""
        mine = [session for session in _opened.get() if session in self._openers]
        return mine[-1] if mine else None


def _task() -> Any:
    """The task that runs here; None outside of an event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _is_plain_thread() -> bool:
    """Whether this thread was started for what it does now, with no context to inherit."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        frame = sys._getframe()
        modules = set()
        while frame is not None:
            modules.add(frame.f_globals.get("__name__"))
            frame = frame.f_back  # type: ignore[assignment]
        return modules.isdisjoint(POOLS)
    return False
