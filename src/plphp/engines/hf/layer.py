# SPDX-License-Identifier: Apache-2.0
"""One layer of a `PrunedCache`: a packed, immutable prefix and a dense, growing tail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from plphp.errors import CacheMemoryError, CacheStateError, UnsupportedFeatureError
from plphp.io.quoting import one_line
from plphp.kernels import compact_kv
from plphp.kernels.packed import PackedKV

MIN_GROWTH = 16
"""Tokens for which the tail reserves room at least when it grows."""
NO_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch says on a CPU."""


class PrunedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer.

    Two lengths are kept apart: the *logical* one (`get_seq_length`: every token seen; position ids follow it) and
    the *physical* one (what is stored). The tail holds the last ``logical - prefix_length`` tokens, so that
    masks made for it by transformers need to cover the tail only.

    Attributes
    ----------
    prefix : PackedKV or None
        What `compact` kept so far.
    prefix_length : int
        Tokens seen up to the last `compact`.
    tail_length : int
        Tokens seen since.
    dtypes : tuple of torch.dtype
        Those that keys and values are held in.
    slot : Tensor or None
        int64 [1] on the device; while it is set `update` writes one token there and counts nothing.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.prefix: PackedKV | None = None
        self.prefix_length = 0
        self.tail_length = 0
        self.slot: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first update."""
        if self.prefix is not None:
            return self.prefix.batch
        return -1 if self.keys is None else self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the layer holds, reserved room included."""
        tail = 0 if self.keys is None else self.keys.untyped_storage().nbytes()
        tail += 0 if self.values is None else self.values.untyped_storage().nbytes()
        return tail + (0 if self.prefix is None else self.prefix.nbytes)

    @property
    def reserved_nbytes(self) -> int:
        """Those of them that hold no entry: room behind the tail, and what the tail is only a view on."""
        if self.keys is None or self.values is None:
            return 0
        storages = self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()
        return storages - sum(entries.nbytes for entries in self.tail())

    @property
    def full_nbytes(self) -> int:
        """Bytes that all tokens seen would take in a dynamic cache."""
        if not self.is_initialized:
            return 0
        entries = self.batch_size * self._kv_heads * self.get_seq_length()
        of_keys, of_values = self.dtypes
        if not values_keep_their_dtype():
            of_values = torch.promote_types(self.dtype, of_values)
        return entries * (self._dims[0] * of_keys.itemsize + self._dims[1] * of_values.itemsize)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the dtypes and the device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.dtypes = key_states.dtype, value_states.dtype
        self._dims = key_states.shape[3], value_states.shape[3]
        self._kv_heads = key_states.shape[1]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new entries to the tail.

        Parameters
        ----------
        key_states, value_states : Tensor
            [batch, kv_heads, new, dim].

        Returns
        -------
        tuple of Tensor
            Views on the keys and values of the tail, [batch, kv_heads, tail, dim]; with the room behind it while
            ``slot`` is set.

        Raises
        ------
        CacheMemoryError
            If there is no memory for them; the layer is as before.
        """
        if self.slot is not None and self.keys is not None and self.values is not None:
            self.keys.index_copy_(2, self.slot, key_states)
            self.values.index_copy_(2, self.slot, value_states)
            return self.keys[:], self.values[:]  # views, as the cache marks what it returns
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif (key_states.dtype, value_states.dtype) != self.dtypes:
            key_states, value_states = self._evened(key_states, value_states)
        new = self.tail_length + key_states.shape[2]
        if self.tail_length == 0 and key_states.shape[2] > 1:
            # A prompt is held as it came: no copy of what is compacted in a moment.
            self.keys, self.values = key_states, value_states
        else:
            self.keys = _appended(self.keys, key_states, self.tail_length)
            self.values = _appended(self.values, value_states, self.tail_length)
        self.tail_length = new
        return self.tail()

    def _evened(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Give what is held and what comes the wider of their dtypes, as concatenation does in a dynamic cache.

        Under autocast keys and values have dtypes of their own, and turns inside and outside of it have others.
        """
        of_keys = torch.promote_types(self.dtypes[0], key_states.dtype)
        of_values = torch.promote_types(self.dtypes[1], value_states.dtype)
        with _memory_named(f"what is held in {of_keys} and {of_values}"):
            prefix = None if self.prefix is None else self.prefix.to(of_keys, of_values)
            keys = None if self.keys is None else self.keys.to(of_keys)
            values = None if self.values is None else self.values.to(of_values)
            new = key_states.to(of_keys), value_states.to(of_values)
        self.prefix, self.keys, self.values = prefix, keys, values
        self.dtypes = of_keys, of_values
        return new

    def tail(self) -> tuple[Tensor, Tensor]:
        """Views on the keys and values of the tail, [batch, kv_heads, tail, dim]."""
        if self.keys is None or self.values is None:
            raise CacheStateError("The tail of the layer is empty.")
        return self.keys[:, :, : self.tail_length], self.values[:, :, : self.tail_length]

    def reserve(self, room: int) -> int:
        """Make room for so many tokens more, without NaN or inf in it; return how many the tail has room for now.

        Raises
        ------
        CacheMemoryError
            If there is no memory for it; the layer is as before.
        """
        keys, values = self.tail()
        needed = self.tail_length + room
        larger = [_grown(one, self.tail_length, needed) for one in (keys, values)]
        self.keys, self.values = larger
        return needed

    def compact(self, keep: Tensor) -> None:
        """Move the kept entries of the tail into the prefix and free the tail.

        Parameters
        ----------
        keep : Tensor
            bool [batch, kv_heads, tail].
        """
        keys, values = self.tail()
        # Without no_grad the graph would keep the full keys and values alive.
        block = compact_kv(keys.detach(), values.detach(), keep)
        self.prefix = block if self.prefix is None else self.prefix.appended(block)
        self.prefix_length += self.tail_length
        self.tail_length = 0
        self.keys = self.values = None

    def begin_with(self, prefix: PackedKV, source: PrunedLayer) -> None:
        """Take over a prefix that was compacted elsewhere, from the tokens that the layer ``source`` has seen."""
        self.lazy_initialization(*source.tail())
        self.prefix, self.prefix_length = prefix, source.get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included."""
        return self.prefix_length + self.tail_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask has to cover: the tail alone."""
        return self.tail_length + query_length, self.prefix_length

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.prefix, self.keys, self.values = None, None, None
        self.prefix_length = self.tail_length = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number), as long as they are in the tail."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}.")
        if -tokens_to_remove > self.tail_length:
            raise UnsupportedFeatureError(
                f"Cannot remove the last {-tokens_to_remove} tokens: only the {self.tail_length} seen after the "
                "pruned prompt are still complete. Start again from a new cache."
            )
        self.tail_length += tokens_to_remove
        if self.get_seq_length() == 0:
            self.keys = self.values = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; the prefix is shared by the copies."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (numbers, or a bool mask)."""
        if indices.dtype is torch.bool:
            indices = indices.nonzero()[:, 0]
        if self.prefix is not None:
            self.prefix = self.prefix.select(indices.tolist())
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, indices.to(self.keys.device))
            self.values = self.values.index_select(0, indices.to(self.values.device))

    def offload(self) -> None:
        """Refused: the cache is not made with offloading."""
        raise UnsupportedFeatureError("A PrunedCache cannot be offloaded to the host.")

    prefetch = offload


@cache
def values_keep_their_dtype() -> bool:
    """Whether a dynamic cache holds values in their own dtype: before 5.24 they are joined to the first keys' dtype."""
    layer = DynamicLayer()
    layer.lazy_initialization(torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.bfloat16))
    return layer.values.dtype is torch.bfloat16


def _appended(buffer: Tensor | None, new: Tensor, used: int) -> Tensor:
    """Write ``new`` behind the first ``used`` entries of a buffer, or of a larger one if there is no room."""
    needed = used + new.shape[2]
    if buffer is None or buffer.shape[2] < needed:
        buffer = _grown(new[:, :, :0] if buffer is None else buffer, used, needed + max(MIN_GROWTH, needed // 8))
    elif buffer.is_inference() and not torch.is_inference_mode_enabled():
        buffer = buffer.clone()  # a turn under inference_mode, then one outside of it
    buffer[:, :, used:needed] = new
    return buffer


def _grown(buffer: Tensor, used: int, room: int) -> Tensor:
    """Copy the first ``used`` entries of a buffer to a new one with room for ``room``, zeros behind them."""
    with _memory_named(f"keys and values of {tuple(buffer.shape[:2])} rows and heads with room for {room} tokens"):
        grown = buffer.new_zeros((*buffer.shape[:2], room, buffer.shape[3]))
    grown[:, :, :used] = buffer[:, :, :used]
    return grown


@contextmanager
def _memory_named(what: str) -> Iterator[None]:
    """Raise `CacheMemoryError` where torch finds no memory."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise CacheMemoryError(
            f"There is no memory for {what} ({one_line(error)}): free some, or decode fewer rows or shorter answers."
        ) from error


def lacks_memory(error: RuntimeError) -> bool:
    """Whether torch raised it because there is no memory; on a CPU only the words tell."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)


def layer_nbytes(layer: Any) -> int:
    """Bytes that a layer of any kind holds."""
    if isinstance(layer, PrunedLayer):
        return layer.nbytes
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    for states in ("conv_states", "recurrent_states"):
        tensors += list(getattr(layer, states, {}).values())
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))
