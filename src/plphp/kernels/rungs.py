# SPDX-License-Identifier: Apache-2.0
"""The rungs: named ways to hold an entry in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from plphp.errors import UnsupportedFeatureError

from .bit_planes import BYTE
from .books import Books, LayerBooks
from .centred import Centred
from .codecs import INSTEAD, Affine, Codec

GROUP = 128
"""Entries of a head that share the steps of a channel, in rungs that are not KIVI's."""


@dataclass(frozen=True)
class Rung:
    """A way to hold entries in few bits.

    Parameters
    ----------
    name : str
        Its name in a ladder.
    keys, values : Codec
        What is done to keys and to values.
    """

    name: str
    keys: Codec
    values: Codec

    def __post_init__(self) -> None:
        if self.keys.group and self.values.group and self.keys.group != self.values.group:  # kernels number them once
            raise ValueError(
                f"Keys and values that both have groups of entries must have them of the same size, and the rung "
                f"{self.name!r} has {self.keys.group} and {self.values.group}."
            )

    @property
    def group(self) -> int:
        """Entries that share a group, 0 where an entry's code depends on no other entry of its tier."""
        return self.keys.group or self.values.group

    @property
    def needs_books(self) -> bool:
        """Whether it needs codebooks."""
        return bool(self.keys.books or self.values.books)

    def bits(self, dim: int, value_dim: int | None = None) -> float:
        """Bits per channel of an entry, over its key and value, with its part of what a full group shares."""
        value_dim = value_dim or dim
        return (self.keys.bits(dim) * dim + self.values.bits(value_dim) * value_dim) / (dim + value_dim)

    def check(self, dim: int, value_dim: int, books: LayerBooks | None) -> None:
        """Raise `UnsupportedFeatureError` unless it can hold keys and values of these widths, with these codebooks."""
        if dim % BYTE or value_dim % BYTE:
            raise UnsupportedFeatureError(
                f"Tiers hold keys and values whose head dimension is a multiple of {BYTE}, and this model has "
                f"{dim} and {value_dim}: {INSTEAD}."
            )
        for side, codec in (("keys", self.keys), ("values", self.values)):
            of_side: Books | None = None if books is None else getattr(books, side)
            for name in codec.books:
                if getattr(of_side, name, None) is None:
                    missing = "no codebooks are given" if of_side is None else f"the codebooks have no {name} centroids"
                    raise UnsupportedFeatureError(
                        f"The rung {self.name!r} needs codebooks, and {missing}: give a bank with codebooks (plphp "
                        "collect), or take a ladder without product codes, such as r20."
                    )


_ALL = (
    Rung("kivi4", Affine(4, "channel", 32), Affine(4, "token")),
    Rung("kivi2", Affine(2, "channel", 32), Affine(2, "token")),
    Rung("c4", Affine(4, "channel", GROUP), Affine(4, "channel", GROUP)),
    Rung("c3", Affine(3, "channel", GROUP), Affine(3, "channel", GROUP)),
    Rung("r4", Centred(width=4), Centred(width=4)),
    Rung("r3", Centred(width=3), Centred(width=3)),
    Rung("r2", Centred(width=2), Centred(width=2)),
    Rung("r1", Centred(width=1), Centred(width=1)),
    Rung("pr2", Centred(("fine",), 2), Centred(("fine",), 2)),
    Rung("rvq", Centred(("fine", "residual")), Centred(("fine", "residual"))),
    Rung("pq", Centred(("fine",)), Centred(("fine",))),
    Rung("pq16", Centred(("coarse",)), Centred(("coarse",))),
)
RUNGS: Mapping[str, Rung] = MappingProxyType({rung.name: rung for rung in _ALL})
"""By name: ``kivi``, per channel and per token as KIVI has it; ``c``, both per channel over longer groups; ``r``, both
rotated; ``pq``, product codes, with a second codebook ``rvq``, with a rotated rest ``pr2``, of 16 channels ``pq16``."""
