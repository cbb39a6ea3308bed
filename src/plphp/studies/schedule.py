# SPDX-License-Identifier: Apache-2.0
"""Which share of the vision tokens each decoder layer gets and attends among, for an estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from plphp.errors import ConfigError
from plphp.policy.allocation import kept_count


@dataclass(frozen=True)
class Schedule:
    """What leaves a prompt before layers get it, and what attends in those that do.

    Parameters
    ----------
    encoder : float
        Share of the tokens of each image that comes to the text model, in [0, 1].
    prefill : mapping of int to float
        By decoder layers from 1 on, the share from there on, in [0, 1], of the vision tokens that came to the text
        model; not rising.
    images : int
        Images of the prompt, all alike.
    attention : float
        Share of the vision tokens that a layer with full attention gets among which its attention runs while it reads
        the prompt, in [0, 1]; it computes all that is no attention for all of them (`plphp.methods.zipvl`).

    Raises
    ------
    ConfigError
        If a share or a layer is out of range, or a share rises.
    """

    encoder: float = 1.0
    prefill: Mapping[int, float] = field(default_factory=dict)
    images: int = 1
    attention: float = 1.0

    def __post_init__(self) -> None:
        for share in (self.encoder, *self.prefill.values(), self.attention):
            if not 0 <= share <= 1:
                raise ConfigError(f"A share of the vision tokens is between 0 and 1, got {share!r}.")
        if any(later > earlier for (_, earlier), (_, later) in pairwise(sorted(self.prefill.items()))):
            raise ConfigError(f"A token that has left does not come back: the shares of {self.text!r} must not rise.")
        if min(self.prefill, default=1) < 1:
            raise ConfigError(
                f"Inside prefill tokens leave before layer 1 at the earliest, got {self.text!r}: those that no layer "
                "gets are the encoder's (--encoder-retention)."
            )

    @classmethod
    def parse(cls, prefill: str | None, encoder: float = 1.0, images: int = 1, attention: float = 1.0) -> Schedule:
        """Read the shares inside prefill from a text of layers and shares, such as "2:0.5,16:0.25".

        Raises
        ------
        ConfigError
            If it is not of this form, or names what cannot be.
        """
        shares: dict[int, float] = {}
        for part in (prefill or "").split(",") if prefill is not None else ():
            layer, _, share = part.partition(":")
            try:
                number, rate = int(layer), float(share)
            except ValueError:
                number, rate = -1, 0.0
            if number < 0 or number in shares:
                raise ConfigError(
                    f"What leaves inside prefill is given as layers with shares, each layer once, such as 2:0.5 or "
                    f"2:0.5,16:0.25, got {prefill!r}."
                )
            shares[number] = rate
        return cls(encoder, shares, images, attention)

    @property
    def text(self) -> str | None:
        """The shares inside prefill as `parse` reads them; None without any."""
        return ",".join(f"{layer}:{share:g}" for layer, share in sorted(self.prefill.items())) or None

    def vision_tokens(self, tokens: int, layers: int) -> list[int]:
        """By decoder layer, the vision tokens that it gets of a prompt with so many.

        Raises
        ------
        ConfigError
            If the model has no such layer.
        """
        if max(self.prefill, default=0) >= layers:
            raise ConfigError(f"The model has the layers 0 to {layers - 1}, and {self.text!r} names others.")
        of_image, more = divmod(tokens, self.images)
        came = sum(self._staying(of_image + (number < more)) for number in range(self.images))
        there = []
        for layer in range(layers):
            share = self.prefill.get(max((first for first in self.prefill if first <= layer), default=-1), 1.0)
            there.append(kept_count(share, came, min_kept=1 if share else 0))
        return there

    def attending(self, there: Sequence[int]) -> list[int] | None:
        """By decoder layer, those of the vision tokens that it gets among which it attends; None where all of them."""
        return None if self.attention == 1 else [kept_count(self.attention, vision, min_kept=1) for vision in there]

    def _staying(self, tokens: int) -> int:
        """Of an image: at least a token, as the methods have it."""
        return kept_count(self.encoder, tokens, min_kept=1)
