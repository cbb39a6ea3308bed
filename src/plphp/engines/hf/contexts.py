# SPDX-License-Identifier: Apache-2.0
"""Which of the sessions on a model a call belongs to.

A session belongs to the context (`contextvars`) that opened it, and to all that inherit it: tasks of an event loop and
``asyncio.to_thread`` do, plain threads and executors do not. A plain thread that was started while a single session is
open joins it, as ``generate`` runs in a thread beside a streamer. Whatever else runs outside of the contexts of the
open sessions could be meant for one of them or for none, and is refused: a guess may prune with a stranger's settings.

A thread-local would not do: coroutines that share a thread would share it. A context variable alone would not do
either: a session is closed in the context that opened it, while copies of that context still list it. So the variable
says which sessions a context has seen, and `OpenSessions`, which the model's attachment holds, which of them are open.
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
from plphp.settings.config import PLPHPConfig

POOLS = ("concurrent.futures.thread", "multiprocessing.pool", "anyio._backends._asyncio")
"""Modules whose threads work for whoever comes, so that the time at which they were started says nothing."""


class Session(Protocol):
    """What this module needs of a `plphp.engines.hf.session.Session`, which stands above it."""

    closed: bool
    config: PLPHPConfig

    def note(self, report: Any) -> None:
        """Keep what gives the report of a finished ``generate``; None while one is running."""

    def note_unpruned(self) -> None:
        """Count a pass of the model that no `PrunedCache` took part in."""

    def warn_unpruned(self, frames: int) -> None:
        """Warn, at the caller so many frames above, if the model ran inside the session without plphp."""

    def close(self) -> None:
        """End the session."""

    def run_generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``generate`` with a new `PrunedCache`."""


_opened: ContextVar[tuple[Session, ...]] = ContextVar("plphp_sessions", default=())
_generating: ContextVar[bool] = ContextVar("plphp_generating", default=False)


@contextmanager
def generating() -> Iterator[None]:
    """While open, every pass of the model belongs to a ``generate`` that plphp runs."""
    token = _generating.set(True)
    try:
        yield
    finally:
        _generating.reset(token)


def is_generating() -> bool:
    """Whether a ``generate`` that plphp runs is going on in this context."""
    return _generating.get()


class OpenSessions:
    """The sessions that are open on one model."""

    def __init__(self) -> None:
        self._applied: weakref.ref[Session] | None = None
        self._lock = threading.Lock()
        # By open session, the thread and task that opened it, and the threads that ran already.
        self._openers: dict[Session, tuple[int, Any]] = {}
        self._threads: dict[Session, weakref.WeakSet[threading.Thread]] = {}

    @property
    def applied(self) -> Session | None:
        """The session of `plphp.apply`, which counts for every caller without a session of its own.

        It is held weakly: the model holds it, and it goes when the model goes.
        """
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
        """The session of this context or thread, or the applied session.

        Raises
        ------
        CacheStateError
            If sessions are open, and it is unclear whether this call is meant for any of them.
        """
        session, doubt = self._session_or_doubt()
        if doubt:
            raise CacheStateError(
                f"{doubt}, so plphp cannot tell whose settings count here. Run the call in the context of its session "
                "(asyncio.to_thread, or contextvars.copy_context().run in an executor), open a session for it, "
                "use plphp.apply for all callers of the model, or plphp.PLPHPConfig(method='none') for one that is not "
                "to be pruned."
            )
        return session

    def here_or_none(self) -> Session | None:
        """The session of this context or thread, or the applied session; None also where that is unclear."""
        return self._session_or_doubt()[0]

    def _session_or_doubt(self) -> tuple[Session | None, str]:
        """The session of this call, if any, and "" or the reason for which it is unclear."""
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
        opened_here = [session for session in _opened.get() if session in self._openers]
        return opened_here[-1] if opened_here else None


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
        # A pool's thread has a function of the pool at the bottom of its stack; nothing else tells it from others.
        frame = sys._getframe()
        modules = set()
        while frame is not None:
            modules.add(frame.f_globals.get("__name__"))
            frame = frame.f_back  # type: ignore[assignment]
        return modules.isdisjoint(POOLS)
    return False
