# SPDX-License-Identifier: Apache-2.0
"""Settings: what is refused and how, and that every way to write a config reads back the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import plphp
from plphp import ConfigError, PLPHPConfig, PLPHPError
from plphp.methods.registry import resolve
from plphp.settings.checks import KEPT_BY
from plphp.settings.ladder import Ladder
from tiny_models import TINY, tiny_model

fractions = st.floats(0, 1)


budgets = st.just({}) | st.fixed_dictionaries(
    {
        "vision_budget": st.integers(1, 2**50) | st.sampled_from(["200MB", "1.5 GiB", "2048 tokens"]),
        "fading": st.sampled_from(["ranked", "oldest", "newest", "equal"]),
        "tier_device": st.none() | st.just("cpu"),
    }
)
"""Settings of a budget, or none: only the last method of a chain has one."""


@st.composite
def configs(draw: st.DrawFn, longest: int = 2) -> PLPHPConfig:
    """Any valid config, with up to ``longest`` methods before its own."""
    tiers = draw(st.none() | st.sampled_from(["t10", "t7.5", "kivi4", "c3", "pr2=.2,pq", "pr2=.20, rvq=.24,pq=.32"]))
    target = draw(st.none() | st.floats(0, 1, exclude_min=True)) if tiers is None else None
    rate = draw(fractions) if tiers is None and target is None else 0.4
    base = rate if target is None else target
    base = base if tiers is None else Ladder.parse(tiers).kept
    read = draw(st.floats(0, 1, exclude_min=True)) if tiers else 1.0
    thresholds = sorted([draw(fractions), draw(fractions)]) if tiers is None else [0.1, 0.25]
    return PLPHPConfig(
        method=draw(st.sampled_from(["plphp", "random", "my-method"])),
        retention_rate=rate,
        retention_delta=draw(st.none() | st.floats(0, min(base, 1 - base))),
        indifferent_threshold=thresholds[0],
        attentive_threshold=thresholds[1],
        target_retention=target,
        class_quantile=draw(st.floats(0.001, 0.5)),
        exempt_layers=tuple(draw(st.lists(st.integers(-50, 50), max_size=4))),
        query_rows=draw(st.none() | st.just("text") | st.integers(1, 1000)),
        gqa_reduction=draw(st.sampled_from(["mean", "max"])),
        image_quota=draw(st.sampled_from(["pooled", "per_image"])),
        score_pool=2 * draw(st.integers(0, 50)) + 1,
        min_kept=draw(st.integers(0, 1000)),
        tiers=tiers,
        read=read,
        rest=draw(st.booleans()) if read < 1 else True,
        books=draw(st.none() | st.sampled_from(["bundled", "a+b.safetensors", "a,b@c", "12", "none"]))
        if tiers
        else None,
        **(draw(budgets) if longest else {}),
        seed=draw(st.integers(0, 2**40)),
        earlier=tuple(draw(st.lists(configs(0), max_size=longest))) if longest else (),
    )


def one_line(config: PLPHPConfig) -> str:
    """A config as the text that ``PLPHPConfig.parse`` reads."""
    values = config.to_dict()
    del values["earlier"]
    method = values.pop("method")
    if config.tiers is not None:  # on a line even the default of a rate contradicts a ladder
        values = {name: value for name, value in values.items() if name not in KEPT_BY}
    elif config.target_retention is not None:
        del values["retention_rate"]
    values["exempt_layers"] = "+".join(map(str, values["exempt_layers"]))
    values.update(values.pop("options"))
    values.update({name: f'"{value}"' for name in ("tiers", "books") if (value := values[name]) is not None})
    own = f"{method}:" + ",".join(f"{key}={value}" for key, value in values.items())
    return "+".join([*map(one_line, config.earlier), own])


def spread(line: str) -> str:
    """A line with spaces around what separates its settings, outside quotes."""
    parts = line.split('"')
    parts[::2] = [part.replace(",", " , ").replace("=", " = ") for part in parts[::2]]
    return "  " + '"'.join(parts) + " "


def toml(config: PLPHPConfig) -> str:
    """A config as TOML; TOML has no null, so what is None is left out."""
    values = {key: value for key, value in config.to_dict().items() if value is not None and key != "earlier"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join([*lines, *(f"[[earlier]]\n{toml(part)}" for part in config.earlier)])


@given(configs())
def test_every_way_to_write_a_config_reads_back_the_same(config: PLPHPConfig) -> None:
    assert PLPHPConfig.from_dict(config.to_dict()) == config
    assert PLPHPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PLPHPConfig.parse(one_line(config)) == config
    assert PLPHPConfig.parse(spread(one_line(config))) == config


@given(configs())
def test_the_rates_of_every_class_are_retention_rates(config: PLPHPConfig) -> None:
    assert 0 <= config.delta <= 1
    assert -1e-9 <= config.base_rate - config.delta <= config.base_rate + config.delta <= 1 + 1e-9


@pytest.mark.parametrize("table", ["", "[plphp]\n"], ids=["top level", "table"])
@pytest.mark.parametrize("few_bits", [False, True])
def test_toml_file_reads_back_the_same(tmp_path: Path, table: str, few_bits: bool) -> None:
    tiers = {"tiers": "pr2=.2,pq", "read": 0.2, "rest": False, "books": "my bank.safetensors"}
    kept: dict[str, Any] = tiers if few_bits else {"target_retention": 0.5}
    config = PLPHPConfig(**kept, exempt_layers=(0, -1), query_rows="text", gqa_reduction="max")
    path = tmp_path / "config.toml"
    other = "[other]\nkey = 1\n" if table else ""
    path.write_text(f"{other}{table}{toml(config)}\n", encoding="utf-8")
    assert PLPHPConfig.from_toml(path) == config == PLPHPConfig.from_toml(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("retention_rate = ", "not a valid TOML file"),
        (b"\xff\xfe", "not a valid TOML file"),
        ("plphp = 3", r"\[plphp\] in .* must be a table of settings, got 3"),
        ("retention_rte = 0.5", "Did you mean 'retention_rate'"),
        ("[plphp]\nretention_rate = 2.0", "retention_rate must be between 0 and 1, got 2.0"),
        ("[plphp]\nretention_rate = nan", "retention_rate must be between 0 and 1, got nan"),
    ],
)
def test_toml_file_that_is_no_config(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        PLPHPConfig.from_toml(path)


def test_toml_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the config file .*gone\.toml: No such file"):
        PLPHPConfig.from_toml(tmp_path / "gone.toml")


FRACTIONS = (
    "retention_rate",
    "retention_delta",
    "attentive_threshold",
    "indifferent_threshold",
    "target_retention",
    "class_quantile",
)


@pytest.mark.parametrize("value", [-0.001, 1.001, float("nan"), float("inf"), -float("inf"), 40])
@pytest.mark.parametrize("name", FRACTIONS)
def test_fraction_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be between 0 and 1, got {value}"):
        PLPHPConfig(**{name: value})


@pytest.mark.parametrize("value", [True, False, "0.4", [0.4], 1j], ids=repr)
@pytest.mark.parametrize("name", FRACTIONS)
def test_fraction_that_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        PLPHPConfig(**{name: value})
    assert f"{name} must be a number between 0 and 1, got {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"method": ""}, ["method must be the name of a method", "''"]),
        ({"method": None}, ["method must be the name of a method", "None"]),
        ({"class_quantile": 0.0}, ["class_quantile must be in (0, 0.5]", "0.0"]),
        ({"class_quantile": 0.51}, ["class_quantile must be in (0, 0.5]", "0.51"]),
        (
            {"indifferent_threshold": 0.4, "attentive_threshold": 0.3},
            ["indifferent_threshold (0.4) must not be above attentive_threshold (0.3)", "swap"],
        ),
        ({"retention_rate": 0.2, "retention_delta": 0.3}, ["retention_rate", "0.2 -/+ 0.3", "at most 0.2"]),
        ({"retention_rate": 0.9, "retention_delta": 0.3}, ["retention_rate", "0.9 -/+ 0.3", "at most 0.1"]),
        (
            {"target_retention": 0.1, "retention_delta": 0.3},
            ["target_retention", "0.1 -/+ 0.3", "at most 0.1"],
        ),
        ({"exempt_layers": 0}, ["exempt_layers must be a list of layer numbers", "0"]),
        ({"exempt_layers": ["0"]}, ["exempt_layers must be a list of layer numbers", "['0']"]),
        ({"exempt_layers": [True]}, ["exempt_layers must be a list of layer numbers", "[True]"]),
        ({"query_rows": 0}, ["query_rows must be an integer of at least 1 or 'text'", "0"]),
        ({"query_rows": True}, ["query_rows must be", "True"]),
        ({"query_rows": 1.0}, ["query_rows must be", "1.0"]),
        ({"query_rows": "all"}, ["query_rows must be", "'all'"]),
        ({"gqa_reduction": "sum"}, ["gqa_reduction must be one of 'mean', 'max'", "'sum'"]),
        ({"image_quota": None}, ["image_quota must be one of 'pooled', 'per_image'", "None"]),
        ({"min_kept": -1}, ["min_kept must be an integer of at least 0", "-1"]),
        ({"min_kept": False}, ["min_kept must be", "False"]),
        ({"tiers": 10}, ["tiers must be a ladder as text, such as 't10'", "got 10"]),
        ({"tiers": 0.1}, ["tiers must be a ladder as text", "got 0.1"]),
        ({"tiers": ["pq"]}, ["tiers must be a ladder as text", "got ['pq']"]),
        ({"tiers": ""}, ["A ladder needs a rung", "t7.5"]),
        ({"tiers": "pr2=.9,pq=.2"}, ["at most 1 together, got 1.1"]),
        ({"tiers": "t10", "read": 0}, ["read must be a number above 0 and at most 1", "got 0"]),
        ({"tiers": "t10", "read": 1.5}, ["read must be a number above 0 and at most 1", "got 1.5"]),
        ({"tiers": "t10", "read": float("nan")}, ["read must be a number above 0", "got nan"]),
        ({"tiers": "t10", "read": True}, ["read must be a number above 0", "got True"]),
        ({"tiers": "t10", "read": "0.2"}, ["read must be a number above 0", "got '0.2'"]),
        ({"tiers": "t10", "rest": 0}, ["rest must be true or false, got 0"]),
        ({"tiers": "t10", "rest": "no"}, ["rest must be true or false, got 'no'"]),
        ({"tiers": "t10", "books": ""}, ["books must name the file of a query bank, or be 'bundled', got ''"]),
        ({"tiers": "t10", "books": 3}, ["books must name the file", "got 3"]),
        ({"read": 0.5}, ["read=0.5 is for entries in few bits", "tiers=t10", "leave it out"]),
        ({"rest": False}, ["rest=False is for entries in few bits", "tiers=t10"]),
        ({"books": "bundled"}, ["books=bundled is for entries in few bits", "tiers=t10"]),
        ({"tiers": "whole=.5", "read": 0.5}, ["read=0.5 is for entries in few bits, and tiers=whole=.5 has none"]),
        (
            {"tiers": "t10", "target_retention": 0.4},
            ["tiers=t10 says how much is kept, and so does target_retention=0.4", "leave target_retention out"],
        ),
        (
            {"tiers": "t10", "retention_rate": 0.3},
            ["tiers=t10 says how much is kept, and so does retention_rate=0.3", "another ladder"],
        ),
        (
            {"tiers": "c3", "attentive_threshold": 0.3},
            ["tiers=c3 says how much is kept, and so does attentive_threshold=0.3", "leave attentive_threshold out"],
        ),
        ({"tiers": "c3", "indifferent_threshold": 0.05}, ["and so does indifferent_threshold=0.05"]),
        ({"tiers": "t10", "retention_delta": 0.3}, ["the rate of tiers", "0.76 -/+ 0.3", "at most 0.24"]),
        ({"seed": -1}, ["seed must be an integer of at least 0", "-1"]),
        ({"seed": 0.5}, ["seed must be", "0.5"]),
    ],
    ids=str,
)
def test_error_names_the_setting_the_value_and_what_was_expected(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        PLPHPConfig(**values)
    assert all(part in str(error.value) for part in parts)
    assert isinstance(error.value, (PLPHPError, ValueError))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "method must be the name"),
        (":retention_rate=0.5", "method must be the name"),
        ("plphp:retention_rate", "Expected key=value after 'plphp':, got 'retention_rate'"),
        ("plphp:retention_rate=0.5,retention_rate=0.6", "'retention_rate' is given twice"),
        ("plphp:method=random", "'method' is given twice"),
        ("plphp:retention_rate=half", "retention_rate must be a number between 0 and 1, got 'half'"),
        ("plphp:retention_rate=nan", "retention_rate must be between 0 and 1, got nan"),
        ("plphp:retention_rate=true", "retention_rate must be a number between 0 and 1, got 'true'"),
        ("plphp:retention_rate=none", "retention_rate must be a number between 0 and 1, got None"),
        ("plphp:tiers=c3,retention_rate=0.4", "tiers=c3 says how much is kept, and so does retention_rate=0.4"),
        ("plphp:attentive_threshold=0.25,tiers=c3", "tiers=c3 says how much is kept, and so does attentive_threshold"),
        ("plphp:exempt_layers=0+1.5", "exempt_layers must be a list of layer numbers"),
    ],
)
def test_line_that_is_no_config(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PLPHPConfig.parse(text)


def test_unknown_key_of_a_mapping() -> None:
    with pytest.raises(ConfigError, match="Unknown setting 'alpha'"):
        PLPHPConfig.from_dict({"alpha": 0.2})
    with pytest.raises(ConfigError, match="Unknown setting 3"):
        PLPHPConfig.from_dict({3: 0.2})  # type: ignore[dict-item]


@pytest.mark.parametrize(("rate", "delta"), [(0.4, 0.3), (0.5, 0.3), (1.0, 0.0), (0.01, 0.01), (0.9, 0.1), (0.2, 0.2)])
def test_default_delta_leaves_room_for_all_classes(rate: float, delta: float) -> None:
    assert PLPHPConfig(retention_rate=rate).delta == pytest.approx(delta)
    assert PLPHPConfig(target_retention=rate).delta == pytest.approx(delta)


@pytest.mark.parametrize("target", [0, 0.0, -0.0])
def test_a_target_of_nothing_is_refused_and_a_rate_of_nothing_is_not(target: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0, got 0: .* use retention_rate=0 with min_kept=0"):
        PLPHPConfig(target_retention=target)
    config = PLPHPConfig(retention_rate=target)  # each KV head keeps min_kept tokens
    assert (config.base_rate, config.delta, config.min_kept) == (0, 0, 1)


def test_target_retention_takes_the_place_of_the_rate() -> None:
    assert (PLPHPConfig(target_retention=0.7).base_rate, PLPHPConfig(retention_rate=0.5).base_rate) == (0.7, 0.5)
    with pytest.raises(ConfigError, match=r"retention_rate=0\.5 and target_retention=0\.3 both say how much is kept"):
        PLPHPConfig(method="divprune", retention_rate=0.5, target_retention=0.3)
    with pytest.raises(ConfigError, match=r"retention_rate=0\.4 and target_retention=0\.3 both say"):
        PLPHPConfig.parse("divprune:keep=0.4,target_retention=0.3")  # on a line a default is given, too
    assert PLPHPConfig.from_dict({"retention_rate": 0.4, "target_retention": 0.3}).base_rate == 0.3


def test_what_stands_in_for_entries_needs_some_that_are_not_read() -> None:
    with pytest.raises(ConfigError, match=r"rest=False is for entries that a step does not read, .* as in read=0\.2"):
        PLPHPConfig(method="uniform", tiers="t10", rest=False)


@pytest.mark.parametrize(
    ("tiers", "base", "delta"), [("t10", 0.76, 0.24), ("c3", 1.0, 0.0), ("pr2=.2,pq", 1.0, 0.0), ("t5", 0.44, 0.3)]
)
def test_tiers_take_the_place_of_the_rate(tiers: str, base: float, delta: float) -> None:
    config = PLPHPConfig(tiers=tiers)
    assert (config.base_rate, config.delta) == (base, pytest.approx(delta))
    assert config.ladder == Ladder.parse(tiers)
    assert PLPHPConfig().ladder is None


def test_settings_of_before_tiers_read_as_they_were() -> None:
    values = PLPHPConfig(retention_rate=0.3, seed=4).to_dict()
    for name in ("tiers", "read", "rest", "books"):
        del values[name]
    assert PLPHPConfig.from_dict(values) == PLPHPConfig(retention_rate=0.3, seed=4)


def test_integers_at_the_ends_are_rates() -> None:
    assert PLPHPConfig(retention_rate=1, attentive_threshold=1, indifferent_threshold=0).base_rate == 1


def test_config_is_frozen_hashable_and_keyword_only() -> None:
    config = PLPHPConfig(exempt_layers=[0, 1])  # type: ignore[arg-type]
    assert config.exempt_layers == (0, 1)
    assert hash(config) == hash(PLPHPConfig(exempt_layers=(0, 1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.retention_rate = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        PLPHPConfig("plphp")  # type: ignore[misc]


def test_thresholds_of_a_model_of_another_depth_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model)
    for layers, warnings in ((3, 0), (5, 1), (5, 0)):
        caplog.clear()
        with plphp.prune(model, PLPHPConfig(calibrated_layers=layers, seed=71)):
            model.generate(**inputs, max_new_tokens=1)
        assert ["5 decoder layers" in record.message for record in caplog.records] == [True] * warnings
    with pytest.raises(ConfigError, match="calibrated_layers"):
        PLPHPConfig(calibrated_layers=0)


OPTIONS = {
    "snapkv": {"window": 8, "kernel": 7, "pool": "max"},
    "pyramidkv": {"beta": 12.5, "window": 3},
    "zipvl": {"tau": 0.5},
    "recall_rank": {"floor": 0.25, "layers": "vision_attention", "random_share": 0.0, "value_norm": 1},
    "fastv": {"layer": 3},
    "oracle": {"reduce": "peak"},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_options_read_back_the_same(method: str, tmp_path: Path) -> None:
    config = PLPHPConfig(method=method, options=OPTIONS[method], retention_rate=0.3)
    assert config.options == OPTIONS[method]
    assert PLPHPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PLPHPConfig.parse(one_line(config)) == config
    assert type(config.to_dict()["options"]) is dict
    path = tmp_path / "config.toml"
    values = {key: value for key, value in config.to_dict().items() if value is not None and key != "earlier"}
    table = values.pop("options")
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    lines += ["[options]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert PLPHPConfig.from_toml(path) == config
    assert hash(config) == hash(PLPHPConfig(method=method, options=dict(reversed(table.items())), retention_rate=0.3))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert config != PLPHPConfig(method=method, retention_rate=0.3)
    with pytest.raises(TypeError):
        config.options["window"] = 3  # type: ignore[index]


def test_options_come_from_their_own_line() -> None:
    config = PLPHPConfig.parse("snapkv:kernel=7,retention_rate=0.3,query_rows=none")
    assert (dict(config.options), config.retention_rate, config.query_rows) == ({"kernel": 7}, 0.3, None)
    assert PLPHPConfig.parse("zipvl:tau=none").options == {"tau": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv:windw=7", "'windw', which is no option of the method 'snapkv' either. Did you mean 'window'?"),
        ("plphp:retention_rat=0.5", "'retention_rat', which is no option of .* Did you mean 'retention_rate'?"),
        ("plphp:qqq=1", "Unknown setting 'qqq', .* Known: attentive_threshold, books, calibrated_layers,"),
        ("snapkv:kernel=4", "'kernel' of the method 'snapkv' must be an odd integer of at least 1, got 4"),
        ("snapkv:kernel=5.0", "must be an odd integer of at least 1, got 5.0"),
        ("snapkv:window=0", "'window' of the method 'snapkv' must be an integer of at least 1, got 0"),
        ("snapkv:pool=sum", "must be one of 'avg', 'max', got 'sum'"),
        ("snapkv:pool=none", "must be one of 'avg', 'max', got None"),
        ("recall_rank:floor=1.5", "'floor' of the method 'recall_rank' must be a number from 0 to 1, got 1.5"),
        ("recall_rank:floor=nan", "must be a number from 0 to 1, got nan"),
        ("zipvl:tau=high", "must be a number from 0 to 1 or None, got 'high'"),
        ("plphp:window=3", "Unknown setting 'window'"),
        ("snapkw:window=3", "Unknown method 'snapkw'. Did you mean 'snapkv'?"),
        ("snapkv:options=3", "Unknown setting 'options'"),
        ("snapkv:window=3,window=4", "'window' is given twice"),
    ],
)
def test_option_that_the_method_does_not_have(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        resolve(PLPHPConfig.parse(text))


def test_options_of_a_mapping_are_those_of_the_method() -> None:
    with pytest.raises(
        ConfigError, match=r"'windw', which is no option of the method 'snapkv' either\. Did you mean 'window'\?"
    ):
        resolve(PLPHPConfig.from_dict({"method": "snapkv", "options": {"windw": 3}}))
    with pytest.raises(ConfigError, match=r"'window', which is no option of the method 'plphp' either\. Known: "):
        resolve(PLPHPConfig.from_dict({"options": {"window": 3}}))
    # A config does not look its method up: a wrong option is refused where the method is first asked for.
    config = PLPHPConfig(method="snapkv", options={"window": "wide"})
    with pytest.raises(ConfigError, match="must be an integer of at least 1, got 'wide'"):
        resolve(config)


@pytest.mark.parametrize("options", [3, ["a"], {1: 2}, {"a": [1]}, {"a": {}}, None], ids=repr)
def test_options_that_are_no_mapping_of_values(options: Any) -> None:
    with pytest.raises(ConfigError, match="option"):
        PLPHPConfig(options=options)


@pytest.mark.parametrize("value", [0, 2, -1, 1.0, True, "3"])
def test_score_pool_is_odd(value: Any) -> None:
    with pytest.raises(ConfigError, match="score_pool must be"):
        PLPHPConfig(score_pool=value)
