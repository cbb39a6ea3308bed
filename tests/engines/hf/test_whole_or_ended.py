# SPDX-License-Identifier: Apache-2.0
"""A cache is whole or ended, and nothing but a cache is taken for one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import plphp
from plphp import CacheStateError, ConfigError, PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.extend import Method, PrefillStage, register_method
from plphp.methods.registry import METHODS_BY_NAME
from tiny_models import TINY, tiny_model


@pytest.mark.parametrize("first", [0, -1, 4])
def test_a_prefill_stage_begins_inside_the_model(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})
    stage = PrefillStage(lambda config, layers: {first: 0.5}, lambda scores, *_: scores.vision)
    register_method(Method("outside", "an example", "an example", prefill=stage))
    model = tiny_model("llava")
    with pytest.raises(ConfigError, match=f"from layer {first} on, which must be between 1 and 3"):
        PrunedCache.for_inputs(model, TINY["llava"].inputs(model), PLPHPConfig(method="outside"))


def test_any_error_inside_a_prompt_ends_the_cache() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"))
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="uniform"))

    def fail(*_: Any) -> Any:
        raise RuntimeError("no method's own")

    kv = cache.chain.kv
    broken = dataclasses.replace(kv, stage=dataclasses.replace(kv.stage, score=fail))
    cache.chain = dataclasses.replace(cache.chain, kv=broken)
    cache.plan(inputs)
    with pytest.raises(RuntimeError, match="no method's own"), torch.no_grad():
        model(**inputs, **passed(cache))
    with pytest.raises(CacheStateError, match="an error stopped the reading of a prompt"):
        cache.plan(inputs)


def test_who_listens_to_a_cache_does_not_listen_to_its_copy() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"))
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="none"))
    heard: list[int] = []
    with cache.listening(lambda attended: heard.append(attended.layer)), torch.no_grad():
        model(**inputs, **passed(cache))
        assert heard == [0, 1, 2]
        model(input_ids=inputs["input_ids"][:, -1:], **passed(copy.deepcopy(cache)))
        assert heard == [0, 1, 2]


def test_an_argument_that_has_every_attribute_is_no_cache() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"))
    with plphp.prune(model, plphp.PLPHPConfig()) as run:
        output = model.generate(**inputs, streamer=MagicMock(), max_new_tokens=2)
    assert isinstance(output, torch.Tensor)
    assert run.report.prompts


def test_the_oracle_of_a_branch_has_no_method_before_it() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [1])
    config = PLPHPConfig.parse("fastv:layer=1,retention_rate=0.8+oracle")
    with pytest.raises(ConfigError, match="no method can act before it, got 'fastv'"):
        plphp.branch(model, inputs, [config], answer_ids=torch.tensor([5, 6]))
