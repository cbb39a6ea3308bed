# SPDX-License-Identifier: Apache-2.0
"""Ask the prompt with its own queries, turned to just behind it. Our own; no paper.

A query bank (`plphp.methods.query_bank`) needs answers of the model. Without one the prompt's own queries stand for
those to come: ``rows`` of them at most, evenly spread over the tokens of this turn, text and vision, without the first
4 of the conversation. Each is turned on by the rotary embedding of its layer, from its own position to ``ahead`` tokens
behind the first place behind the prompt, and so sees all of the prompt from where an answer would. With A the softmax
attention of a KV head (query heads combined by ``gqa_reduction``) for these queries t, and v_j the value of entry j:

    best[j] = min over t of the position of j in the order among the vision tokens by A[t, j], from 0
    s[j]    = 1 / (2 + best[j] - mean[j] / max(mean))        times ||v_j|| with ``value_norm=1``

as in `plphp.methods.query_bank`, whose options ``reduce`` and ``value_norm`` these are. The KV heads of a layer compete
for its places by s (``heads="ragged"``, unless the config says otherwise).

With m-RoPE a vision token has no single position to be turned from: there the queries of the text behind the last image
ask, and in the first turn those before the first. Where none is left, the last token of the prompt asks, as it is if
its own position is not known. A model whose rotary embedding is not found out, or changes with the length of the
prompt, is refused.

It tells what needs many bits from what needs few. For eviction it is weak beside a bank. Related: arXiv:2510.00636 asks
with the distribution of the prompt's queries, turned to come behind it.
"""

from __future__ import annotations

from plphp.errors import ConfigError
from plphp.policy.allocation import uniform
from plphp.policy.evidence import Evidence
from plphp.policy.method import Method
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from . import _best

OPTIONS = {"rows": Option(128, low=1), "ahead": Option(10, low=0), **_best.OPTIONS}


def evidence(config: PLPHPConfig) -> Evidence:
    """The prompt's queries turned to behind it, and what the option ``reduce`` looks at under them."""
    options = settings(OPTIONS, config.options)
    return Evidence(turned_rows=options["rows"], turned_ahead=options["ahead"], **_best.asked(config))


def check(config: PLPHPConfig, layers: int) -> None:
    """The queries that ask are spread over the prompt, so that a config names no rows."""
    if config.query_rows is not None:
        raise ConfigError(
            "The method 'prompt_queries' asks with queries that are spread over the prompt, got "
            f"query_rows={config.query_rows!r}: leave it out; the option rows says how many ask."
        )


METHOD = Method(
    name="prompt_queries",
    summary="every KV head keeps what the prompt's own queries would look at from behind it",
    paper="own: the prompt's queries in the place of a bank, heads as in arXiv:2407.11550",
    kv=KVStage(allocate=uniform, score=_best.score, evidence=evidence, heads="ragged"),
    options=OPTIONS,
    check=check,
    when="where there is no query bank, with tiers that drop nothing",
)
