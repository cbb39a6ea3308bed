# SPDX-License-Identifier: Apache-2.0
"""Target retention: quantiles within the prompt, and thresholds calibrated on other prompts."""

from __future__ import annotations

import dataclasses

import pytest

import plphp
from invariants import pruned
from plphp import PLPHPConfig
from tiny_models import TINY, tiny_model


def test_quantiles_within_the_prompt_meet_the_target() -> None:
    model = tiny_model("qwen2-vl")
    inputs = TINY["qwen2-vl"].inputs(model, [3, 1], seed=3)
    _, report = pruned(model, inputs, PLPHPConfig(target_retention=0.5))
    (prompt,) = report.prompts
    for row in range(2):
        classes = [layer.rows[row].layer_class for layer in prompt.layers]
        rates = [layer.rows[row].rate for layer in prompt.layers]
        assert classes.count("attentive") == classes.count("indifferent") == 1
        assert sum(rates) / len(rates) == pytest.approx(0.5)
        by_score = sorted(prompt.layers, key=lambda layer: layer.rows[row].vision_score)
        assert by_score[0].rows[row].layer_class == "indifferent"
        assert by_score[-1].rows[row].layer_class == "attentive"


def test_calibrated_thresholds_meet_the_target_on_their_prompts() -> None:
    model = tiny_model("llava")
    prompts = [TINY["llava"].inputs(model, [2], seed=seed) for seed in range(6)]
    config = plphp.calibrate(model, prompts, PLPHPConfig(target_retention=0.4, gqa_reduction="max"))
    assert config.target_retention is None
    assert (config.retention_rate, config.gqa_reduction) == (0.4, "max")
    rates, classes = [], set()
    for inputs in prompts:
        _, report = pruned(model, inputs, config)
        rows = [row for layer in report.prompts[0].layers for row in layer.rows]
        rates += [row.rate for row in rows]
        classes |= {row.layer_class for row in rows}
    assert sum(rates) / len(rates) == pytest.approx(0.4)
    assert classes == {"attentive", "balanced", "indifferent"}


def test_calibrate_needs_a_target_and_images() -> None:
    model = tiny_model("llava")
    with pytest.raises(plphp.ConfigError, match="target_retention"):
        plphp.calibrate(model, [], PLPHPConfig())
    text = TINY["llava"].inputs(model, [0])
    with pytest.raises(plphp.ConfigError, match="vision token"):
        plphp.calibrate(model, [text], dataclasses.replace(PLPHPConfig(), target_retention=0.4))
