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
    comparison = compare(llava, tiny_hub.processor(), inputs, config, rounds=2, max_new_tokens=NEW)
    prompt = inputs["input_ids"].shape[1]
    stock = llava.generate(**inputs, max_new_tokens=NEW)[:, prompt:].tolist()
    with plphp.prune(llava, config) as run:
        pruned = llava.generate(**inputs, max_new_tokens=NEW)[:, prompt:].tolist()
    assert (comparison.unpruned.tokens, comparison.pruned.tokens) == (stock, pruned)
    assert comparison.report.prompts == run.report.prompts
    assert comparison.same_tokens == (stock == pruned)


def test_bytes_are_those_of_live_tensors_after_the_prompt(llava: Any, inputs: dict[str, Any]) -> None:
    comparison = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=1, max_new_tokens=NEW)
    plain = DynamicCache(config=llava.config.get_text_config())
    cache = plphp.PrunedCache.for_inputs(llava, inputs, PLPHPConfig())
    with torch.no_grad():
        llava(**inputs, **passed(plain))
        llava(**inputs, **passed(cache))
    by_hand = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert comparison.unpruned.kv_bytes == by_hand == cache.full_nbytes
    assert comparison.pruned.kv_bytes == cache.nbytes < by_hand
    assert comparison.kv_reduction == 1 - cache.nbytes / by_hand


def test_comparison_and_report_give_the_same_figures(llava: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Whatever shows a run shows the same bytes, also where the answers differ in length."""
    comparison = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=2, max_new_tokens=40)
    comparison.report.to_json(tmp_path / "report.json")
    read = plphp.PruneReport.from_json(tmp_path / "report.json")
    assert read.tokens == inputs["input_ids"].shape[1]
    assert (comparison.unpruned.kv_bytes, comparison.pruned.kv_bytes) == (read.kv_bytes_full, read.entry_bytes)
    values = comparison_values(comparison)
    assert values["kv_reduction"] == values["report"]["kv_reduction"] == report_values(read)["kv_reduction"] > 0
    console = Console(width=110, file=io.StringIO())
    console.print(comparison_table(comparison))
    shown, line = console.file.getvalue(), summary(read)
    for part in (f"KV cache of {read.tokens} tokens", human_bytes(read.kv_bytes_full), f"{-read.kv_reduction:+.0%}"):
        assert part in shown
        assert part in line


def test_text_alone_is_compared_too(llava: Any) -> None:
    inputs = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    comparison = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=1, max_new_tokens=NEW)
    assert comparison.kv_reduction == 0
    assert comparison.same_tokens


def test_full_retention_is_equal(llava: Any, inputs: dict[str, Any]) -> None:
    comparison = compare(
        llava, tiny_hub.processor(), inputs, PLPHPConfig(retention_rate=1.0), rounds=1, max_new_tokens=NEW
    )
    assert comparison.same_tokens
    assert comparison.unpruned.texts == comparison.pruned.texts


def test_rounds_alternate_and_only_decode_steps_count(llava: Any, inputs: dict[str, Any]) -> None:
    steps: list[str] = []
    comparison = compare(
        llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=2, max_new_tokens=2, progress=steps.append
    )
    assert [line.split(", ")[1] for line in steps] == ["unpruned", "pruned"] * 2
    assert comparison.speedup is not None
    short = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=1, max_new_tokens=1)
    assert short.unpruned.seconds_per_token is short.speedup is None
    assert short.unpruned.prefill_seconds > 0


def test_sampling_is_the_same_for_both_and_leaves_the_random_state(llava: Any, inputs: dict[str, Any]) -> None:
    keep_all = PLPHPConfig(method="none")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    comparisons = [
        compare(llava, tiny_hub.processor(), inputs, keep_all, rounds=1, seed=seed, max_new_tokens=NEW, do_sample=True)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(comparison.same_tokens for comparison in comparisons)
    assert comparisons[0].pruned.tokens == comparisons[1].pruned.tokens != comparisons[2].pruned.tokens


def test_values_for_json(llava: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    comparison = compare(llava, tiny_hub.processor(), inputs, PLPHPConfig(), rounds=1, max_new_tokens=2)
    values = comparison_values(comparison)
    assert values["report"]["kv_bytes"] == comparison.report.kv_bytes
    assert len(values["report"]["prompts"][0]["layers"]) == 3


@pytest.mark.parametrize(
    "arguments",
    [{"rounds": 0}, {"rounds": 1.5}, {"rounds": True}, {"seed": "1"}, {"past_key_values": None}, {"streamer": None}],
)
def test_refusals(llava: Any, inputs: dict[str, Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        compare(llava, tiny_hub.processor(), inputs, **arguments)
