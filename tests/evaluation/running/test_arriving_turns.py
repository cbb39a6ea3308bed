# SPDX-License-Identifier: Apache-2.0
"""Variants read a conversation turn by turn, each on a cache of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.errors import ConfigError
from plphp.evaluation import EvalSettings, Sample, evaluate, make_variants
from plphp.evaluation.running.conversation import encode, end_tokens, prompt_inputs
from plphp.evaluation.running.forcing import generate_greedily
from plphp.evaluation.running.shares import HeldVision
from plphp.evaluation.running.task_choice import mode_of
from plphp.evaluation.running.turns import verify_turns
from plphp.evaluation.tasks.arriving import ARRIVING, ARRIVING_TASKS
from plphp.inputs.prompt import count_vision_tokens

METHODS = ("query_bank:bank=bundled@0.25+0.05", "bits=quantized:tiers=c3", "zero", "blank")


@pytest.fixture(scope="module")
def short() -> Sample:
    """A conversation of three images in two turns, and a question about two of them."""
    task = dataclasses.replace(ARRIVING_TASKS[2], images=(3,))
    return next(sample for sample in task.samples("dev", 20) if sample.arrivals == (2, 1, 0))


def generated(model: Any, processor: Any, sample: Sample, config: Any) -> str:
    """The answer to the last question of ``generate`` on a cache that has read the reference answers before it."""
    ends = end_tokens(model, processor)
    answers = encode(processor, sample, ends).answers
    prompts = [prompt_inputs(processor, sample, turn + 1) for turn in range(len(sample.turns))]
    cache = PrunedCache.for_inputs(model, prompts[0], config)
    with torch.inference_mode():
        for prompt, answer in zip(prompts[:-1], answers, strict=False):
            model(**cache.model_inputs(cache.plan(prompt)), **passed(cache))
            model(input_ids=torch.tensor([answer.tokens[:-1]]), **passed(cache))
        output = generate_greedily(model, {**prompts[-1], **passed(cache)}, 20)
    return processor.decode(output[0, prompts[-1]["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_equals_generate_on_a_cache_that_goes_on(bundled: Any, short: Sample) -> None:
    model, processor = bundled
    variants = make_variants(METHODS[:-1], [])
    outcomes = verify_turns(model, processor, short, variants)
    for variant in variants:
        answer = generated(model, processor, short, variant.config)
        assert outcomes[variant.name].score == float(answer == short.turns[-1].answer), variant.name
    assert {outcomes["full"].score, outcomes["zero"].score} == {1.0, 0.0}


def test_shares_are_of_the_whole_conversation(bundled: Any, short: Sample) -> None:
    outcomes = verify_turns(*bundled, short, make_variants(METHODS, []))
    assert outcomes["full"].held == pytest.approx((2 / 3, 1, 1), abs=1e-6)
    assert outcomes["full"].kl == 0
    for rate in (0.25, 0.05):
        own = outcomes[f"query_bank:bank=bundled@{rate}"]
        assert own.held == pytest.approx([rate * share for share in (2 / 3, 1, 1)], rel=0.03)
        assert own.kept == own.read == max(own.held)
        assert own.vision_kept == pytest.approx(rate, rel=0.03)
    bits = outcomes["bits"]
    assert (bits.vision_kept, bits.held[-1] < 0.11) == (1, True)  # 3 bits of 32, with their scales
    assert (outcomes["zero"].kept, outcomes["zero"].vision_kept) == (0, 0)
    assert (outcomes["blank"].kept, outcomes["blank"].score) == (1, 0)


def test_a_share_of_the_budget_is_never_passed(bundled: Any, short: Sample) -> None:
    line = "query_bank:bank=bundled,retention_rate=1,vision_budget=share,fading={0}"
    rules = [f"{rule}={line.format(rule)}@0.5" for rule in ("ranked", "oldest")]
    outcomes = verify_turns(*bundled, short, make_variants(rules, []))
    assert 0.48 < outcomes["ranked@0.5"].kept <= 0.5
    assert outcomes["oldest@0.5"].held == pytest.approx([1 / 3] * 3, abs=1e-6)  # whole images leave, and one has room
    assert outcomes["ranked@0.5"].vision_kept > outcomes["oldest@0.5"].vision_kept  # in few bits, and dropped


def test_a_share_of_a_budget_is_for_conversations_alone(tmp_path: Path) -> None:
    line = "query_bank:bank=bundled,vision_budget=share"
    settings = EvalSettings(methods=(line,), retention=(0.5,), tasks=("two_images", "cell"), samples=1)
    [reason] = evaluate(settings, tmp_path)["refused"].values()
    assert "arriving_images alone" in reason


def test_held_bytes_are_those_of_the_report(bundled: Any, short: Sample) -> None:
    model, processor = bundled
    prompt = prompt_inputs(processor, short)
    [_, variant] = make_variants(["bits=quantized:tiers=c3"], [])
    cache = PrunedCache.for_inputs(model, prompt, variant.config)
    with torch.inference_mode():
        model(**cache.model_inputs(cache.plan(prompt)), **passed(cache))
    vision = count_vision_tokens(model.config, prompt)
    held, report = HeldVision.of(cache, vision), cache.report()
    assert held.full == report.kv_bytes_full * vision / report.tokens
    assert held.nbytes == report.kv_bytes - (report.kv_bytes_full - held.full)


def test_a_run_records_ages_and_gives_figures_by_age(tmp_path: Path) -> None:
    settings = EvalSettings(methods=("zero",), retention=(), tasks=("newest_image", "old_image"), samples=1)
    metrics = evaluate(settings, tmp_path)
    assert list(metrics["groups"]) == [ARRIVING]
    assert {task["mode"] for task in metrics["tasks"].values()} == {"turns"}
    for name, newest in (("newest_image", True), ("old_image", False)):
        [line] = (tmp_path / "predictions" / f"{name}.jsonl").read_text().splitlines()
        record = json.loads(line)
        assert (record["ages"] == [0]) is newest
        assert len(record["outcomes"]["zero"]["held"]) > 2


@pytest.mark.parametrize("mode", ["decode", "generate", "label-free"])
def test_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="arrive over the turns: it is scored in the modes auto and verify alone"):
        mode_of(ARRIVING_TASKS[0], mode)


def test_what_cannot_read_turn_by_turn_is_left_out_by_name(tmp_path: Path) -> None:
    settings = EvalSettings(methods=("oracle", "downsample"), retention=(0.5,), tasks=("two_images",), samples=1)
    refused = evaluate(settings, tmp_path)["refused"]
    assert set(refused) == {"oracle@0.5", "downsample@0.5"}
    assert "not made smaller" in refused["downsample@0.5"]
