# SPDX-License-Identifier: Apache-2.0
"""Whose session counts: coroutines, threads and executors that share a model."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import plphp
from invariants import generate
from plphp import CacheStateError, PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import cache_in, passed
from tiny_models import TINY

KEEP = {rate: PLPHPConfig(method="uniform", retention_rate=rate) for rate in (1.0, 0.5, 0.25)}
NOT_PRUNED = PLPHPConfig(method="none")


def kept(model: Any, **kwargs: Any) -> float:
    """Run ``generate`` and give what its cache kept, 1.0 for a stock cache."""
    cache = cache_in(generate(model, TINY["llava"].inputs(model), max_new_tokens=2, **kwargs))
    return cache.report().retention if isinstance(cache, PrunedCache) else -1.0


def outcome(work: Callable[[], float]) -> Any:
    """What comes of it, or the error."""
    try:
        return work()
    except CacheStateError as error:
        return str(error)


def in_new_thread(work: Callable[[], float]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(outcome(work)))
    thread.start()
    thread.join()
    return results[0]


@contextmanager
def waiting_thread() -> Iterator[Callable[[Callable[[], float]], Any]]:
    """A thread that is there already, and does what it is asked to; with no executor around it."""
    wanted, done, tasks, results = threading.Event(), threading.Event(), [], []

    def loop() -> None:
        wanted.wait()
        results.extend(outcome(task) for task in tasks)
        done.set()

    def ask(work: Callable[[], float]) -> Any:
        tasks.append(work)
        wanted.set()
        done.wait()
        return results[0]

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield ask
    finally:
        wanted.set()
        thread.join()


def test_two_coroutines_each_with_a_session(llava: Any) -> None:
    """Their models run in threads of the event loop's executor, one behind the other while both sessions are open."""

    async def serve(rate: float, opened: asyncio.Barrier) -> float:
        with plphp.prune(llava, KEEP[rate]) as run:
            await opened.wait()
            seen = await asyncio.to_thread(kept, llava)
            await opened.wait()
            assert run.report.retention == seen
        return seen

    async def both() -> list[float]:
        opened = asyncio.Barrier(2)
        return await asyncio.gather(serve(0.5, opened), serve(0.25, opened))

    assert asyncio.run(both()) == [0.5, 0.25]


def test_a_coroutine_without_a_session_beside_one_with(llava: Any) -> None:
    async def pruned(opened: asyncio.Event, over: asyncio.Event) -> float:
        with plphp.prune(llava, KEEP[0.5]):
            opened.set()
            await over.wait()
            return await asyncio.to_thread(kept, llava)

    async def stock(opened: asyncio.Event, over: asyncio.Event) -> tuple[Any, ...]:
        await opened.wait()
        threaded = await asyncio.to_thread(outcome, lambda: kept(llava))
        inline = outcome(lambda: kept(llava))
        with plphp.prune(llava, NOT_PRUNED):
            named = await asyncio.to_thread(kept, llava)
        over.set()
        return threaded, inline, named

    async def both() -> list[Any]:
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(pruned(*events), stock(*events))

    rate, (threaded, inline, named) = asyncio.run(both())
    assert rate == 0.5
    assert "in another context" in threaded
    assert "in another context" in inline
    assert named == 1.0


def test_a_task_that_is_made_inside_a_session_inherits_it(llava: Any) -> None:
    async def main() -> float:
        with plphp.prune(llava, KEEP[0.25]):
            return await asyncio.create_task(asyncio.to_thread(kept, llava))

    assert asyncio.run(main()) == 0.25


def test_an_executor_has_no_context(llava: Any) -> None:
    with ThreadPoolExecutor(1) as pool, plphp.prune(llava, KEEP[0.25]):
        assert "contextvars.copy_context" in pool.submit(outcome, lambda: kept(llava)).result()
        assert pool.submit(contextvars.copy_context().run, kept, llava).result() == 0.25


def test_a_thread_that_was_there_before_the_session(llava: Any) -> None:
    with waiting_thread() as ask, plphp.prune(llava, KEEP[0.25]):
        assert "in another context" in ask(lambda: kept(llava))


def test_a_new_thread_joins_the_only_session(llava: Any) -> None:
    with plphp.prune(llava, KEEP[0.25]) as run:
        assert in_new_thread(lambda: kept(llava)) == 0.25
        assert run.report.retention == 0.25
        with plphp.prune(llava, KEEP[0.5]):  # and the innermost of several that stand inside each other
            assert in_new_thread(lambda: kept(llava)) == 0.5
        assert in_new_thread(lambda: kept(llava)) == 0.25


def test_a_new_thread_between_two_sessions_is_refused(llava: Any) -> None:
    """Either could have started it."""

    def inner() -> float:
        with plphp.prune(llava, KEEP[0.5]):
            assert in_new_thread(lambda: kept(llava)).startswith("2 plphp sessions are open")
            return kept(llava)

    with plphp.prune(llava, KEEP[0.25]):
        assert in_new_thread(inner) == 0.5
        assert kept(llava) == 0.25


def test_a_new_thread_beside_a_child_task_is_refused(llava: Any) -> None:
    """The child's session stands inside its parent's, and both run."""

    async def child(opened: asyncio.Event, over: asyncio.Event) -> None:
        with plphp.prune(llava, KEEP[0.25]):
            opened.set()
            await over.wait()

    async def main() -> Any:
        opened, over = asyncio.Event(), asyncio.Event()
        with plphp.prune(llava, KEEP[1.0]):
            task = asyncio.create_task(child(opened, over))
            await opened.wait()
            result = in_new_thread(lambda: kept(llava))
            over.set()
            await task
        return result

    assert asyncio.run(main()).startswith("2 plphp sessions are open")


def test_a_session_that_another_context_of_the_same_thread_holds_open(llava: Any) -> None:
    """As the life-span of a server does, or a fixture of a test."""
    context = contextvars.copy_context()
    manager = plphp.prune(llava, KEEP[0.25])
    context.run(manager.__enter__)
    assert "plphp.apply" in outcome(lambda: kept(llava))
    assert context.run(kept, llava) == 0.25
    context.run(manager.__exit__, None, None, None)
    assert kept(llava) == -1.0


def test_apply_counts_for_every_caller(llava: Any) -> None:
    plphp.apply(llava, KEEP[0.25])
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(kept, llava).result() == 0.25
            with plphp.prune(llava, KEEP[0.5]):
                assert kept(llava) == 0.5
                assert "beside plphp.apply" in pool.submit(outcome, lambda: kept(llava)).result()
        assert kept(llava) == 0.25
    finally:
        plphp.remove(llava)


def test_a_cache_of_its_own_needs_no_session(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    with waiting_thread() as ask, plphp.prune(llava, KEEP[0.25]):
        arguments = passed(PrunedCache.for_inputs(llava, inputs, KEEP[0.5]))
        assert ask(lambda: kept(llava, **arguments)) == 0.5
        arguments.clear()


def test_sessions_that_are_closed_in_another_order(llava: Any) -> None:
    managers = [plphp.prune(llava, KEEP[rate]) for rate in (0.5, 0.25)]
    for manager in managers:
        manager.__enter__()
    managers[0].__exit__(None, None, None)
    assert kept(llava) == 0.25
    managers[1].__exit__(None, None, None)
    assert kept(llava) == -1.0


def test_a_copied_context_that_outlives_its_session_is_outside(llava: Any) -> None:
    with plphp.prune(llava, KEEP[0.25]):
        context = contextvars.copy_context()
    assert context.run(kept, llava) == -1.0
    with plphp.prune(llava, KEEP[0.5]):
        assert "in another context" in context.run(outcome, lambda: kept(llava))
