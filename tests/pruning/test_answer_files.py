# SPDX-License-Identifier: Apache-2.0
"""The files of answers beside a bank that is not complete: what they hold, and what becomes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_bank_collection import MODEL, NAME, ROTATIONS, answer, entries, kept, numbers, wide
from torch import Tensor

from plphp import ConfigError, QueryBank
from plphp.policy import bank_folder
from plphp.policy.answer_files import AnswerFiles
from plphp.policy.bank_folder import MOST_ANSWERS
from plphp.policy.bank_sampling import SAMPLES, BankSample
from plphp.policy.entry_sampling import TOKENS
from plphp.policy.evidence import OwnBank
from plphp.pruning.own_bank import BankCollection
from plphp.pruning.report import BankProgress

STEM = NAME.removesuffix(".safetensors")


def collection(folder: Path | None, prompts: int = 3) -> BankCollection:
    return BankCollection(OwnBank(prompts, "" if folder is None else str(folder)), MODEL)


def files(folder: Path) -> list[str]:
    """The files of a folder but for the lock, without what all have in common."""
    return sorted(path.name.removeprefix(STEM) for path in folder.iterdir() if path.suffix != ".lock")


def content(file: Path) -> tuple[Any, ...]:
    """All that a file says, to the bit; safetensors writes what it says beside the tensors in any order."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        said = dict(opened.metadata())
    bits = {name: (part.dtype, part.shape, part.flatten().view(torch.uint8).tolist()) for name, part in tensors.items()}
    return bits, said


def drawn(number: int, tokens: int) -> dict[int, Tensor]:
    """An answer whose queries are of no dtype of a file."""
    return {2: torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(number))}


def test_the_bank_is_the_same_to_the_bit_whoever_wrote_it(tmp_path: Path) -> None:
    """By one process, by one for each answer, by several answers at once, and without a folder: from more tokens of
    answers and prompts than a bank keeps, and more answers than stand beside it."""
    prompts = MOST_ANSWERS + 5
    heard = [(drawn(number, 11 + 3 * number), entries(number, 300)) for number in range(prompts)]
    assert sum(queries[2].shape[1] for queries, _ in heard) > 2 * SAMPLES
    assert 300 * prompts > TOKENS
    one, each, batches = (collection(tmp_path / name, prompts) for name in ("one", "each", "batches"))
    for queries, of_prompt in heard:
        one.add([queries], ROTATIONS, [of_prompt])
        collection(tmp_path / "each", prompts).add([queries], ROTATIONS, [of_prompt])
    for begin in range(0, prompts, 4):
        batches.add(*_columns(heard[begin : begin + 4]))
    memory = collection(None, prompts)
    memory.add(*_columns(heard))
    assert memory.bank is not None
    _with_hash(memory.bank).save(tmp_path / "bank")
    expected = content(tmp_path / "bank")
    each.refresh()
    for own, folder in ((one, "one"), (each, "each"), (batches, "batches")):
        assert content(tmp_path / folder / NAME) == expected
        assert files(tmp_path / folder) == [".safetensors"]
        assert own.bank is not None
        own.bank.save(tmp_path / "again")
        assert content(tmp_path / "again") == expected


def _columns(heard: Any) -> tuple[Any, Any, Any]:
    return [queries for queries, _ in heard], ROTATIONS, [of_prompt for _, of_prompt in heard]


def _with_hash(bank: QueryBank) -> QueryBank:
    """A bank of no folder does not say of which weights it is."""
    record = {**MODEL.record(), **{name: bank.record[name] for name in bank.record if name not in MODEL.record()}}
    return QueryBank(bank.layers, bank.ahead, record, bank.books)


def test_what_the_folder_keeps_is_at_any_time_the_bank_so_far(tmp_path: Path) -> None:
    prompts, sample = MOST_ANSWERS + 4, BankSample()
    for number in range(prompts - 1):
        of_prompt = entries(number, 300)
        collection(tmp_path, prompts).add([drawn(number, 30)], ROTATIONS, [of_prompt])
        sample.add(drawn(number, 30), of_prompt)
        sample.bank(ROTATIONS, MODEL.record()).rounded().save(tmp_path / "expected")
        kept(tmp_path).save(tmp_path / "actual")
        assert content(tmp_path / "actual") == content(tmp_path / "expected")
        for name in ("expected", "actual"):
            (tmp_path / name).unlink()


def test_an_answer_writes_what_was_taken_of_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = Path.write_bytes

    def count(path: Path, content: Any) -> int:
        written.append(len(content))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", count)
    own = collection(tmp_path, MOST_ANSWERS + 9)
    for number in range(MOST_ANSWERS):
        own.add([drawn(number, 60)], ROTATIONS, [entries(number, 40)])
        assert files(tmp_path)[-1] == f".answer-{number + 1:04d}.safetensors"
    assert len(written) == MOST_ANSWERS
    assert max(written) < written[0] + 64, "an answer writes more than itself"  # digits of numbers
    assert written[-1] < 0.8 * written[0], "tokens that the sample did not take are written"
    own.add([drawn(99, 60)], ROTATIONS, [entries(99, 40)])
    assert files(tmp_path) == [".safetensors"], "the answers are in the bank now, and are there besides"
    own.add([drawn(100, 60)], ROTATIONS, [entries(100, 40)])
    assert files(tmp_path) == [f".answer-{MOST_ANSWERS + 2:04d}.safetensors", ".safetensors"]
    assert len(written) == MOST_ANSWERS + 2


@pytest.mark.parametrize("prompts", [2, 4])
@pytest.mark.parametrize("name", ["forget", "unlink"])
def test_answers_that_the_bank_holds_already_are_passed_over(
    prompts: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ended between the writing of the bank, complete or not, and the deleting of the answers; or they
    cannot be deleted."""
    monkeypatch.setattr(bank_folder, "MOST_ANSWERS", 1)
    own = collection(tmp_path, prompts)
    own.add([answer(1)], ROTATIONS)

    def fail(path: Any, *arguments: Any, **named: Any) -> None:
        if ".answer-" in str(path):
            raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        if name == "forget":
            patch.setattr(AnswerFiles, "forget", lambda *_: None)
        else:
            patch.setattr(Path, "unlink", fail)
        own.add([answer(2)], ROTATIONS)
        assert files(tmp_path) == [".answer-0001.safetensors", ".safetensors"]
        assert collection(tmp_path, prompts).progress == BankProgress(2, prompts)
    later = collection(tmp_path, prompts)
    assert later.progress == BankProgress(2, prompts)
    assert files(tmp_path) == [".safetensors"], "entries of a prompt stay that the complete bank does not hold"
    later.add([answer(3), answer(4)], ROTATIONS)
    assert numbers(later.bank) == [1, 1, 2, 2, *([3, 3, 4, 4] if prompts == 4 else [])]


def test_half_a_bank_of_a_single_file_goes_on(tmp_path: Path) -> None:
    """As earlier versions wrote it with every answer."""
    sample = BankSample()
    for number in (1, 2):
        sample.add(wide(number), entries(number))
    sample.bank(ROTATIONS, MODEL.record()).save(tmp_path / NAME)
    before = (tmp_path / NAME).read_bytes()
    own = collection(tmp_path, 4)
    assert own.progress == BankProgress(2, 4)
    own.add([wide(3)], ROTATIONS, [entries(3)])
    assert (tmp_path / NAME).read_bytes() == before
    assert files(tmp_path) == [".answer-0003.safetensors", ".safetensors"]
    assert numbers(kept(tmp_path)) == [1, 1, 2, 2, 3, 3]
    later = collection(tmp_path, 4)
    later.add([wide(4)], ROTATIONS, [entries(4)])
    whole = collection(None, 4)
    whole.add([wide(n) for n in (1, 2, 3, 4)], ROTATIONS, [entries(n) for n in (1, 2, 3, 4)])
    assert whole.bank is not None
    _with_hash(whole.bank).save(tmp_path / "expected")
    assert content(tmp_path / NAME) == content(tmp_path / "expected")


def test_a_larger_session_adds_queries_alone_to_a_bank_with_codebooks(tmp_path: Path) -> None:
    collection(tmp_path, 1).add([wide(1)], ROTATIONS, [entries(1)])
    collection(tmp_path, 3).add([wide(2)], ROTATIONS, [entries(2)])
    assert QueryBank.load(tmp_path / f"{STEM}.answer-0002.safetensors").sampled is None
    grown = kept(tmp_path)
    assert grown.sampled is None
    assert grown.books is not None


def test_entries_that_the_sample_left_out_are_not_kept(tmp_path: Path) -> None:
    """The answer counts all the same, and can be read again."""
    broken = entries(2)
    broken[2][0][0, 0, 0] = torch.inf
    collection(tmp_path, 4).add([wide(1), wide(2), wide(3)], ROTATIONS, [entries(1), broken, entries(3)])
    assert QueryBank.load(tmp_path / f"{STEM}.answer-0002.safetensors").sampled is None
    assert collection(tmp_path, 4).progress == BankProgress(3, 4)
    assert kept(tmp_path).record["book_prompts"] == 2


def other_weights(file: Path) -> None:
    bank = QueryBank.load(file)
    QueryBank(bank.layers, bank.ahead, {**bank.record, "weights_sha256": "f" * 64}).save(file)


def other_samples(file: Path) -> None:
    bank = QueryBank.load(file)
    QueryBank(bank.layers, bank.ahead + 1, bank.record).save(file)


def other_heads(file: Path) -> None:
    bank = QueryBank.load(file)
    layers = {2: type(bank.layers[2])(bank.layers[2].queries.repeat(2, 1, 1), ROTATIONS[2])}
    QueryBank(layers, bank.ahead, bank.record).save(file)


def no_answer(file: Path) -> None:
    bank = QueryBank.load(file)
    QueryBank(bank.layers, bank.ahead, MODEL.record()).save(file)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-3]), "0002.* is not a safetensors file"),
        (lambda file: file.write_bytes(b""), "0002.* is not a safetensors file"),
        (other_weights, "0002.* is a query bank of another model: its weights_sha256 is 'ffff"),
        (other_samples, r"holds the tokens \[1, 2\] of 2"),
        (other_heads, r"with queries of the shapes \{2: \(2, 2, 4\)\}"),
        (no_answer, "says that it is of the answer None"),
        (lambda file: file.unlink(), "0003.* holds answer 3, behind 4 tokens, expected answer 2, behind 2"),
        (lambda file: shutil.copy(file.with_name(f"{STEM}.answer-0001.safetensors"), file), "holds answer 1, behind 0"),
    ],
    ids=["torn", "empty", "weights", "samples", "heads", "record", "gone", "copied"],
)
def test_an_answer_that_does_not_belong_there_is_refused_and_stays(
    spoil: Any, match: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = collection(tmp_path, 5)
    own.add([answer(1), answer(2), answer(3)], ROTATIONS)
    spoil(tmp_path / f"{STEM}.answer-0002.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=match) as refusal:
        collection(tmp_path, 5)
    assert f" Move the files {tmp_path / STEM}.answer-* away to collect anew what they hold" in str(refusal.value)
    own.add([answer(4)], ROTATIONS)  # in a session that has begun an answer ends as ever
    assert "tries again" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for file in tmp_path.glob("*.answer-*"):
        file.unlink()
    assert collection(tmp_path, 5).add([answer(5)], ROTATIONS) == BankProgress(1, 5)


def test_a_broken_bank_is_moved_away_with_its_answers(tmp_path: Path) -> None:
    collection(tmp_path, 1).add([answer(1)], ROTATIONS)
    collection(tmp_path, 3).add([answer(2)], ROTATIONS)
    (tmp_path / NAME).write_bytes(b"")
    with pytest.raises(ConfigError) as refusal:
        collection(tmp_path)
    advice = f"Move the file {tmp_path / NAME} and the files {tmp_path / STEM}.answer-* away to collect a bank anew"
    assert advice in str(refusal.value)
    (tmp_path / NAME).unlink()
    with pytest.raises(ConfigError, match="holds answer 2, behind 2 tokens, expected answer 1, behind 0"):
        collection(tmp_path)


def test_what_changes_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers go into the bank after a reader has seen their names."""
    own = collection(tmp_path, 3)
    own.add([answer(1), answer(2)], ROTATIONS)
    load, completed = QueryBank.load, []

    def late(path: Path) -> QueryBank:
        if not completed:
            completed.append(path.name)
            own.add([answer(3)], ROTATIONS)
        return load(path)

    monkeypatch.setattr(QueryBank, "load", late)
    reader = collection(tmp_path, 3)
    assert completed == [f"{STEM}.answer-0001.safetensors"]
    assert numbers(reader.bank) == [1, 1, 2, 2, 3, 3]


def test_a_disk_that_is_full_for_one_of_several_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What could be saved stays, and the next answer brings the rest, in one bank."""
    own, left = collection(tmp_path, 5), [1]
    replace = Path.replace

    def once(path: Path, target: Path) -> Path:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", once)
        assert own.add([answer(1), answer(2)], ROTATIONS) == BankProgress(2, 5)
    assert "answer-0002.safetensors: No space left on device" in caplog.text
    assert numbers(kept(tmp_path)) == [1, 1]
    assert own.add([answer(3)], ROTATIONS) == BankProgress(3, 5)
    assert files(tmp_path) == [".safetensors"]
    own.add([answer(4)], ROTATIONS)
    assert numbers(kept(tmp_path)) == [1, 1, 2, 2, 3, 3, 4, 4]


def test_answers_are_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection(tmp_path, 3).add([answer(1), answer(2)], ROTATIONS)
    monkeypatch.setattr("plphp.policy.bank_folder.os.access", lambda *_: False)
    assert numbers(collection(tmp_path, 2).bank) == [1, 1, 2, 2]
