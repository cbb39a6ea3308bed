# SPDX-License-Identifier: Apache-2.0
"""From the tokens of an answer to its text while it is being written, up to the texts at which it is to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or none yet."""


class AnswerText:
    """The text of an answer, token by token.

    What has been handed out is never taken back: the bytes of half a character wait for the other half, and what may
    be the beginning of a stop text waits until it is, or is not.

    Parameters
    ----------
    decode : callable
        Makes text of a list of tokens.
    stop : sequence of str
        Texts at which the answer ends; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self.stopped = False
        """Whether a stop text has come; what comes later is dropped."""
        self._decode, self._stop = decode, tuple(stop)
        # Tokens are decoded behind a few that are out already, as spaces and bytes depend on what stands before them.
        self._context, self._out = 0, 0
        self._waiting = ""

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain by now, often none."""
        self.tokens.append(token)
        if self.stopped:
            return ""
        text = self._new_text()
        return "" if text.endswith(HALF) else self._advance(text)

    def finish(self) -> str:
        """Return what has waited for tokens that do not come."""
        if self.stopped:
            return ""
        text = self._advance(self._new_text())
        if self.stopped:
            return text
        waiting, self._waiting = self._waiting, ""
        return text + waiting

    def _new_text(self) -> str:
        before = self._decode(self.tokens[self._context : self._out])
        return self._decode(self.tokens[self._context :])[len(before) :]

    def _advance(self, text: str) -> str:
        if text:  # a special token has no text, and is no context
            self._context, self._out = self._out, len(self.tokens)
        text = self._waiting + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._waiting = True, ""
            return text[: min(places)]
        waiting = max((_overlap(text, stop) for stop in self._stop), default=0)
        certain = len(text) - waiting
        self._waiting = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
