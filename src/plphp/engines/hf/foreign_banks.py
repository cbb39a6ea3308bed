# SPDX-License-Identifier: Apache-2.0
"""Query banks and codebooks of files that another model than the one that answers was asked for.

Siblings have the same shapes: nothing but the weights tells a fine-tuned model from its base. Centroids of another
model make other keys and values of every entry, so they are refused. Queries of another model say less of what an
answer will look at, and change nothing that is held: they are used, and the log says so.
"""

from __future__ import annotations

import logging
from functools import cache

from transformers import PreTrainedModel

from plphp.errors import ConfigError, UnsupportedModelError
from plphp.inputs.weight_values import kept_weights_values_hash
from plphp.policy.bank import QueryBank, bank_at
from plphp.policy.chain import Chain
from plphp.pruning.coders import books_file, collects_books

log = logging.getLogger("plphp")

SHOWN = 12
"""Digits of a hash in a message."""


def refuse_foreign_banks(chain: Chain, model: PreTrainedModel, own_bank: QueryBank | None = None) -> None:
    """Hold the queries and codebooks of a chain against the weights of a model.

    These are hashed for the first bank that says of which weights it is, and again once they have changed
    (`plphp.inputs.weights.kept_weights_hash`).

    Parameters
    ----------
    chain : Chain
        What names the files of banks.
    model : PreTrainedModel
        The model that answers.
    own_bank : QueryBank, optional
        The bank that a session has collected: weights may be written to while it is open.

    Raises
    ------
    ConfigError
        If codebooks are of other weights. For queries of other weights, and where it cannot be found out, a warning is
        logged, once.
    """
    of_books = books_file(chain.kv)
    links = [link for link in (chain.prefill, chain.attention, chain.kv) if link is not None]
    asked = [link.stage.evidence(link.config).bank for link in links]
    for name in {*(name for name in asked if isinstance(name, str)), *([] if of_books is None else [of_books])}:
        _check_file(name, model, of_books == name)
    if own_bank is not None and own_bank.values_hash:
        advice = "open a new session, which collects another bank."
        _compare("that was collected here", own_bank, model, collects_books(chain.kv), advice)


def _check_file(name: str, model: PreTrainedModel, brings_books: bool) -> None:
    bank = bank_at(name)
    brings_books = brings_books and bank.books is not None
    what = "Codebooks" if brings_books else "Queries"
    if not bank.values_hash:
        _warn_once(
            f"The query bank {name} does not say of which weights it is, as an earlier version or a server has made "
            f"it, so that nobody notices if they are others than those of this model. {what} of another model "
            "are of no use: to be sure collect it with this version (plphp collect)."
        )
        return
    advice = "collect a bank with this model (plphp collect), read in the dtype that it answers in, and give its file."
    _compare(name, bank, model, brings_books, advice)


def _compare(name: str, bank: QueryBank, model: PreTrainedModel, brings_books: bool, advice: str) -> None:
    of_bank = bank.values_hash
    try:
        of_model = kept_weights_values_hash(model)
    except UnsupportedModelError as error:
        _warn_once(f"Whether the query bank {name} is of this model is not known. {error}")
        return
    if of_model == of_bank:
        return
    differ = f"the hash of its weights is {of_bank[:SHOWN]}..., and that of this model's is {of_model[:SHOWN]}..."
    if brings_books:
        raise ConfigError(
            f"The codebooks of the query bank {name} are of another model: {differ}. What they stand for would be "
            f"wrong without a word: {advice}"
        )
    _warn_once(
        f"The queries of the bank {name} are of another model: {differ}. They rank worse what an answer of this one "
        f"will look at: {advice}"
    )


@cache
def _warn_once(message: str) -> None:
    """Log a warning the first time that this function is called with it: a cache is made for every answer."""
    log.warning("%s", message)
