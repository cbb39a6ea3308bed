# SPDX-License-Identifier: Apache-2.0
"""What a layer holds of a prompt while its retention rate is still open: all that it may keep in the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.errors import CacheStateError
from plphp.kernels import compact_kv
from plphp.kernels.packed import PackedKV


@dataclass(frozen=True)
class ProvisionalBlock:
    """Entries of a tail that was compacted by an upper bound of the layer's rate.

    Parameters
    ----------
    block : PackedKV
        The entries.
    held : Tensor
        bool [batch, kv_heads, tail]; the tokens of the tail whose entries they are.
    """

    block: PackedKV
    held: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, keep: Tensor) -> ProvisionalBlock:
        """Copy what is kept of a tail.

        Parameters
        ----------
        keys, values : Tensor
            [batch, kv_heads, tail, dim].
        keep : Tensor
            bool [batch, kv_heads, tail].
        """
        # Without detach the graph would keep the full keys and values alive.
        return cls(compact_kv(keys.detach(), values.detach(), keep), keep)

    def narrowed(self, keep: Tensor) -> ProvisionalBlock:
        """Copy what is kept of the entries; the block itself where that is all of them.

        Parameters
        ----------
        keep : Tensor
            bool [batch, kv_heads, tail].

        Raises
        ------
        CacheStateError
            If an entry is kept that is not held any more.
        """
        missing = int((keep & ~self.held).sum())
        if missing:
            raise CacheStateError(
                f"A layer is to keep {missing} entries that were dropped before its retention rate was known: the "
                "method's `at_most` has to name rates that no layer exceeds in the end, and its scores must not depend "
                "on rates."
            )
        if torch.equal(keep, self.held):
            return self
        return ProvisionalBlock(self.block.narrowed(self.held, keep), keep)
