# SPDX-License-Identifier: Apache-2.0
"""Tokens of a conversation: those of the chat template, cut where answers begin and end."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import tiny_qwen
import torch
from PIL import Image

import tiny_hub
from plphp.engines.hf.session import prune
from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.evaluation import Sample, Turn, make_variants
from plphp.evaluation.running.controls import blank, smaller_inputs
from plphp.evaluation.running.conversation import _tokenized, batch_inputs, encode, end_tokens, prompt_inputs
from plphp.evaluation.running.forcing import force, groups_of
from plphp.inputs.prompt import count_vision_tokens
from tiny_models import EOS, TINY

PICTURES = tuple(Image.effect_noise(size, 90).convert("RGB") for size in ((60, 40), (48, 64)))
TURNS = (Turn("What is red?", "The digit is 7.", scored=False), Turn("And blue?", "Nothing is."), Turn("Why?", "So."))
SAMPLE = Sample("a", "task", PICTURES, TURNS)
WITH_END = tiny_hub.CHAT_TEMPLATE.replace(
    "{% endfor %}\n{% endfor %}", "{% endfor %}{% if message['role'] == 'assistant' %}<eos>{% endif %}\n{% endfor %}"
)


def test_the_bundled_model(bundled: Any) -> None:
    model, processor = bundled
    ends = end_tokens(model, processor)
    conversation = encode(processor, SAMPLE, ends)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is red?"}]}
    ]
    messages += [
        {"role": "assistant", "content": "The digit is 7."},
        {"role": "user", "content": "And blue?"},
        {"role": "assistant", "content": "Nothing is."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    text = processor.apply_chat_template(messages)
    [image] = processor.tokenizer("<image>", add_special_tokens=False)["input_ids"]
    whole = processor.tokenizer(text)["input_ids"]
    prompt = [token for token in conversation.inputs["input_ids"][0].tolist() if token != image]
    # the template ends a turn with the end token and a line break, which are not fed
    assert [*prompt, *conversation.draft.tolist()] == [token for token in whole if token != image][:-2]
    assert [answer.scored for answer in conversation.answers] == [False, True, True]
    for answer, turn in zip(conversation.answers, TURNS, strict=True):
        assert processor.decode(list(answer.tokens[:-1])) == turn.answer
        assert answer.tokens[-1] == ends[0]
        fed = conversation.draft[answer.start : answer.start + len(answer.tokens)].tolist()
        assert fed == list(answer.tokens)[: len(fed)]
        assert len(fed) == len(answer.tokens) - (turn is TURNS[-1])


@pytest.mark.parametrize("template", [tiny_hub.CHAT_TEMPLATE, WITH_END], ids=["no end token", "end token"])
def test_qwen(template: str) -> None:
    """The end token is asked for where the template has none, too, but only fed where it has one."""
    processor = tiny_qwen.processor()
    object.__setattr__(processor, "chat_template", template)
    conversation = encode(processor, SAMPLE, (EOS,))
    decoded = processor.tokenizer.decode(conversation.draft)
    end = "<eos>" if template == WITH_END else ""
    expected = f"The digit is 7.{end}user: And blue?assistant: Nothing is.{end}user: Why?assistant: So."
    assert decoded == expected
    assert [answer.tokens[-1] for answer in conversation.answers] == [EOS] * 3
    assert conversation.answers[1].start == len("The digit is 7.user: And blue?assistant: ") + bool(end)


def test_only_what_leads_to_a_scored_token_is_fed(bundled: Any) -> None:
    _, processor = bundled
    turns = (TURNS[1], dataclasses.replace(TURNS[0], scored=False))
    conversation = encode(processor, dataclasses.replace(SAMPLE, turns=turns), (1,))
    assert processor.decode(conversation.draft.tolist()) == "Nothing is."


def test_tokens_that_span_answer_and_template_are_cut() -> None:
    """As a model generates them: the answer's own tokens, whatever follows."""

    def merging(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [sum(map(ord, part)) for part in re.findall(r"\.\n|.", text, re.DOTALL)]}

    pieces = ["Why", "So.", "\nAnd", "No."]
    assert _tokenized(merging, pieces) == [[ord(letter) for letter in piece] for piece in pieces]
    assert merging("So.\nAnd", add_special_tokens=False)["input_ids"][2] == ord(".") + ord("\n")


def test_a_system_message_takes_the_place_of_the_default(bundled: Any) -> None:
    _, processor = bundled
    text = processor.decode(prompt_inputs(processor, dataclasses.replace(SAMPLE, system="Be brief."))["input_ids"][0])
    assert "Be brief." in text
    assert "careful" not in text


def test_what_cannot_be_encoded_is_named(bundled: Any) -> None:
    _, processor = bundled
    with pytest.raises(ConfigError, match="'a' has no answer"):
        encode(processor, dataclasses.replace(SAMPLE, turns=(Turn("Why?", " "),)), (1,))
    with pytest.raises(ConfigError, match="no turn that is scored"):
        encode(processor, dataclasses.replace(SAMPLE, turns=TURNS[:1]), (1,))
    qwen = tiny_qwen.processor()
    object.__setattr__(qwen, "chat_template", tiny_hub.CHAT_TEMPLATE.replace("'] }}{% endif", "'] | upper }}{% endif"))
    object.__setattr__(
        qwen, "chat_template", qwen.chat_template.replace("assistant: {% endif", "assistant: <think>{% endif")
    )
    with pytest.raises(UnsupportedFeatureError, match="writes other text"):
        encode(qwen, SAMPLE, (EOS,))
    object.__setattr__(qwen, "chat_template", None)
    with pytest.raises(UnsupportedFeatureError, match="no chat template"):
        encode(qwen, SAMPLE, (EOS,))


def test_a_model_without_end_is_refused(bundled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = bundled
    monkeypatch.setattr(model.generation_config, "eos_token_id", [4, 5])
    assert end_tokens(model, processor) == (4, 5)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert end_tokens(model, processor) == (processor.tokenizer.eos_token_id,)
    monkeypatch.setattr(processor.tokenizer, "_special_tokens_map", {})
    with pytest.raises(ConfigError, match="names no end token"):
        end_tokens(model, processor)


def test_a_batch_is_padded_on_the_left(bundled: Any) -> None:
    _, processor = bundled
    short = dataclasses.replace(SAMPLE, images=PICTURES[:1])
    inputs = batch_inputs(processor, [SAMPLE, short])
    alone = prompt_inputs(processor, short)["input_ids"]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert torch.equal(inputs["input_ids"][1, -alone.shape[1] :], alone[0])
    assert inputs["attention_mask"][1].sum() == alone.shape[1]


def test_forcing_places_a_dialogue_of_qwen_as_generate_does() -> None:
    """m-RoPE: what follows the prompt stands where the images say, in many rows and many tokens at once."""
    model, processor = TINY["qwen2-vl"].build(), tiny_qwen.processor()
    model.generation_config.suppress_tokens = None
    variants = make_variants(["plphp", "uniform", "zero", "downsample"], [0.4])
    inputs = prompt_inputs(processor, SAMPLE)
    groups = groups_of(model, processor, SAMPLE, variants, rows=2)
    assert [len(group.variants) for group in groups] == [2, 2, 1]
    for group in groups:
        for variant in group.variants:
            with prune(model, variant.config) as run:
                output = model.generate(**group.inputs, max_new_tokens=8, do_sample=False)
            said = output[0, group.inputs["input_ids"].shape[1] :]
            forced = force(model, groups, said, range(8))[variant.name]
            assert forced.tokens == tuple(said.tolist()), variant.name
            if variant.images == "as they are":
                assert forced.shares.kept == pytest.approx(run.report.retention)
    share = count_vision_tokens(model.config, groups[-1].inputs) / count_vision_tokens(model.config, inputs)
    assert forced.shares.kept == share < 0.6


def test_smaller_images(bundled: Any) -> None:
    model, processor = bundled
    before = dict(processor.image_processor.size)
    full = count_vision_tokens(model.config, prompt_inputs(processor, SAMPLE))
    for rate in (0.5, 0.1):
        inputs = smaller_inputs(model, processor, SAMPLE, rate)
        assert count_vision_tokens(model.config, inputs) / full == pytest.approx(rate, abs=0.06)
    assert dict(processor.image_processor.size) == before
    assert count_vision_tokens(model.config, smaller_inputs(model, processor, SAMPLE, 1.0)) == full


def test_a_model_that_takes_one_size_is_refused(bundled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = bundled
    monkeypatch.setattr(model.config.vision_config, "image_size", [80, 80])
    with pytest.raises(UnsupportedFeatureError, match="downsample does not work with this 'llava' model"):
        smaller_inputs(model, processor, SAMPLE, 0.5)


def test_blank_images_have_one_colour_and_their_sizes() -> None:
    for image, grey in zip(PICTURES, blank(SAMPLE).images, strict=True):
        assert image.size == grey.size
        assert len(grey.getcolors()) == 1
