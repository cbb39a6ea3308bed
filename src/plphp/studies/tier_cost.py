# SPDX-License-Identifier: Apache-2.0
"""What a ladder takes for the vision tokens of a layer, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from plphp.errors import UnsupportedFeatureError
from plphp.kernels.books import CENTROIDS, COARSE_PART, DTYPE
from plphp.kernels.coded import ALL, Reading
from plphp.kernels.coded_bytes import head_nbytes, means_of_shape, read_of_shape
from plphp.kernels.rungs import RUNGS, Rung
from plphp.policy.allocation import kept_count
from plphp.settings.ladder import WHOLE, Ladder, check_rungs

CENTROIDS_NBYTES = CENTROIDS * DTYPE.itemsize
"""Bytes that a channel takes in each codebook."""


@dataclass(frozen=True)
class TierCost:
    """A ladder, and how much a step reads of what it holds.

    Parameters
    ----------
    ladder : Ladder
        The heads of a layer are taken to hold as many entries each.
    reading : Reading
        What a decoding step reads.

    Raises
    ------
    ConfigError
        If the ladder names a rung that there is not.
    """

    ladder: Ladder
    reading: Reading = ALL

    def __post_init__(self) -> None:
        check_rungs(self.ladder, str(self.ladder))

    @property
    def rungs(self) -> list[Rung]:
        """Those that hold entries in few bits."""
        return [RUNGS[name] for name in self.ladder.names if name != WHOLE]

    @property
    def needs_books(self) -> bool:
        """Whether a rung needs codebooks."""
        return any(rung.needs_books for rung in self.rungs)

    def check(self, dims: tuple[int, int]) -> None:
        """Raise `UnsupportedFeatureError` unless the rungs can hold keys and values of these widths."""
        RUNGS["r1"].check(*dims, books=None)
        for rung in self.rungs:
            coarse = "coarse" in {name for codec in (rung.keys, rung.values) for name in codec.books}
            if coarse and any(dim % COARSE_PART for dim in dims):
                raise UnsupportedFeatureError(
                    f"The rung {rung.name!r} holds keys and values whose head dimension is a multiple of "
                    f"{COARSE_PART}, and this model has {dims[0]} and {dims[1]}: leave it out."
                )

    def counts(self, tokens: int) -> tuple[int, dict[Rung, int]]:
        """Of so many vision tokens, those that a head holds whole, and those in each rung."""
        before, whole, coded = 0, 0, {}
        for name, share in zip(self.ladder.names, self.ladder.cumulative(), strict=True):
            down_to = kept_count(share, tokens, min_kept=1)
            if name == WHOLE:
                whole = down_to - before
            elif down_to > before:
                coded[RUNGS[name]] = down_to - before
            before = down_to
        return whole, coded

    def head_bytes(self, tokens: int, dims: tuple[int, int], entry_bytes: int) -> tuple[int, float]:
        """Bytes that a KV head holds of so many vision tokens, and those that a step reads of them at most.

        Parameters
        ----------
        tokens : int
        dims : tuple of int
            Channels of keys and of values.
        entry_bytes : int
            Bytes of the key and the value of a token.
        """
        whole, coded = self.counts(tokens)
        means = means_of_shape(coded, self.reading, *dims) if coded else 0
        held = sum(head_nbytes(rung, count, *dims) for rung, count in coded.items())
        always = whole * entry_bytes + means
        return always + held, always + read_of_shape(coded, self.reading, *dims)


def book_nbytes(kv_heads: int, dims: tuple[int, int]) -> int:
    """Bytes of the codebooks of a layer, with keys and values of these widths."""
    return sum(kv_heads * dim * CENTROIDS_NBYTES * (2 if dim % COARSE_PART else 3) for dim in dims)
