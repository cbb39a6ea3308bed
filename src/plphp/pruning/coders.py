# SPDX-License-Identifier: Apache-2.0
"""The coders of a run: by decoder layer, what holds its entries in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from plphp.errors import ConfigError
from plphp.kernels.books import LayerBooks
from plphp.kernels.coded import Reading
from plphp.kernels.coder import Coder
from plphp.kernels.rungs import RUNGS
from plphp.policy.bank import QueryBank, bank_at
from plphp.policy.chain import Link
from plphp.policy.evidence import OwnBank
from plphp.policy.stages import KVStage
from plphp.settings.ladder import WHOLE

Coders = Callable[[int], Coder]
"""The coder of a decoder layer."""


def coders_of(link: Link[KVStage], own_bank: QueryBank | None = None) -> Coders | None:
    """The coders that a config asks for; None where it holds entries whole or not at all.

    Parameters
    ----------
    link : Link of KVStage
        With a config by which it may ask for rungs.
    own_bank : QueryBank, optional
        The bank that the engine has collected, for a method that asks for such a bank.

    Raises
    ------
    ConfigError
        If a rung needs codebooks and there are none.
    """
    config = link.config
    names = link.stage.rungs(config)
    if names is None:
        return None
    rungs = tuple(RUNGS[name] for name in names if name != WHOLE)
    reading = Reading(config.read, config.rest)
    books: Mapping[int, LayerBooks] | None = None
    if any(rung.needs_books for rung in rungs):
        books = _books_of(link, own_bank)

    def coder(layer: int) -> Coder:
        if books is not None and layer not in books:
            raise ConfigError(
                f"The codebooks are of the layers {', '.join(map(str, books))}, not of layer {layer}: collect a bank "
                "with this model."
            )
        return Coder(rungs, None if books is None else books[layer], reading)

    return coder


def books_file(link: Link[KVStage]) -> str | None:
    """The file that the codebooks of a config are read from; None where it needs none, or the engine collects them."""
    asked = _books_from(link)
    return asked if isinstance(asked, str) else None


def collects_books(link: Link[KVStage]) -> bool:
    """Whether the codebooks of a config are those of a bank that the engine collects."""
    return isinstance(_books_from(link), OwnBank)


def _books_from(link: Link[KVStage]) -> str | OwnBank | None:
    """What the codebooks of a config are of: a file, or a bank that the engine collects; None where it needs none.

    Under a budget images fade by codebooks where there are any.
    """
    config = link.config
    needed = any(RUNGS[name].needs_books for name in link.stage.rungs(config) or () if name != WHOLE)
    if not needed and config.vision_budget is None:
        return None
    return config.books or link.stage.evidence(config).bank


def fading_books(link: Link[KVStage], own_bank: QueryBank | None = None) -> Mapping[int, LayerBooks] | None:
    """The codebooks by which images can fade, by decoder layer: those that the config names, else those of the method's
    bank; None where there are none."""
    named = link.config.books or link.stage.evidence(link.config).bank
    bank = bank_at(named) if isinstance(named, str) else own_bank
    return None if bank is None else bank.books


def _books_of(link: Link[KVStage], own_bank: QueryBank | None) -> Mapping[int, LayerBooks]:
    """The codebooks that the config names, else those of the method's bank."""
    config = link.config
    file = books_file(link)
    bank = own_bank if file is None else bank_at(file)
    where = "The query bank" if file is None else f"The query bank {file}"
    if bank is None:
        raise ConfigError(
            f"The ladder {config.tiers!r} needs codebooks, and {link.method!r} has no bank: give books=FILE, or take a "
            "ladder of rotated bits."
        )
    if bank.books is None:
        raise ConfigError(f"{where} has no codebooks, which the ladder {config.tiers!r} needs: collect it again.")
    return bank.books
