# SPDX-License-Identifier: Apache-2.0
"""Quote a user's values in a message, without repeating a whole image that is written out as text."""

from __future__ import annotations

import re
import reprlib
from typing import Any

SHOWN = 40
"""Characters of a long text that a message repeats."""
LONGEST_NAME = 255
"""Characters of a path or an address up to which a message has it in full."""
LONGEST = 600
"""Characters of a quote: 40 of a text may take ten each."""
_ENCODED = re.compile(
    r"(?:data:|base64,)[^\s'\"]+(?:\s+[\w+/=-]{40,})*"  # with the lines that MIME breaks base64 into
    r"|[\w+/=-]{200,}",
    re.IGNORECASE | re.ASCII,
)


def cut(text: str) -> str:
    """Return a text's first characters and its length, or all of it if it is short."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def shortened(text: str) -> str:
    """Return a text in which data URIs and long runs of base64 are cut; everything else stays."""
    # A text that was quoted by an inner error has been cut already, and ends in three dots.
    return _ENCODED.sub(lambda match: match[0] if match[0].endswith("...") else cut(match[0]), text)


def named(text: str) -> str:
    """Return a path or an address as messages show it: whole up to 255 characters, encoded images always cut."""
    return shortened(text) if len(text) <= LONGEST_NAME else cut(text)


def quoted(value: Any) -> str:
    """Return the ``repr`` of a value on a line, in which no text has more than 40 characters and no list many items.

    Parameters
    ----------
    value : object
        A user's value, such as a chat's message with images in it.
    """
    text = _QUOTES.repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of any exception as a line of at most ``limit`` characters, without whole data URIs."""
    text = " ".join(shortened(str(error)).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _Quotes(reprlib.Repr):
    """Shortens texts and bytes at the limits of this module, and says how long they are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = 8
        self.maxother = 100

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= SHOWN else f"{x[:SHOWN]!r}... ({len(x):,} characters)"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x) if len(x) <= SHOWN else f"{x[:SHOWN]!r}... ({len(x):,} bytes)"

    repr_bytearray = repr_bytes

    def repr_instance(self, x: object, level: int) -> str:
        return " ".join(super().repr_instance(x, level).split())


_QUOTES = _Quotes()
