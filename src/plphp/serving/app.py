# SPDX-License-Identifier: Apache-2.0
"""The pages of a server: chat completions, conversations, models, health and metrics."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from plphp.io.quoting import quoted

from .chat_endpoint import ChatEndpoint
from .conversations import Conversations
from .image_changes import ImageChanges
from .line import Line
from .metrics import Metrics
from .refusals import RequestError, refusal_of
from .served_model import ServedModel

CHAT = "/v1/chat/completions"


def make_app(served: ServedModel, model_name: str, api_key: str | None = None) -> Starlette:
    """Make the application of a server.

    Parameters
    ----------
    served : ServedModel
        The model; it is closed with the server.
    model_name : str
        What clients call it.
    api_key : str, optional
        What clients have to send as a bearer token; default: nothing.

    Returns
    -------
    Starlette
        An ASGI application.
    """
    line = Line(served.limits.max_queue, served.limits.max_queue * served.limits.max_body_bytes)
    metrics = Metrics(line)
    conversations = Conversations(served.limits, served.conversation, metrics.note_end)
    metrics.show_conversations(conversations)
    chat = ChatEndpoint(served, model_name, line, metrics, conversations)
    card = _card(model_name, served)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name == model_name:
            return JSONResponse(card)
        text = f"The model {quoted(name)} is not served here: ask for {model_name!r}."
        return _refused(RequestError(text, status=404, code="model_not_found"))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        chat.stop()
        line.close()
        conversations.clear()
        served.close()

    routes = [
        Route(CHAT, chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        *_pages_of(conversations, ImageChanges(served.limits, line, conversations)),
        Route("/health", health),
        Route("/metrics", show_metrics),
    ]
    middleware = [] if api_key is None else [Middleware(_WithKey, api_key=api_key)]
    return Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _on_http_error}
    )


def _card(model_name: str, served: ServedModel) -> dict[str, Any]:
    """What is told of the model."""
    entry = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "plphp"}
    return {**entry, "max_model_len": served.limits.max_model_len}


def _pages_of(conversations: Conversations, changes: ImageChanges) -> list[Route]:
    """The pages of conversations and of their images."""
    path = "/v1/conversations/{name}"
    return [
        Route(path, _page_of(conversations), methods=["GET", "DELETE"]),
        Route(f"{path}/images/{{image:int}}", changes, methods=["DELETE"]),
        Route(f"{path}/images/{{image:int}}/restore", changes, methods=["POST"]),
    ]


def _page_of(conversations: Conversations) -> Callable[[Request], Awaitable[Response]]:
    """The page of a conversation, to look at it and to delete it."""

    async def page(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            if request.method != "DELETE":
                return JSONResponse((await conversations.find(name)).card())
            await conversations.delete(name)
        except RequestError as error:
            return _refused(error)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    return page


class _WithKey:
    """Lets through what has the key; health and metrics need none."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._expected = app, f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(sent, self._expected):
                text = "The key is missing or wrong: send the header Authorization: Bearer KEY."
                response = _refused(RequestError(text, status=401, code="invalid_api_key"))
                return await response(scope, receive, send)
        return await self._app(scope, receive, send)


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = f"There is no {request.method} {quoted(request.url.path)} here: chats go to POST {CHAT}."
    return _refused(RequestError(text, status=status))


def _refused(error: RequestError) -> Response:
    refusal = refusal_of(error)
    return JSONResponse(refusal.body, refusal.status)
