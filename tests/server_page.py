# SPDX-License-Identifier: Apache-2.0
"""The how-to page of the server: how it says that a server is started, and its client."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "server.md").read_text(encoding="utf-8")
RIGHT = "Row 4 shows: purple diamond, orange diamond, purple circle."
"""The answer to the page's question."""


def blocks(language: str) -> list[str]:
    """The page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def started(block: str) -> tuple[list[str], dict[str, str]]:
    """The arguments of ``plphp`` in a block, without the port, and the environment variables before it."""
    words = shlex.split(block.replace("\\\n", " "))
    (command,) = (index for index, word in enumerate(words) if Path(word).name == "plphp")
    assert words[-2:] == ["--port", "8000"]
    return words[command + 1 : -2], dict(word.split("=", 1) for word in words[:command])


def asked(port: int) -> tuple[str, dict[str, float]]:
    """The answer that the page's client gets, and the metrics that the page shows, by name and labels.

    The working folder has to be that of the repository.
    """
    ask, look, _ = blocks("python")
    names: dict[str, Any] = {"print": lambda *_: None}
    exec(ask.replace(":8000", f":{port}"), names)
    names["print"] = lambda text: names.update(shown=text)
    exec(look, names)
    return names["answer"].strip(), {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in names["shown"].splitlines())
    }


def talked(port: int) -> list[str]:
    """What the page's conversation prints: an answer, the numbers of its tokens, and that it is deleted."""
    ask, _, talk = blocks("python")
    printed: list[str] = []
    names: dict[str, Any] = {"print": lambda text: printed.append(str(text))}
    exec(ask.replace(":8000", f":{port}"), names)
    printed.clear()
    exec(talk, names)
    return printed
