# SPDX-License-Identifier: Apache-2.0
"""A query bank: queries of a model's own answers, to ask with what an answer will look at, and codebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from plphp.engines.hf.answer_queries import AnswerQueries
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache import NOTHING_EVICTED, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.own_bank import values_record
from plphp.engines.hf.rotation_probe import find_rotations
from plphp.errors import ConfigError
from plphp.policy.bank import QueryBank
from plphp.policy.bank_sampling import SAMPLES, BankSample
from plphp.policy.book_learning import with_books
from plphp.policy.entry_sampling import TOKENS, Entries
from plphp.policy.rotation import Rotation
from plphp.settings.checks import check_int

from .provenance import provenance


def collect_query_bank(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    *,
    samples: int = SAMPLES,
    book_tokens: int = TOKENS,
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> QueryBank:
    """Let a model answer prompts greedily, unpruned, and keep a sample of the queries that it wrote its answers with.

    From a sample of the vision entries of the same prompts the codebooks of product codes are learned, see
    `plphp.kernels.books`; there are none for a model whose heads have a number of channels that 8 does not divide.

    Take prompts like those that will be pruned, but others: a few dozen.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    prompts : iterable of mapping
        Inputs of ``generate`` with one row, without padding, and with at least one vision token.
    samples : int
        Tokens of answers whose queries are kept, at random; all if there are fewer.
    book_tokens : int
        Vision tokens that the codebooks are learned from, at random, at most 512 of a prompt. More make better
        codebooks and take longer.
    max_new_tokens : int
        Longest answer.
    seed : int
        Of the sample.
    progress : callable
        Told what is going on, in a few words.

    Returns
    -------
    QueryBank
        Save it for the option ``bank`` of the method ``query_bank``.

    Raises
    ------
    ConfigError
        If a number is none of at least 1 (the seed: 0), which is said before the model answers; if a prompt has several
        rows or no vision token, or no answer has a second token.
    UnsupportedModelError
        If it is not known how the model rotates its queries, see `plphp.engines.hf.rotation_probe.find_rotations`.

    Examples
    --------
    >>> plphp.collect_query_bank(model, prompts).save("bank.safetensors")  # doctest: +SKIP
    """
    check_int("max_new_tokens", max_new_tokens, minimum=1)
    sample = BankSample(samples, seed, book_tokens)
    rotations = find_rotations(model)
    _answer_all(model, prompts, max_new_tokens, sample, rotations, progress)
    record = {**provenance(model), **values_record(model), "max_new_tokens": max_new_tokens}
    bank = sample.bank(rotations, record)
    return with_books(bank, model.device)


def _answer_all(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    max_new_tokens: int,
    sample: BankSample,
    rotations: Mapping[int, Rotation],
    progress: Callable[[str], None],
) -> None:
    """Let the model answer the prompts, and sample the queries of the answers and the entries of the prompts."""
    count = 0
    lease = Lease.of(model)
    try:
        for count, inputs in enumerate(prompts, 1):
            progress(f"prompt {count}")
            for queries, entries in _answer(model, lease, inputs, count, max_new_tokens, rotations):
                sample.add(queries, entries)
    finally:
        # Not left to the cache: an error that is kept would keep it, and the model attached.
        lease.end()
    if not sample.prompts:
        raise ConfigError(
            f"{count} prompt(s) gave no answer of more than one token, so no query of an answer: give others, or a "
            "larger max_new_tokens."
        )


def _answer(
    model: PreTrainedModel,
    lease: Lease,
    inputs: Mapping[str, Any],
    number: int,
    max_new_tokens: int,
    rotations: Mapping[int, Rotation],
) -> list[tuple[dict[int, Tensor], Entries]]:
    """Let the model answer one prompt; the queries of the answer, and entries of the prompt."""
    cache = PrunedCache(lease.attachment, NOTHING_EVICTED)
    cache.plan(inputs)
    _check_prompt(cache, number)
    generate: Any = model.generate
    heard = AnswerQueries(cache)
    with cache.listening(heard):
        output = generate(
            **inputs,
            **passed(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
        )
    answers = heard.answers(output, GenerationConfig(), rotations)  # a single row ends with its last token
    return list(zip(answers, heard.entries(), strict=True))


def _check_prompt(cache: PrunedCache, number: int) -> None:
    reading = cache.reading
    if reading is None:
        raise ConfigError(f"Prompt {number} has no vision token: collect from prompts like those that will be pruned.")
    if reading.batch != 1 or not reading.spans.valid.all():
        raise ConfigError(f"Prompt {number} has {reading.batch} rows or padding: give one prompt at a time, unpadded.")
