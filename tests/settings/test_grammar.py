# SPDX-License-Identifier: Apache-2.0
"""Settings on a line: lists, labels, rates, and chains of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp import ConfigError, PLPHPConfig
from plphp.settings.grammar import Line, keys_of, read_chain, read_line, split_lines
from plphp.settings.presets import write_preset

METHODS = ("plphp", "uniform", "random", "fastv", "query_bank")


def test_a_chain_has_settings_of_each_method() -> None:
    config = PLPHPConfig.parse("fastv:layer=3,retention_rate=0.5 + query_bank:bank=bundled,exempt_layers=0+1+-1")
    assert config == PLPHPConfig(
        method="query_bank",
        options={"bank": "bundled"},
        exempt_layers=(0, 1, -1),
        earlier=(PLPHPConfig(method="fastv", options={"layer": 3}, retention_rate=0.5),),
    )


def test_numbers_with_a_sign_are_not_a_chain() -> None:
    assert read_chain("plphp:seed=1e+3") == [("plphp", {"seed": 1000.0})]
    assert PLPHPConfig.parse("plphp:exempt_layers=0+1").earlier == ()


def test_a_chain_of_three_keeps_its_order() -> None:
    assert [method for method, _ in read_chain("a:x=1+b+c:y=two")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (["fastv:layer=2,retention_rate=0.5+plphp,uniform"], ["fastv:layer=2,retention_rate=0.5+plphp", "uniform"]),
        (
            ["fastv:layer=2+plphp:seed=1,query_rows=text,random"],
            ["fastv:layer=2+plphp:seed=1,query_rows=text", "random"],
        ),
        (["a=fastv+uniform:seed=2,seed=3,b=random"], ["a=fastv+uniform:seed=2,seed=3", "b=random"]),
        (["plphp:query_rows=text+uniform:seed=1,min_kept=2"], ["plphp:query_rows=text+uniform:seed=1,min_kept=2"]),
        (
            ["plphp:seed=1,query_rows=text+uniform:seed=1,min_kept=2"],
            ["plphp:seed=1,query_rows=text+uniform:seed=1,min_kept=2"],
        ),
        (["plphp,best=plphp:seed=1,random:seed=1"], ["plphp", "best=plphp:seed=1", "random:seed=1"]),
        (["uniform:seed=8,fastv:layer=3"], ["uniform:seed=8", "fastv:layer=3"]),
        (
            ["both=fastv:layer=1+plphp,fastv:layer=2+uniform:seed=3,seed=4"],
            ["both=fastv:layer=1+plphp", "fastv:layer=2+uniform:seed=3,seed=4"],
        ),
        (["a=fastv:layer=1@.5,b=uniform,c=random@.5"], ["a=fastv:layer=1@.5", "b=uniform", "c=random@.5"]),
        (["a=plphp+uniform:seed=1@.5,b=random@.2"], ["a=plphp+uniform:seed=1@.5", "b=random@.2"]),
        (["plphp:seed=1,mine=uniform:seed=2"], ["plphp:seed=1", "mine=uniform:seed=2"]),
        (["plphp:exempt_layers=0+1,fastv@0.5+0.25"], ["plphp:exempt_layers=0+1", "fastv@0.5+0.25"]),
    ],
)
def test_a_list_is_cut_between_lines(texts: list[str], lines: list[str]) -> None:
    assert split_lines(texts, METHODS) == lines


def test_a_line_has_a_label_and_rates() -> None:
    assert read_line("mine=fastv:layer=2+uniform@0.5+0.25") == Line("mine", "fastv:layer=2+uniform", ("0.5", "0.25"))
    assert read_line("fastv+uniform") == Line("fastv+uniform", "fastv+uniform", None)
    with pytest.raises(ConfigError, match="Expected label=method"):
        read_line("=plphp")


def test_a_plus_inside_a_file_name_is_no_chain() -> None:
    config = PLPHPConfig.parse("query_bank:bank=my+bank.safetensors,retention_rate=0.2+uniform")
    assert config.earlier[0].options == {"bank": "my+bank.safetensors"}
    assert config.method == "uniform"


TIERS = "pr2=.20,rvq=.24,pq=.32"


def test_a_value_in_quotes_may_hold_what_separates_values() -> None:
    config = PLPHPConfig.parse(f'fastv:layer=3 + query_bank:bank="my,b@nk+plphp:.st", tiers="{TIERS}",seed=2')
    assert (config.options, config.tiers, config.seed) == ({"bank": "my,b@nk+plphp:.st"}, TIERS, 2)
    assert config.earlier == (PLPHPConfig(method="fastv", options={"layer": 3}),)
    assert keys_of(f'fastv+query_bank:tiers="{TIERS}"') == {"tiers"}


def test_what_is_quoted_stays_text() -> None:
    assert read_chain('a:x="12",y="none",z=" 0.5 ",exempt_layers="0",w=""') == [
        ("a", {"x": "12", "y": "none", "z": " 0.5 ", "exempt_layers": "0", "w": ""})
    ]


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ('"false"', "false"), ("0", 0)])
def test_a_switch_is_true_or_false(text: str, value: object) -> None:
    [(_, values)] = read_chain(f"a:rest={text}")
    assert values["rest"] is value or (values["rest"] == value and type(values["rest"]) is type(value))


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text().filter(lambda t: '"' not in t)))
def test_any_text_without_quotes_can_be_quoted(values: dict[str, str]) -> None:
    values.pop("method", None)
    part = "mine:" + ",".join(f'{key}="{value}"' for key, value in values.items())
    assert read_chain(f"{part}+uniform+{part}") == [("mine", values), ("uniform", {}), ("mine", values)]
    assert split_lines([f"random,label={part},uniform:seed=1,{part}"], METHODS) == [
        *("random", f"label={part}".rstrip(","), "uniform:seed=1", part)
    ]
    assert read_line(f"label={part}@0.5+1") == Line("label", part, ("0.5", "1"))
    assert read_line(part) == Line(part, part, None)


@pytest.mark.parametrize(
    "text", ['query_bank:tiers="pr2=.2,pq', 'query_bank:tiers=pr2=.2,pq"', '"query_bank:tiers=t10"', 'a:x="b",y="']
)
def test_a_quote_without_a_partner_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"A double quote has no partner in .*: write key=\"value\""):
        read_chain(text)
    if text.count('"') % 2:
        for read in (read_line, lambda text: split_lines([text], METHODS)):
            with pytest.raises(ConfigError, match="A double quote has no partner"):
                read(text)


@pytest.mark.parametrize("value", ['a"b,c"', '"a"b', 'a""', '"a""b"'])
def test_quotes_stand_around_a_whole_value(value: str) -> None:
    with pytest.raises(ConfigError, match="Double quotes stand around a whole value"):
        read_chain(f"query_bank:bank={value}")


def test_keep_is_short_for_the_rate() -> None:
    assert PLPHPConfig.parse("fastv:keep=0.5+plphp:keep=0.2") == PLPHPConfig(
        retention_rate=0.2, earlier=(PLPHPConfig(method="fastv", retention_rate=0.5),)
    )
    assert keys_of("plphp:keep=0.2") == {"retention_rate"}
    with pytest.raises(ConfigError, match="'retention_rate' is given twice"):
        PLPHPConfig.parse("plphp:keep=0.2,retention_rate=0.3")


def test_a_list_is_cut_outside_quotes() -> None:
    ours = f'query_bank:bank=bundled,tiers="{TIERS}"'
    assert split_lines([f"uniform,best={ours},seed=3,fastv:layer=1+{ours},random@.5"], METHODS) == [
        *("uniform", f"best={ours},seed=3", f"fastv:layer=1+{ours}", "random@.5")
    ]


def test_a_preset_of_a_chain_reads_back_the_same(tmp_path: Path) -> None:
    config = PLPHPConfig.parse("fastv:layer=3,retention_rate=0.5+plphp:target_retention=0.4")
    write_preset(tmp_path / "preset.toml", config, {"prompts": [{"file": "a", "seed": None}]})
    assert PLPHPConfig.from_toml(tmp_path / "preset.toml") == config


@pytest.mark.parametrize("values", [[3], ["fastv"], [None]])
def test_what_is_no_method_of_a_chain_is_refused(values: list[object]) -> None:
    with pytest.raises(ConfigError, match="earlier must be a list of tables of settings, got"):
        PLPHPConfig.from_dict({"earlier": values})


@pytest.mark.parametrize("values", ["plphp", {"method": "plphp"}, 3])
def test_what_is_no_chain_is_refused(values: object) -> None:
    with pytest.raises(ConfigError, match="earlier must be a list of tables of settings"):
        PLPHPConfig.from_dict({"earlier": values})
    with pytest.raises(ConfigError, match="earlier must be a tuple of PLPHPConfig"):
        PLPHPConfig(earlier=values)  # type: ignore[arg-type]


def test_a_method_of_a_chain_has_no_chain() -> None:
    first = PLPHPConfig(method="fastv")
    with pytest.raises(ConfigError, match="names no chain of its own"):
        PLPHPConfig(earlier=(PLPHPConfig(earlier=(first,)),))


def test_settings_beside_the_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[plphp]\nmethod = "plphp"\n[[earlier]]\nmethod = "vtw"\n')
    with pytest.raises(ConfigError, match=r"earlier in .* stands beside the table \[plphp\].*\[\[plphp.earlier\]\]"):
        PLPHPConfig.from_toml(path)
    path.write_text('[plphp]\nmethod = "plphp"\n[[plphp.earlier]]\nretention_rate = 0.5\n')
    with pytest.raises(ConfigError, match=r"A table of earlier names its method, got .*retention_rate"):
        PLPHPConfig.from_toml(path)
    path.write_text('[plphp]\nmethod = "plphp"\n[[plphp.earlier]]\nmethod = "vtw"\n[calibration]\nprompts = 3\n')
    assert PLPHPConfig.from_toml(path) == PLPHPConfig.parse("vtw+plphp")


@pytest.mark.parametrize("values", [None, "plphp", 3])
def test_what_is_no_mapping_is_no_config(values: Any) -> None:
    with pytest.raises(ConfigError, match="Expected a mapping of settings, got"):
        PLPHPConfig.from_dict(values)
