# SPDX-License-Identifier: Apache-2.0
"""Ladders: which share of a layer's vision entries is held in which rung, the best entries in the first.

::

    ladder = name                    of `LADDERS`
           | share {"," share}
    share  = rung "=" number         this share of the entries, in (0, 1]
           | rung                    all that is left, for the last rung alone

What no rung takes is dropped. A rung is a way to hold an entry: a code of few bits, or ``whole``, the dtype of the
model. Which rungs there are is checked where the method of a config is looked up (`plphp.methods.registry.resolve`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import MappingProxyType

from plphp.errors import ConfigError, did_you_mean

LADDERS = MappingProxyType(
    {
        "t15": "pr2=.47,rvq=.20,pq=.24",
        "t10": "pr2=.20,rvq=.24,pq=.32",
        "t7.5": "pr2=.10,rvq=.20,pq=.35",
        "t5": "pr2=.05,rvq=.12,pq=.27",
        "p12.5": "pr2=.25,rvq=.3,pq",
        "r20": "r4=.1,r3=.4,r2",
        "r15": "r4=.25,r3=.2,r2=.2",
        "kivi4": "kivi4",
        "kivi2": "kivi2",
        "c4": "c4",
        "c3": "c3",
    }
)
"""Ladders by name, as text. The number in a name with one is what it holds, in per cent of the bytes of whole entries:
``t`` with a bank and its codebooks, ``p`` with codebooks alone, ``r`` without any, of which r15 drops what a bank says
is not needed. The rest holds everything in one rung."""
WHOLE = "whole"
"""Name of the rung that holds an entry in the dtype of the model."""
PLAIN_RUNGS = {"kivi4": 5, "kivi2": 3, "c4": 4.25, "c3": 3.25, "r4": 4.12, "r3": 3.12, "r2": 2.12, "r1": 1.12}
PRODUCT_RUNGS = {"pr2": 3.12, "rvq": 2, "pq": 1, "pq16": 0.5}
"""The rungs of few bits, and those that need codebooks, with the bits of a channel at a head dimension of 128.
`plphp.kernels.rungs` has what they are; here they are known without torch, which takes seconds to load and is not
needed to refuse a line of settings."""
KNOWN_RUNGS = (WHOLE, *PLAIN_RUNGS, *PRODUCT_RUNGS)
"""Names of all rungs."""
ROUNDING = 1e-9
"""By how much shares may be off because decimal fractions are rounded."""

_RUNG = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Share:
    """The part of a layer's vision entries that is held in a rung.

    Parameters
    ----------
    rung : str
        Name of the rung.
    share : float, optional
        Fraction of the vision entries, in (0, 1]; None for all that is left.

    Raises
    ------
    ConfigError
        If the rung is no name, or the share no number in (0, 1].
    """

    rung: str
    share: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rung, str) or not _RUNG.fullmatch(self.rung):
            raise ConfigError(f"A rung is named by letters and digits, as in pq=.32, got {self.rung!r}.")
        if self.share is None:
            return
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ConfigError(
                f"The share of the rung {self.rung!r} must be a number above 0 and at most 1, got {self.share!r}: "
                f"leave out a rung that holds nothing, and write {self.rung} alone for all that is left."
            )
        object.__setattr__(self, "share", float(self.share))

    def __str__(self) -> str:
        return self.rung if self.share is None else f"{self.rung}={self.share!r}"


@dataclass(frozen=True)
class Ladder:
    """Rungs with the share of a layer's vision entries that each holds.

    Parameters
    ----------
    rungs : tuple of Share
        At least one; the best entries go to the first.

    Raises
    ------
    ConfigError
        If there is no rung, one is there twice, one before the last is open, or the shares are more than 1 together.
    """

    rungs: tuple[Share, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rungs, tuple) or not all(isinstance(rung, Share) for rung in self.rungs):
            raise ConfigError(f"The rungs of a ladder must be a tuple of Share, got {self.rungs!r}.")
        if not self.rungs:
            raise ConfigError(f"A ladder needs a rung, such as pq=.32, or a name: {', '.join(LADDERS)}.")
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"The rung {name!r} stands twice in the ladder {self}: add its shares up.")
        *before, last = self.rungs
        for rung in before:
            if rung.share is None:
                raise ConfigError(
                    f"The rung {rung.rung!r} of the ladder {self} takes all that is left, and nothing is left for "
                    f"{last.rung!r}: give it a share, as in {rung.rung}=.2."
                )
        total = self._sum(len(self.rungs))
        if total > 1 + ROUNDING:
            raise ConfigError(f"The shares of a ladder must be at most 1 together, got {total:g} in {self}.")
        if last.share is None and total > 1 - ROUNDING:
            raise ConfigError(f"The ladder {self} leaves nothing for its last rung: leave {last.rung!r} out.")

    @classmethod
    def parse(cls, text: str) -> Ladder:
        """Read a ladder: its name, or its rungs by commas.

        Parameters
        ----------
        text : str
            See the grammar in the module's docstring.

        Raises
        ------
        ConfigError
            If it is no ladder; the message says where.

        Examples
        --------
        >>> Ladder.parse("t10").rungs
        (Share(rung='pr2', share=0.2), Share(rung='rvq', share=0.24), Share(rung='pq', share=0.32))
        >>> Ladder.parse("pr2=.2, pq").cumulative()
        [0.2, 1.0]
        >>> str(Ladder.parse("t5"))
        'pr2=0.05,rvq=0.12,pq=0.27'
        """
        if not isinstance(text, str):
            raise ConfigError(f"A ladder must be text, such as 't10' or 'pr2=.20,rvq=.24,pq=.32', got {text!r}.")
        text = LADDERS.get(text.strip(), text.strip())
        return cls(tuple(_share(piece.strip(), text) for piece in text.split(",") if text))

    def __str__(self) -> str:
        """The ladder as text that `parse` reads."""
        return ",".join(map(str, self.rungs))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rungs, the first for the best entries."""
        return tuple(rung.rung for rung in self.rungs)

    @property
    def open(self) -> bool:
        """Whether the last rung takes all that is left, so that nothing is dropped."""
        return self.rungs[-1].share is None

    @property
    def kept(self) -> float:
        """Fraction of the vision entries that some rung holds, in (0, 1].

        >>> Ladder.parse("t10").kept
        0.76
        """
        return self.cumulative()[-1]

    def cumulative(self, rate: float | None = None) -> list[float]:
        """Fractions of the vision entries that are held in each rung or in a better one.

        Parameters
        ----------
        rate : float, optional
            Retention rate of the layer, in [0, 1]: the shares grow or shrink in proportion, and are at most 1 together.
            Default: `kept`, the rate that the ladder itself gives.

        Returns
        -------
        list of float
            One for each rung, rising, each at most 1.

        Examples
        --------
        >>> Ladder.parse("pr2=.2,rvq=.3").cumulative()
        [0.2, 0.5]
        >>> Ladder.parse("pr2=.2,rvq=.3").cumulative(0.25)
        [0.1, 0.25]
        """
        sums = [min(1.0, self._sum(count)) for count in range(1, len(self.rungs) + 1)]
        if self.open or sums[-1] > 1 - ROUNDING:
            sums[-1] = 1.0
        return sums if rate is None else [min(1.0, part * (rate / sums[-1])) for part in sums]

    def _sum(self, count: int) -> float:
        """Sum of the first shares, as decimal fractions add up; an open one counts nothing."""
        return round(math.fsum(rung.share or 0.0 for rung in self.rungs[:count]), 12)


def check_rungs(ladder: Ladder, text: str) -> None:
    """Raise `ConfigError` for a rung that there is not.

    A single name may have been meant for a ladder: names of ladders are too like each other to guess which.

    Parameters
    ----------
    ladder : Ladder
    text : str
        How the user wrote it, for the message.
    """
    for name in ladder.names:
        if name not in KNOWN_RUNGS:
            alone = len(ladder.names) == 1 and ladder.open
            what, hint = ("ladder or rung", _known()) if alone else ("rung", did_you_mean(name, KNOWN_RUNGS))
            raise ConfigError(f"Unknown {what} {name!r} in tiers={text}.{hint}")


def quoting_hint(name: str) -> str:
    """What to do about a word of a line that is the name of a rung and no setting; empty for any other word."""
    if name not in KNOWN_RUNGS:
        return ""
    return f' {name!r} is a rung: a ladder of several rungs stands in double quotes, as in tiers="pr2=.2,pq=.3".'


def _known() -> str:
    return f" Ladders: {', '.join(LADDERS)}; rungs: {', '.join(KNOWN_RUNGS)}."


def _share(piece: str, text: str) -> Share:
    """Read the share of one rung.

    Raises
    ------
    ConfigError
        If it is none; an unknown name with a dot can only be meant for a named ladder.
    """
    name, equals, number = (part.strip() for part in piece.partition("="))
    if not _RUNG.fullmatch(name):
        if not equals and piece == text:
            raise ConfigError(f"Unknown ladder {text!r}.{_known()}")
        raise ConfigError(f"Expected rung=share by commas, such as pr2=.20,pq=.32, got {piece!r} in {text!r}.")
    if not equals:
        return Share(name)
    try:
        return Share(name, float(number))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The share of the rung {name!r} must be a number above 0 and at most 1, got {number!r} in {text!r}."
        ) from error
