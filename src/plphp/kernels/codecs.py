# SPDX-License-Identifier: Apache-2.0
"""How keys or values become codes of few bits, and what the codes stand for.

A codec takes the keys, or the values, of a tier: ragged entries [entries, dim]. What it makes of them are `Codes`:

- ``streams``: for every entry some bytes each, bit planes or numbers of centroids. The first stream of keys is the
  index by which a step finds the entries that it wants.
- ``scales``: float16, of every entry by itself.
- ``groups``: float16, shared by up to `Affine.group` entries of a head that lie behind each other.

Nothing else is stored for an entry. Codebooks belong to the model, and the means of a prompt to all of its tiers.

References
----------
KIVI, arXiv:2402.02750: keys per channel, values per token. VidKV, arXiv:2503.16257: values of vision tokens per
channel, too. QuaRot, arXiv:2404.00456: rotated by Hadamard matrices.
Product quantization: Jegou et al., doi:10.1109/TPAMI.2010.57.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from plphp.errors import UnsupportedFeatureError

from .bit_planes import pack_planes, unpack_planes
from .books import Books

SCALE = torch.float16
"""Dtype of scales and means."""
SMALLEST = 2.0**-24
"""Smallest step: the least number of float16 above 0."""
TOKEN_GROUP = 32
"""Channels of an entry that share their scale, where entries have several."""
INSTEAD = "take the method 'none', or one that evicts, such as PLPHPConfig(target_retention=0.4)"
"""What to do where few bits cannot be: they are the default, so that to leave something out is no advice."""


class ScaleError(UnsupportedFeatureError):
    """A scale or a mean is too large for float16, or no number."""


@dataclass(frozen=True)
class Codes:
    """The codes of the keys, or of the values, of some entries; see the docstring of this module."""

    streams: tuple[Tensor, ...]
    scales: Tensor | None = None
    groups: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its tensors."""
        return (*self.streams, *(tensor for tensor in (self.scales, self.groups) if tensor is not None))

    def taken(self, entries: Tensor | slice, groups: Tensor | slice) -> Codes:
        """Those of some entries, with some of the groups."""
        return Codes(
            tuple(stream[entries] for stream in self.streams),
            None if self.scales is None else self.scales[entries],
            None if self.groups is None else self.groups[groups],
        )

    @classmethod
    def joined(cls, parts: list[Codes]) -> Codes:
        """Put codes of one codec behind each other."""
        scales = [part.scales for part in parts if part.scales is not None]
        groups = [part.groups for part in parts if part.groups is not None]
        return cls(
            tuple(torch.cat(streams) for streams in zip(*(part.streams for part in parts), strict=True)),
            torch.cat(scales) if scales else None,
            torch.cat(groups) if groups else None,
        )


@dataclass(frozen=True)
class Places:
    """Where the entries of a tier lie, and what they share.

    Parameters
    ----------
    pair, place : Tensor
        int64 [entries]; ``stored row * kv_heads + KV head`` of each entry, and its number among those of the pair.
    counts : tuple of int
        Entries of each pair.
    kv_heads : int
        KV heads.
    means : Tensor, optional
        float16 [pairs, dim]; what centred codecs take off.
    books : Books, optional
        Codebooks of the layer.
    """

    pair: Tensor
    place: Tensor
    counts: tuple[int, ...]
    kv_heads: int
    means: Tensor | None = None
    books: Books | None = None

    @property
    def head(self) -> Tensor:
        """The KV head of each entry, int64 [entries]."""
        return self.pair % self.kv_heads

    def group_of(self, size: int) -> Tensor:
        """The group of each entry, int64 [entries], where a pair has one for every ``size`` entries."""
        return (self.place % size == 0).cumsum(0) - 1  # one begins at each of these, pair after pair


def groups_of(counts: tuple[int, ...], size: int) -> list[int]:
    """Groups of ``size`` entries that pairs of so many entries have."""
    return [-(-count // size) for count in counts]


class Codec(Protocol):
    """A way to hold keys or values in few bits."""

    @property
    def books(self) -> tuple[str, ...]:
        """The codebooks that it needs, in turn, names of fields of `plphp.kernels.books.Books`."""

    @property
    def centred(self) -> bool:
        """Whether it codes what is left without the mean of the prompt."""

    @property
    def group(self) -> int:
        """Entries that share a group; 0 where an entry's code depends on no other entry."""

    @property
    def index_scaled(self) -> bool:
        """Whether the index of an entry needs its scales."""

    def bits(self, dim: int) -> float:
        """Bits per channel of an entry of so many channels, with its scales and its part of its group."""

    def index_bits(self, dim: int) -> float:
        """Those of them that the index needs."""

    def encode(self, states: Tensor, places: Places) -> Codes:
        """The codes of states, floating-point [entries, dim]."""

    def decode(self, codes: Codes, places: Places, dtype: torch.dtype) -> Tensor:
        """What codes stand for, [entries, dim]."""

    def index(self, codes: Codes, places: Places, dtype: torch.dtype) -> Tensor:
        """What the first stream alone says of the states, [entries, dim]."""


@dataclass(frozen=True)
class Affine:
    """Codes of equal steps between the smallest and the largest number of a channel, or of some channels of an entry.

    ``code = round((x - low) / step)`` with ``step = (high - low) / (2 ** width - 1)``, so that nothing is further from
    its code than half a step, but for the rounding of both to float16.

    Parameters
    ----------
    width : int
        Bits of a code.
    axis : {"channel", "token"}
        Whether a channel shares its steps over ``group`` entries of a head, or an entry over `TOKEN_GROUP` channels.
    group : int
        Entries that share their steps per channel; 0 for ``token``.
    """

    width: int
    axis: Literal["channel", "token"]
    group: int = 0
    books: tuple[str, ...] = ()
    centred: bool = False
    index_scaled: bool = True

    def bits(self, dim: int) -> float:
        """See `Codec`."""
        return self.width + (32 / self.group if self.axis == "channel" else 32 / self.channels(dim))

    def index_bits(self, dim: int) -> float:
        """See `Codec`."""
        return self.bits(dim) - (self.width - 1)

    def encode(self, states: Tensor, places: Places) -> Codes:
        """See `Codec`."""
        if self.axis == "channel":
            group = places.group_of(self.group)
            shape = sum(groups_of(places.counts, self.group)), states.shape[1]
            index = group[:, None].expand(states.shape)
            low = states.new_full(shape, torch.inf).scatter_reduce_(0, index, states, "amin")
            high = states.new_full(shape, -torch.inf).scatter_reduce_(0, index, states, "amax")
            low, step = self._steps(low, high)
            codes = self._codes(states, low.to(states.dtype)[group], step.to(states.dtype)[group])
            return Codes(pack_planes(codes, self.width), None, torch.stack([low, step], 1))
        parts = states.unflatten(1, (-1, self.channels(states.shape[1])))
        low, step = self._steps(parts.amin(2), parts.amax(2))
        codes = self._codes(parts, low.to(states.dtype)[..., None], step.to(states.dtype)[..., None])
        return Codes(pack_planes(codes.flatten(1), self.width), torch.cat([low, step], 1))

    def decode(self, codes: Codes, places: Places, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        return self._decoded(unpack_planes(codes.streams).to(dtype), codes, places)

    def index(self, codes: Codes, places: Places, dtype: torch.dtype) -> Tensor:
        """See `Codec`: the middle of the codes that begin with the highest bit."""
        half = 2 ** (self.width - 1)
        middle = unpack_planes(codes.streams[:1]).to(dtype) * half + (half - 1) / 2
        return self._decoded(middle, codes, places)

    def _decoded(self, numbers: Tensor, codes: Codes, places: Places) -> Tensor:
        if codes.groups is not None:
            low, step = codes.groups.to(numbers.dtype)[places.group_of(self.group)].unbind(1)
            return numbers * step + low
        assert codes.scales is not None
        low, step = codes.scales.to(numbers.dtype).unflatten(1, (2, -1)).unbind(1)
        parts = numbers.unflatten(1, (-1, self.channels(numbers.shape[1])))
        return (parts * step[..., None] + low[..., None]).flatten(1)

    def _steps(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest numbers and the steps, as they are stored."""
        low = stored(low)
        step = ((high - low.to(high.dtype)) / (2**self.width - 1)).clamp(min=SMALLEST)
        return low, stored(step)

    def _codes(self, states: Tensor, low: Tensor, step: Tensor) -> Tensor:
        return ((states - low) / step).round().clamp(0, 2**self.width - 1).int()

    @staticmethod
    def channels(dim: int) -> int:
        return math.gcd(dim, TOKEN_GROUP)


def stored(numbers: Tensor) -> Tensor:
    """Numbers as they are stored.

    Raises
    ------
    ScaleError
        If one of them is too large for float16, or no number.
    """
    result = numbers.to(SCALE)
    if not bool(result.isfinite().all()):
        raise ScaleError(
            "Keys or values are held in few bits with scales and means in float16, and these are NaN or beyond 65,504: "
            f"for this prompt {INSTEAD}."
        )
    return result
