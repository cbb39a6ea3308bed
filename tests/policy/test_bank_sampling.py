# SPDX-License-Identifier: Apache-2.0
"""The sample that a query bank is made of: uniform, the same at all layers, taken up again, and shared by threads."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plphp import ConfigError, QueryBank
from plphp.policy.bank_sampling import BankSample
from plphp.policy.rotation import Rotation
from plphp.policy.sampled_answer import SampledAnswer

LAYERS = (1, 3)
ROTATIONS = {layer: Rotation(torch.tensor([1.0])) for layer in LAYERS}


def answer(first: int, tokens: int) -> dict[int, Tensor]:
    """Queries [2 heads, tokens, 2] that say their number, by layer."""
    numbers = torch.arange(first, first + tokens).float()[None, :, None].expand(2, -1, 2)
    return {layer: numbers * (1 if layer == 1 else -1) for layer in LAYERS}


def numbers(bank: QueryBank) -> list[int]:
    """The numbers that a bank's queries say; the same at both layers."""
    first = bank.layers[1].queries[0, :, 0]
    assert torch.equal(bank.layers[3].queries[1, :, 1], -first)
    return [int(number) for number in first]


def test_a_sample_is_uniform_over_the_tokens_of_all_answers() -> None:
    counts: Counter[int] = Counter()
    lengths = (3, 1, 9, 2, 5)
    for seed in range(400):
        sample, first = BankSample(5, seed), 0
        for tokens in lengths:
            assert sample.add(answer(first, tokens))
            first += tokens
        bank = sample.bank(ROTATIONS, {"model_type": "tiny"})
        kept = numbers(bank)
        begins = [sum(lengths[:i]) for i in range(len(lengths))]
        assert bank.ahead.tolist() == [number - max(b for b in begins if b <= number) for number in kept]
        counts.update(kept)
    assert len(counts) == 20
    assert all(60 < count < 145 for count in counts.values())  # 100 expected, standard deviation 9
    expected = {"model_type": "tiny", "prompts": 5, "answer_tokens": 20, "samples": 5, "seed": 399}
    assert bank.record == expected


@pytest.mark.parametrize("size", [6, 100])
def test_a_sample_goes_on_where_its_bank_ended(size: int, tmp_path: Path) -> None:
    """In another process, from the file: what is kept in the end is what an uninterrupted sample keeps."""
    whole, part = BankSample(size), BankSample(size)
    first = 0
    for tokens in (2, 7, 3, 11, 4):
        whole.add(answer(first, tokens))
        part.add(answer(first, tokens))
        part.bank(ROTATIONS, {"decoder_layers": 4}).save(tmp_path / "bank")
        part = BankSample.of(QueryBank.load(tmp_path / "bank"), size)
        first += tokens
    expected, resumed = whole.bank(ROTATIONS, {"decoder_layers": 4}), part.bank(ROTATIONS, {"decoder_layers": 4})
    assert numbers(resumed) == numbers(expected)
    assert resumed.ahead.tolist() == expected.ahead.tolist()
    assert resumed.record == expected.record


@pytest.mark.parametrize("size", [6, 100])
def test_what_was_taken_of_answers_makes_the_same_sample_again(size: int, tmp_path: Path) -> None:
    """Also from files, and of an answer of which no token was taken."""
    whole, again, first = BankSample(size), BankSample(size), 0
    taken = []
    for tokens in (2, 7, 1, 1, 1, 1, 1, 11, 4):
        answer_of = whole.add(answer(first, tokens))
        assert answer_of is not None
        taken.append(len(answer_of.ahead))
        answer_of.bank(ROTATIONS, {"decoder_layers": 4}).save(tmp_path / "answer")
        again.replay(SampledAnswer.of(QueryBank.load(tmp_path / "answer")))
        first += tokens
    assert (0 in taken) == (size == 6)
    expected, replayed = whole.bank(ROTATIONS, {"decoder_layers": 4}), again.bank(ROTATIONS, {"decoder_layers": 4})
    assert numbers(replayed) == numbers(expected)
    assert replayed.ahead.tolist() == expected.ahead.tolist()
    assert replayed.record == expected.record
    assert answer_of is not None
    with pytest.raises(ConfigError, match="it holds answer 9, behind 25 tokens, expected answer 10, behind 29"):
        again.replay(answer_of)


def test_threads_lose_no_answer() -> None:
    sample = BankSample(1000)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: sample.add(answer(10 * number, 10)), range(60)))
    bank = sample.bank(ROTATIONS, {"decoder_layers": 4})
    assert sorted(numbers(bank)) == list(range(600))
    assert bank.record["prompts"] == 60
    assert all(number % 10 == ahead for number, ahead in zip(numbers(bank), bank.ahead.tolist(), strict=True))


def test_an_answer_that_counts_for_nothing_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    sample = BankSample(4)
    assert not sample.add(answer(0, 0))
    broken = answer(0, 3)
    broken[3] = broken[3].clone()
    broken[3][1, 2, 0] = torch.inf
    with caplog.at_level(logging.WARNING, "plphp"):
        assert not sample.add(broken)
    assert "NaN or inf among its queries" in caplog.text
    assert (sample.prompts, sample.answer_tokens) == (0, 0)
    with pytest.raises(ConfigError, match="no answer of more than one token"):
        sample.bank(ROTATIONS, {"decoder_layers": 4})
    assert sample.add(answer(5, 2))
    assert numbers(sample.bank(ROTATIONS, {"decoder_layers": 4})) == [5, 6]


def test_what_is_no_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="samples must be an integer of at least 1, got 0"):
        BankSample(0)
    sample = BankSample(4)
    sample.add(answer(0, 3))
    with pytest.raises(ConfigError, match=r"tokens by layer: \{1: 3\}.*layers 1, 3"):
        sample.add({1: torch.zeros(2, 3, 2)})
    with pytest.raises(ConfigError, match=r"\{1: 3, 3: 2\}"):
        sample.add({1: torch.zeros(2, 3, 2), 3: torch.zeros(2, 2, 2)})
    bank = sample.bank(ROTATIONS, {"decoder_layers": 4})
    for record, match in (({"prompts": 1}, "None tokens"), ({"prompts": 0, "answer_tokens": 3}, "0 prompts")):
        with pytest.raises(ConfigError, match=match):
            BankSample.of(QueryBank(bank.layers, bank.ahead, record))
    with pytest.raises(ConfigError, match="3 samples of 9 tokens, expected 4"):
        BankSample.of(QueryBank(bank.layers, bank.ahead, {"prompts": 1, "answer_tokens": 9}), 4)
