# SPDX-License-Identifier: Apache-2.0
"""The sample that codebooks are learned from: bounded, uniform, the same tokens everywhere, and in a bank's file."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plphp import ConfigError, QueryBank
from plphp.policy.bank import FORMAT
from plphp.policy.bank_sampling import BankSample
from plphp.policy.book_learning import with_books
from plphp.policy.entry_sampling import OF_PROMPT, EntrySample, centred, drawn
from plphp.policy.rotation import Rotation

LAYERS = (1, 3)
ROTATIONS = {layer: Rotation(torch.tensor([1.0])) for layer in LAYERS}


def entries(first: int, tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys [2 heads, tokens, 8] that say their number, and values [2 heads, tokens, 16] that say its opposite."""
    numbers = torch.arange(first, first + tokens).half()[None, :, None]
    return {layer: (numbers.expand(2, -1, 8) + layer, -numbers.expand(2, -1, 16)) for layer in LAYERS}


def numbers(sample: EntrySample) -> list[int]:
    """The numbers that a sample's entries say; the same in both layers, of keys and of values."""
    said = sample.layers[1][0][0, :, 0] - 1
    for layer in LAYERS:
        assert torch.equal(sample.layers[layer][0], (said + layer)[None, :, None].expand(2, -1, 8))
        assert torch.equal(sample.layers[layer][1], -said[None, :, None].expand(2, -1, 16))
    return [int(number) for number in said]


def answer(tokens: int = 3) -> dict[int, Tensor]:
    return {layer: torch.randn(4, tokens, 8, generator=torch.Generator().manual_seed(tokens)) for layer in LAYERS}


def bank(prompts: int = 2) -> QueryBank:
    sample = BankSample()
    for number in range(prompts):
        sample.add(answer(), entries(100 * number, 20))
    return sample.bank(ROTATIONS, {"decoder_layers": 4})


def test_a_sample_is_uniform_over_the_tokens_of_all_prompts() -> None:
    counts: Counter[int] = Counter()
    for seed in range(300):
        sample, first = EntrySample(), 0
        for tokens in (3, 9, 1, 7):
            sample = sample.with_prompt(entries(first, tokens), 6, seed)
            first += tokens
        assert len(sample) == 6
        assert sample.prompts == 4
        assert sample.draws.tolist() == sorted(sample.draws.tolist())
        counts.update(numbers(sample))
    assert len(counts) == 20
    assert all(58 < count < 125 for count in counts.values())  # 90 expected, standard deviation 8


def test_a_prompt_gives_a_bounded_number_of_its_tokens() -> None:
    assert drawn(7, 30) == list(range(7))
    many = drawn(2000, 2100)
    assert many == sorted(set(many)) == drawn(2000, 2100)
    assert len(many) == OF_PROMPT
    assert max(many) > 1900
    assert many != drawn(2000, 2101), "images of one size give the same places, whatever stands around them"


def test_entries_are_less_the_mean_of_their_prompt() -> None:
    """Over all vision tokens, not over those that were drawn."""
    keys, values = torch.randn(2, 2, 300, 16, generator=torch.Generator().manual_seed(0)).bfloat16() + 3
    pair = centred(keys, values, [4, 7])
    assert pair is not None
    for part, states in zip(pair, (keys, values), strict=True):
        exact = states.double()[:, [4, 7]] - states.double().mean(1, keepdim=True)
        assert part.dtype == torch.float16
        assert (part - exact).abs().max() < 2e-3
    assert centred(keys[..., :12], values, [4]) is None
    assert centred(keys, values[..., :12], [4]) is None


def test_what_is_not_finite_or_does_not_fit_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    sample = EntrySample().with_prompt(entries(0, 3))
    broken = entries(5, 3)
    broken[3] = broken[3][0], broken[3][1].clone()
    broken[3][1][1, 2, 0] = torch.nan
    with caplog.at_level(logging.WARNING, "plphp"):
        assert sample.with_prompt(broken) is sample
    assert "left out of the codebooks" in caplog.text
    assert sample.with_prompt({}) is sample
    with pytest.raises(ConfigError, match="entries of the layers 1, expected those of 1, 3"):
        sample.with_prompt({1: entries(0, 2)[1]})
    with pytest.raises(ConfigError, match="2 KV heads of dimension 16 in layer 1, expected 2 of 8"):
        sample.with_prompt({layer: pair[::-1] for layer, pair in entries(0, 2).items()})
    with pytest.raises(ConfigError, match="book_tokens must be an integer of at least 1, got 0"):
        BankSample(book_tokens=0)


def test_a_sample_goes_on_where_its_file_ended(tmp_path: Path) -> None:
    whole, part = BankSample(book_tokens=30), BankSample(book_tokens=30)
    for number in range(5):
        for sample in (whole, part):
            sample.add(answer(), entries(100 * number, 12))
        part.bank(ROTATIONS, {"decoder_layers": 4}).save(tmp_path / "bank")
        part = BankSample.of(QueryBank.load(tmp_path / "bank"))
        part.book_tokens = 30
    assert numbers(part.entries) == numbers(whole.entries)
    record = whole.bank(ROTATIONS, {"decoder_layers": 4}).record
    assert (record["book_tokens"], record["book_prompts"]) == (30, 5)


def test_books_take_the_place_of_the_sample_and_are_read_back(tmp_path: Path) -> None:
    collected = bank()
    assert collected.books is None
    complete = with_books(collected)
    assert complete.sampled is None
    assert complete.books is not None
    assert with_books(complete) is complete
    for rounded in (complete, complete.rounded()):
        rounded.save(tmp_path / "bank")
        read = QueryBank.load(tmp_path / "bank")
        assert read.sampled is None
        assert read.books is not None
        for layer, own in complete.books.items():
            for side in ("keys", "values"):
                kept, expected = (getattr(books, side).tensors() for books in (read.books[layer], own))
                assert kept.keys() == expected.keys()
                assert all(torch.equal(kept[name], expected[name]) for name in kept)
    assert read.books[1].keys.coarse is None
    assert read.books[1].values.coarse is not None
    # Books that are there stay, as the entries that they are of are gone.
    sample = BankSample.of(read)
    sample.add(answer(), entries(0, 5))
    continued = sample.bank(ROTATIONS, {"decoder_layers": 4})
    assert continued.books is read.books
    assert continued.sampled is None


def test_a_file_without_books_is_read(tmp_path: Path) -> None:
    dataclasses.replace(bank(), sampled=None).save(tmp_path / "bank")
    assert ".books." not in " ".join(load_file(tmp_path / "bank"))
    read = QueryBank.load(tmp_path / "bank")
    assert read.books is None
    assert read.sampled is None


@pytest.mark.parametrize("kind", ["books", "sampled"])
def test_broken_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    (with_books(bank()) if kind == "books" else bank()).save(path)
    good = load_file(path)
    about = {"format": FORMAT, "interleaved": '{"1": false, "3": false}', "record": '{"decoder_layers": 4}'}
    some = "3.books.keys.residual" if kind == "books" else "3.sampled.keys"
    nan = good[some].clone()
    nan[0, 0, 0] = torch.nan
    changes: list[tuple[dict[str, Tensor | None], str]] = [
        ({some: None}, rf"KeyError\('{some}'\)"),
        ({some: nan}, "holds NaN or inf"),
        ({some: good[some][:1].contiguous()}, "is broken"),
        ({"3.queries": torch.zeros(3, 6, 8)}, r"layer 3 has 3 query heads of dimension 8, and codebooks of 2 KV heads"),
        ({"3.queries": torch.zeros(4, 6, 16)}, "query heads of dimension 16, and codebooks of 2 KV heads of dimens"),
    ]
    if kind == "books":
        changes += [
            ({"7.books.keys.fine": good[some].clone()}, r"7\.books\.keys\.fine belongs to no layer of the bank"),
            ({"3.books.values.coarse": None}, "is broken"),
            ({some: good[some].float()}, "are float16"),
        ]
    else:
        none = {f"{n}.sampled.{s}": good[f"{n}.sampled.{s}"][:, :0].clone() for n in LAYERS for s in ("keys", "values")}
        changes += [
            ({"sampled.prompts": torch.tensor([1, 1])}, "a sample of no entries"),
            ({"sampled.prompts": torch.tensor(0)}, "a sample of no entries"),
            ({"sampled.draws": good["sampled.draws"][:0].clone(), **none}, "a sample of no entries"),
            ({"sampled.draws": good["sampled.draws"][:5].clone()}, r"expected \[kv_heads, 5, dim\]"),
        ]
    for change, match in changes:
        tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        save_file(tensors, path, metadata=about)
        with pytest.raises(ConfigError, match=rf"is broken .*{match}" if match != "is broken" else match):
            QueryBank.load(path)
