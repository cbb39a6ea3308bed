# SPDX-License-Identifier: Apache-2.0
"""``/v1/conversations/{name}/images/{image}``: an image of a conversation is forgotten, or restored."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any

import anyio
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from plphp.inputs.chat import parts_of
from plphp.io.quoting import quoted

from .call import Call
from .chat_messages import HELD, decoded_chat, fetch_images, read_messages
from .conversation import SEND_IMAGES, Conversation
from .conversations import Conversations
from .line import Line
from .options import Limits
from .refusals import Refusal, RequestError, refusal_of

logger = logging.getLogger("plphp")

JSON_TYPES = {str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}
"""What JSON calls the types of values."""


class ImageChanges:
    """Forgets images and restores them; an ASGI application.

    Parameters
    ----------
    limits : Limits
        What a request may ask for.
    line : Line
        Where requests wait.
    conversations : Conversations
        Those whose images these are.
    """

    def __init__(self, limits: Limits, line: Line, conversations: Conversations) -> None:
        self._limits, self._line, self._conversations = limits, line, conversations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reply with what the conversation holds then, or with why nothing was done."""
        call = Call(scope, receive, send)
        try:
            try:
                await call.send_json(await self._card(call))
            except ClientDisconnect:
                raise
            except Exception as error:
                await call.refuse(refusal_of(error))
        except ClientDisconnect:
            logger.info("A client has left before its reply.")

    async def _card(self, call: Call) -> dict[str, Any]:
        """Change an image, and say what the conversation holds then."""
        name, image = call.request.path_params["name"], call.request.path_params["image"]
        if call.request.method == "DELETE":
            with self._line.place():
                return await self._changed(name, partial(Conversation.forget, image=image))
        body = b"" if call.is_empty else await call.json_body(self._limits, self._line)
        with self._line.place():
            pictures = await anyio.to_thread.run_sync(_pictures, body, self._limits)
            return await self._changed(name, partial(Conversation.restore, image=image, pictures=pictures))

    async def _changed(self, name: str, change: partial[None]) -> dict[str, Any]:
        conversation = await self._conversations.take_held(name)
        held = False
        try:
            await self._line.answered(partial(change, conversation))
            held = self._conversations.hold(conversation)
            if not held:
                raise RequestError("With this image the conversation takes more than --conversation-bytes.")
            return conversation.card()
        except Exception as error:
            over = conversation.over or not self._conversations.holds(conversation)
            raise _saying(refusal_of(error), over=over) from error
        finally:
            self._conversations.give_back(conversation, answered=held)


def _saying(refusal: Refusal, *, over: bool) -> RequestError:
    """A refusal that says what has become of the conversation."""
    state = "The conversation is over: begin a new one." if over else "The conversation is as before."
    error = refusal.body["error"]
    return RequestError(f"{error['message']} {state}", status=refusal.status, code=error["code"])


def _pictures(body: bytes, limits: Limits) -> list[Image.Image]:
    """The images of a body: nothing, or the parts of a message."""
    if not body:
        return []
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request is not JSON: {str(error)[:200]}. {SEND_IMAGES}") from error
    if not isinstance(values, dict) or set(values) != {"content"}:
        raise RequestError(f"{SEND_IMAGES} Got {quoted(values)}.", param="content")
    content = values["content"]
    if not isinstance(content, list):
        kind = JSON_TYPES.get(type(content), "an object")
        text = f"content must be a list of image parts, got {kind}: {quoted(content)}. {SEND_IMAGES}"
        raise RequestError(text, param="content")
    chat = read_messages([{"role": "user", "content": content}], limits)
    for number, part in enumerate(chat[0]["content"], 1):
        if part.get("image") == HELD:
            text = f"Part {number} is {HELD!r}, and to restore an image takes the picture itself. {SEND_IMAGES}"
            raise RequestError(text, param="content")
    fetch_images(chat, limits)
    return [part["image"] for _, part in parts_of(decoded_chat(chat, limits), "image")]
