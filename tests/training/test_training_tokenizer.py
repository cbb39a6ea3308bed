# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and chat template: nothing is unknown, and packed rows equal the template."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plphp.evaluation.running.conversation import prompt_inputs
from plphp.evaluation.tasks.built_in import available_tasks
from plphp.evaluation.tasks.synthetic import questions, scenes
from training import rows, tokenizer

TOKENIZER = tokenizer.build_tokenizer()
PLAIN = st.text().filter(lambda text: not any(special in text for special in tokenizer.SPECIAL))


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_every_printable_character_is_a_token() -> None:
    for character in string.printable:
        assert len(TOKENIZER.encode(character)) == 1


def test_codes_are_spelled_and_words_are_single_tokens() -> None:
    assert TOKENIZER.tokenize("K7QX") == list("K7QX")
    assert TOKENIZER.tokenize("12") == ["1", "2"]
    for phrase in (phrase for group in questions.PHRASINGS.values() for phrase in group):
        words = [word for word in phrase.replace("{", " ").split() if word.isalpha()]
        for word in words:
            assert len(TOKENIZER.encode(word)) == 1, word


def test_the_default_system_text_is_that_of_the_template() -> None:
    assert f"'{questions.DEFAULT_SYSTEM}'" in tokenizer.chat_template()


@pytest.mark.parametrize("n_images", [1, 2, 4])
@pytest.mark.parametrize("system", [questions.DEFAULT_SYSTEM, "", questions.SYSTEMS[1]])
def test_packed_rows_equal_the_chat_template(n_images: int, system: str) -> None:
    rng = random.Random(21)
    drawn = scenes.make_scenes(rng, "test", n_images, kinds=("grid",))
    turns = [questions.ask(rng, drawn, kind) for kind in ("cell", "list_row")]
    images = [{"type": "image", "image": scene.draw()} for scene in drawn]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for i, turn in enumerate(turns):
        content = [*([] if i else images), {"type": "text", "text": turn.text}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    if system == questions.DEFAULT_SYSTEM:
        messages = messages[1:]
    processor = tokenizer.build_processor()
    encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    encoded = list(encoded[0]) if isinstance(encoded[0], list) else list(encoded)
    ids, labels = rows.block_ids(turns)
    packed = rows.prefix_ids(n_images, system) + ids
    assert encoded[: len(packed)] == packed
    assert tokenizer.bpe().decode(encoded[len(packed) :], skip_special_tokens=False) == "<|end|>\n"
    answers = tokenizer.bpe().decode([i for i in labels if i >= 0], skip_special_tokens=False)
    assert answers == "".join(turn.answer + "<|end|>" for turn in turns)


def test_vision_tokens_are_most_of_a_prompt_and_not_all() -> None:
    processor = tokenizer.build_processor()
    shares: dict[int, list[float]] = {}
    for task in available_tasks().values():
        for sample in task.samples("dev", 4):
            ids = prompt_inputs(processor, sample)["input_ids"]
            shares.setdefault(len(sample.images), []).append((ids == rows.IMAGE).float().mean().item())
    means = {images: sum(found) / len(found) for images, found in shares.items()}
    assert sorted(means) == [1, 2, 3, 4]
    assert all(0.60 <= mean <= 0.86 for mean in means.values())
