# SPDX-License-Identifier: Apache-2.0
"""The bank that an engine collects, in memory and in a folder that several processes may share."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plphp import ConfigError, QueryBank
from plphp.policy import bank_folder
from plphp.policy.bank_folder import BankFolder, BankModel
from plphp.policy.bank_sampling import BankSample
from plphp.policy.book_learning import with_books
from plphp.policy.entry_sampling import EntrySample
from plphp.policy.evidence import OwnBank
from plphp.policy.rotation import Rotation
from plphp.pruning.own_bank import BankCollection
from plphp.pruning.report import BankProgress

MODEL = BankModel("tiny/vl", 4, "0123456789abcdef" + "0" * 48)
NAME = "tiny_vl-0123456789abcdef.safetensors"
ROTATIONS = {2: Rotation(torch.tensor([1.0, 0.1]))}


def answer(number: float, tokens: int = 2) -> dict[int, Tensor]:
    return {2: torch.full((1, tokens, 4), float(number))}


def kept(folder: Path) -> QueryBank:
    """What a folder keeps, as a session reads it."""
    loaded = BankFolder(folder, MODEL).load()
    assert loaded is not None
    return loaded.bank


def numbers(bank: QueryBank | None) -> list[float]:
    assert bank is not None
    queries: list[float] = bank.layers[2].queries[0, :, 0].tolist()
    return queries


def entries(number: int, tokens: int = 6) -> dict[int, tuple[Tensor, Tensor]]:
    """Of a layer with one KV head."""
    states = torch.randn(2, 1, tokens, 8, generator=torch.Generator().manual_seed(number)).half()
    return {2: (states[0], states[1])}


def wide(number: int) -> dict[int, Tensor]:
    """An answer of a layer whose heads have a product code."""
    return {2: torch.full((1, 2, 8), float(number))}


def test_entries_are_kept_until_the_bank_is_complete_and_become_codebooks(tmp_path: Path) -> None:
    whole = BankCollection(OwnBank(3), MODEL)
    whole.add([wide(n) for n in (1, 2, 3)], ROTATIONS, [entries(n) for n in (1, 2, 3)])
    assert whole.bank is not None
    assert whole.bank.sampled is None
    assert whole.bank.books is not None
    expected = with_books(QueryBank(whole.bank.layers, whole.bank.ahead, {}, None, sampled(1, 2, 3))).books
    assert expected is not None
    for number in (1, 2, 3):  # in three processes
        collection = BankCollection(OwnBank(3, str(tmp_path)), MODEL)
        collection.add([wide(number)], ROTATIONS, [entries(number)])
        now = kept(tmp_path)
        assert (now.books is None) == (now.sampled is not None) == (number < 3)
        assert now.record["book_tokens"] == 6 * number
    for bank in (
        whole.bank,
        collection.bank,
        QueryBank.load(tmp_path / NAME),
        BankCollection(OwnBank(3, str(tmp_path)), MODEL).bank,
    ):
        assert bank is not None
        assert bank.books is not None
        assert torch.equal(bank.books[2].keys.fine, expected[2].keys.fine)
        assert torch.equal(bank.books[2].values.residual, expected[2].values.residual)


def sampled(*prompts: int) -> EntrySample:
    sample = EntrySample()
    for number in prompts:
        sample = sample.with_prompt(entries(number))
    return sample


def test_a_session_of_fewer_prompts_learns_from_what_the_folder_holds_and_leaves_it(tmp_path: Path) -> None:
    BankCollection(OwnBank(3, str(tmp_path)), MODEL).add([wide(1), wide(2)], ROTATIONS, [entries(1), entries(2)])
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    fewer = BankCollection(OwnBank(2, str(tmp_path)), MODEL).bank
    assert fewer is not None
    assert fewer.books is not None
    assert fewer.sampled is None
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_codebooks_stay_where_a_bank_is_added_to(tmp_path: Path) -> None:
    """The entries that they were learned from are gone: those of the newest prompts alone would make worse ones."""
    first = BankCollection(OwnBank(2, str(tmp_path)), MODEL)
    first.add([wide(1), wide(2)], ROTATIONS, [entries(1), entries(2)])
    larger = BankCollection(OwnBank(3, str(tmp_path)), MODEL)
    larger.add([wide(3)], ROTATIONS, [entries(3)])
    assert first.bank is not None
    assert larger.bank is not None
    assert first.bank.books is not None
    assert larger.bank.books is not None
    assert torch.equal(larger.bank.books[2].keys.fine, first.bank.books[2].keys.fine)
    assert larger.bank.record["prompts"] == 3


def test_an_engine_without_entries_collects_a_bank_without_codebooks(tmp_path: Path) -> None:
    collection = BankCollection(OwnBank(1, str(tmp_path)), MODEL)
    collection.add([answer(1)], ROTATIONS)
    assert collection.bank is not None
    assert collection.bank.books is None
    assert QueryBank.load(tmp_path / NAME).books is None


def test_in_memory() -> None:
    collection = BankCollection(OwnBank(3), BankModel("tiny", 4))
    assert collection.add([answer(1), answer(2, 0)], ROTATIONS) == BankProgress(1, 3)
    assert collection.bank is None
    assert collection.progress.missing == 2
    assert collection.add([answer(2.001), answer(3), answer(4)], ROTATIONS) == BankProgress(3, 3)
    assert numbers(collection.bank) == [1, 1, 2, 2, 3, 3], "the queries are not rounded as in a file"
    complete = collection.bank
    assert collection.add([answer(9)], ROTATIONS) == BankProgress(3, 3)
    assert collection.bank is complete


def test_a_file_of_fewer_prompts_is_added_to_and_of_more_is_taken(tmp_path: Path) -> None:
    BankCollection(OwnBank(2, str(tmp_path)), MODEL).add([answer(1), answer(2)], ROTATIONS)
    larger = BankCollection(OwnBank(3, str(tmp_path)), MODEL)
    assert larger.progress == BankProgress(2, 3)
    assert larger.bank is None
    larger.add([answer(3)], ROTATIONS)
    assert numbers(larger.bank) == [1, 1, 2, 2, 3, 3]
    smaller = BankCollection(OwnBank(1, str(tmp_path)), MODEL)
    assert numbers(smaller.bank) == [1, 1, 2, 2, 3, 3]
    assert smaller.progress == BankProgress(3, 1)
    assert {path.name for path in tmp_path.iterdir()} == {NAME, NAME.replace("safetensors", "lock")}


def _collect(folder: str, first: int, room: int) -> None:
    bank_folder.MOST_ANSWERS = room
    collection = BankCollection(OwnBank(12, folder), MODEL)
    for number in range(first, first + 8):
        collection.add([answer(number)], ROTATIONS)


def _watch(folder: str) -> None:
    """What a session does before each prompt: it never finds half of what another writes."""
    collection, collected = BankCollection(OwnBank(12, folder), MODEL), 0
    while collection.bank is None:
        collection.refresh()
        assert collection.progress.collected >= collected
        collected = collection.progress.collected


@pytest.mark.parametrize("room", [2, 16])
def test_processes_lose_nothing_and_end_with_the_same_bank(room: int, tmp_path: Path) -> None:
    """Also where answers are put into the bank before it is complete, while a third process reads."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_collect, args=(str(tmp_path), first, room)) for first in (0, 100)]
    processes.append(context.Process(target=_watch, args=(str(tmp_path),)))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = numbers(QueryBank.load(tmp_path / NAME))
    assert len(found) == 24
    assert found[::2] == found[1::2]
    assert len(set(found)) == 12, "an answer is there twice, and another was lost"
    ours, theirs = [number for number in found[::2] if number < 100], [number for number in found[::2] if number >= 100]
    assert ours == list(range(len(ours)))
    assert theirs == list(range(100, 100 + len(theirs)))
    assert {path.name for path in tmp_path.iterdir()} == {NAME, NAME.replace("safetensors", "lock")}


def test_an_answer_is_added_to_what_the_file_holds_by_then(tmp_path: Path) -> None:
    """Both collections were begun before either had an answer, and their answers end in turn."""
    first, second = (BankCollection(OwnBank(3, str(tmp_path)), MODEL) for _ in range(2))
    assert first.add([answer(1)], ROTATIONS) == BankProgress(1, 3)
    assert second.add([answer(2)], ROTATIONS) == BankProgress(2, 3)
    assert first.add([answer(3), answer(4)], ROTATIONS) == BankProgress(3, 3)
    assert second.add([answer(5)], ROTATIONS) == BankProgress(3, 3)
    assert numbers(first.bank) == numbers(second.bank) == [1, 1, 2, 2, 3, 3]


def test_two_saves_never_write_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even without a lock: neither sees half of what the other writes."""
    collection = BankCollection(OwnBank(1), MODEL)
    collection.add([answer(1)], ROTATIONS)
    written: list[Path] = []
    original = Path.replace

    def replace(part: Path, target: Path) -> Path:
        written.append(part)
        return original(part, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert collection.bank is not None
    for _ in range(2):
        collection.bank.save(tmp_path / "bank")
    assert len({*written, tmp_path / "bank"}) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_a_file_that_was_taken_away_begins_anew(tmp_path: Path) -> None:
    collection = BankCollection(OwnBank(3, str(tmp_path)), MODEL)
    collection.add([answer(1)], ROTATIONS)
    [file] = tmp_path.glob("*.safetensors")
    file.unlink()
    assert collection.add([answer(2)], ROTATIONS) == BankProgress(1, 3)
    assert numbers(kept(tmp_path)) == [2, 2]


def saved(path: Path, bank: QueryBank, **record: object) -> None:
    QueryBank(bank.layers, bank.ahead, {**bank.record, **record}).save(path)


def test_a_file_that_is_no_bank_of_this_model_is_refused_and_stays(tmp_path: Path) -> None:
    BankCollection(OwnBank(1, str(tmp_path)), MODEL).add([answer(1)], ROTATIONS)
    collection = BankCollection(OwnBank(2, str(tmp_path)), MODEL)
    file = tmp_path / NAME
    good = QueryBank.load(file)
    for record, match in (
        ({"weights_sha256": "f" * 64}, f"weights_sha256 is '{'f' * 64}'"),
        ({"decoder_layers": 5}, "decoder_layers is 5, and that of this model is 4"),
        ({"model_type": "other"}, "model_type is 'other'"),
        ({"weights_sha256": None}, "weights_sha256 is None"),
        ({"prompts": 7}, "is broken: its record says that it is of 7 prompts with 2 tokens"),
        ({"answer_tokens": 7}, "is broken: it holds 2 samples of 7 tokens"),
    ):
        saved(file, good, **record)
        content = file.read_bytes()
        with pytest.raises(ConfigError, match=match) as refusal:
            BankCollection(OwnBank(2, str(tmp_path)), MODEL)
        assert f"Move the file {file} away" in str(refusal.value)
        collection.add([answer(2)], ROTATIONS)  # it was replaced while an answer was written: that goes on
        assert collection.bank is None
        with pytest.raises(ConfigError, match=match):
            collection.refresh()  # before the next answer
        assert file.read_bytes() == content
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        BankCollection(OwnBank(2, str(tmp_path)), MODEL)
    assert file.read_bytes() == b""


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Cannot make the folder .*file/in .*: Not a directory"):
        BankCollection(OwnBank(2, str(tmp_path / "file" / "in")), MODEL)
    with pytest.raises(ConfigError, match="needs the SHA-256 of the weights, got ''"):
        BankFolder(tmp_path, BankModel("tiny", 4))
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="Cannot write to the folder"):
            BankFolder(tmp_path / "closed", MODEL)


def test_a_save_that_fails_costs_no_answer_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collection = BankCollection(OwnBank(2, str(tmp_path)), MODEL)
    collection.add([answer(1)], ROTATIONS)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert collection.add([answer(2)], ROTATIONS) == BankProgress(2, 2)
    assert f"{NAME}: No space left on device" in caplog.text
    assert "Nothing is pruned before the query bank is saved" in caplog.text
    assert numbers(kept(tmp_path)) == [1, 1]
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob(".*.part"))
    assert collection.bank is None
    assert collection.add([answer(3)], ROTATIONS) == BankProgress(2, 2)
    assert numbers(collection.bank) == numbers(QueryBank.load(tmp_path / NAME)) == [1, 1, 2, 2]


def test_a_folder_without_room_for_a_lock_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collection = BankCollection(OwnBank(2, str(tmp_path)), MODEL)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("plphp.policy.bank_folder.locked", full)
        for number in (1, 2, 3):
            assert collection.add([answer(number)], ROTATIONS) == BankProgress(min(number, 2), 2)
    assert caplog.text.count("No space left on device") == 3
    assert collection.bank is None
    assert not list(tmp_path.iterdir())
    assert collection.add([], ROTATIONS) == BankProgress(2, 2)
    assert numbers(collection.bank) == numbers(QueryBank.load(tmp_path / NAME)) == [1, 1, 2, 2]


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_complete_bank_holds_no_sample_and_none_is_built_before(
    in_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], BankSample.bank

    def bank(sample: BankSample, *args: Any) -> QueryBank:
        built.append(sample.prompts)
        return build(sample, *args)

    monkeypatch.setattr(BankSample, "bank", bank)
    collection = BankCollection(OwnBank(3, str(tmp_path) if in_folder else ""), MODEL)
    samples = weakref.WeakSet([collection._sample])
    for number in (1, 2, 3):
        collection.add([answer(number)], ROTATIONS)
    assert built == [3]
    gc.collect()
    assert not samples, "the queries are held twice"
    assert collection.progress == BankProgress(3, 3)


def test_answers_that_count_for_nothing_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Again after as many as the bank is to be of, without any between them that counted."""
    collection = BankCollection(OwnBank(3), MODEL)
    for number, tokens, warned in ((1, 0, 0), (2, 0, 0), (3, 2, 0), (4, 0, 0), (5, 0, 0), (6, 0, 1), (7, 0, 1)):
        collection.add([answer(number, tokens)], ROTATIONS)
        assert caplog.text.count("The last 3 answer(s) gave nothing to the query bank") == warned, number
    assert collection.progress == BankProgress(1, 3)


def test_the_log_says_what_is_going_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "plphp"):
        collection = BankCollection(OwnBank(2, str(tmp_path)), MODEL)
        collection.warn_unpruned()
        collection.warn_unpruned()
        collection.add([answer(1)], ROTATIONS)
        collection.add([], ROTATIONS)
        collection.add([answer(2)], ROTATIONS)
        BankCollection(OwnBank(2, str(tmp_path)), MODEL)
    lines = [record.getMessage() for record in caplog.records]
    assert "the next 2 answer(s)" in lines[0]
    assert lines[1:] == [
        "The query bank is of 1 of 2 prompts.",
        "The query bank is of 2 of 2 prompts.",
        f"The query bank is complete: 2 prompts, 4 queries; pruning from now on. It is kept in {tmp_path / NAME}.",
        f"Pruning by the query bank of 2 prompts in {tmp_path / NAME}.",
    ]
