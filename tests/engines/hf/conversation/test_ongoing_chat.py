# SPDX-License-Identifier: Apache-2.0
"""A chat with one cache: turns that are taken back leave no trace, and chats that share a model do not mix."""

from __future__ import annotations

from typing import Any

import pytest
from test_whole_chat import model_of

import plphp
from plphp.engines.hf.ongoing_chat import OngoingChat
from plphp.inputs.later_turn import TurnInputs, joined, token_inputs
from test_invariants import FAMILIES
from tiny_models import TINY, collate, drop_empty

CONFIG = plphp.PLPHPConfig(retention_rate=0.3, retention_delta=0.2, attentive_threshold=0.3)
SOME = ("llava", "gemma3", "qwen2-vl", "glm4v", "qwen3.5", "lfm2-vl")
"""With full attention alone, with windows, with positions that the model remembers, and with states."""
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


class Chat:
    """A chat with a tiny model, whose turns are made without a processor."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.model, self.tiny = model_of(name), TINY[name]
        self.chat = OngoingChat(self.model, None)
        self.first = self.tiny.inputs(self.model, (1,), seed=seed)

    def turn(self, image: bool = False, seed: int = 1) -> TurnInputs:
        """The next turn: new text, with a new image or without."""
        if self.chat.cache is None:
            return TurnInputs(self.first, self.first)
        new = drop_empty(collate(self.tiny.new_parts(self.model, 1, image, seed)))
        return TurnInputs({**new, **joined(self.chat.said.tokens, token_inputs(new))}, new)

    def ask(self, image: bool = False, seed: int = 1) -> list[int]:
        """The answer to a turn, which is kept."""
        turn = self.turn(image, seed)
        tokens = self.chat.generate(turn, **OPTIONS)
        self.chat.keep(0, turn, tokens)
        self.chat.settle()
        return tokens

    def break_off(self, image: bool = False) -> None:
        """A turn of which nothing is to stay."""
        self.chat.generate(self.turn(image, seed=7), **OPTIONS)
        self.chat.take_back()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_that_is_taken_back_was_never_there(name: str) -> None:
    with plphp.prune(model_of(name), CONFIG):
        chat, other = Chat(name), Chat(name)
        assert chat.ask() == other.ask()
        tokens = chat.chat.said.held
        chat.break_off()
        if chat.chat.over:  # layers with a window or a state
            assert chat.chat.cache is None
            with pytest.raises(plphp.CacheStateError, match="This chat is over"):
                chat.chat.prepare([])
            return
        assert (chat.chat.said.held, chat.chat.cache.get_seq_length()) == (tokens, tokens)
        assert [chat.ask(), chat.ask(image=True), chat.ask()] == [other.ask(), other.ask(image=True), other.ask()]
        reports = chat.chat.report(), other.chat.report()
        assert reports[0].prompts == reports[1].prompts
        assert reports[0].entry_bytes == reports[1].entry_bytes


@pytest.mark.parametrize("name", SOME)
def test_an_image_cannot_be_unread(name: str) -> None:
    with plphp.prune(model_of(name), CONFIG):
        chat = Chat(name)
        chat.ask()
        chat.break_off(image=True)
        assert chat.chat.over
        assert chat.chat.nbytes == 0
        first = Chat(name)
        first.break_off()
        assert first.chat.over


@pytest.mark.parametrize("name", SOME)
def test_chats_share_a_model(name: str) -> None:
    with plphp.prune(model_of(name), CONFIG):
        alone = []
        for seed in (0, 3):
            chat = Chat(name, seed)
            alone.append([chat.ask(), chat.ask(), chat.ask(image=True, seed=seed), chat.ask()])
        chats = [Chat(name, seed) for seed in (0, 3)]
        turns: list[list[Any]] = [[], []]
        for options in ({}, {}, {"image": True}, {}):
            for number, seed in enumerate((0, 3)):
                more = {"seed": seed} if options else {}
                turns[number].append(chats[number].ask(**options, **more))
        assert turns == alone


def test_a_failed_prepare_takes_nothing_back() -> None:
    with plphp.prune(model_of("llava"), CONFIG):
        chat = Chat("llava")
        chat.ask()
        chat.ask()
        said = chat.chat.said
        with pytest.raises(AttributeError):
            chat.chat.prepare([{"role": "user", "content": "a"}])  # there is no processor
        chat.chat.take_back()
        assert chat.chat.said is said
        assert not chat.chat.over
