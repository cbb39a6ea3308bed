# SPDX-License-Identifier: Apache-2.0
"""The conversations that a server holds: as many as it may, the least recently used leave first.

All of it happens on the event loop, so that nothing is locked. A conversation is taken by one request at a time, and
what is taken does not leave.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import anyio

from plphp.io.quoting import quoted
from plphp.pruning.image_bytes import ImageBytes

from .conversation import Conversation
from .options import Limits
from .refusals import RequestError

logger = logging.getLogger("plphp")
NEW = "new"
"""The name under which a request begins a conversation."""
REPLY_SECONDS = 5
"""How long a request waits for the reply before it to be out."""


class Conversations:
    """The conversations of a server.

    Parameters
    ----------
    limits : Limits
        How many there may be, and how many bytes their caches may hold together.
    make : callable
        Makes a conversation.
    note_end : callable
        Hears why a conversation is over: "room", "unfinished" or "deleted".
    """

    def __init__(
        self, limits: Limits, make: Callable[[], Conversation], note_end: Callable[[str], None] = lambda why: None
    ) -> None:
        self._limits, self._make, self._note_end = limits, make, note_end
        self._held: OrderedDict[str, Conversation] = OrderedDict()
        self._taken: set[Conversation] = set()
        # By conversation whose answer is complete, what is set once the reply is out.
        self._replies: dict[Conversation, anyio.Event] = {}

    @property
    def alive(self) -> int:
        """Conversations that can be continued."""
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of their caches after their newest turns."""
        return sum(conversation.nbytes for conversation in self._held.values())

    @property
    def image_bytes(self) -> ImageBytes:
        """What their images take under a budget, all together."""
        return ImageBytes(*map(sum, zip(*(own.image_bytes for own in self._held.values()), strict=True)))

    async def take(self, name: str) -> Conversation:
        """Take a conversation for a request, or begin one.

        Raises
        ------
        RequestError
            If there is none of that name, another request has it, or too many are taken.
        """
        most = self._limits.conversations
        if not most:
            raise RequestError(
                "This server holds no conversations: leave out the field, and send the whole chat; or start the "
                "server with --conversations N.",
                param="plphp",
            )
        if name != NEW:
            return await self.take_held(name)
        if len(self._taken) >= most:
            text = f"All {most} conversations that this server holds are being answered: try again later."
            raise RequestError(text, status=503, code="server_overloaded")
        conversation = self._make()
        self._taken.add(conversation)
        return conversation

    async def take_held(self, name: str) -> Conversation:
        """Take a conversation that is held, for a request that begins none.

        Raises
        ------
        RequestError
            As `find`.
        """
        conversation = await self.find(name)
        self._taken.add(conversation)
        return conversation

    async def find(self, name: str) -> Conversation:
        """Return a conversation that no request has taken, once the reply of its newest answer is out.

        Raises
        ------
        RequestError
            If there is none of that name, or a request has it.
        """
        with anyio.move_on_after(REPLY_SECONDS):
            while (reply := self._replies.get(self._named(name))) is not None:
                await reply.wait()
        conversation = self._named(name)
        if conversation in self._taken:
            text = f"The conversation {quoted(name)} is being answered: wait for that answer."
            raise RequestError(text, status=409, param="plphp", code="conversation_in_use")
        return conversation

    async def delete(self, name: str) -> None:
        """Forget a conversation.

        Raises
        ------
        RequestError
            As `find`.
        """
        self._forget(await self.find(name), "deleted")

    def hold(self, conversation: Conversation) -> bool:
        """Make room for a conversation whose answer is complete; return whether it stays."""
        self._held[conversation.name] = conversation
        self._held.move_to_end(conversation.name)
        self._replies[conversation] = anyio.Event()
        while conversation.name in self._held and self._exceeded():
            idle = next((held for held in self._held.values() if held not in self._taken), conversation)
            if idle is conversation:
                logger.warning("A conversation is not held: with it --conversation-bytes would be exceeded.")
            self._forget(idle, "room")
        return self.holds(conversation)

    def holds(self, conversation: Conversation) -> bool:
        """Whether a conversation can be continued."""
        return conversation.name in self._held

    def give_back(self, conversation: Conversation, *, answered: bool) -> None:
        """End what `take` began; a turn that was not answered is taken back."""
        self._taken.discard(conversation)
        if (reply := self._replies.pop(conversation, None)) is not None:
            reply.set()
        if answered:
            conversation.settle()
        else:
            conversation.take_back()
        if conversation.over and conversation.name in self._held:
            self._forget(conversation, "unfinished")

    def clear(self) -> None:
        """Forget all of them, with their caches."""
        self._held.clear()
        self._taken.clear()

    def _named(self, name: str) -> Conversation:
        if name in self._held:
            return self._held[name]
        raise RequestError(
            f"There is no conversation {quoted(name)} here: it never was, was deleted, came to no end, or has left for "
            "others. Begin anew with the conversation 'new' and the whole chat.",
            status=404,
            param="plphp",
            code="conversation_not_found",
        )

    def _forget(self, conversation: Conversation, why: str) -> None:
        del self._held[conversation.name]
        self._note_end(why)

    def _exceeded(self) -> bool:
        return len(self._held) > self._limits.conversations or self.nbytes > self._limits.conversation_bytes
