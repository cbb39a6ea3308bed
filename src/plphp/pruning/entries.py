# SPDX-License-Identifier: Apache-2.0
"""What one decoder layer holds: packed, immutable entries that were placed, and a dense, growing tail.

It knows no engine: `plphp.engines.hf.layer` makes a layer of a transformers cache of it, and the vLLM plugin holds the
keys and values of a prompt in it until the prompt has been read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.errors import CacheStateError, UnsupportedFeatureError
from plphp.kernels.coded import CodedKV
from plphp.kernels.coder import Coder
from plphp.kernels.packed import PackedKV
from plphp.kernels.prompt_codes import PromptCodes

from .ledger import LayerLedger, codes_of
from .packing import Packing
from .placement import held_whole, without_codes
from .provisional import ProvisionalBlock
from .room import appended, grown, memory_named
from .tail_tokens import TailTokens
from .too_large import coded_or_whole


class LayerEntries:
    """Keys and values of one decoder layer.

    Two lengths are kept apart: the *logical* one (`length`: every token seen; position ids follow it) and the
    *physical* one (what is stored). The tail holds the last ``length - prefix_length`` tokens, but for those that left
    before the layer (`packing`); they count as seen, and at the end of the prompt no trace of them is left.

    Between a `compact` that is not final and the final one the tail is a block of what may still be kept: nothing reads
    the layer then, and it takes no token.

    Attributes
    ----------
    keys, values : Tensor or None
        [batch, kv_heads, room, dim]; the tail, with room behind it.
    prefix : PackedKV or None
        What `compact` kept whole so far.
    coded : tuple of CodedKV or PromptCodes
        What `compact` kept in few bits so far, a block for each prompt that has any; with a ledger one for all of them.
    ledger : LayerLedger or None
        Of which tokens these entries are, where images are to fade.
    prefix_length : int
        Tokens seen up to the last final `compact`.
    tail_length : int
        Entries of the tail, for each token seen since that has not left before the layer.
    packing : Packing or None
        Which of the last tokens of the tail have entries, while a prompt is read that some have left.
    dtypes : tuple of torch.dtype
        Those that keys and values are held in; there from the first `append` on.
    slot : Tensor or None
        int64 [1] on the device; while it is set `append` writes one token there and counts nothing. A CUDA graph
        replays the same launches for every token, so that the position cannot be a number of Python's.
    """

    dtypes: tuple[torch.dtype, torch.dtype]

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.prefix: PackedKV | None = None
        self.coded: tuple[CodedKV | PromptCodes, ...] = ()
        self.ledger: LayerLedger | None = None
        self.prefix_length = 0
        self.tail_length = 0
        self.packing: Packing | None = None
        self.slot: Tensor | None = None
        self._dims: tuple[int, int] | None = None
        self._kv_heads = 0
        self._provisional: ProvisionalBlock | None = None

    @property
    def length(self) -> int:
        """Tokens seen, evicted ones and those that left before the layer included."""
        left = 0 if self.packing is None else self.packing.left
        return self.prefix_length + self.tail_length + left

    @property
    def tail_tokens(self) -> TailTokens:
        """The tokens that the entries of the tail are of."""
        packed = 0 if self.packing is None else self.packing.packed
        return TailTokens(self.prefix_length, self.tail_length - packed, self.packing)

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first entries."""
        if self.prefix is not None:
            return self.prefix.batch
        if self._provisional is not None:
            return self._provisional.block.batch
        return -1 if self.keys is None else self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the layer holds, reserved room included."""
        tail = 0 if self.keys is None else self.keys.untyped_storage().nbytes()
        tail += 0 if self.values is None else self.values.untyped_storage().nbytes()
        packed = self.provisional_nbytes + (0 if self.prefix is None else self.prefix.nbytes)
        return tail + packed + sum(block.nbytes for block in self.coded)

    @property
    def provisional_nbytes(self) -> int:
        """Those of what waits for its final placement."""
        return 0 if self._provisional is None else self._provisional.block.nbytes

    @property
    def dims(self) -> tuple[int, int]:
        """Channels of keys and of values; 0 before the first entries."""
        return self._dims or (0, 0)

    @property
    def pair_nbytes(self) -> int:
        """Bytes that the key and the value of one token take in a KV head, held whole."""
        return sum(dim * dtype.itemsize for dim, dtype in zip(self.dims, self.dtypes, strict=True))

    @property
    def entry_nbytes(self) -> int:
        """Bytes that the keys and values of one token take in all KV heads, held whole."""
        return self._kv_heads * self.pair_nbytes

    @property
    def reserved_nbytes(self) -> int:
        """Those of them that hold no entry: room behind the tail, and what the tail is only a view on."""
        if self.keys is None or self.values is None:
            return 0
        storages = self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()
        return storages - sum(entries.nbytes for entries in self.tail())

    def nbytes_unpruned(self, dtypes: tuple[torch.dtype, torch.dtype]) -> int:
        """Bytes that the keys and values of all tokens seen would take in two dtypes."""
        if self._dims is None:
            return 0
        entries = self.batch_size * self._kv_heads * self.length
        return entries * sum(dim * dtype.itemsize for dim, dtype in zip(self._dims, dtypes, strict=True))

    def begin(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the dtypes and the sizes of the first keys and values."""
        self.dtypes = key_states.dtype, value_states.dtype
        self._dims = key_states.shape[3], value_states.shape[3]
        self._kv_heads = key_states.shape[1]

    def take_sizes(self, source: LayerEntries) -> None:
        """Take the dtypes and the sizes of what another layer holds, if it holds anything."""
        if source._dims is not None:
            self.dtypes, self._dims, self._kv_heads = source.dtypes, source._dims, source._kv_heads

    def append(self, key_states: Tensor, value_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """Append new entries to the tail.

        Parameters
        ----------
        key_states, value_states : Tensor
            [batch, kv_heads, new, dim].
        packing : Packing, optional
            Which tokens of the pass they are of, where some have left before the layer.

        Returns
        -------
        tuple of Tensor
            Views on the keys and values of the tail, [batch, kv_heads, tail, dim]; with the room behind it while
            ``slot`` is set.

        Raises
        ------
        CacheMemoryError
            If there is no memory for them; the layer is as before.
        CacheStateError
            If the layer waits for its final placement.
        """
        self._check_final()
        if self.slot is not None and self.keys is not None and self.values is not None:
            self.keys.index_copy_(2, self.slot, key_states)
            self.values.index_copy_(2, self.slot, value_states)
            return self.keys[:], self.values[:]  # views, as the cache marks what it returns
        if self._dims is None:
            self.begin(key_states, value_states)
        elif (key_states.dtype, value_states.dtype) != self.dtypes:
            key_states, value_states = self._evened(key_states, value_states)
        new = self.tail_length + key_states.shape[2]
        if self.tail_length == 0 and key_states.shape[2] > 1:
            # A prompt is held as it came: no copy of what is compacted in a moment.
            self.keys, self.values = key_states, value_states
        else:
            self.keys = appended(self.keys, key_states, self.tail_length)
            self.values = appended(self.values, value_states, self.tail_length)
        self.tail_length, self.packing = new, packing
        return self.tail()

    def _evened(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Give what is held and what comes the wider of their dtypes, as concatenation does in a dynamic cache.

        Under autocast keys and values have dtypes of their own, and turns inside and outside of it have others.
        """
        of_keys = torch.promote_types(self.dtypes[0], key_states.dtype)
        of_values = torch.promote_types(self.dtypes[1], value_states.dtype)
        with memory_named(f"what is held in {of_keys} and {of_values}"):
            prefix = None if self.prefix is None else self.prefix.to(of_keys, of_values)
            keys = None if self.keys is None else self.keys.to(of_keys)
            values = None if self.values is None else self.values.to(of_values)
            new = key_states.to(of_keys), value_states.to(of_values)
        self.prefix, self.keys, self.values = prefix, keys, values
        self.dtypes = of_keys, of_values
        return new

    def tail(self) -> tuple[Tensor, Tensor]:
        """Views on the keys and values of the tail, [batch, kv_heads, tail, dim]."""
        self._check_final()
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
        self.keys, self.values = [grown(states, self.tail_length, needed) for states in (keys, values)]
        return needed

    def compact(
        self, placement: Tensor, *, final: bool = True, coder: Coder | None = None, vision: Tensor | None = None
    ) -> Tensor:
        """Move the entries of the tail that are held into the prefix and a coded block, and free the tail.

        Parameters
        ----------
        placement : Tensor
            uint8 [batch, kv_heads, tail], see `plphp.pruning.placement.Placement`; of the whole tail, whatever an
            earlier placement has dropped of it.
        final : bool
            False where the rest is freed and what is held does not join the prefix yet: another placement of the same
            tail narrows it.
        coder : Coder, optional
            Holds what a final placement puts in few bits: codes are not made of entries that another one may drop.
        vision : Tensor, optional
            bool [batch, tail]; the vision tokens, for a coder.

        Returns
        -------
        Tensor
            uint8 [batch, kv_heads, tail]; the placement that was done: another one only where entries are too large for
            few bits, see `plphp.pruning.too_large`.

        Raises
        ------
        UnsupportedFeatureError, CacheStateError
            If an entry cannot be held in few bits, or was dropped by an earlier placement, or the placement is not that
            of the tail, or has a coder and is not final; the layer is as before.
        """
        if coder is not None and not final:
            raise CacheStateError("A placement that is not final holds entries whole, and it came with a coder.")
        shape = self.tail()[0].shape[:3] if self._provisional is None else self._provisional.held.shape
        if placement.shape != shape:
            raise CacheStateError(
                f"The placement of a layer covers its tail, {tuple(shape)} rows, KV heads and tokens, got "
                f"{tuple(placement.shape)}."
            )
        coded, done = None, placement
        if coder is not None and vision is not None:
            coded, done = coded_or_whole(coder, *self.tail(), vision, placement)
            placement = without_codes(done)
        keep = held_whole(placement)
        if self._provisional is None:
            held = ProvisionalBlock.of(*self.tail(), keep)
        else:
            held = self._provisional.narrowed(keep)
        if not final:
            self._provisional, self.keys, self.values = held, None, None
            return done
        self.prefix = held.block if self.prefix is None else self.prefix.appended(held.block)
        self.coded += () if coded is None else (coded,)
        self.prefix_length = self.length
        self.tail_length, self.packing = 0, None
        self._provisional = self.keys = self.values = None
        return done

    def begin_with(self, prefix: PackedKV, coded: tuple[CodedKV, ...], source: LayerEntries) -> None:
        """Take over what was compacted elsewhere, from the tokens that ``source`` has seen."""
        self.begin(*source.tail())
        self.prefix, self.coded, self.prefix_length = prefix, coded, source.length

    def forget(self) -> None:
        """Forget everything."""
        self.prefix, self._provisional, self.keys, self.values = None, None, None, None
        self.coded, self.ledger = (), None
        self.prefix_length = self.tail_length = 0
        self.packing = self._dims = None

    def remove_last(self, tokens: int) -> None:
        """Remove the last tokens.

        Raises
        ------
        UnsupportedFeatureError
            If some of them are in the prefix, where their entries are no longer complete.
        CacheStateError
            If the layer waits for its final placement.
        """
        self._check_final()
        if tokens > self.tail_length:
            raise UnsupportedFeatureError(
                f"Cannot remove the last {tokens} tokens: only the {self.tail_length} seen after the "
                "pruned prompt are still complete. Start again from a new cache."
            )
        self.tail_length -= tokens
        if self.length == 0:
            self.keys = self.values = None

    def select_rows(self, rows: Tensor) -> None:
        """Keep some rows, in a new order and as often as they are named; copies of a row share its prefix.

        Parameters
        ----------
        rows : Tensor
            int64 [new batch], or bool [batch].

        Raises
        ------
        CacheStateError
            If the layer waits for its final placement.
        """
        self._check_final()
        if rows.dtype is torch.bool:
            rows = rows.nonzero()[:, 0]
        if self.prefix is not None:
            self.prefix = self.prefix.select(rows.tolist())
        if self.ledger is not None:
            self.ledger = self.ledger.select(rows.tolist(), codes_of(self.coded))
        blocks = (block.select(rows.tolist()) for block in self.coded)
        self.coded = tuple(block for block in blocks if any(map(any, block.held)))
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def _check_final(self) -> None:
        """Raise `CacheStateError` while the last placement is not the final one."""
        if self._provisional is not None:
            raise CacheStateError("The prompt has not been read to its end: the layer waits for its final placement.")
