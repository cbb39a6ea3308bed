# SPDX-License-Identifier: Apache-2.0
"""What generation_kwargs become, and where answers end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

import tiny_hub
from plphp.errors import ConfigError
from plphp.integrations.lmms_eval.generation import LONGEST, Generation, StopsIn, read_generation

GREEDY = {"do_sample": False, "num_beams": 1}


@pytest.mark.parametrize(
    ("kwargs", "options"),
    [
        ({}, {**GREEDY, "max_new_tokens": LONGEST}),
        ({"max_new_tokens": 16, "temperature": 0, "do_sample": False}, {**GREEDY, "max_new_tokens": 16}),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.9}, {**GREEDY, "max_new_tokens": LONGEST}),
        ({"temperature": 0.7, "do_sample": False}, {**GREEDY, "max_new_tokens": LONGEST}),
        (
            {"num_beams": 3, "image_aspect_ratio": "pad"},
            {"do_sample": False, "num_beams": 3, "max_new_tokens": LONGEST},
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": None},
            {"do_sample": True, "num_beams": 1, "max_new_tokens": LONGEST, "temperature": 0.7, "top_p": 0.9},
        ),
        ({"do_sample": True}, {"do_sample": True, "num_beams": 1, "max_new_tokens": LONGEST}),
    ],
)
def test_options(kwargs: dict[str, Any], options: dict[str, Any]) -> None:
    assert read_generation(kwargs) == Generation(options)


@pytest.mark.parametrize(
    ("until", "stops"),
    [(None, ()), (["\n\n"], ()), ("###", ("###",)), (["</s>", "\n", None, ""], ("</s>", "\n")), ([], ())],
)
def test_stops(until: Any, stops: tuple[str, ...]) -> None:
    """The delimiter between examples, which lmms-eval adds by itself, is none."""
    assert read_generation({"until": until}).stops == stops


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"max_tokens": 5}, "'max_tokens'. Did you mean 'max_new_tokens'?"), ({"until": [3]}, "until must be")],
)
def test_what_cannot_be_done_is_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_generation(kwargs)


def test_answers_are_cut_at_the_first_stop() -> None:
    generation = read_generation({"until": ["\n", "Question:"]})
    assert generation.cut(" 42 Question: what?\nno") == "42"
    assert generation.cut(" 42 ") == "42"
    assert read_generation({}).cut("a\n\nb ") == "a\n\nb"


def test_rows_end_by_their_answers_and_not_by_the_prompt() -> None:
    processor = tiny_hub.processor()
    ids = processor.tokenizer(["ask:\n", "ask:\n", "ask:\n"], return_tensors="pt", add_special_tokens=False).input_ids
    said = processor.tokenizer(["\nab", "abc", "ab\n"], return_tensors="pt", add_special_tokens=False).input_ids
    criterion = StopsIn(processor, ids.shape[1], ("\n\n", "b\n"))
    assert isinstance(criterion, StoppingCriteria)
    assert criterion(torch.cat([ids, said], 1), None).tolist() == [False, False, True]
    assert read_generation({}).criteria(processor, 3) == {}
