# SPDX-License-Identifier: Apache-2.0
"""Which methods fill tiers, which rungs need codebooks, and the method that holds everything in one rung."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import plphp
from plphp import ConfigError, PLPHPConfig
from plphp.kernels.rungs import RUNGS
from plphp.methods.registry import chain_of, get_method, resolve
from plphp.policy import bank as banks
from plphp.policy.evidence import LayerScores
from plphp.settings.ladder import LADDERS, Ladder

PRODUCT = ("pr2", "rvq", "pq", "pq16")
CANNOT = {
    "none": "it keeps every entry whole. Take 'quantized'",
    "snapkv": "text competes with vision tokens",
    "adakv": "text competes with vision tokens",
    **{
        name: f"it leaves the KV cache as it is.* behind it, as in {name}\\+query_bank:tiers=t10"
        for name, method in plphp.available_methods().items()
        if method.kv is None
    },
}
"""By method, why it can fill no tiers."""


def resolved(line: str) -> PLPHPConfig:
    """The settings of the KV stage of a line."""
    return chain_of(PLPHPConfig.parse(line)).kv.config


@pytest.mark.parametrize("method", sorted(plphp.available_methods()))
def test_a_method_fills_tiers_or_says_why_it_cannot(method: str) -> None:
    config = PLPHPConfig(method=method, tiers="c3")
    if method not in CANNOT:
        assert chain_of(config).kv.config == config
        return
    with pytest.raises(ConfigError, match=f"The method '{method}' cannot fill tiers=c3: {CANNOT[method]}"):
        resolve(config)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("query_bank:candidates=prompt,tiers=t10", "text competes with vision tokens"),
        ("query_bank:random_share=.2,tiers=t10", "Leave out random_share and floor"),
        ("recall_rank:floor=0.1,tiers=c3", "Leave out random_share and floor"),
        ("fastv:tiers=c3+plphp", "The method 'fastv' cannot fill tiers=c3"),
        ("fastv:layer=1,tiers=c3+plphp:tiers=c3", "The method 'fastv' cannot fill tiers=c3"),
    ],
)
def test_options_with_which_a_method_cannot_fill_tiers(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolved(line)


def test_the_tiers_of_a_chain_are_those_of_its_last_method() -> None:
    config = resolved('fastv:retention_rate=0.5+query_bank:bank=bundled,tiers="pr2=.2,pq"')
    assert config.ladder == Ladder.parse("pr2=.2,pq")
    assert config.base_rate == 1.0


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ("pr=.2,pq=.3", r"Unknown rung 'pr' in tiers=pr=.2,pq=.3. Did you mean 'pr2'\?"),
        ("t11", r"Unknown ladder or rung 't11' in tiers=t11. Ladders: t15, t10, .*; rungs: whole, kivi4, .*, pq16\.$"),
        ("kivi3", r"Unknown ladder or rung 'kivi3' in tiers=kivi3. Ladders: .* kivi4, kivi2"),
        ("kivi3=.5", r"Unknown rung 'kivi3' in tiers=kivi3=.5. Did you mean 'kivi"),
        ("zzz=.2,pq", r"Unknown rung 'zzz' in tiers=zzz=.2,pq. Known: c3, c4, kivi2, kivi4, pq,"),
    ],
)
def test_unknown_rungs_are_refused_by_name(tiers: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(PLPHPConfig(method="query_bank", tiers=tiers))


def test_every_named_ladder_has_known_rungs() -> None:
    for name in LADDERS:
        resolve(PLPHPConfig(method="query_bank", tiers=name))
        assert set(Ladder.parse(name).names) <= set(RUNGS)


@pytest.mark.parametrize("rung", PRODUCT)
@pytest.mark.parametrize("method", ["uniform", "plphp", "quantized"])
def test_product_rungs_need_a_bank_that_brings_codebooks(rung: str, method: str) -> None:
    refused = (
        rf"tiers={rung} names rungs .*\({rung}\), and the method '{method}' asks no query bank .*books=FILE.*: .*c3"
    )
    with pytest.raises(ConfigError, match=refused):
        resolve(PLPHPConfig(method=method, tiers=rung))
    resolve(PLPHPConfig(method=method, tiers=rung, books="bundled"))
    resolve(PLPHPConfig(method="query_bank", tiers=rung))
    resolve(PLPHPConfig(method="query_bank", tiers=rung, options={"bank": "bundled"}))


def test_a_message_lists_the_rungs_that_need_codebooks() -> None:
    with pytest.raises(ConfigError, match=r"tiers=t10 names rungs that need codebooks \(pr2, rvq, pq\)"):
        resolve(PLPHPConfig(method="uniform", tiers="t10"))


@pytest.mark.parametrize(
    "values", [{"method": "query_bank", "options": {"bank": "a.st"}}, {"method": "uniform", "books": "a.st"}], ids=str
)
def test_a_bank_without_codebooks_is_refused(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    bank = SimpleNamespace(decoder_layers=4, books=None)
    monkeypatch.setattr(banks, "bank_at", lambda name: bank)
    config = PLPHPConfig(tiers="t10", **values)
    with pytest.raises(
        ConfigError, match=r"The query bank a.st has no codebooks, .*\(pr2, rvq, pq\): collect it again"
    ):
        chain_of(config, layers=4)
    with pytest.raises(ConfigError, match="of a model with 4 decoder layers, and this one has 5"):
        chain_of(config, layers=5)
    if "books" not in values:
        chain_of(PLPHPConfig(**{**values, "tiers": "c3"}), layers=4)  # needs none
    bank.books = {}
    assert chain_of(config, layers=4).kv.config == config


@pytest.mark.parametrize("line", ["quantized", "quantized:tiers=c3", "query_bank:tiers=r15", 'uniform:tiers="c3=.5"'])
def test_codebooks_that_no_rung_needs_are_refused(line: str) -> None:
    """A file that nobody looks at could be any."""
    config = dataclasses.replace(get_method(line.split(":")[0]).settled(PLPHPConfig.parse(line)), books="/nope")
    with pytest.raises(ConfigError, match=r"books=/nope brings codebooks, and no rung .* leave books out, .* pr2, rvq"):
        resolve(config)


@pytest.mark.parametrize(
    "line",
    ["query_bank:tiers=pr2=.5,pq=.2", "query_bank:tiers=pr2=.5,pq", "query_bank:tiers=pr2=.5+pq", "pq"],
)
def test_a_ladder_without_quotes_is_told_of_them(line: str) -> None:
    with pytest.raises(ConfigError, match=r"'pq' is a rung: .* double quotes, as in tiers=\"pr2=.2,pq=.3\""):
        chain_of(PLPHPConfig.parse(line))


def test_a_file_of_codebooks_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the query bank"):
        chain_of(PLPHPConfig(method="uniform", tiers="pq", books=str(tmp_path / "gone.st")), layers=4)


def test_quantized_has_a_ladder_of_its_own() -> None:
    assert resolved("quantized") == PLPHPConfig(method="quantized", tiers="c3")
    assert resolved("quantized:tiers=kivi2").tiers == "kivi2"
    assert resolved("fastv:layer=1+quantized").ladder == Ladder.parse("c3")
    assert resolved("plphp").tiers is None


@pytest.mark.parametrize(
    "setting", ["retention_rate", "target_retention", "attentive_threshold", "indifferent_threshold"]
)
def test_quantized_says_itself_how_much_it_keeps(setting: str) -> None:
    own = r"^The ladder of the method 'quantized' \(c3\) says how much is kept"
    with pytest.raises(ConfigError, match=rf"{own}, and so does {setting}=0.2: leave"):
        resolve(PLPHPConfig(method="quantized", **{setting: 0.2}))  # type: ignore[arg-type]


@pytest.mark.parametrize("tiers", ["t10", "c3=.5", "c4=.5,c3"])
def test_quantized_holds_everything_in_one_rung(tiers: str) -> None:
    config = PLPHPConfig(method="quantized", tiers=tiers, books="bundled")
    with pytest.raises(ConfigError, match=rf"every vision entry in one rung, got tiers={tiers}: name one"):
        get_method("quantized").check(config, 4)


@pytest.mark.parametrize("tiers", ["whole", "whole=1"])
def test_quantized_is_no_other_name_of_none(tiers: str) -> None:
    """A method that ranks may hold all of it whole, as it may have a rate of 1: this one would have nothing to do."""
    with pytest.raises(ConfigError, match=rf"tiers={tiers} holds it in the dtype of the model.* method 'none'"):
        chain_of(PLPHPConfig.parse(f"quantized:tiers={tiers}"), layers=4)
    chain_of(PLPHPConfig.parse(f"random:tiers={tiers}"), layers=4)
    chain_of(PLPHPConfig.parse("quantized:tiers=kivi4"), layers=4)


def test_quantized_prefers_no_entry_and_no_layer() -> None:
    stage, config = get_method("quantized").kv, PLPHPConfig(method="quantized", tiers="c3")
    assert stage is not None
    scores = LayerScores(
        torch.rand(2, 4, 9),
        torch.zeros(2, 9, dtype=torch.long),
        torch.ones(2, 9, dtype=torch.bool),
        layer=0,
        kv_heads=2,
    )
    assert torch.equal(stage.scored(scores, config), torch.zeros(2, 2, 9))
    assert not stage.ragged(config)
    assert config.base_rate == 1
