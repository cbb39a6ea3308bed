# SPDX-License-Identifier: Apache-2.0
"""What may go wrong where tokens leave before layers get them: rows of several turns, users' methods, failures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import plphp
from invariants import assert_same_generation, generate
from left_masked import left_tokens_masked
from plphp import ConfigError, PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf.cache_argument import passed
from plphp.extend import Chosen, EncoderStage, Method, PrefillStage, register_method
from plphp.methods.registry import METHODS_BY_NAME
from precision import assert_exact
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

RANDOM = PLPHPConfig.parse("encoder_random:retention_rate=0.3")


def with_window(family: str, window: int) -> Any:
    """A model of its own, whose windows are so long."""
    tiny = TINY[family]
    config = tiny.config()
    config.get_text_config().sliding_window = window
    original = tiny.config
    object.__setattr__(tiny, "config", lambda: config)
    try:
        return tiny.build()
    finally:
        object.__setattr__(tiny, "config", original)


def mixed_turns(model: Any, family: str, cache: Any) -> list[Any]:
    """Two turns of a batch, in each of which another row has an image."""
    tiny = TINY[family]
    first = tiny.inputs(model, [0, 1])
    answers = [generate(model, first, **passed(cache))]
    later = tiny.inputs(model, [1, 0], seed=5)
    ids = torch.cat([answers[0].sequences, later["input_ids"]], 1)
    seen = torch.ones(2, answers[0].sequences.shape[1] - first["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([first["attention_mask"], seen, later["attention_mask"]], 1)
    second = {**later, "input_ids": ids, "attention_mask": mask}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in later:
            before = torch.zeros(2, ids.shape[1] - later[name].shape[1], dtype=torch.long)
            before[:, : first[name].shape[1]] = first[name]
            second[name] = torch.cat([before, later[name]], 1)
    answers.append(generate(model, second, **passed(cache)))
    return answers


@pytest.mark.parametrize("window", [44, 50, 56, 62])
def test_windows_keep_what_is_seen_where_rows_are_filled_up_between_turns(window: int) -> None:
    model = with_window("gemma3", window)
    cache = PrunedCache.for_inputs(model, TINY["gemma3"].inputs(model, [0, 1]), RANDOM)
    answers = mixed_turns(model, "gemma3", cache)
    report = cache.report()
    assert len(report.prompts) == 2
    del cache
    with left_tokens_masked(model, report):
        expected = mixed_turns(model, "gemma3", DynamicCache(config=model.config.get_text_config()))
    for answer, reference in zip(answers, expected, strict=True):
        assert_same_generation(reference, answer)


@pytest.mark.parametrize("family", ["qwen3.5", "lfm2-vl"])
def test_states_behind_rows_that_are_filled_up_are_refused(family: str) -> None:
    model = tiny_model(family)
    cache = PrunedCache.for_inputs(model, TINY[family].inputs(model, [0, 1]), RANDOM)
    with pytest.raises(UnsupportedFeatureError, match="answer the rows one by one"):
        mixed_turns(model, family, cache)


@pytest.mark.parametrize("family", sorted({"gemma3", "qwen3.5", "llama4"} & TINY.keys()))
def test_a_branch_over_shared_windows_or_states_is_refused(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2])
    with pytest.raises(UnsupportedFeatureError, match="'encoder_random' would leave other tokens in them"):
        plphp.branch(model, inputs, [RANDOM])


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register a method of a user, and return the config that asks for it."""
    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})

    def register(**stages: Any) -> PLPHPConfig:
        register_method(Method("mine", "an example", "an example", **stages))
        return PLPHPConfig(method="mine")

    return register


@pytest.mark.parametrize(
    "kept",
    [
        lambda scores, rates, config: scores.vision[0],
        lambda scores, rates, config: scores.vision[:1],
        lambda scores, rates, config: scores.vision.long(),
        lambda scores, rates, config: True,
        lambda scores, rates, config: None,
    ],
    ids=["row", "one row", "integers", "a truth value", "nothing"],
)
def test_a_mask_of_another_kind_is_refused(mine: Any, kept: Any) -> None:
    config = mine(prefill=PrefillStage(lambda config, layers: {1: 0.5}, kept))
    model = tiny_model("llava")
    with pytest.raises(ConfigError, match=r"'mine' has to give a mask, bool \[3, \d+\]"), plphp.prune(model, config):
        model.generate(**TINY["llava"].inputs(model, [2, 0, 1]), max_new_tokens=1)


@pytest.mark.parametrize("rate", [float("nan"), -0.5, 1.5, True, "half"])
@pytest.mark.parametrize("stage", ["encoder", "prefill"])
def test_a_rate_that_is_none_is_refused(mine: Any, stage: str, rate: Any) -> None:
    if stage == "encoder":
        config = mine(encoder=EncoderStage(lambda image, config: None, lambda config: rate))  # type: ignore[arg-type, return-value]
    else:
        config = mine(prefill=PrefillStage(lambda config, layers: {1: rate}, lambda scores, *_: scores.vision))
    model = tiny_model("llava")
    with pytest.raises(ConfigError, match=r"'mine' gave the retention rate .* a number from 0 to 1"):
        PrunedCache.for_inputs(model, TINY["llava"].inputs(model), config)


def test_a_layer_between_two_is_refused(mine: Any) -> None:
    config = mine(prefill=PrefillStage(lambda config, layers: {1.5: 0.5}, lambda scores, *_: scores.vision))  # type: ignore[dict-item]
    model = tiny_model("llava")
    with pytest.raises(ConfigError, match=r"from layer 1\.5 on"):
        PrunedCache.for_inputs(model, TINY["llava"].inputs(model), config)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda image, config: None, "has to give a Chosen for each image, got a NoneType"),
        (lambda image, config: Chosen(torch.ones(3, dtype=torch.bool)), r"a mask, bool \[16\], got torch.bool \[3\]"),
        (
            lambda image, config: Chosen(torch.ones(16, dtype=torch.bool), image.features[:2]),
            r"features \[16, \d+\] for the tokens that stay",
        ),
        (
            lambda image, config: Chosen(torch.ones(16, dtype=torch.bool), image.features * torch.nan),
            "gave features with NaN or inf",
        ),
    ],
    ids=["nothing", "a short mask", "few features", "nan"],
)
def test_a_choice_that_cannot_be_is_refused(mine: Any, choose: Any, message: str) -> None:
    config, model = mine(encoder=EncoderStage(choose)), tiny_model("llava")
    with pytest.raises(ConfigError, match=message), plphp.prune(model, config):
        model.generate(**TINY["llava"].inputs(model), max_new_tokens=1)


def test_a_failure_behind_the_last_attention_loses_nothing() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2])
    whole = PrunedCache.for_inputs(model, inputs, RANDOM)
    failed = PrunedCache.for_inputs(model, inputs, RANDOM)
    token = torch.tensor([[5]])

    def fail(*_: Any) -> None:
        raise RuntimeError("in the last layer")

    with torch.no_grad():
        model(**inputs, **passed(whole))
        handle = model.get_decoder().layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the last layer"):
            model(**inputs, **passed(failed))
        handle.remove()
        expected = model(input_ids=token, **passed(whole)).logits
        assert_exact(model(input_ids=token, **passed(failed)).logits, expected)
    assert failed.report().prompts[0].stages == whole.report().prompts[0].stages
    assert len(failed.report().prompts[0].stages) == 1


def test_a_tower_is_read_while_it_is_recorded_alone() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse("vtc_cls:start=0,retention_rate=0.5"))
    copied = copy.deepcopy(cache)  # of a cache that is planned and not read
    other = TINY["llava"].inputs(model, [2], seed=3)
    with torch.no_grad():
        with cache.tower_recorded():
            model(**other, use_cache=False)
        with pytest.raises(UnsupportedFeatureError, match=r"cache\.tower_recorded"):
            model(**inputs, **passed(cache))
        with copied.tower_recorded():
            logits = model(**inputs, **passed(copied)).logits
    output = generate(model, inputs)
    assert logits.shape[1] == inputs["input_ids"].shape[1]
    assert output is not None
