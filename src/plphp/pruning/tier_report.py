# SPDX-License-Identifier: Apache-2.0
"""What of a report is about bytes: what is held in few bits, and what the layers of a cache hold now."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TierReport:
    """What one layer put in a rung of one row.

    Parameters
    ----------
    rung : str
        Name of the rung, see ``plphp methods``.
    positions : list of list of int
        Per KV head, the logical positions of its vision tokens.
    nbytes : list of int
        Per KV head, the bytes of codes, scales and groups.
    """

    rung: str
    positions: list[list[int]]
    nbytes: list[int]

    @property
    def entries(self) -> list[int]:
        """Entries per KV head."""
        return [len(positions) for positions in self.positions]


@dataclass(frozen=True)
class RungBytes:
    """What a layer of a cache holds in a rung now, over all prompts and stored rows.

    Parameters
    ----------
    rung : str
        Name of the rung.
    entries : list of int
        Entries per KV head.
    codes, scales, groups : int
        Bytes: of the codes, of what an entry needs by itself to give them their size, and of what a group of entries
        shares of that.
    """

    rung: str
    entries: list[int]
    codes: int
    scales: int
    groups: int

    @property
    def nbytes(self) -> int:
        """All of its bytes."""
        return self.codes + self.scales + self.groups


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of the live tensors of one layer of a cache. What rows of a batch share counts once.

    Parameters
    ----------
    layer : int
        Decoder layer.
    device : str
        Where they are; "" before the first entries.
    whole : int
        Of the entries of pruned prompts that are held in the dtype of the model, of vision tokens and text.
    tail : int
        Of all that was read since, prompts without images and answers among it.
    reserved : int
        Room for tokens to come.
    means : int
        Of the means that the rungs of a prompt share.
    rungs : list of RungBytes
        Of the entries held in few bits.
    other : int
        Of a layer that is not pruned, all of it: sliding windows and states.
    read : int
        Bytes that a decoding step reads at most, of every row what it holds or asks for of that.
    """

    layer: int
    device: str
    whole: int = 0
    tail: int = 0
    reserved: int = 0
    means: int = 0
    rungs: list[RungBytes] = field(default_factory=list)
    other: int = 0
    read: int = 0

    @property
    def coded(self) -> int:
        """Bytes of what is held in few bits, with the means."""
        return self.means + sum(rung.nbytes for rung in self.rungs)

    @property
    def nbytes(self) -> int:
        """All of its bytes."""
        return self.whole + self.tail + self.reserved + self.coded + self.other
