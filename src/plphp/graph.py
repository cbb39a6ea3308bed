# SPDX-License-Identifier: Apache-2.0
"""Decoding steps that are replayed from a CUDA graph, inside the ordinary ``generate``.

A small model, or a large one at batch 1, decodes more slowly than the memory allows because every kernel is launched
from Python. A graph launches all of a step at once. It holds for one cache: it reads the prefix where it lies, writes
new keys and values to a slot of the tail that a tensor names, and masks the room behind it.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import PrunedCache
from .errors import CacheMemoryError, UnsupportedFeatureError, one_line
from .layer import PrunedLayer

log = logging.getLogger("plphp")

FEWEST_STEPS = 48
"""Tokens to generate from which on "auto" captures: a capture costs some steps."""
MOST_ROOM = 512
"""Tokens of room that are masked at most; a longer answer is captured anew."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference between replayed and eager logits, as a share of the largest logit."""
PER_STEP = ("input_ids", "position_ids")
"""Tensors that are given anew to each step; others say what the prompt was."""
COMPARED = 2
"""Replays that are compared: what a graph holds fast, and should not, shows in the second one."""

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes, of a function that runs a step and gives its logits, one that replays the same on the device."""


def no_graph(model: PreTrainedModel, beams: int) -> str | None:
    """Say why a model cannot replay its steps from a graph; None where it can be tried."""
    if model.device.type != "cuda":
        return "it needs a model on a CUDA device"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if beams > 1:
        return "beams are moved between steps"
    return None


def capture_cuda(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture in a CUDA graph, after one run that compiles and allocates what is needed once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class GraphedDecoding:
    """Stands in for the forward of a model while ``generate`` runs with one cache.

    The first decoding step is eager, the second is captured, and it and the next are done both ways and compared; what
    cannot be captured, or differs, goes on eagerly.

    Parameters
    ----------
    cache : PrunedCache
        The cache.
    forward : callable
        The model's own forward.
    steps : int
        Tokens to be generated at most.
    required : bool
        Whether to raise where steps cannot be captured, rather than to log why.
    capture : callable
        See `Capture`.
    """

    def __init__(
        self,
        cache: PrunedCache,
        forward: Callable[..., Any],
        steps: int,
        *,
        required: bool = False,
        capture: Capture = capture_cuda,
    ) -> None:
        self.__signature__ = inspect.signature(forward)  # generate checks arguments by it
        self._cache, self._forward, self._capture = cache, forward, capture
        self._left, self._required = steps, required
        self._template: Any = None
        self._step: _Step | None = None
        self._off, self._compared = False, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""
        ids = kwargs.get("input_ids")
        of_cache = not args and kwargs.get("past_key_values") is self._cache
        if self._off or not of_cache or ids is None or ids.shape[1] != 1 or not self._cache.is_read:
            return self._forward(*args, **kwargs)
        self._left -= 1
        if self._template is None:
            reason = self._obstacle(kwargs)
            if reason is not None:
                return self._give_up(reason, kwargs)
            self._template = self._forward(**kwargs)
            return self._template
        if self._step is None or not self._step.has_room:
            reason = self._prepare(kwargs)
            if reason is not None:
                return self._give_up(reason, kwargs)
        assert self._step is not None
        if not self._step.takes(kwargs):
            return self._give_up("the arguments of the model changed between steps", kwargs)
        if self._compared < COMPARED:
            return self._compare(self._step, kwargs)
        return self._output(self._step(kwargs))

    def _obstacle(self, kwargs: dict[str, Any]) -> str | None:
        """Say why the steps of this cache cannot be captured."""
        cache, mask = self._cache, kwargs.get("attention_mask")
        if not all(isinstance(layer, PrunedLayer) and layer.prefix is not None for layer in cache.layers):
            return "not every layer of the cache was pruned"
        if "position_ids" not in kwargs:
            return "the model works out the positions by itself"
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            return "hidden states or attentions are asked for"
        start = cache.layers[0].prefix_length
        if mask is not None and (mask.ndim != 2 or not bool(mask[:, start:].all())):
            return "there is padding behind the pruned prompt"
        return None

    def _prepare(self, kwargs: dict[str, Any]) -> str | None:
        """Make room and capture; say why if it cannot be done."""
        try:
            self._step = None  # frees the graph before
            self._step = _Step(self._cache, self._forward, kwargs, max(1, min(self._left, MOST_ROOM)), self._capture)
        except CacheMemoryError as error:
            return one_line(error)
        except Exception as error:  # models do what cannot be captured, and compilers raise what they like
            return f"{type(error).__name__}: {one_line(error)}"
        return None

    def _compare(self, step: _Step, kwargs: dict[str, Any]) -> Any:
        """Replay a step that is also done eagerly."""
        expected = self._forward(**kwargs)
        self._cache.crop(-1)
        found = step(kwargs)
        largest = expected.logits.float().abs().max()
        difference = ((found.float() - expected.logits.float()).abs().max() / largest).item()
        self._compared += 1
        if difference <= TOLERANCE.get(found.dtype, 1e-3):
            return self._output(found)
        self._cache.crop(-1)
        return self._give_up(f"replayed logits differ by {difference:.2g} of the largest", kwargs)

    def _give_up(self, reason: str, kwargs: dict[str, Any]) -> Any:
        self._off, self._step = True, None
        if self._required:
            raise UnsupportedFeatureError(
                f"decode='graph' cannot be done here: {reason}. Use decode='auto' or 'eager' instead."
            )
        log.warning("Decoding without a CUDA graph: %s.", reason)
        return self._forward(**kwargs)

    def _output(self, logits: Tensor) -> Any:
        """What the model would return."""
        output = copy.copy(self._template)
        output["logits"] = logits
        return output


class _Step:
    """A captured step of one cache."""

    def __init__(
        self,
        cache: PrunedCache,
        forward: Callable[..., Any],
        kwargs: dict[str, Any],
        room: int,
        capture: Capture,
    ) -> None:
        self._cache, self._layers = cache, [layer for layer in cache.layers if isinstance(layer, PrunedLayer)]
        self._capacity = cache.reserve(room)
        self._given = {name: kwargs[name].clone() for name in PER_STEP}
        self._settings = _settings(kwargs)
        others = {name: one for name, one in kwargs.items() if name not in (*PER_STEP, "attention_mask")}
        device = self._given["input_ids"].device
        slot = torch.full((1,), self._layers[0].tail_length, device=device)
        place = torch.arange(self._capacity, device=device)
        lowest = torch.finfo(torch.float32).min

        def run() -> Tensor:
            bias = torch.where(place <= slot, 0.0, lowest)[None, None, None]
            with cache.written_at(slot, bias):
                logits: Tensor = forward(**self._given, **others, attention_mask=None).logits
            return logits

        self._slot = slot
        self._replay = capture(run)

    @property
    def has_room(self) -> bool:
        """Whether the tail has room for one token more."""
        return self._layers[0].tail_length < self._capacity

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether a step has these arguments, but for what is in its tensors."""
        same_shapes = all(kwargs[name].shape == tensor.shape for name, tensor in self._given.items())
        return same_shapes and _settings(kwargs) == self._settings

    def __call__(self, kwargs: dict[str, Any]) -> Tensor:
        """Replay; the logits [batch, 1, vocabulary] are those of the newest replay."""
        for name, tensor in self._given.items():
            tensor.copy_(kwargs[name])
        self._slot.fill_(self._layers[0].tail_length)
        logits = self._replay()
        for layer in self._layers:
            layer.tail_length += 1
        return logits


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step that are no tensors."""
    return {name: one for name, one in kwargs.items() if not isinstance(one, Tensor)}
