# SPDX-License-Identifier: Apache-2.0
"""Unpruned beside pruned: the same as two runs by hand, measured on live tensors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import DynamicCache

import plphp
import tiny_hub
from plphp import ConfigError, PLPHPConfig
from plphp.engines.hf.cache_argument import passed
from plphp.inputs.prompt import build_inputs
from plphp.show.tables import comparison_table, comparison_values, human_bytes, report_values, summary
from plphp.studies.compare import compare

NEW = 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tiny_hub.picture(tmp_path_factory.mktemp("images") / "a.png")
    return build_inputs(tiny_hub.processor(), "What?", images=[Image.open(path)] * 3)


def test_equals_two_runs_by_hand(llava: Any, inputs: dict[str, Any]) -> None:
    config = PLPHPConfig(method="uniform", retention_rate=0.25)
    found = compare(llava, tiny_hub.processor(), inputs, config, rounds=2, max_new_tokens=NEW)
    prompt = inputs["input_ids"].shape[1]
    stock = llava.generate(**inputs, max_new_tokens=NEW)[:, prompt:].tolist()
    with plphp.prune(llava, config) as run:
        pruned = llava.generate(**inputs, max_new_tokens=NEW)[:, prompt:].tolist()
    assert (found.unpruned.tokens, found.pruned.tokens) == (stock, pruned)
    assert found.report.prompts == run.report.prompts
    assert found.same_tokens == (stock == pruned)


def test_bytes_are_those_of_live_tensors_after_the_prompt(llava: Any, inputs: dict[str, Any]) -> None:
    found = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=1, max_new_tokens=NEW)
    plain = DynamicCache(config=llava.config.get_text_config())
    cache = plphp.PrunedCache.for_inputs(llava, inputs)
    with torch.no_grad():
        llava(**inputs, **passed(plain))
        llava(**inputs, **passed(cache))
    by_hand = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert found.unpruned.kv_bytes == by_hand == cache.full_nbytes
    assert found.pruned.kv_bytes == cache.nbytes < by_hand
    assert found.kv_reduction == 1 - cache.nbytes / by_hand


def test_comparison_and_report_give_the_same_figures(llava: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Whatever shows a run shows the same bytes, also where the answers differ in length."""
    found = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=2, max_new_tokens=40)
    found.report.to_json(tmp_path / "report.json")
    read = plphp.PruneReport.from_json(tmp_path / "report.json")
    assert read.tokens == inputs["input_ids"].shape[1]
    assert (found.unpruned.kv_bytes, found.pruned.kv_bytes) == (read.kv_bytes_full, read.entry_bytes)
    values = comparison_values(found)
    assert values["kv_reduction"] == values["report"]["kv_reduction"] == report_values(read)["kv_reduction"] > 0
    console = Console(width=110, file=io.StringIO())
    console.print(comparison_table(found))
    shown, line = console.file.getvalue(), summary(read)
    for part in (f"KV cache of {read.tokens} tokens", human_bytes(read.kv_bytes_full), f"{-read.kv_reduction:+.0%}"):
        assert part in shown
        assert part in line


def test_text_alone_is_compared_too(llava: Any) -> None:
    inputs = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    found = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=1, max_new_tokens=NEW)
    assert found.kv_reduction == 0
    assert found.same_tokens


def test_full_retention_is_equal(llava: Any, inputs: dict[str, Any]) -> None:
    found = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(retention_rate=1.0), rounds=1, max_new_tokens=NEW)
    assert found.same_tokens
    assert found.unpruned.texts == found.pruned.texts


def test_rounds_alternate_and_only_decode_steps_count(llava: Any, inputs: dict[str, Any]) -> None:
    told: list[str] = []
    found = compare(llava, tiny_hub.processor(), inputs, rounds=2, max_new_tokens=2, progress=told.append)
    assert [line.split(", ")[1] for line in told] == ["unpruned", "pruned"] * 2
    assert found.speedup is not None
    one = compare(llava, tiny_hub.processor(), inputs, rounds=1, max_new_tokens=1)
    assert one.unpruned.seconds_per_token is one.speedup is None
    assert one.unpruned.prefill_seconds > 0


def test_sampling_is_the_same_for_both_and_leaves_the_random_state(llava: Any, inputs: dict[str, Any]) -> None:
    keep_all = PLPHPConfig(method="none")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = [
        compare(llava, tiny_hub.processor(), inputs, keep_all, rounds=1, seed=seed, max_new_tokens=NEW, do_sample=True)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(one.same_tokens for one in found)
    assert found[0].pruned.tokens == found[1].pruned.tokens != found[2].pruned.tokens


def test_values_for_json(llava: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    found = compare(llava, tiny_hub.processor(), inputs, rounds=1, max_new_tokens=2)
    values = comparison_values(found)
    assert values["report"]["kv_bytes"] == found.report.kv_bytes
    assert len(values["report"]["prompts"][0]["layers"]) == 3


@pytest.mark.parametrize("arguments", [{"rounds": 0}, {"past_key_values": None}, {"streamer": None}])
def test_refusals(llava: Any, inputs: dict[str, Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        compare(llava, tiny_hub.processor(), inputs, **arguments)
