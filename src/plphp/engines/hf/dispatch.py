# SPDX-License-Identifier: Apache-2.0
"""Whose graph a call of a model's forward goes to: caches of several threads may be decoded on a model at a time.

``generate`` calls the model and not a function of ours, so that the model's own ``forward`` has to be stood in for. The
caches that are decoded share a dispatcher, which knows them by identity and is taken off with the last of them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .cache_argument import cache_among
from .captured import Capture, DecodedCache, capture_cuda
from .graph import GraphedDecoding

_lock = threading.RLock()


class Dispatcher:
    """Stands in for a model's forward while some of its caches are decoded from graphs, each by a graph of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.before = model.__dict__.get("forward")
        self.forward = model.forward
        self.__signature__ = inspect.signature(model.forward)  # generate checks arguments by it
        self.decodings: dict[int, GraphedDecoding] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decoding = self.decodings.get(id(cache_among(kwargs)))
        return (decoding or self.forward)(*args, **kwargs)


@contextmanager
def replayed(
    model: PreTrainedModel, cache: DecodedCache, steps: int, *, required: bool, capture: Capture = capture_cuda
) -> Iterator[None]:
    """While open, decode a cache from graphs, see `GraphedDecoding`; threads may share the model."""
    with _lock:
        dispatcher = model.__dict__.get("forward")
        if not isinstance(dispatcher, Dispatcher):
            model.__dict__["forward"] = dispatcher = Dispatcher(model)
        decoding = GraphedDecoding(cache, dispatcher.forward, steps, required=required, capture=capture)
        dispatcher.decodings[id(cache)] = decoding
    try:
        yield
    finally:
        with _lock:
            del dispatcher.decodings[id(cache)]
            # A forward that somebody put on top meanwhile calls the dispatcher, which then stays and calls the model.
            if not dispatcher.decodings and model.__dict__.get("forward") is dispatcher:
                del model.__dict__["forward"]
                if dispatcher.before is not None:
                    model.__dict__["forward"] = dispatcher.before
