# SPDX-License-Identifier: Apache-2.0
"""Target retention: quantiles within the prompt, thresholds calibrated on further prompts, and what they keep."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

import plphp
from invariants import pruned
from plphp import PLPHPConfig
from plphp.settings.presets import write_preset
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
    assert (config.retention_rate, config.retention_delta, config.gqa_reduction) == (0.4, 0.3, "max")
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


@pytest.mark.parametrize("family", ["llava-next", "qwen2-vl", "gemma3", "internvl"])
def test_measured_retention_is_that_of_the_reports(family: str) -> None:
    model = tiny_model(family)
    prompts = [TINY[family].inputs(model, [count, 1], seed=count) for count in (1, 2, 3)]
    config = plphp.calibrate(model, prompts, PLPHPConfig(target_retention=0.5, exempt_layers=(-1,)))
    measured = plphp.measure_retention(model, iter(prompts), config)
    assert "generate" not in model.__dict__
    whole, tokens, exempt = [], [], 0
    for inputs in prompts:
        _, report = pruned(model, inputs, config)
        for row in range(2):
            rows = [layer.rows[row] for layer in report.prompts[0].layers]
            entries = sum(layer.vision_tokens * len(layer.kept) for layer in rows)
            whole.append(sum(sum(layer.kept) for layer in rows) / entries)
            tokens.append(rows[0].vision_tokens)
            exempt += sum(layer.layer_class == "exempt" for layer in rows)
    assert measured.retentions_all_layers == pytest.approx(whole)
    assert measured.vision_tokens == tuple(tokens)
    assert sum(counts.get("exempt", 0) for counts in measured.classes.values()) == exempt
    assert all(sum(counts.values()) == 6 for counts in measured.classes.values())
    values = measured.summary()
    assert values["retention_mean"] == pytest.approx(sum(measured.retentions) / 6)
    assert values["retention_min"] <= values["retention_mean"] <= values["retention_max"]
    # the exempt layer is aside, and with these few tokens only rounding is between the rate and what is kept
    assert measured.mean == pytest.approx(0.5, abs=0.06)
    if exempt:
        assert values["retention_mean_all_layers"] > measured.mean


def test_one_prompt_has_no_spread_and_text_no_retention() -> None:
    model = tiny_model("llava")
    image, text = (TINY["llava"].inputs(model, [count]) for count in (1, 0))
    measured = plphp.measure_retention(model, [image, text], PLPHPConfig(method="uniform", retention_rate=0.25))
    assert (measured.retentions, measured.std) == ((0.25,), 0.0)
    assert measured.classes == {layer: {"uniform": 1} for layer in range(3)}
    with pytest.raises(plphp.ConfigError, match="vision token"):
        plphp.measure_retention(model, [text], PLPHPConfig())


def test_methods_without_classes_are_not_calibrated() -> None:
    with pytest.raises(plphp.ConfigError, match="'uniform' does not sort layers"):
        plphp.calibrate(tiny_model("llava"), [], PLPHPConfig(method="uniform", target_retention=0.4))


def test_whether_a_method_is_calibrated_depends_on_its_settings() -> None:
    model = tiny_model("llava")
    prompts = [TINY["llava"].inputs(model, [2], seed=seed) for seed in range(4)]
    by_class = PLPHPConfig.parse("recall_rank:layers=vision_attention,target_retention=0.4")
    calibrated = plphp.calibrate(model, prompts, by_class)
    measured = plphp.measure_retention(model, prompts, calibrated)
    assert measured.mean == pytest.approx(0.4, abs=0.06)
    classes = {name for counts in measured.classes.values() for name in counts}
    assert classes == {"attentive", "balanced", "indifferent"}
    with pytest.raises(plphp.ConfigError, match="'recall_rank' with layers=uniform does not sort layers"):
        plphp.calibrate(model, [], PLPHPConfig.parse("recall_rank:layers=uniform,target_retention=0.4"))


def test_thresholds_of_any_choice_of_query_rows() -> None:
    model = tiny_model("llava")
    prompts = [TINY["llava"].inputs(model, [2], seed=seed) for seed in range(4)]
    first, text = (
        plphp.calibrate(model, prompts, PLPHPConfig(target_retention=0.4, query_rows=rows)) for rows in (1, "text")
    )
    assert first.attentive_threshold != text.attentive_threshold
    scores = plphp.profile(model, prompts, ["text"]).layer_scores("text")
    assert (scores >= text.attentive_threshold).sum() == (scores < text.indifferent_threshold).sum() == 4


def test_a_preset_reads_back_and_knows_the_models_depth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llava")
    prompts = [TINY["llava"].inputs(model, [1], seed=seed) for seed in range(3)]
    config = plphp.calibrate(model, prompts, PLPHPConfig(target_retention=0.4, query_rows="text", exempt_layers=(0,)))
    assert config.calibrated_layers == 3
    record = {"model": 'a "name"\\\n', "none": None, "held out": {"retention_mean": 1e-7, "list": [1, 2]}}
    write_preset(tmp_path / "preset.toml", config, record)
    loaded = PLPHPConfig.from_toml(tmp_path / "preset.toml")
    assert loaded == config
    written = tomllib.loads((tmp_path / "preset.toml").read_text())
    assert written["calibration"] == {"model": 'a "name"\\\n', "held out": {"retention_mean": 1e-7, "list": [1, 2]}}
    pruned(model, prompts[0], loaded)
    assert caplog.records == []
    smaller = tiny_model("qwen3-vl")
    pruned(smaller, TINY["qwen3-vl"].inputs(smaller), loaded)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "with 3 decoder layers and are used on one with 4" in caplog.text


def test_a_preset_keeps_the_options_of_its_method(tmp_path: Path) -> None:
    config = PLPHPConfig.parse("snapkv:kernel=3,retention_rate=0.3")
    write_preset(tmp_path / "preset.toml", config, {})
    loaded = PLPHPConfig.from_toml(tmp_path / "preset.toml")
    assert loaded == config
    assert loaded.options == {"kernel": 3}
