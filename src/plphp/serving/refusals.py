# SPDX-License-Identifier: Apache-2.0
"""Why a request is not answered, in the words and with the HTTP status that OpenAI's clients know."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from plphp.errors import (
    CacheMemoryError,
    CacheStateError,
    LoadError,
    NonFiniteAttentionError,
    PLPHPError,
    SpanError,
    UnsupportedFeatureError,
)
from plphp.io.quoting import one_line

logger = logging.getLogger("plphp")


class RequestError(PLPHPError):
    """A request that is not answered.

    Parameters
    ----------
    message : str
        What was got, what was expected, and what to do.
    status : int
        HTTP status.
    param : str, optional
        Field of the request.
    code : str, optional
        OpenAI's name of the reason.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Refusal:
    """A status and the body that says why."""

    status: int
    body: dict[str, Any]


def refusal_of(error: Exception) -> Refusal:
    """Return what a client is told of an error; an unexpected one goes to the log in full, and to no client."""
    if isinstance(error, RequestError):
        return _refusal(error.status, str(error), error.param, error.code)
    if isinstance(error, CacheMemoryError) or type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        logger.error("A request does not fit into memory: %s", one_line(error))
        return _refusal(503, "The server has no memory for this request: make it smaller, or try again later.")
    if isinstance(error, NonFiniteAttentionError):
        return _refusal(422, str(error))
    if isinstance(error, (LoadError, SpanError, UnsupportedFeatureError, ValueError)) and isinstance(error, PLPHPError):
        return _refusal(400, str(error), "messages")
    if isinstance(error, CacheStateError):
        logger.error("An answer came to no end: %s", error)
    else:
        logger.error("An error that no request should cause", exc_info=error)
    return _refusal(500, "The server failed at this request, and its log says why.")


def _refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> Refusal:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Refusal(status, {"error": {"message": message, "type": kind, "param": param, "code": code}})
