# SPDX-License-Identifier: Apache-2.0
"""One decoding step of one cache, captured to be replayed with other tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from plphp.errors import CacheMemoryError

from .attachment import Attachment
from .layer import PrunedLayer

Capture = Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]]
"""Makes, of a function that runs a step and gives its logits, one that replays the same on a device.

What the function reads has to stay alive as long as the result is used.
"""

_lock = threading.Lock()


class DecodedCache(Protocol):
    """What a graph needs of a `plphp.engines.hf.cache.PrunedCache`, which stands above this module."""

    layers: list[Any]
    tail_bias: Tensor | None

    @property
    def attachment(self) -> Attachment: ...
    @property
    def is_read(self) -> bool: ...
    def crop(self, tokens_to_remove: int) -> None: ...
    def forget_pass(self) -> None: ...


def capture_cuda(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Capture in a CUDA graph, after one run that compiles and allocates what is needed once.

    In that run whatever waits for the device raises, as a capture would be broken by it, and torch with it.
    """
    graph, side = torch.cuda.CUDAGraph(), _side_stream(device)
    with _lock, torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # gives the stream back where the capture does not
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")  # of the whole process, for this one step
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                logits = run()
        current.wait_stream(side)

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class CapturedStep:
    """A captured step of one cache."""

    def __init__(
        self,
        cache: DecodedCache,
        forward: Callable[..., Any],
        first: dict[str, Any],
        kwargs: dict[str, Any],
        room: int,
        capture: Capture,
    ) -> None:
        self._layers = _pruned(cache)
        self._capacity = reserve(cache, room)
        self._buffers = self._held()
        # What changes its shape from step to step says what the prompt was, and does not matter any more.
        given = {name: one.clone() for name, one in _tensors(kwargs).items() if _same_shape(first.get(name), one)}
        others = {name: kwargs[name] for name in kwargs if name not in (*given, "attention_mask")}
        device = given["input_ids"].device
        slot = torch.full((1,), self._layers[0].tail_length, device=device)
        place = torch.arange(self._capacity, device=device)
        lowest = torch.finfo(torch.float32).min

        def run() -> Tensor:
            bias = torch.where(place <= slot, 0.0, lowest)[None, None, None]
            with _written_at(cache, slot, bias):
                logits: Tensor = forward(**given, **others, attention_mask=None).logits
            return logits

        self._given, self._settings, self._slot = given, _settings(kwargs), slot
        self._run = run  # keeps alive what the graph reads
        self._replay = capture(run, device)

    @property
    def has_room(self) -> bool:
        """Whether the tail has room for one token more, in the memory that was captured."""
        same = all(one is other for one, other in zip(self._held(), self._buffers, strict=True))
        return same and self._layers[0].tail_length < self._capacity

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether a step has these arguments, but for what is in its tensors."""
        same_shapes = all(_same_shape(kwargs.get(name), tensor) for name, tensor in self._given.items())
        return same_shapes and _settings(kwargs) == self._settings

    def written(self) -> list[Tensor]:
        """Copies of the newest keys and values of the first layer, [batch, kv_heads, dim] each."""
        return [states[:, :, -1].clone() for states in self._layers[0].tail()]

    def __call__(self, kwargs: dict[str, Any]) -> Tensor:
        """Replay; the logits [batch, 1, vocabulary] are those of the newest replay."""
        for name, tensor in self._given.items():
            tensor.copy_(kwargs[name])
        self._slot.fill_(self._layers[0].tail_length)
        logits = self._replay()
        for layer in self._layers:
            layer.tail_length += 1
        return logits

    def _held(self) -> list[Any]:
        """What the graph reads of the layers and writes to them."""
        return [held for layer in self._layers for held in (layer.prefix, layer.keys, layer.values)]


def reserve(cache: DecodedCache, room: int) -> int:
    """Make room in the tails for so many tokens more; return how many tokens a tail has room for now.

    Raises
    ------
    CacheMemoryError
        If there is no memory for it; the cache holds what it held.
    """
    layers = _pruned(cache)
    try:
        return min(layer.reserve(room) for layer in layers)
    except CacheMemoryError:
        with suppress(CacheMemoryError):
            for layer in layers:
                layer.reserve(0)
        raise


@contextmanager
def _written_at(cache: DecodedCache, slot: Tensor, bias: Tensor) -> Iterator[None]:
    """Let a step be written to a slot of the tails, int64 [1], without being counted.

    ``bias`` is additive, float32 [1, 1, 1, room], and hides what is behind the slot.
    """
    layers, cache.tail_bias = _pruned(cache), bias
    for layer in layers:
        layer.slot = slot
    try:
        yield
    finally:
        cache.tail_bias = None
        cache.forget_pass()
        for layer in layers:
            layer.slot = None


def _pruned(cache: DecodedCache) -> list[PrunedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PrunedLayer)]


def _tensors(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a step, but for the mask: there is nothing for it to hide."""
    return {name: one for name, one in kwargs.items() if isinstance(one, Tensor) and name != "attention_mask"}


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step that are no tensors, as what can be compared."""
    plain = (bool, int, float, str, type(None))
    others = {name: one for name, one in kwargs.items() if not isinstance(one, Tensor)}
    return {name: one if isinstance(one, plain) else id(one) for name, one in others.items()}


def _same_shape(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape
