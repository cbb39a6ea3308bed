# SPDX-License-Identifier: Apache-2.0
"""A server of the tiny model in a process of its own, and clients of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serving_load
from PIL import Image

from engine import ENVIRONMENT
from pictures import picture

OPTIONS = ("--block-size", "32", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")


@dataclass(frozen=True)
class Server:
    """A running server.

    Parameters
    ----------
    port : int
        Where it listens.
    model : str
        Name of the model in requests.
    log : Path
        What it writes.
    """

    port: int
    model: str
    log: Path

    def connect(self, timeout: float = 300) -> http.client.HTTPConnection:
        """A new connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page."""
        connection = self.connect()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def ask(self, images: Sequence[str], text: str, **options: Any) -> tuple[int, str]:
        """Status and body of the answer to a question on images, given as URLs."""
        connection = self.connect()
        try:
            self.send(connection, images, text, **options)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def send(self, connection: http.client.HTTPConnection, images: Sequence[str], text: str, **options: Any) -> None:
        """Send a question without waiting for the answer."""
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "temperature": 0,
            "max_tokens": 16,
            "ignore_eos": True,
            **options,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})

    def metrics(self) -> dict[str, float]:
        """Sums over all labels of the metrics by name."""
        sums: dict[str, float] = {}
        for line in self.get("/metrics")[1].splitlines():
            found = re.match(r"([a-zA-Z_:]+)(?:\{.*\})? ([-+.\deE]+)$", line)
            if found:
                sums[found[1]] = sums.get(found[1], 0.0) + float(found[2])
        return sums


@contextmanager
def running(folder: Path, model: Path, *options: str) -> Iterator[Server]:
    """Run ``plphp serve`` on the tiny model."""
    log = folder / "server.log"
    command = ["plphp", "serve", str(model), *OPTIONS, *options]
    env = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with serving_load.running(command, env, log) as port:
        yield Server(port, str(model), log)


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """An image as a URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def noise_url(width: int, height: int, seed: int = 0, kind: str = "PNG") -> str:
    """An image of `pictures.picture` as a URL."""
    return data_url(picture(width, height, seed), kind)
