# SPDX-License-Identifier: Apache-2.0
"""The query bank that a server collects by itself, without vLLM: passes of a worker, made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plphp import PLPHPConfig
from plphp.engines.vllm import heard_answer
from plphp.engines.vllm.checkpoint import files_hash
from plphp.engines.vllm.heard_answer import HeardAnswer
from plphp.engines.vllm.own_bank import OwnBankCollector
from plphp.engines.vllm.setup import Setup
from plphp.engines.vllm.state import Pruning
from plphp.engines.vllm.step import Row, Step
from plphp.errors import ConfigError
from plphp.methods.registry import chain_of
from plphp.policy.bank import QueryBank
from plphp.policy.bank_folder import BankModel
from plphp.policy.rotation import Rotation
from plphp.pruning.own_bank import BankCollection
from plphp.pruning.report import BankProgress

Q_HEADS, KV_HEADS, DIM, LAYERS, BLOCK = 4, 2, 8, 3, 4
PROMPT, IMAGE = 30, (4, 20)
"""Tokens of a prompt; first position and length of its image."""
ROTATIONS = {
    0: Rotation(torch.tensor([1.0, 0.3, 0.1, 0.01])),
    1: Rotation(torch.zeros(1)),
    2: Rotation(torch.tensor([0.5, 0.05, 0.002]), interleaved=True),
}


def request(prompt: int = PROMPT, image: tuple[int, int] | None = IMAGE, delta: int | None = None) -> Any:
    features = []
    if image is not None:
        first, length = image
        place = SimpleNamespace(offset=first, extract_embeds_range=lambda: [(first, first + length - 1)])
        features.append(SimpleNamespace(modality="image", mm_position=place))
    return SimpleNamespace(num_prompt_tokens=prompt, mm_features=features, mrope_position_delta=delta)


def unrotated(name: str, tokens: int, layer: int) -> Tensor:
    """What the queries [tokens, q_heads, dim] of a request would be at position 0; of the prompt and the answer."""
    seed = sum(map(ord, name)) * LAYERS + layer
    return torch.randn(tokens, Q_HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def collector(collect: int = 2, folder: Path | None = None, rotations: dict[int, Rotation] | None = None) -> Any:
    wanted = chain(collect, folder).own_bank
    assert wanted is not None
    collection = BankCollection(wanted, BankModel("tiny", LAYERS, "a" * 64))
    return OwnBankCollector(collection, rotations or ROTATIONS, Q_HEADS, DIM)


def chain(collect: int = 2, folder: Path | None = None) -> Any:
    options = {"collect": collect, **({} if folder is None else {"folder": str(folder)})}
    config = PLPHPConfig(method="query_bank", retention_rate=0.3, heads="equal", options=options)
    return chain_of(config, LAYERS)


class Worker:
    """Runs passes over requests, as a model runner would; each has keys, values and queries of its own."""

    def __init__(self, collect: int = 2, folder: Path | None = None) -> None:
        self.own = collector(collect, folder)
        self.pruning = Pruning(Setup(chain(collect, folder), LAYERS, BLOCK), self.own)
        self.requests: dict[str, Any] = {}
        self.computed: dict[str, int] = {}

    def run(self, **tokens: int) -> None:
        """One pass with so many tokens of each request."""
        self.pruning.forget_all_but(self.requests)
        rows, start = [], 0
        for name, number in tokens.items():
            given, computed = self.requests[name], self.computed[name]
            rows.append(Row(name, self.pruning.reading(name, given, computed), start, number, computed))
            start += number
        step = Step(self.pruning, rows)
        for layer in range(LAYERS):
            parts = []
            for row in rows:
                delta = self.requests[row.request].mrope_position_delta or 0
                position = torch.arange(row.computed, row.computed + row.tokens) + delta
                queries = unrotated(row.request, row.computed + row.tokens, layer)[row.computed :]
                parts.append(ROTATIONS[layer].rotated(queries.transpose(0, 1), position).transpose(0, 1))
            query = torch.cat(parts)
            keys = torch.randn(start, KV_HEADS, DIM, generator=torch.Generator().manual_seed(layer))
            step._tables[layer] = torch.arange(64).reshape(1, -1).repeat(len(rows), 1).int()
            step.after_attention(layer, (query, keys, keys), torch.zeros(start, Q_HEADS * DIM), 1.0, lambda *_: None)
            query.fill_(torch.nan)  # vLLM reuses the memory of a pass
        for name, number in tokens.items():
            self.computed[name] += number
        self.pruning.forget_without_pass(())

    def begin(self, name: str, **given: Any) -> None:
        self.requests[name], self.computed[name] = request(**given), 0

    def answer(self, name: str, tokens: int, **given: Any) -> None:
        """A request alone, from its beginning to its end; its last token is never read."""
        self.begin(name, **given)
        self.run(**{name: self.requests[name].num_prompt_tokens})
        for _ in range(tokens - 1):
            self.run(**{name: 1})
        self.end(name)

    def end(self, *names: str) -> None:
        """Requests end, and vLLM says so once there is nothing else to do."""
        for name in names:
            del self.requests[name]
        self.pruning.forget_without_pass(names)

    def pruned(self, name: str) -> bool:
        """Whether a new request is pruned."""
        self.answer(name, 2)
        return name in self.pruning.take_pruned()


def expected(**answers: tuple[int, int]) -> dict[int, Tensor]:
    """By layer, queries [q_heads, tokens, dim] of the answers: each with its prompt's length and its tokens."""
    return {
        layer: torch.cat([unrotated(name, a + b, layer)[a : a + b] for name, (a, b) in answers.items()]).transpose(0, 1)
        for layer in range(LAYERS)
    }


def assert_holds(bank: QueryBank | None, queries: dict[int, Tensor]) -> None:
    assert bank is not None
    for layer, wanted in queries.items():
        torch.testing.assert_close(bank.of(layer).queries.float(), wanted.bfloat16().float(), atol=2e-2, rtol=2e-2)


def test_answers_of_several_requests_at_once(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    worker.begin("a", delta=-7)
    worker.begin("b", prompt=40)
    worker.begin("text", image=None)
    worker.run(a=12, text=5)
    worker.run(a=18, text=1, b=40)
    worker.run(b=1, a=1, text=1)
    worker.run(text=1, a=1, b=1)
    worker.run(a=1)
    worker.end("a", "text")
    assert worker.own.collection.progress == BankProgress(1, 2)
    worker.run(b=1)
    worker.end("b")
    bank = worker.own.collection.bank
    assert_holds(bank, expected(a=(30, 3), b=(40, 3)))
    assert bank is not None
    assert bank.ahead.tolist() == [0, 1, 2, 0, 1, 2]
    assert worker.pruning.take_pruned() == {}
    assert worker.own.take_whole() == 2
    assert worker.pruned("c")
    assert not caplog.text, "no prompt was kept whole by an error"


def test_what_does_not_count() -> None:
    worker = Worker(collect=1)
    worker.answer("text", 5, image=None)
    worker.answer("one-token", 1)
    assert worker.own.collection.progress.collected == 0
    worker.begin("aborted-in-its-prompt")
    worker.run(**{"aborted-in-its-prompt": 10})
    worker.end("aborted-in-its-prompt")
    assert worker.own.collection.progress.collected == 0
    worker.begin("aborted-in-its-answer")
    worker.run(**{"aborted-in-its-answer": 30})
    worker.run(**{"aborted-in-its-answer": 1})
    worker.end("aborted-in-its-answer")
    assert_holds(worker.own.collection.bank, expected(**{"aborted-in-its-answer": (30, 1)}))


def test_an_answer_that_is_read_again_is_heard_once() -> None:
    worker = Worker(collect=1)
    worker.begin("a")
    worker.run(a=30)
    for _ in range(3):
        worker.run(a=1)
    worker.computed["a"] = 0  # preempted
    worker.run(a=25)
    worker.run(a=9)  # the end of the prompt, what was written, and the token that was written last
    worker.run(a=1)
    worker.end("a")
    assert_holds(worker.own.collection.bank, expected(a=(30, 5)))


def test_a_prompt_is_decided_when_it_begins() -> None:
    worker = Worker(collect=1)
    worker.begin("heard")
    worker.begin("early")
    worker.run(heard=30, early=10)
    worker.run(heard=1)
    worker.end("heard")
    assert worker.own.collection.bank is not None
    worker.run(early=20)
    worker.computed["early"] = 0  # preempted, and read again with a bank
    worker.run(early=30)
    worker.end("early")
    assert worker.pruning.take_pruned() == {}
    worker.begin("late")
    worker.run(late=30)
    assert set(worker.pruning.take_pruned()) == {"late"}
    worker.computed["late"] = 0
    worker.run(late=30)
    assert set(worker.pruning.take_pruned()) == {"late"}
    assert worker.own.take_whole() == 2


def test_another_request_of_the_same_id_is_decided_anew() -> None:
    worker = Worker(collect=1)
    worker.begin("a")
    worker.run(a=30)
    worker.run(a=1)
    worker.begin("a")
    worker.run(a=30)
    assert worker.own.collection.bank is not None
    assert "a" in worker.pruning.take_pruned()


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heard_answer, "TOKENS", 3)
    worker = Worker(collect=2)
    for name in "abc":
        worker.begin(name)
    worker.run(a=30, b=30, c=30)
    for _ in range(2):
        worker.run(a=1, b=1, c=1)
    assert set(worker.own._answers) == {"a", "b"}
    for _ in range(3):
        worker.run(a=1, b=1, c=1)
    assert not worker.own._answers, "an answer counts once as much was heard as is held"
    assert worker.pruning.take_pruned() == {}
    worker.end("c", "a", "b")
    assert_holds(worker.own.collection.bank, expected(a=(30, 3), b=(30, 3)))
    assert not worker.own._decided


def test_after_a_restart_the_bank_is_there(tmp_path: Path) -> None:
    first = Worker(folder=tmp_path)
    first.answer("a", 4)
    second = Worker(folder=tmp_path)  # goes on with one answer
    assert second.own.take_progress() == BankProgress(1, 2)
    second.answer("b", 3)
    assert second.own.take_progress() == BankProgress(2, 2)
    third = Worker(folder=tmp_path)
    assert_holds(third.own.collection.bank, expected(a=(30, 3), b=(30, 2)))
    assert third.pruned("c")
    assert third.own.take_whole() == 0
    assert first.pruned("d"), "the first finds what the second has completed"


def test_a_bank_of_another_rotation_is_refused(tmp_path: Path) -> None:
    Worker(collect=1, folder=tmp_path).answer("a", 4)
    scaled = {**ROTATIONS, 2: Rotation(ROTATIONS[2].frequencies / 2, interleaved=True)}
    with pytest.raises(ConfigError, match="queries of layer 2 otherwise"):
        collector(1, tmp_path, scaled)
    with pytest.raises(ConfigError, match="queries of layer 2 otherwise"):
        collector(1, tmp_path, {**ROTATIONS, 2: Rotation(ROTATIONS[2].frequencies)})
    with pytest.raises(ConfigError, match="not of layer 3"):
        collector(1, tmp_path, {**ROTATIONS, 3: ROTATIONS[1]})
    collector(1, tmp_path)


def test_an_error_costs_an_answer_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no memory for this")

    worker = Worker(collect=1, folder=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(HeardAnswer, "hear", fail)
        worker.answer("a", 4)
        patched.undo()
        patched.setattr(BankCollection, "add", fail)
        worker.answer("b", 4)
        patched.undo()
        patched.setattr(BankCollection, "refresh", fail)
        worker.answer("c", 4)
    assert caplog.text.count("no memory for this") >= 3
    assert worker.own.collection.progress.collected == 0
    worker.answer("d", 4)
    assert_holds(worker.own.collection.bank, expected(d=(30, 3)))


def test_an_answer_with_a_gap_is_not_heard(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(collect=1)
    worker.begin("a")
    worker.run(a=30)
    worker.run(a=1)
    worker.computed["a"] += 1
    worker.run(a=1)
    worker.end("a")
    assert worker.own.collection.progress.collected == 0
    assert "31 to 31 of the request were missed" in caplog.text


def test_a_bank_that_cannot_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    worker = Worker(collect=1, folder=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(QueryBank, "save", fail)
        worker.answer("a", 4)
        assert not worker.pruned("b")
    assert caplog.text.count("disk full") == 2
    assert worker.pruned("c")
    assert_holds(Worker(collect=1, folder=tmp_path).own.collection.bank, expected(a=(30, 3)))


def test_without_such_a_bank_nothing_is_heard() -> None:
    config = PLPHPConfig(method="uniform", retention_rate=0.3)
    worker = Worker()
    worker.pruning = Pruning(Setup(chain_of(config, LAYERS), LAYERS, BLOCK))
    assert worker.pruned("a")


def test_the_hash_of_a_checkpoint(tmp_path: Path) -> None:
    def checkpoint(name: str, **contents: bytes) -> list[Path]:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        return [folder / file for file in contents]

    made = checkpoint("one", a=b"12", b=b"3")
    assert files_hash(made) == files_hash(reversed(made)) == files_hash(checkpoint("same", b=b"3", a=b"12"))
    others = [checkpoint("x", a=b"1", b=b"23"), checkpoint("y", a=b"12", c=b"3"), checkpoint("z", a=b"12")]
    assert len({files_hash(files) for files in [made, *others]}) == 4
    assert len(files_hash(made)) == 64


def test_the_setup_is_that_of_the_chain() -> None:
    """The chain asks for a bank of its own, and says how many prompts it is of."""
    wanted = chain(3).own_bank
    assert dataclasses.asdict(wanted) == {"prompts": 3, "folder": ""}
