# SPDX-License-Identifier: Apache-2.0
"""Decoding steps that are replayed from a CUDA graph, inside the ordinary ``generate``.

A small model, or a large one at batch 1, decodes more slowly than the memory allows because every kernel is launched
from Python. A graph launches all of a step at once. It holds for one cache: it reads the prefix where it lies, writes
new keys and values to a slot of the tail that a tensor names, and masks the room behind it.

A model may hold fast what it should not: a number of Python's that a step works out is a constant of the graph. Nothing
says so, and the replayed logits are merely wrong. That is why the first replays of every graph are compared with the
same steps done eagerly.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plphp.errors import CacheMemoryError, UnsupportedFeatureError
from plphp.io.quoting import one_line

from .cache_argument import cache_among
from .captured import Capture, CapturedStep, DecodedCache, capture_cuda, reserve
from .layer import PrunedLayer

log = logging.getLogger("plphp")

FEWEST_STEPS = 48
"""Tokens to generate from which on "auto" captures: a capture costs some steps."""
MOST_ROOM = 512
"""Tokens of room that are masked at most; a longer answer is captured anew."""
COMPARED = 2
"""Replays of a graph that are compared: the first has the numbers of the capture, so that a constant shows in the
second."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference between replayed and eager logits, as a share of the largest logit."""
FIRST_LAYER = 0.01
"""Largest difference between replayed and eager keys and values of the first layer, as a share of the largest; they
depend on the token and its position alone, so that no noise of other layers is in them."""

_failed: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Models of which a capture failed, and why: it would again."""


def graph_obstacle(model: PreTrainedModel, beams: int = 1) -> str | None:
    """Say why a model cannot replay its steps from a graph; None where it can be tried."""
    if model.device.type != "cuda":
        return "it needs a model on a CUDA device"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if beams > 1:
        return "beams are moved between steps"
    return None


def refusal(reason: str) -> UnsupportedFeatureError:
    """Make the error for ``decode='graph'`` where steps cannot be replayed."""
    return UnsupportedFeatureError(
        f"decode='graph' cannot be done here: {reason}. Use decode='auto' or 'eager' instead."
    )


class GraphedDecoding:
    """Stands in for the forward of a model for one cache.

    The first decoding step is eager and the second is captured. The first two replays of every graph are also done
    eagerly and compared. What cannot be captured, or differs, goes on eagerly.

    Parameters
    ----------
    cache : PrunedCache
        The cache that is decoded.
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
        cache: DecodedCache,
        forward: Callable[..., Any],
        steps: int,
        *,
        required: bool = False,
        capture: Capture = capture_cuda,
    ) -> None:
        self.cache = cache
        self._forward, self._capture = forward, capture
        self._steps_left, self._required = steps, required
        self._first: dict[str, Any] | None = None  # arguments of the first step
        self._template: Any = None  # what the model returned for it
        self._step: CapturedStep | None = None
        self._gave_up, self._compared = False, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the model: a decoding step of the cache by its graph, all else by the model's own forward."""
        ids = kwargs.get("input_ids")
        of_cache = not args and cache_among(kwargs) is self.cache
        if self._gave_up or not of_cache or ids is None or ids.shape[1] != 1 or not self.cache.is_read:
            return self._forward(*args, **kwargs)
        self._steps_left -= 1
        if self._first is None:
            reason = self._obstacle(kwargs)
            if reason is not None:
                return self._give_up(reason, kwargs)
            self._first, self._template = kwargs, self._forward(**kwargs)
            return self._template
        if self._step is None or not self._step.has_room:
            reason = self._prepare(self._first, kwargs)
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
        mask, model = kwargs.get("attention_mask"), self.cache.attachment.model
        if model in _failed:
            return _failed[model]
        if not all(isinstance(layer, PrunedLayer) and layer.prefix is not None for layer in self.cache.layers):
            return "not every layer of the cache was pruned"
        if not isinstance(kwargs.get("position_ids"), Tensor):
            return "the model works out the positions by itself"
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            return "hidden states or attentions are asked for"
        start = self.cache.layers[0].prefix_length
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(mask[:, start:].all())):
            return "there is padding behind the pruned prompt"
        return None

    def _prepare(self, first: dict[str, Any], kwargs: dict[str, Any]) -> str | None:
        """Make room and capture; say why if it cannot be done."""
        self._step, self._compared = None, 0  # frees the graph before
        room = max(1, min(self._steps_left, MOST_ROOM))
        try:
            self._step = CapturedStep(self.cache, self._forward, first, kwargs, room, self._capture)
        except CacheMemoryError as error:
            return one_line(error)
        except Exception as error:  # models do what cannot be captured, and compilers raise what they like
            reason = f"{type(error).__name__}: {one_line(error)}"
            _failed[self.cache.attachment.model] = reason
            return reason
        return None

    def _compare(self, step: CapturedStep, kwargs: dict[str, Any]) -> Any:
        """Do a step eagerly, take its token back, and replay the step; after a difference go on eagerly."""
        expected = self._forward(**kwargs)
        written = step.written()
        self.cache.crop(-1)
        logits = step(kwargs)
        try:
            differs = _difference(logits, expected.logits) > self._tolerance(logits.dtype)
            differs |= any(
                _difference(now, then) > FIRST_LAYER for now, then in zip(step.written(), written, strict=True)
            )
        except BaseException:
            self.cache.crop(-1)
            raise
        self._compared += 1
        if not differs:
            return self._output(logits)
        # The caller gets an eager step, which appends the token once more.
        self.cache.crop(-1)
        _failed[self.cache.attachment.model] = reason = "a replayed step differs from an eager one"
        return self._give_up(reason, kwargs)

    def _tolerance(self, dtype_of_logits: torch.dtype) -> float:
        """The tolerance of the coarsest dtype: under autocast values have fewer bits than logits may show."""
        dtypes = {dtype_of_logits, *(dtype for layer in self.cache.layers for dtype in layer.dtypes)}
        return max(TOLERANCE.get(dtype, 1e-3) for dtype in dtypes)

    def _give_up(self, reason: str, kwargs: dict[str, Any]) -> Any:
        """Decode eagerly from this step on, and say why; raise where the user asked for graphs alone."""
        self._gave_up, self._step, self._first = True, None, None
        if self._required:
            raise refusal(reason)
        log.warning("Decoding without a CUDA graph: %s.", reason)
        if self._template is not None:
            with suppress(CacheMemoryError):
                reserve(self.cache, 0)  # gives the room back
        return self._forward(**kwargs)

    def _output(self, logits: Tensor) -> Any:
        """Logits in the form that the model returns: its output of the first step, with these in their place."""
        output = copy.copy(self._template)
        output["logits"] = logits.clone()  # the next replay writes to the same memory
        return output


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest number that is expected.

    NaN and inf have to stand in the same places; the finite numbers beside them are compared as ever.
    """
    actual, expected = actual.float(), expected.float()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return math.inf
    actual, expected = (values.where(values.isfinite(), 0) for values in (actual, expected))
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
