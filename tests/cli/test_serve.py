# SPDX-License-Identifier: Apache-2.0
"""``plphp serve``, as far as it goes without vLLM; tests/engines/vllm runs the server."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from command_line import error, run

from plphp import PLPHPConfig


@pytest.mark.skipif(importlib.util.find_spec("vllm.config") is not None, reason="vLLM is installed")
def test_vllm_is_missing() -> None:
    assert "plphp serve needs vLLM" in error("serve", "model", "--port", "8000")


def test_settings_are_read_first() -> None:
    assert "contradict each other" in error("serve", "model", "--method", "plphp", "--config", "plphp")
    assert "Unknown setting 'retention'" in error("serve", "model", "--config", "plphp:retention=0.4")


@pytest.mark.parametrize("model", [(), ("org/model",), ("--port", "8000")], ids=" ".join)
def test_the_bundled_model_has_settings_of_its_own(model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def server_arguments(config: PLPHPConfig, options: list[str], *, for_bundled: PLPHPConfig) -> str:
        asked.append((config, options, for_bundled))
        return "arguments"

    monkeypatch.setattr("plphp.engines.vllm.server.server_arguments", server_arguments)
    monkeypatch.setattr("plphp.engines.vllm.server.serve", asked.append)
    done = run("serve", *model)
    assert done.exit_code == 0, done.output
    assert all(config.tiers is None for config in (asked[0][0], asked[0][2]))  # vLLM holds entries whole
    asked.clear()
    done = run("serve", *model, "--target-retention", "0.3", "--enforce-eager")
    assert done.exit_code == 0, done.output
    bank = PLPHPConfig(method="query_bank", options={"bank": "bundled"}, target_retention=0.3, heads="equal")
    assert asked == [(PLPHPConfig(target_retention=0.3), [*model, "--enforce-eager"], bank), "arguments"]
