# SPDX-License-Identifier: Apache-2.0
"""A server in a thread of the tests' process, and a client of it."""

from __future__ import annotations

import base64
import http.client
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from plphp import PLPHPConfig
from plphp.serving.options import Limits, Listening
from plphp.serving.served_model import ServedModel
from plphp.serving.server import bound_socket, uvicorn_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "images"
CHAT = "/v1/chat/completions"
NAME = "bundled"


@dataclass(frozen=True)
class Client:
    """Talks to a server.

    Parameters
    ----------
    port : int
        Where it listens.
    """

    port: int

    def connect(self) -> http.client.HTTPConnection:
        """A new connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def get(
        self, path: str, method: str = "GET", body: dict[str, Any] | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of a page."""
        connection = self.connect()
        data = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, data, {**kind, **headers})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def send(self, body: dict[str, Any] | bytes, **headers: str) -> http.client.HTTPConnection:
        """Send a chat without waiting for the reply."""
        connection = self.connect()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", CHAT, data, {"Content-Type": "application/json", **headers})
        return connection

    def post(self, body: dict[str, Any] | bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and body of the reply to a chat."""
        connection = self.send(body, **headers)
        try:
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def answer(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """The completion of a chat."""
        status, reply = self.post({"model": NAME, "messages": messages, **options})
        assert status == 200, reply
        return reply

    def text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The answer to a chat."""
        return str(self.answer(messages, **options)["choices"][0]["message"]["content"])

    def events(self, messages: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, whose end is checked."""
        connection = self.send({"model": NAME, "messages": messages, "stream": True, **options})
        try:
            response = connection.getresponse()
            lines = response.read().decode().split("\n\n")
            assert response.status == 200, lines
        finally:
            connection.close()
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def metrics(self) -> dict[str, float]:
        """Sums over all labels of the metrics by name, and the requests by status."""
        sums: dict[str, float] = {}
        for line in self.get("/metrics")[1].splitlines():
            if match := re.match(r"(\w+)(?:\{(.*)\})? ([-+.\deE]+)$", line):
                name = f"{match[1]}{match[2]}" if match[1] == "plphp_requests_total" else match[1]
                sums[name] = sums.get(name, 0.0) + float(match[3])
        return sums

    def status_count(self, status: int) -> float:
        """Requests that have ended with a status."""
        return self.metrics().get(f'plphp_requests_totalstatus="{status}"', 0.0)

    def wait_for(self, name: str, value: float, seconds: float = 30) -> None:
        """Wait until a metric has a value."""
        end = time.monotonic() + seconds
        while self.metrics().get(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metrics().get(name)}, not {value}"
            time.sleep(0.02)


@contextmanager
def serving(
    model: Any,
    processor: Any,
    config: PLPHPConfig,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> Iterator[tuple[Client, ServedModel]]:
    """Serve a model at a free port."""
    served = ServedModel(model, processor, config, "eager", limits or Limits())
    port = bound_socket(Listening(port=0))
    server = uvicorn.Server(uvicorn_config(served, NAME, api_key))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Client(port.getsockname()[1]), served
    finally:
        server.should_exit = True
        thread.join(30)
        port.close()
    assert not thread.is_alive()


def data_uri(source: str | Image.Image) -> str:
    """An example by its name, or an image, as a URI."""
    if isinstance(source, str):
        data = (EXAMPLES / source).read_bytes()
    else:
        source.save(buffer := BytesIO(), "PNG")
        data = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def user(text: str, images: Sequence[str | Image.Image] = ()) -> dict[str, Any]:
    """A user's message, its images first."""
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Talk:
    """A conversation of a client."""

    def __init__(self, client: Client) -> None:
        self.client, self.name, self.chat = client, "new", list[dict[str, Any]]()

    def ask(self, question: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The reply to a turn, which has to succeed."""
        reply = self.client.answer([*self.chat, question], plphp={"conversation": self.name}, **options)
        self.chat += [question, said(reply["choices"][0]["message"]["content"])]
        self.name = reply["plphp"]["conversation"]
        return reply

    def refused(self, *messages: dict[str, Any], **options: Any) -> tuple[int, str]:
        """Status and message of a turn that is refused."""
        body = {"messages": [*self.chat, *messages], "plphp": {"conversation": self.name}, **options}
        status, reply = self.client.post(body)
        return status, reply["error"]["message"]

    def card(self) -> dict[str, Any]:
        """What the server says of it."""
        status, page = self.client.get(f"/v1/conversations/{self.name}")
        assert status == 200, page
        return json.loads(page)
