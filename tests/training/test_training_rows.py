# SPDX-License-Identifier: Apache-2.0
"""Rows: which number each token is to know early."""

from __future__ import annotations

import random

import numpy as np

from plphp.evaluation.tasks.synthetic.questions import Question
from training import model, rows, tokenizer


def _known(*turns: tuple[str, str]) -> dict[str, list[int]]:
    """Return the numbers of the tokens of answers by the token, over all turns, where there are any."""
    ids, labels = rows.block_ids([Question("any", text, answer) for text, answer in turns])
    found: dict[str, list[int]] = {}
    for token, label, number in zip(ids, labels, rows.known_numbers(ids, labels), strict=True):
        assert number == -100 or label >= 0
        if number >= 0:
            found.setdefault(tokenizer.bpe().decode([token], skip_special_tokens=False), []).append(number)
    return found


def test_the_word_behind_a_thing_knows_the_number_that_is_said_of_it() -> None:
    found = _known(("Which images?", "The star is red, in image two. The digit 4 is cyan, in image one."))
    assert found == {" is": [1, 0]}
    assert _known(("What is above?", "The red star is in row 3, column 1. Row 2, column 1 shows nothing.")) == {
        " is": [2]
    }
    assert _known(("Which value?", "J is red, on line three. The value is NC.")) == {" is": [2]}


def test_the_words_of_an_answer_know_the_image_that_was_mentioned_last() -> None:
    found = _known(("Compare image 1 and image 4.", "Image 1: a star. Image 4: a cross."))
    assert found[" star"] == [0]
    assert found[" cross"] == [3]
    asked = _known(("In image 2: Which value?", "J is red, on line three. The value is NC."))
    assert {number for numbers in asked.values() for number in numbers} == {1}


def test_a_mention_holds_for_one_turn() -> None:
    found = _known(("In image 2: What?", "A star."), ("Which image?", "The 4 is cyan, in image one."))
    assert found[" star"] == [1]
    assert found[" is"] == [0]
    assert " cyan" not in found


def test_patches_know_their_image_where_there_are_several() -> None:
    row = rows.make_row(random.Random(4), 3, 3)
    assert row.numbers[row.ids == rows.IMAGE].tolist() == np.arange(3).repeat(model.IMAGE_TOKENS).tolist()
    alone = rows.make_row(random.Random(4), 1, 3)
    assert (alone.numbers[alone.ids == rows.IMAGE] == -100).all()
