# SPDX-License-Identifier: Apache-2.0
"""Later turns behind the tokens that were generated, whatever the chat template and the tokenizer make of an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import tiny_hub
from plphp.errors import SpanError, UnsupportedFeatureError
from plphp.inputs.later_turn import first_turn, joined, later_turn, token_inputs, with_answer
from tiny_models import IMAGE

GENERATED = [20, 21, 22]
"""Tokens of an answer; no text of a chat becomes these."""
TEMPLATES = {
    "plain": tiny_hub.CHAT_TEMPLATE,
    "trims": tiny_hub.CHAT_TEMPLATE.replace("part['text']", "part['text'] | trim"),
    "ends": tiny_hub.CHAT_TEMPLATE.replace("{% endfor %}\n", "{% endfor %}{{ '<eos>' }}", 1),
    "thinks": tiny_hub.CHAT_TEMPLATE.replace("assistant: {% endif %}", "assistant: think. {% endif %}"),
}


def user(text: str, images: int = 0, source: bool = True) -> dict[str, Any]:
    image = {"image": Image.new("RGB", (32, 32))} if source else {}
    return {"role": "user", "content": [{"type": "image", **image}] * images + [{"type": "text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("answer", ["Yes", " Yes\n", "", "user: "])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_stands_as_it_was_generated(name: str, answer: str) -> None:
    processor = tiny_hub.processor(TEMPLATES[name])
    first = first_turn(processor, [user("What?", 1)])
    before = with_answer(token_inputs(first.whole), GENERATED)
    chat = [user("What?", 1, source=False), said(answer), user("And?", 2)]
    turn = later_turn(processor, chat, 1, before)
    ids = turn.whole["input_ids"][0].tolist()
    length = before["input_ids"].shape[1]
    assert ids[:length] == first.whole["input_ids"][0].tolist() + GENERATED
    behind = {"plain": "", "trims": "", "ends": "<eos>", "thinks": ""}[name]
    asked = "think. " if name == "thinks" else ""
    text = processor.tokenizer.decode([token for token in ids[length:] if token != IMAGE])
    assert text == f"{behind}user: And?{behind}assistant: {asked}"
    assert turn.new["input_ids"][0].tolist() == ids[length:]
    assert ids[length:].count(IMAGE) == 2 * tiny_hub.IMAGE_TOKENS
    assert turn.whole["pixel_values"].shape[0] == 2
    assert turn.whole["attention_mask"].tolist() == [[1] * turn.tokens]


def test_what_no_token_holds_is_written_behind_them() -> None:
    processor = tiny_hub.processor()
    before = with_answer(token_inputs(first_turn(processor, [user("What?", 1)]).whole), GENERATED)
    turn = later_turn(processor, [user("What?", 1, source=False), said("x"), user("And?")], 1, before, leftover="Yes.")
    assert processor.tokenizer.decode(turn.new["input_ids"][0]).startswith("Yes.user: And?")
    assert "pixel_values" not in turn.whole


@pytest.mark.parametrize("times", [0, 2])
def test_templates_that_do_not_write_an_answer_once(times: int) -> None:
    kept = "".join(["{{ part['text'] }}"] * times)
    template = tiny_hub.CHAT_TEMPLATE.replace(
        "{{ part['text'] }}", "{% if message['role'] == 'user' %}{{ part['text'] }}{% else %}" + kept + "{% endif %}"
    )
    processor = tiny_hub.processor(template)
    before = token_inputs(first_turn(processor, [user("What?", 1)]).whole)
    with pytest.raises(UnsupportedFeatureError, match=f"writes an answer of the history {times} times"):
        later_turn(processor, [user("What?", 1), said("x"), user("And?")], 1, before)


def test_new_images_have_slots() -> None:
    processor = tiny_hub.processor()
    before = token_inputs(first_turn(processor, [user("What?", 1)]).whole)
    with pytest.raises(SpanError, match="1 image slot"):
        later_turn(processor, [user("What?", 1), said("x"), user("<image> And?")], 1, before)
    with pytest.raises(SpanError, match="more image entries without a path"):
        later_turn(processor, [user("What?", 1), said("x"), user("And?", 1, source=False)], 1, before)


def test_types_of_tokens_are_those_of_text_where_there_are_none() -> None:
    def tokens(count: int, **more: int) -> dict[str, Any]:
        return {"input_ids": torch.full((1, count), 7), **{name: torch.full((1, count), v) for name, v in more.items()}}

    whole = joined(tokens(2, token_type_ids=1, attention_mask=1), tokens(3, mm_token_type_ids=2))
    assert whole["token_type_ids"].tolist() == [[1, 1, 0, 0, 0]]
    assert whole["mm_token_type_ids"].tolist() == [[0, 0, 2, 2, 2]]
    assert whole["attention_mask"].tolist() == [[1] * 5]
    grids = {"input_ids": torch.zeros(1, 3), "image_grid_thw": torch.zeros(1, 3), "pixel_values": torch.zeros(1, 3)}
    assert token_inputs(grids).keys() == {"input_ids"}


class FakeProcessor:
    """A tokenizer of characters that begins every text with a token of its own, or joins an "a" with what follows."""

    chat_template = "one"
    image_token = "<image>"

    def __init__(self, joins: bool) -> None:
        self.tokenizer, self._joins = self, joins
        self.bos_token = None

    def ids(self, text: str) -> list[int]:
        if self._joins and text.startswith("a") and len(text) > 1:
            return [1000 + ord(text[1]), *map(ord, text[2:])]
        return [*([] if self._joins else [999]), *map(ord, text)]

    def __call__(self, text: Any, return_tensors: str | None = None, **options: Any) -> dict[str, Any]:
        assert options == {"add_special_tokens": False}
        if return_tensors is None:
            return {"input_ids": self.ids(text)}
        return {"input_ids": torch.tensor([self.ids(text[0])])}

    def apply_chat_template(self, chat: Any, add_generation_prompt: bool) -> str:
        return "".join(f"{part['text']};" for message in chat for part in message["content"])


@pytest.mark.parametrize("joins", [False, True])
def test_tokenizers_that_begin_a_text_otherwise(joins: bool) -> None:
    before = {"input_ids": torch.tensor([[1, 2]])}
    turn = later_turn(FakeProcessor(joins), [user("What?"), said("x"), user("And?")], 1, before)
    assert turn.whole["input_ids"].tolist() == [[1, 2, *map(ord, ";And?;")]]
