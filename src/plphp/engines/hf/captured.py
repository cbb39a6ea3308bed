# SPDX-License-Identifier: Apache-2.0
"""One decoding step of one cache, captured to be replayed with other tokens.

A CUDA graph replays the very launches that were captured, on the very addresses. So all that changes from step to step
has to be read from tensors that stay where they are: the arguments of the model, and the position in the tail (`slot`)
where the new keys and values are written. A tail that grows by a token would be another tensor each time; here it keeps
its capacity, attention reads all of it, and `tail_bias` hides what is behind the slot. Nothing is counted while a step
is captured: the numbers of Python (`tail_length`, the guard of passes) are moved by `CapturedStep.__call__`.
"""

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
"""Turns a function that runs a step and returns its logits into a function that replays the step on a device.

What the step reads has to stay alive as long as the result is used: a graph knows addresses and holds no tensor.
"""

_lock = threading.Lock()  # the sync debug mode is of the whole process, so captures of threads take turns


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

    In that run whatever waits for the device raises: a wait inside a capture is an error of CUDA that leaves torch
    unusable, and one in the debug mode is an exception of Python that leaves everything as it was.
    """
    graph, side = torch.cuda.CUDAGraph(), _side_stream(device)
    with _lock, torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side.wait_stream(current)  # what the step reads may still be written there
        with torch.cuda.stream(
            side
        ):  # CUDA captures no default stream; a failed capture does not give it back, this does
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            # "thread_local": other threads, with other models, may go on allocating memory meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                logits = run()
        current.wait_stream(side)

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@cache  # one for all captures of a device: torch keeps blocks of memory by stream
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class CapturedStep:
    """A captured step of one cache.

    Parameters
    ----------
    cache : PrunedCache
        The cache that is decoded.
    forward : callable
        The model's own forward.
    first : dict
        Arguments of an earlier step: what has another shape by now is not captured.
    kwargs : dict
        Arguments of this step.
    room : int
        Tokens for which the tails get room.
    capture : callable
        See `Capture`.
    """

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
        self._buffers = self._graph_memory()
        # What changes its shape from step to step says what the prompt was, and does not matter any more.
        inputs = {
            name: tensor.clone() for name, tensor in _tensors(kwargs).items() if _same_shape(first.get(name), tensor)
        }
        rest = {name: kwargs[name] for name in kwargs if name not in (*inputs, "attention_mask")}
        device = inputs["input_ids"].device
        slot = torch.full((1,), self._layers[0].tail_length, device=device)
        position = torch.arange(self._capacity, device=device)
        lowest = torch.finfo(torch.float32).min

        def run() -> Tensor:
            # Inside of the captured step, so that every replay makes it anew from the slot.
            bias = torch.where(position <= slot, 0.0, lowest)[None, None, None]
            with _written_at(cache, slot, bias):
                logits: Tensor = forward(**inputs, **rest, attention_mask=None).logits
            return logits

        self._inputs, self._settings, self._slot = inputs, _settings(kwargs), slot
        self._run = run  # keeps alive what the graph reads: its closure holds positions, inputs and the rest
        self._replay = capture(run, device)

    @property
    def has_room(self) -> bool:
        """Whether the tail has room for one token more, in the memory that was captured."""
        # A tail that grew, a turn that was placed or beams that were moved put other tensors in the layers.
        same = all(now is then for now, then in zip(self._graph_memory(), self._buffers, strict=True))
        return same and self._layers[0].tail_length < self._capacity

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether a step has these arguments, but for what is in its tensors."""
        same_shapes = all(_same_shape(kwargs.get(name), tensor) for name, tensor in self._inputs.items())
        return same_shapes and _settings(kwargs) == self._settings

    def written(self) -> list[Tensor]:
        """Copies of the newest keys and values of the first layer, [batch, kv_heads, dim] each."""
        return [states[:, :, -1].clone() for states in self._layers[0].tail()]

    def __call__(self, kwargs: dict[str, Any]) -> Tensor:
        """Replay; the logits [batch, 1, vocabulary] are those of the newest replay."""
        for name, tensor in self._inputs.items():
            tensor.copy_(kwargs[name])
        self._slot.fill_(self._layers[0].tail_length)
        logits = self._replay()
        for layer in self._layers:
            layer.tail_length += 1
        return logits

    def _graph_memory(self) -> list[Any]:
        """What the graph reads of the layers and writes to them."""
        return [part for layer in self._layers for part in (layer.prefix, layer.coded, layer.keys, layer.values)]


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
        with suppress(CacheMemoryError):  # gives back the room that some layers have got already
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
    return {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name != "attention_mask"}


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step that are no tensors, in a form that can be compared: objects by their identity."""
    plain = (bool, int, float, str, type(None))
    settings = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    return {name: value if isinstance(value, plain) else id(value) for name, value in settings.items()}


def _same_shape(argument: Any, tensor: Tensor) -> bool:
    return isinstance(argument, Tensor) and argument.shape == tensor.shape
