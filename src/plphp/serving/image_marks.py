# SPDX-License-Identifier: Apache-2.0
"""What is remembered of an image that was read: enough to know it again, and no pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from plphp.errors import PLPHPError

from .chat_messages import HELD, content_of


@dataclass(frozen=True)
class ImageMark:
    """An image that was read.

    Parameters
    ----------
    content, source : str
        SHA-256 of its file, and of the URI by which it was sent.
    """

    content: str
    source: str

    def is_of(self, source: str) -> bool:
        """Whether a source names the same image: that it is held, the same URI, or a URI that holds the same file.

        Nothing is fetched.
        """
        if source == HELD or digest(source.encode()) == self.source:
            return True
        try:
            content = content_of(source, allow_urls=False)
        except PLPHPError:
            return False
        return isinstance(content, bytes) and digest(content) == self.content


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
