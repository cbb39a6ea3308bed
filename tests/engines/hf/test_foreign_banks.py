# SPDX-License-Identifier: Apache-2.0
"""Files of queries and codebooks are held against the weights of the model that answers: siblings have its shapes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import plphp
from invariants import generate
from plphp import ConfigError, PLPHPConfig, PrunedCache, QueryBank
from plphp.engines.hf import foreign_banks
from plphp.inputs.weight_values import kept_weights_values_hash, weights_values_hash
from plphp.inputs.weights import hash_kept
from plphp.policy.bank import VALUES_HASH
from precision import working_dtype
from tiny_models import TIERS, tiers_model

pytestmark = pytest.mark.usefixtures("float64")

BY_BOOKS = 'quantized:tiers=pq,books="{}"'
BY_BANK = 'query_bank:bank="{}",tiers="rvq=.3,pq=.5"'
QUERIES_ALONE = 'query_bank:bank="{}",tiers="c3=.5"'


@functools.cache
def sibling() -> Any:
    """A model of the same shapes, of which a single weight is another."""
    model = TIERS["llava"].build(dtype=working_dtype())
    with torch.no_grad():
        next(iter(model.model.language_model.layers[0].parameters())).view(-1)[0] += 1
    return model


def prompt() -> dict[str, Any]:
    inputs: dict[str, Any] = TIERS["llava"].inputs(tiers_model("llava"), [2])
    return inputs


@functools.cache
def collected() -> QueryBank:
    return plphp.collect_query_bank(tiers_model("llava"), [prompt()], max_new_tokens=4)


def config(line: str, folder: Path, **record: Any) -> PLPHPConfig:
    """Settings by the bank of the first model, with some of its record changed; None leaves an item out."""
    about = {name: value for name, value in {**collected().record, **record}.items() if value is not None}
    dataclasses.replace(collected(), record=about).save(folder / "bank.st")
    return PLPHPConfig.parse(line.format(folder / "bank.st"))


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "plphp")


@pytest.mark.parametrize("line", [BY_BOOKS, BY_BANK])
def test_codebooks_of_a_sibling_are_refused(line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = config(line, tmp_path)
    with pytest.raises(ConfigError, match=r"codebooks of the query bank .*bank.st are of another model: .*collect"):
        PrunedCache.for_inputs(sibling(), prompt(), asked)
    with pytest.raises(ConfigError, match="are of another model"), plphp.prune(sibling(), asked):
        generate(sibling(), prompt())
    with pytest.raises(ConfigError, match="are of another model"):
        plphp.branch(sibling(), prompt(), [PLPHPConfig(method="none"), asked])
    caplog.clear()
    PrunedCache.for_inputs(tiers_model("llava"), prompt(), asked)
    assert not messages(caplog)


@pytest.mark.parametrize("write", ["rows", "few"])
def test_codebooks_are_refused_once_weights_were_written_past_the_count_of_writes(write: str, tmp_path: Path) -> None:
    """As by a framework of reinforcement learning, or a moving average: through ``data``, which counts nothing."""
    model, asked = TIERS["llava"].build(dtype=working_dtype()), config(BY_BOOKS, tmp_path)
    weight = model.model.language_model.layers[0].self_attn.k_proj.weight
    with plphp.prune(model, asked):
        generate(model, prompt())
        before, version = weight.data.clone(), weight._version
        if write == "rows":
            weight.data.copy_(before.flip(0))
        else:
            weight.data[:, ::8] += 1
        assert weight._version == version
        with pytest.raises(ConfigError, match="are of another model"):
            generate(model, prompt())
    with pytest.raises(ConfigError, match="are of another model"), plphp.prune(model, asked):
        generate(model, prompt())
    weight.data.copy_(before)
    with plphp.prune(model, asked):
        generate(model, prompt())


def test_codebooks_that_a_session_collected_are_refused_once_the_weights_are_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for tiers in ('tiers="pq=.5"', "retention_rate=.5"):
        model = TIERS["llava"].build(dtype=working_dtype())
        with plphp.prune(model, PLPHPConfig.parse(f"query_bank:collect=1,{tiers}")) as run:
            generate(model, prompt())
            caplog.clear()
            generate(model, prompt())
            assert run.report.collecting is None
            assert not messages(caplog)
            model.model.language_model.layers[0].self_attn.k_proj.weight.data *= 1.5
            if "tiers" in tiers:
                with pytest.raises(ConfigError, match=r"collected here are of another model: .* open a new session"):
                    generate(model, prompt())
            else:
                generate(model, prompt())
                assert "The queries of the bank that was collected here are of another model" in messages(caplog)


@pytest.mark.own_dtype
@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(300, 40).T,
        torch.ones(9000, dtype=torch.bfloat16),
        torch.ones(9000, dtype=torch.float8_e4m3fn),
        torch.ones(9000, dtype=torch.complex128),
        torch.ones(9000, dtype=torch.bool),
        torch.full((70, 70), torch.nan),
        torch.ones(()),
    ],
    ids=lambda weight: f"{weight.dtype}-{list(weight.shape)}",
)
def test_a_write_past_the_count_is_noticed_in_every_dtype(weight: torch.Tensor) -> None:
    hashed: list[int] = []

    def hash_of(model: torch.nn.Module) -> str:
        hashed.append(1)
        return str(len(hashed))

    model = torch.nn.Linear(2, 2)
    model.register_buffer("weight_of_its_own", weight)
    model.register_buffer("offloaded", torch.ones(3, device="meta"))
    for expected in ("1", "1"):
        assert hash_kept(model, "test", hash_of) == expected
    weight.data.zero_()
    for expected in ("2", "2"):
        assert hash_kept(model, "test", hash_of) == expected


def test_queries_of_a_sibling_are_used_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = config(QUERIES_ALONE, tmp_path)
    for _ in range(2):
        with plphp.prune(sibling(), asked) as run:
            generate(sibling(), prompt())
    assert run.report.retention < 1
    assert messages(caplog).count("The queries of the bank") == 1
    assert "are of another model" in messages(caplog)
    caplog.clear()
    with plphp.prune(tiers_model("llava"), asked):
        generate(tiers_model("llava"), prompt())
    assert not messages(caplog)


@pytest.mark.parametrize("line", [BY_BOOKS, BY_BANK, QUERIES_ALONE])
def test_a_bank_that_names_no_weights_is_used_with_a_warning(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one of an earlier version, or of a server, which knows its weights by their files alone."""
    asked = config(line, tmp_path, **{VALUES_HASH: None, "weights_sha256": "0" * 64})
    PrunedCache.for_inputs(sibling(), prompt(), asked)
    assert "does not say of which weights it is" in messages(caplog)


def test_weights_without_a_hash_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def offloaded(model: Any) -> str:
        raise plphp.UnsupportedModelError("The weights 'head' are not in memory.")

    monkeypatch.setattr(foreign_banks, "kept_weights_values_hash", offloaded)
    PrunedCache.for_inputs(sibling(), prompt(), config(BY_BOOKS, tmp_path))
    assert "is not known. The weights 'head' are not in memory." in messages(caplog)


def test_a_bank_that_a_session_collects_says_of_which_weights_it_is(tmp_path: Path) -> None:
    """In a folder from the first answer on, and without one when it is complete."""
    model = tiers_model("llava")
    for folder in ({}, {"folder": str(tmp_path)}):
        with plphp.prune(model, PLPHPConfig(method="query_bank", options={"collect": 2, **folder})) as run:
            generate(model, prompt())
            for file in tmp_path.glob("*.safetensors"):
                assert QueryBank.load(file).values_hash == weights_values_hash(model)
            generate(model, prompt())
        assert run.bank is not None
        assert run.bank.values_hash == weights_values_hash(model)


@pytest.mark.own_dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_hash_of_values_is_of_no_dtype_and_of_no_name(dtype: torch.dtype) -> None:
    model = TIERS["llava"].build(dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[0, :2] = torch.tensor([3e-6, -1e-30])  # of few bits in float16, and of none
    expected = weights_values_hash(model)
    assert kept_weights_values_hash(model) == expected
    model.to(dtype)
    assert weights_values_hash(model) == expected
    assert weights_values_hash(torch.nn.ModuleDict({"renamed": model})) == expected
    with torch.no_grad():
        model.lm_head.weight[0, 2] += 1
    assert weights_values_hash(model) != expected
    assert kept_weights_values_hash(model) == weights_values_hash(model)


def test_the_hash_of_values_is_of_shapes_and_refuses_what_is_not_in_memory() -> None:
    assert weights_values_hash(torch.nn.Linear(2, 3, False)) != weights_values_hash(torch.nn.Linear(3, 2, False))
    with pytest.raises(plphp.UnsupportedModelError, match="'weight' of Linear are not in memory"):
        weights_values_hash(torch.nn.Linear(2, 3, device="meta"))
