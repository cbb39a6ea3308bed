# SPDX-License-Identifier: Apache-2.0
"""Which conversations a server holds, which leave, and who gets them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import anyio
import pytest

pytest.importorskip("anyio")

from plphp.serving.conversations import NEW, Conversations
from plphp.serving.options import Limits
from plphp.serving.refusals import RequestError


class FakeConversation:
    """A conversation without a model."""

    def __init__(self, name: str) -> None:
        self.name, self.nbytes, self.over, self.turns = name, 0, False, 0
        self.taken_back = 0

    def settle(self) -> None:
        self.turns += 1

    def take_back(self) -> None:
        self.taken_back += 1


class Holder:
    """The conversations of a server, each of 100 bytes, and why they ended."""

    def __init__(self, most: int = 2, most_bytes: int = 1000) -> None:
        self.ended: Counter[str] = Counter()
        self._made = 0
        limits = Limits(conversations=most, conversation_bytes=most_bytes)
        self.all = Conversations(limits, self.make, lambda why: self.ended.update([why]))  # type: ignore[arg-type]

    def make(self) -> FakeConversation:
        self._made += 1
        return FakeConversation(f"chat{self._made}")

    def turn(self, name: str = NEW, nbytes: int = 100) -> Any:
        """A turn from its request to its reply; the conversation, or None where it does not stay."""
        conversation: Any = anyio.run(self.all.take, name)
        return conversation if self.answered(conversation, nbytes) else None

    def answered(self, conversation: Any, nbytes: int = 100) -> bool:
        conversation.nbytes = nbytes

        async def answer() -> bool:
            stays = self.all.hold(conversation)
            self.all.give_back(conversation, answered=True)
            return stays

        return anyio.run(answer)

    def status(self, name: str) -> int:
        """The status of a request for a conversation."""
        try:
            anyio.run(self.all.find, name)
        except RequestError as error:
            return error.status
        return 200


def test_the_least_recently_used_leaves() -> None:
    holder = Holder(most=2)
    first, second = holder.turn(), holder.turn()
    holder.turn(first.name)
    third = holder.turn()
    assert [holder.status(item.name) for item in (first, second, third)] == [200, 404, 200]
    assert (holder.all.alive, holder.all.nbytes, holder.ended) == (2, 200, {"room": 1})


def test_bytes_are_bounded_and_the_newest_stays() -> None:
    holder = Holder(most=9, most_bytes=350)
    names = [holder.turn().name for _ in range(3)]
    assert holder.turn(names[0], nbytes=240) is not None
    assert [holder.status(name) for name in names] == [200, 404, 200]
    assert holder.turn(names[2], nbytes=351) is None
    assert (holder.all.alive, holder.all.nbytes) == (0, 0)
    assert holder.ended == {"room": 3}


def test_what_is_taken_does_not_leave() -> None:
    holder = Holder(most=2)
    first = holder.turn()
    taken = anyio.run(holder.all.take, first.name)
    second, third = holder.turn(), holder.turn()
    assert [holder.status(item.name) for item in (first, second, third)] == [409, 404, 200]
    holder.answered(taken)
    assert holder.status(first.name) == 200


def test_as_many_are_answered_at_once_as_are_held() -> None:
    holder = Holder(most=1)
    taken: Any = anyio.run(holder.all.take, NEW)
    with pytest.raises(RequestError, match="All 1 conversations") as refused:
        anyio.run(holder.all.take, NEW)
    assert refused.value.status == 503
    assert holder.answered(taken)
    assert holder.turn() is not None


def test_a_turn_that_fails_is_taken_back_or_ends_the_conversation() -> None:
    holder = Holder()
    first = holder.turn()
    for over, status in ((False, 200), (True, 404)):
        taken: Any = anyio.run(holder.all.take, first.name)
        taken.over = over
        holder.all.give_back(taken, answered=False)
        assert (first.taken_back, holder.status(first.name)) == (2 if over else 1, status)
    assert holder.ended == {"unfinished": 1}
    begun: Any = anyio.run(holder.all.take, NEW)
    holder.all.give_back(begun, answered=False)
    assert (begun.taken_back, holder.status(begun.name), holder.all.alive) == (1, 404, 0)


def test_a_request_waits_for_the_reply_of_the_one_before_to_be_out() -> None:
    holder = Holder()

    async def two() -> list[str]:
        order: list[str] = []
        conversation = await holder.all.take(NEW)
        holder.all.hold(conversation)

        async def next_one() -> None:
            await holder.all.take(conversation.name)
            order.append("taken")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(next_one)
            await anyio.sleep(0.05)
            order.append("out")
            holder.all.give_back(conversation, answered=True)
        return order

    assert anyio.run(two) == ["out", "taken"]


def test_delete() -> None:
    holder = Holder()
    first = holder.turn()
    anyio.run(holder.all.delete, first.name)
    assert holder.status(first.name) == 404
    with pytest.raises(RequestError) as refused:
        anyio.run(holder.all.delete, first.name)
    assert (refused.value.status, holder.ended) == (404, {"deleted": 1})


def test_without_conversations() -> None:
    with pytest.raises(RequestError, match="--conversations N") as refused:
        anyio.run(Holder(most=0).all.take, NEW)
    assert refused.value.status == 400
