# SPDX-License-Identifier: Apache-2.0
"""One pass over the reference tells what ``generate`` would have said."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from plphp import ConfigError
from plphp.evaluation import (
    Sample,
    Turn,
    available_tasks,
    decode_sample,
    generate_samples,
    label_free,
    make_variants,
    verify,
)
from plphp.evaluation.running.conversation import encode, end_tokens, prompt_inputs
from plphp.evaluation.running.forcing import Group, decode, greedy_answer, groups_of
from plphp.evaluation.running.shares import Shares

VARIANTS = make_variants(["plphp", "random:seed=3", "snapkv", "zero", "blank", "downsample"], [0.3, 0.05])


def drawn(task: str, count: int, start: int = 0) -> list[Sample]:
    return list(itertools.islice(available_tasks()[task].samples("dev", start + count), start, None))


def own_history(model: Any, processor: Any, sample: Sample) -> Sample:
    """The same sample with the answers that the model gives with a full cache, so that both outcomes come up."""
    for number in range(len(sample.turns)):
        tokens = greedy_answer(model, prompt_inputs(processor, sample, number + 1), 24)
        text = processor.decode(tokens, skip_special_tokens=True)
        assert text == text.strip() != ""  # else no reference text has these tokens
        turns = list(sample.turns)
        turns[number] = dataclasses.replace(turns[number], answer=text)
        sample = dataclasses.replace(sample, turns=tuple(turns))
    return sample


def dialogue() -> Sample:
    questions = ("What is in row 1, column 2?", "What is in row 2, column 1?", "What is in row 1, column 1?")
    turns = tuple(Turn(question, "?", scored=number > 0) for number, question in enumerate(questions))
    return dataclasses.replace(drawn("cell", 1)[0], turns=turns)


@pytest.mark.parametrize("numbers", [{"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"rows": 0}, {"rows": True}])
def test_numbers_of_answers_and_rows_are_integers(bundled: Any, numbers: dict[str, Any]) -> None:
    for answered in (label_free, functools.partial(decode_sample, metric="exact_match")):
        with pytest.raises(ConfigError, match=f"{next(iter(numbers))} must be an integer of at least 1"):
            answered(*bundled, drawn("cell", 1)[0], VARIANTS[:1], **{"max_new_tokens": 1, **numbers})


@pytest.mark.parametrize("kind", ["one", "several", "dialogue"])
def test_equals_generate(bundled: Any, kind: str) -> None:
    model, processor = bundled
    seen = set()
    for drawn_sample in {"one": drawn("cell", 2), "several": drawn("read_in", 1), "dialogue": [dialogue()]}[kind]:
        sample = own_history(model, processor, drawn_sample)
        verified = verify(model, processor, sample, VARIANTS)
        [generated] = generate_samples(model, processor, [sample], VARIANTS, "exact_match", max_new_tokens=30)
        decoded = decode_sample(model, processor, sample, VARIANTS, "exact_match", max_new_tokens=30)
        assert set(verified) == set(generated) == set(decoded)
        for name, outcome in verified.items():
            assert outcome.score == generated[name].score == decoded[name].score, name
            assert outcome.kept == pytest.approx(generated[name].kept, abs=1e-6), name
            assert outcome.vision_kept == pytest.approx(generated[name].vision_kept, abs=1e-6), name
            assert decoded[name].kept == pytest.approx(generated[name].kept, abs=1e-6), name
            assert decoded[name].text == generated[name].text, name
            if outcome.score == 0 and len(outcome.text) > 4 and len(sample.turns) == 1:
                # all but the last, which may be a piece of a word
                assert generated[name].text.startswith(outcome.text.rsplit(maxsplit=1)[0]), name
            seen.add(outcome.score)
    assert seen == {0.0, 1.0}


def test_a_batch_says_what_its_samples_say_alone(bundled: Any) -> None:
    model, processor = bundled
    samples, variants = drawn("cell", 2) + drawn("read_in", 1), make_variants(["plphp", "blank"], [0.3])
    together = generate_samples(model, processor, samples, variants, "exact_match", max_new_tokens=12)
    for sample, outcome in zip(samples, together, strict=True):
        [alone] = generate_samples(model, processor, [sample], variants, "exact_match", max_new_tokens=12)
        assert {name: (answer.score, answer.text) for name, answer in alone.items()} == {
            name: (answer.score, answer.text) for name, answer in outcome.items()
        }


def test_evicted_text_counts_like_evicted_vision_entries(bundled: Any) -> None:
    model, processor = bundled
    variants = make_variants(["snapkv", "snapkv_vision"], [0.3])
    outcomes = verify(model, processor, drawn("cell", 1)[0], variants)
    assert outcomes["snapkv@0.3"].kept == pytest.approx(outcomes["snapkv_vision@0.3"].kept)
    assert outcomes["snapkv@0.3"].kept == pytest.approx(0.3, abs=0.01)
    assert outcomes["snapkv_vision@0.3"].vision_kept == pytest.approx(outcomes["snapkv_vision@0.3"].kept)
    assert outcomes["snapkv@0.3"].vision_kept > 0.35  # in the place of text


def test_bytes_of_few_bits_are_the_same_however_answers_are_made(bundled: Any) -> None:
    model, processor = bundled
    lines = ["quantized", "recall=quantized:tiers=c3,read=0.2", "t10=query_bank:bank=bundled,tiers=t10"]
    variants = make_variants(lines, [])
    sample = drawn("cell", 1)[0]
    verified = verify(model, processor, sample, variants)
    [generated] = generate_samples(model, processor, [sample], variants, "exact_match", max_new_tokens=4)
    for name, outcome in verified.items():
        assert generated[name].kept == pytest.approx(outcome.kept, abs=1e-6), name
        assert generated[name].vision_kept == pytest.approx(outcome.vision_kept, abs=1e-6), name
        assert generated[name].read == (None if name == "recall" else pytest.approx(outcome.read, abs=1e-6)), name
    assert 0.09 < verified["quantized"].kept == verified["quantized"].read < 0.12
    assert verified["recall"].read < 0.5 * verified["recall"].kept
    assert 0.045 < verified["t10"].kept < 0.053  # of float32, which is twice the bytes of bfloat16
    assert verified["t10"].vision_kept == pytest.approx(0.76, abs=0.01)


def recalled(model: Any, group: Group, ends: list[int], longest: int) -> dict[str, tuple[list[int], Shares]]:
    nothing = torch.empty(0, dtype=torch.int64)
    return decode(model, group, nothing, nothing, ends, longest)


def test_what_a_row_reads_after_its_answer_counts_for_nothing(bundled: Any) -> None:
    """It is decoded as long as another answer goes on."""
    model, processor = bundled
    recall = 'recall=random:tiers="r4=.4,r1=.4",read=0.2'  # of two tiers, so that steps differ in what they read
    variants = make_variants(["full", "zero", recall, "blank"], [])
    [group, *_] = groups_of(model, processor, drawn("read_in", 1)[0], variants, 8)
    answers = recalled(model, group, [], 12)
    said = {name: tokens for name, (tokens, _) in answers.items()}
    steps = next(n for n, token in enumerate(said["recall"]) if n and token not in said["recall"][:n] + said["zero"])
    ended = recalled(model, group, [said["recall"][steps]], 12)
    assert len(ended["recall"][0]) == steps < len(ended["zero"][0])
    alone = recalled(model, dataclasses.replace(group, variants=group.variants[2:3]), [], steps + 1)
    assert ended["recall"][1].read == pytest.approx(alone["recall"][1].read, rel=1e-9)
    assert ended["recall"][1].read != pytest.approx(answers["recall"][1].read, rel=1e-9)


def test_what_no_step_reads_is_not_measured(bundled: Any) -> None:
    model, processor = bundled
    variants = make_variants(["recall=quantized:tiers=c3,read=0.2", "plphp:retention_rate=0.3"], [])
    [group] = groups_of(model, processor, drawn("cell", 1)[0], variants, 8)
    shares = {name: own for name, (_, own) in recalled(model, group, [], 1).items()}
    assert shares["recall"].read is None
    assert all(own.read == own.kept for name, own in shares.items() if name != "recall")


def test_right_tokens_end_at_the_first_error(bundled: Any) -> None:
    model, processor = bundled
    sample = own_history(model, processor, drawn("cell", 1)[0])
    right = verify(model, processor, sample, VARIANTS[:1])["full"]
    assert right.score == 1
    assert right.right_tokens == right.tokens
    assert right.text is None
    words = sample.turns[0].answer.split()
    wrong = dataclasses.replace(sample, turns=(Turn(sample.turns[0].question, " ".join([*words[:3], "star."])),))
    outcome = verify(model, processor, wrong, VARIANTS[:1])["full"]
    assert outcome.score == 0
    assert 0 < outcome.right_tokens < outcome.tokens
    assert sample.turns[0].answer.startswith(outcome.text)


def test_without_labels_the_full_cache_agrees_with_itself(bundled: Any) -> None:
    model, processor = bundled
    variants = make_variants(["none", "zero", "plphp"], [0.5])
    for sample in (*drawn("cell", 1), dialogue()):
        outcomes = label_free(model, processor, sample, variants, max_new_tokens=12)
        for name in ("full", "none"):
            assert outcomes[name].agreement == 1.0
            assert outcomes[name].kl == pytest.approx(0, abs=1e-9)
            assert outcomes[name].kept == 1.0
        assert outcomes["zero"].kept == pytest.approx(0, abs=1e-12)
        assert outcomes["zero"].kl > outcomes["plphp@0.5"].kl > 0
        assert outcomes["zero"].score is None


def test_divergence_by_hand(bundled: Any) -> None:
    """KL against distributions of ordinary forwards over prompt and answer."""
    model, processor = bundled
    sample = drawn("list_row", 1)[0]
    outcome = label_free(model, processor, sample, make_variants(["blank"], []), max_new_tokens=12)["blank"]
    grey = dataclasses.replace(sample, images=tuple(image.point(lambda _: 128) for image in sample.images))
    answer = greedy_answer(model, prompt_inputs(processor, sample), 12)
    logs = []
    for shown in (sample, grey):
        inputs = prompt_inputs(processor, shown)
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0].double()
        start = inputs["input_ids"].shape[1]
        # the first token comes out of the prompt itself
        logs.append(logits[start : start + len(answer) - 1].log_softmax(-1))
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()
    assert outcome.kl == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3  # far above float noise


def test_any_end_token_ends_an_answer(bundled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference ends with another token than the one that the model says."""
    model, processor = bundled
    sample = own_history(model, processor, drawn("cell", 1)[0])
    conversation = encode(processor, sample, end_tokens(model, processor))
    ending_differently = dataclasses.replace(
        conversation.answers[0], tokens=(*conversation.answers[0].tokens[:-1], 700)
    )
    for ends, score in (((700, *conversation.ends), 1), ((700,), 0)):
        changed = dataclasses.replace(conversation, answers=(ending_differently,), ends=ends)
        monkeypatch.setattr("plphp.evaluation.running.scoring.encode", lambda *_, changed=changed: changed)
        assert verify(model, processor, sample, VARIANTS[:1])["full"].score == score


def test_all_scored_turns_have_to_be_right(bundled: Any) -> None:
    model, processor = bundled
    sample = own_history(model, processor, dialogue())
    for wrong in (1, 2):
        turns = list(sample.turns)
        turns[wrong] = dataclasses.replace(turns[wrong], answer="Row 4, column 4 shows a thing.")
        changed = dataclasses.replace(sample, turns=tuple(turns))
        assert verify(model, processor, changed, VARIANTS[:1])["full"].score == 0
        [generated] = generate_samples(model, processor, [changed], VARIANTS[:1], "exact_match")
        assert generated["full"].score == 0
        decoded = decode_sample(model, processor, changed, VARIANTS[:1], "edit_similarity")["full"]
        assert 0.5 < decoded.score < 1
