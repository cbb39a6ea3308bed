# SPDX-License-Identifier: Apache-2.0
"""vLLM's plugin refuses each method that takes tokens out before layers get them, by name and without vLLM."""

from __future__ import annotations

import pytest

from plphp import PLPHPConfig, available_methods
from plphp.engines.vllm.refusals import STAGES
from plphp.errors import UnsupportedFeatureError
from plphp.methods.registry import chain_of
from plphp.policy.chain import WHERE

EARLY = [(name, stage) for name, method in available_methods().items() for stage in method.stages if stage != "kv"]


@pytest.mark.parametrize("behind", ["", "+uniform:retention_rate=0.4"], ids=["alone", "in-a-chain"])
@pytest.mark.parametrize(("name", "stage"), EARLY)
def test_each_is_refused_by_name(name: str, stage: str, behind: str) -> None:
    chain = chain_of(PLPHPConfig.parse(f"{name}:retention_rate=0.5{behind}"))
    with pytest.raises(UnsupportedFeatureError, match=f"'{name}' takes tokens out {WHERE[stage]}, which vLLM has no"):
        chain.refuse_all_but(STAGES, "vLLM")


def test_there_are_some_of_both_stages() -> None:
    assert {stage for _, stage in EARLY} == {"encoder", "prefill"}
    assert {"divprune", "pool", "visionzip", "fastv"} <= {name for name, _ in EARLY}
