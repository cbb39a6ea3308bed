# SPDX-License-Identifier: Apache-2.0
"""A cache that follows the passes of its model, and is whole or ended: never half-updated in silence.

How a pass is followed: `update` appends to a layer, notes it as pending (`PassGuard.pending`) and marks the keys that
it returns with a `PendingUpdate`. By that mark plphp's attention function finds the cache; it reads the layer and calls
``after_attention``, after which nothing is pending. A layer that is still pending when the next is updated was read by
another attention function, without its prefix. An update of an early layer before the pass came to its end follows an
error: while decoding, the tokens of that pass can be taken back, as they are the last of every tail; the tokens of a
prompt cannot, as its layers are placed one by one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from plphp.errors import CacheMemoryError, CacheStateError, SpanError, UnsupportedFeatureError, UnsupportedModelError
from plphp.pruning.packing import Packing
from plphp.pruning.reading import PromptReading

from .attachment import Attachment, Lease
from .conversation.cache import ConversationCache
from .layer import PrunedLayer, layer_nbytes
from .passes import PassGuard
from .window_layer import WindowLayer


@dataclass(frozen=True)
class PendingUpdate:
    """Rides on the keys that `GuardedCache.update` returns, so that the attention function finds its cache.

    Transformers hands an attention function the keys and values and no cache: an attribute of the tensor is the only
    way from the cache to the function that needs no global state, and threads that share a model cannot mix it up. The
    keys are a view that is made anew at every update, so that no tensor which the cache keeps holds the cache.
    """

    cache: GuardedCache
    layer: int


class GuardedCache(ConversationCache):
    """A conversation's cache with layers that can be pruned, and the state of the pass over them.

    Attributes
    ----------
    reading : PromptReading or None
        The prompt that was planned and has not been read to its end. None says that everything planned is read: what
        comes now is an answer, which no layer scores or evicts.
    tail_bias : Tensor or None
        Additive mask, float32 [1, 1, 1, room], in the place of the model's; set while a step is captured for a CUDA
        graph, which reads the tail with the room behind it (`plphp.engines.hf.captured`).
    """

    def __init__(self, attachment: Attachment) -> None:
        text_config = attachment.model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=text_config).layers
        super().__init__(attachment, [_of_ours(layer) for layer in layers])
        self._pruned = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, PrunedLayer)}
        if not self._pruned:
            raise UnsupportedModelError(
                f"No text layer of this {attachment.model.config.model_type!r} model has full attention (all have a "
                "sliding window, chunks or no KV cache), so there is nothing to prune."
            )
        self._first, self._last = min(self._pruned), max(self._pruned)
        # Layers without attention, or with the keys and values of an earlier layer, have a dummy that no pass updates.
        dummy = getattr(self, "is_dummy", [False] * len(layers))
        updated = [i for i in range(len(layers)) if not dummy[i]]
        self._guard = PassGuard(max(updated))
        # A sliding window has overwritten entries, and a recurrent state has mixed them: neither can go back.
        self._can_take_back = all(i in self._pruned for i in updated)
        self._before = 0  # tokens at the beginning of the pass
        self._lease: Lease | None = None
        self._dead = ""  # why nothing can be done with the cache any more
        self._spent = ""  # why it takes no further turn
        self.reading: PromptReading | None = None
        self.tail_bias: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, see `transformers.Cache.update`."""
        self._begin(layer_idx)
        layer, packing = self._pruned.get(layer_idx), self._packing_at(layer_idx, key_states.shape[2])
        if layer is not None and layer_idx == self._first:
            self._before = layer.get_seq_length()
            if self.reading is not None:
                tokens = key_states.shape[2] if packing is None else packing.tokens
                self._check_length(self.reading.spans.end, self._before + tokens)
        self._guard.enter(layer_idx)
        if layer is None:
            if packing is not None:
                kwargs = {**kwargs, "packing": packing}
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values
        if layer.batch_size not in (-1, key_states.shape[0]):
            self._end_by(f"it holds {layer.batch_size} rows and was given {key_states.shape[0]}")
        try:
            keys, values = layer.update(key_states, value_states, packing=packing)
        except CacheMemoryError as error:
            if not self._take_back():
                self._end_by(str(error), CacheMemoryError)
            raise CacheMemoryError(f"{error} The cache holds {self._before} tokens as before.") from error
        # Two notes of one fact: the mark goes to the attention function, `pending` stays here in case it never arrives.
        keys.plphp_pending = PendingUpdate(self, layer_idx)  # type: ignore[attr-defined]
        self._guard.pending = layer_idx
        return keys, values

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Update a linear-attention layer, see `transformers.Cache.update_conv_state`."""
        self._begin(layer_idx)
        self._guard.enter_conv(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Update a linear-attention layer, see `transformers.Cache.update_recurrent_state`."""
        if not self._guard.in_conv(layer_idx):  # decoding may write the conv state in place
            self._begin(layer_idx)
            self._guard.enter(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @property
    def is_read(self) -> bool:
        """Whether there is no prompt that has been planned and not been read to its end."""
        return self.reading is None

    def forget_pass(self) -> None:
        """Stand between two passes again: while a CUDA graph is captured, a pass runs that no token comes of."""
        self._guard.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value tensors that are alive in the cache, reserved room included."""
        return sum(layer_nbytes(layer) for layer in self.layers)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes among `nbytes` that hold no entry yet: room for tokens to come."""
        return sum(layer.reserved_nbytes for layer in self._pruned.values())

    @property
    def full_nbytes(self) -> int:
        """Bytes that a dynamic cache would hold for the same tokens."""
        return sum(
            layer.full_nbytes if isinstance(layer, PrunedLayer) else layer_nbytes(layer) for layer in self.layers
        )

    def check_alive(self) -> None:
        """Raise `CacheStateError` if the cache cannot be used any more."""
        if self._dead:
            raise CacheStateError(f"This PrunedCache cannot be used any more: {self._dead}. Make a new one.")
        if not self.attachment.active:
            raise CacheStateError(
                "This PrunedCache is used outside the session that made it, where the model would read it wrongly: "
                "keep `with plphp.prune(model)` open, or make the cache with PrunedCache.for_inputs."
            )

    def check_reader(self, module: nn.Module) -> None:
        """Raise `UnsupportedFeatureError` if a layer of another model reads the cache."""
        if not self.attachment.reads(module):
            self._end_by("a model read it for which it was not made", UnsupportedFeatureError)

    def check_read(self) -> None:
        """Raise `CacheStateError` if the last layer to be updated was not read as it has to be."""
        if self._guard.pending is not None:
            self._end_by(
                f"layer {self._guard.pending} did not read it through plphp's attention function (is this model class "
                "a supported one, and was it compiled or changed while the cache was in use?)"
            )

    def end_here(self, reason: str) -> None:
        """Refuse further turns, for a reason that completes "cannot be continued: "."""
        self._spent = reason

    def _refuse_spent(self, what: str) -> None:
        """Raise `UnsupportedFeatureError` after `end_here`; ``what`` completes "cannot"."""
        if self._spent and self.get_seq_length():
            raise UnsupportedFeatureError(f"This PrunedCache cannot {what}: {self._spent}. Make a new one.")

    def after_failure(self) -> None:
        """Make the cache whole again after an exception; if it cannot be, mark it as dead."""
        half_read = self.reading is not None and self._pruned[self._last].get_seq_length() > self.reading.spans.start
        if not self._dead and (self._guard.cut_off or half_read) and not self._take_back():
            self._invalidate("an error stopped the model in the middle of a step")

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers 5.17 zeroes the entries and goes on behind them
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.reading, self._spent = None, ""
        self._guard.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedCache:
        # By hand, as copy.deepcopy would go through `__reduce_ex__`, which refuses.
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedFeatureError(
            "A PrunedCache belongs to its model and cannot be pickled, sent to another process or copied in part: "
            "copy.deepcopy makes another one for the same model, and cache.report().to_json() can be stored."
        )

    def _end_by(self, reason: str, error: type[Exception] = CacheStateError) -> NoReturn:
        """Invalidate the cache and raise ``error`` with the reason."""
        reason = reason.rstrip(".")
        self._invalidate(reason)
        raise error(f"{reason[0].upper()}{reason[1:]}; this PrunedCache cannot be used any more.")

    def _invalidate(self, reason: str) -> None:
        """Mark the cache as dead and free its entries: half-updated they are wrong, and nobody can use them."""
        self.reset()
        self._dead = reason

    def _check_length(self, planned: int, tokens: int) -> None:
        """Raise `SpanError` if more tokens are read than the prompt has."""
        if tokens > planned:
            raise SpanError(
                f"The cache was planned for a prompt of {planned} tokens and would hold {tokens}: pass the inputs that "
                "it was made for, or call cache.plan(inputs) first."
            )

    def before_attention(self, layer_idx: int, query: Tensor, scaling: float) -> Packing | None:
        """Which of the tokens that a layer has got attend in it, None for all."""
        return None

    def _packing_at(self, layer_idx: int, given: int) -> Packing | None:
        """Which tokens of the pass a layer has got, None for all; checked against the ``given`` number."""
        return None

    def _begin(self, layer_idx: int) -> None:
        """Before a layer is updated, check that the last layer was read and that the last pass came to its end."""
        self.check_alive()
        if self._guard.begins_anew(layer_idx):
            # Too late to take the last pass back: the mask and the positions of this pass count its tokens already.
            self._end_by("an error stopped the model in the middle of a step")
        self.check_read()

    def _take_back(self) -> bool:
        """Forget the tokens of a pass that was cut off; return whether that can be done, as while decoding."""
        if self.reading is not None or not self._can_take_back:
            return False
        for layer in self._pruned.values():
            layer.crop(self._before - layer.get_seq_length())
        self.history.cut(self._before)
        self._guard.reset()
        return True


def _of_ours(layer: Any) -> Any:
    """The layer that stands in for one of transformers'."""
    if type(layer) is DynamicLayer:
        return PrunedLayer()
    return WindowLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer
