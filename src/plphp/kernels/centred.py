# SPDX-License-Identifier: Apache-2.0
"""The codec of product codes and rotated bits: both code what is left without the mean of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bit_planes import BYTE, pack_planes, unpack_planes
from .books import COARSE_PART, PART
from .centroids import centroids, nearest
from .codecs import SMALLEST, Codes, Places, stored
from .hadamard import hadamard

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the largest rotated number that the codes of an entry may reach; what leaves the least error is taken."""


@dataclass(frozen=True)
class Centred:
    """Codes of what is left without the mean over the vision tokens of the prompt, per head and channel.

    First the nearest of 256 centroids of every few channels, then on demand the nearest of 256 to what is left of that,
    and then what is still left, rotated and in equal steps around 0, with a scale of its own for every entry.

    Parameters
    ----------
    books : tuple of str
        Codebooks in turn, names of fields of `plphp.kernels.books.Books`.
    width : int
        Bits of the rotated rest; 0 for none.
    """

    books: tuple[str, ...] = ()
    width: int = 0
    centred: bool = True
    group: int = 0

    @property
    def index_scaled(self) -> bool:
        """See `Codec`."""
        return not self.books

    def bits(self, dim: int) -> float:
        """See `Codec`."""
        return sum(map(self._book_bits, self.books)) + (self.width + 16 / dim if self.width else 0)

    def index_bits(self, dim: int) -> float:
        """See `Codec`."""
        return self._book_bits(self.books[0]) if self.books else 1 + 16 / dim

    def encode(self, states: Tensor, places: Places) -> Codes:
        """See `Codec`."""
        rest = states - self._means(places, states.dtype)[places.pair]
        streams: list[Tensor] = []
        head = places.head
        for name in self.books:
            book = self._book(places, name, states.dtype)
            numbers = nearest(rest, book, head)
            rest = rest - centroids(numbers, book, head)
            streams.append(numbers)
        if not self.width:
            return Codes(tuple(streams))
        codes, scale = self._rotated(rest @ hadamard(rest.shape[1], rest.dtype, rest.device))
        return Codes((*streams, *pack_planes(codes, self.width)), scale)

    def decode(self, codes: Codes, places: Places, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        result = self._means(places, dtype)[places.pair]
        for name, numbers in zip(self.books, codes.streams, strict=False):
            result = result + centroids(numbers, self._book(places, name, dtype), places.head)
        if self.width:
            numbers = unpack_planes(codes.streams[len(self.books) :]).to(dtype)
            result = result + self._unrotated(numbers, codes, 2 ** (self.width - 1) - 0.5)
        return result

    def index(self, codes: Codes, places: Places, dtype: torch.dtype) -> Tensor:
        """See `Codec`: the first centroids, or where there are none the signs of what is rotated."""
        if self.books:
            first = replace(self, books=self.books[:1], width=0)
            return first.decode(Codes(codes.streams[:1]), places, dtype)
        half = 2.0 ** (self.width - 1)
        signs = unpack_planes(codes.streams[:1]).to(dtype) * half
        return self._means(places, dtype)[places.pair] + self._unrotated(signs, codes, half / 2)

    def _rotated(self, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of rotated states, int32 [entries, dim], and a step for each entry, float16 [entries, 1]."""
        half = 2 ** (self.width - 1)
        if self.width == 1:
            step = 2 * rotated.abs().mean(1, keepdim=True)
            return (rotated >= 0).int(), stored(step.clamp(min=SMALLEST))
        top = rotated.abs().amax(1, keepdim=True)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for clip in CLIPS:
            step = stored((top * (clip / half)).clamp(min=SMALLEST))
            exact = step.to(rotated.dtype)
            codes = (rotated / exact - 0.5).round().clamp(-half, half - 1)
            error = ((codes + 0.5) * exact - rotated).square().sum(1, keepdim=True)
            if best is None:
                best = codes, step, error
            else:
                better = error < best[2]
                candidates = zip((codes, step, error), best, strict=True)
                best = tuple(torch.where(better, new, old) for new, old in candidates)  # type: ignore[assignment]
        assert best is not None
        return (best[0] + half).int(), best[1]

    def _unrotated(self, numbers: Tensor, codes: Codes, middle: float) -> Tensor:
        """What rotated codes stand for, from their distance to the middle of all."""
        assert codes.scales is not None
        rotated = (numbers - middle) * codes.scales.to(numbers.dtype)
        return rotated @ hadamard(numbers.shape[1], numbers.dtype, numbers.device)

    @staticmethod
    def _book_bits(name: str) -> float:
        return BYTE / (COARSE_PART if name == "coarse" else PART)

    @staticmethod
    def _means(places: Places, dtype: torch.dtype) -> Tensor:
        assert places.means is not None
        return places.means.to(dtype)

    @staticmethod
    def _book(places: Places, name: str, dtype: torch.dtype) -> Tensor:
        book: Tensor | None = getattr(places.books, name, None)
        assert book is not None  # `Rung.check` has asked for it
        return book.to(dtype)
