# SPDX-License-Identifier: Apache-2.0
"""A hundred clients at once, with all that clients do: nothing is lost, and nothing is left."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from chat_client import Client, serving, user

from plphp import PLPHPConfig, PrunedCache
from plphp.inputs.loading import load_model
from plphp.serving.options import Limits

CONFIG = PLPHPConfig.parse("uniform:retention_rate=0.4")
LENGTH = 6
CHATS = {
    "text": [user("Hello")],
    "grid": [user("Which digit is yellow?", ["grid-2.png"])],
    "page": [user("What does line 2 say?", ["page-1.png"])],
}
BAD: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,a"}}, {"text": "a"}]}
        ]
    },
    {"messages": [user("word " * 2000)]},
    {"messages": [user("a", ["grid-1.png"] * 17)]},
    {"messages": [user("a")], "logprobs": True},
    {"messages": "a"},
)


def good(client: Client, number: int, expected: dict[str, str]) -> None:
    """The answer that a client gets alone, streamed or not."""
    name = list(CHATS)[number % len(CHATS)]
    if number % 2:
        chunks = client.events(CHATS[name], max_tokens=LENGTH)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected[name]
    else:
        assert client.text(CHATS[name], max_tokens=LENGTH) == expected[name]


def bad(client: Client, number: int, _: Any) -> None:
    """A client's mistake, told with a reason."""
    status, reply = client.post(BAD[number % len(BAD)])
    assert status == 400, reply
    assert reply["error"]["message"]


def leave(client: Client, number: int, _: Any) -> None:
    """Ask for a long answer and go away, at once or in the middle of it."""
    body = {"messages": CHATS["page"], "max_tokens": 900, "ignore_eos": True}
    connection = client.send({**body, "stream": True})
    if number % 2:
        connection.getresponse().read(200)
    connection.close()


def test_a_hundred_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: weakref.WeakSet[PrunedCache] = weakref.WeakSet()
    make = PrunedCache.__init__

    def noted(self: PrunedCache, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        caches.add(self)

    monkeypatch.setattr(PrunedCache, "__init__", noted)
    model, processor = load_model(None)
    limits = Limits(max_queue=100, max_model_len=1500)
    with serving(model, processor, CONFIG, limits) as (client, _):
        expected = {name: client.text(chat, max_tokens=LENGTH) for name, chat in CHATS.items()}
        assert len(set(expected.values())) == len(CHATS)
        gc.collect()
        threads = threading.active_count()
        most: list[int] = []
        actions = [good] * 60 + [bad] * 25 + [leave] * 15
        order = sorted(range(100), key=lambda number: number * 37 % 100)
        with ThreadPoolExecutor(100) as clients:
            done = [clients.submit(actions[number], client, number, expected) for number in order]
            for future in done:
                future.result()
                most.append(len(caches))
        client.wait_for("plphp_requests_waiting", 0)
        client.wait_for("plphp_requests_running", 0)
        good(client, 1, expected)
        gc.collect()
        assert len(caches) == 0
        assert max(most) <= 2  # the one that is being answered, and one that is being freed
        assert (client.status_count(200), client.status_count(400), client.status_count(499)) == (64, 25, 15)
        assert threading.active_count() <= threads + 40  # those that anyio keeps to read requests in
    del model
