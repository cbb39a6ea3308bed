# SPDX-License-Identifier: Apache-2.0
"""Which methods can fill tiers, and which rungs need codebooks that some file has to bring."""

from __future__ import annotations

from plphp.errors import ConfigError
from plphp.policy.allocation import keep_all
from plphp.policy.method import Method
from plphp.policy.selection import RANKED
from plphp.settings.config import PLPHPConfig
from plphp.settings.ladder import LADDERS, PRODUCT_RUNGS, Ladder, check_rungs


def refuse_tiers(method: Method, config: PLPHPConfig) -> None:
    """Raise `ConfigError` for tiers that there are not, or that a method cannot fill.

    Parameters
    ----------
    method : Method
        The method.
    config : PLPHPConfig
        Its settings, see `Method.settled`.
    """
    ladder = config.ladder
    if ladder is None:
        return
    check_rungs(ladder, config.tiers or "")
    reason = _obstacle(method, config)
    if reason:
        raise ConfigError(f"The method {method.name!r} cannot fill tiers={config.tiers}: {reason}.")
    needed = _product_rungs(ladder)
    if config.books is not None and not needed and config.vision_budget is None:
        raise ConfigError(
            f"books={config.books} brings codebooks, and no rung of tiers={config.tiers} needs any: leave books out, "
            f"or take a ladder with one of {', '.join(PRODUCT_RUNGS)}."
        )
    if needed and config.books is None and method.kv is not None and method.kv.evidence(config).bank is None:
        without = [name for name, text in LADDERS.items() if not _product_rungs(Ladder.parse(text))]
        raise ConfigError(
            f"tiers={config.tiers} names rungs that need codebooks ({', '.join(needed)}), and the method "
            f"{method.name!r} asks no query bank that brings them: collect a bank (plphp collect) and give its file as "
            "books=FILE, or books=bundled for the bundled model; or take a ladder that needs none: "
            f"{', '.join(without)}."
        )


def check_books(method: Method, config: PLPHPConfig, layers: int) -> None:
    """Raise `ConfigError` unless the file that brings codebooks has them, for a model of this depth.

    A bank that the engine collects by itself has none yet, and collects them.

    Parameters
    ----------
    method : Method
        The method.
    config : PLPHPConfig
        Its settings, see `Method.settled`; they have passed `refuse_tiers`.
    layers : int
        Decoder layers of the model.
    """
    rungs = () if config.ladder is None else _product_rungs(config.ladder)
    fades = config.vision_budget is not None and config.books is not None
    if method.kv is None or not (rungs or fades):
        return
    file = config.books or method.kv.evidence(config).bank
    if not isinstance(file, str):
        return
    from plphp.policy.bank import bank_at, check_depth

    check_depth(file, layers)
    if bank_at(file).books is None:
        needed = f"which tiers={config.tiers} needs ({', '.join(rungs)})" if rungs else "for which books names it"
        raise ConfigError(
            f"The query bank {file} has no codebooks, {needed}: collect it again with this version (plphp collect)."
        )


def _obstacle(method: Method, config: PLPHPConfig) -> str:
    """Why a method cannot fill tiers, with what to do instead; empty where it can."""
    if method.kv is None:
        return (
            "it leaves the KV cache as it is. Give the tiers to a method of the KV cache behind it, as in "
            f"{method.name}+query_bank:tiers=t10"
        )
    if method.kv.allocate is keep_all:
        return "it keeps every entry whole. Take 'quantized', which holds every entry in few bits"
    if method.kv.evidence(config).candidates == "prompt":
        return "text competes with vision tokens in it, and text is held whole. Take a method that keeps all text"
    if method.kv.mix(config) != RANKED:
        return (
            "a part of what it keeps is drawn at random or spread out, which says nothing of the rung of an entry. "
            "Leave out random_share and floor"
        )
    return ""


def _product_rungs(ladder: Ladder) -> tuple[str, ...]:
    """The rungs of a ladder that need codebooks."""
    return tuple(name for name in ladder.names if name in PRODUCT_RUNGS)
