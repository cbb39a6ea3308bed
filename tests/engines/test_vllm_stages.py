# SPDX-License-Identifier: Apache-2.0
"""vLLM's plugin refuses each method that takes tokens out before layers get them, by name and without vLLM."""

from __future__ import annotations

import pytest

from plphp import PLPHPConfig, available_methods
from plphp.engines.vllm.refusals import STAGES
from plphp.errors import UnsupportedFeatureError
from plphp.methods.registry import chain_of
from plphp.policy.chain import WHERE

METHODS = available_methods()
EARLY = [(name, stage) for name, method in METHODS.items() for stage in method.stages if stage != "kv"]


@pytest.mark.parametrize("behind", ["", "+uniform:retention_rate=0.4"], ids=["alone", "in-a-chain"])
@pytest.mark.parametrize(("name", "stage"), EARLY)
def test_each_is_refused_by_name(name: str, stage: str, behind: str) -> None:
    if behind and METHODS[name].kv is not None:
        pytest.skip("it acts on the KV cache itself")
    chain = chain_of(PLPHPConfig.parse(f"{name}:retention_rate=0.5{behind}"))
    with pytest.raises(UnsupportedFeatureError, match=f"'{name}' takes tokens out {WHERE[stage]}, which vLLM has no"):
        chain.refuse_all_but(STAGES, "vLLM")


def test_there_are_some_of_each_stage() -> None:
    assert {stage for _, stage in EARLY} == {"encoder", "prefill", "attention"}
    assert {"divprune", "pool", "visionzip", "fastv", "zipvl"} <= {name for name, _ in EARLY}


def test_what_does_not_attend_in_prefill_alone_is_run() -> None:
    chain_of(PLPHPConfig.parse("zipvl:attention=dense")).refuse_all_but(STAGES, "vLLM")
