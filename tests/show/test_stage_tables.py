# SPDX-License-Identifier: Apache-2.0
"""Reports say what left before layers got it: in the table, in a line, and in JSON."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from rich.console import Console

from plphp import PLPHPConfig, PrunedCache, PruneReport
from plphp.engines.hf.cache_argument import passed
from plphp.pruning.prompt_report import PromptReport
from plphp.pruning.stage_report import StageReport
from plphp.show.stage_tables import stage_table, stages_line
from plphp.show.tables import layer_tables, report_values, summary
from tiny_models import TINY, tiny_model

ENCODER = StageReport("encoder", "divprune", 0, [6, 4], [[1, 2, 3], [5, 6]])
INSIDE = StageReport("prefill", "fastv", 2, [3, 2], [[2], []])
PROMPT = PromptReport(0, 12, [[], []], [], stages=[ENCODER, INSIDE], computed=[15, 15, 11])


def shown(item: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(item)
    return console.export_text()


def ran(settings: str, rows: list[int]) -> PruneReport:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), rows)
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(settings))
    with torch.no_grad():
        model(**inputs, **passed(cache))
    return cache.report()


def cells(text: str, word: str) -> list[str]:
    [line] = (line for line in text.splitlines() if word in line)
    return [cell.strip() for cell in line.strip().strip("│").split("│")]


def test_the_table_of_a_row() -> None:
    text = shown(stage_table(PROMPT, 1))
    assert cells(text, "divprune") == ["encoder", "divprune", "before the text model", "4", "2", "50%"]
    assert cells(text, "fastv") == ["prefill", "fastv", "before layer 2", "2", "0", "0%"]
    # 20 tokens in 3 layers: 15 and the 5 that left before layer 0
    assert "41 of 60 tokens x layers computed (68%)" in text


def test_a_row_without_images() -> None:
    prompt = dataclasses.replace(PROMPT, stages=[StageReport("encoder", "divprune", 0, [6, 0], [[1], []])])
    assert cells(shown(stage_table(prompt, 1)), "divprune")[3:] == ["0", "0", ""]


def test_the_line_is_over_rows_and_prompts() -> None:
    report = ran("encoder_random:retention_rate=0.5+fastv:layer=1,retention_rate=0.5", [1])
    twice = dataclasses.replace(report, prompts=[PROMPT, PROMPT])
    assert stages_line(twice) == (
        "20 -> 10 vision tokens before the text model (divprune) -> 2 before layer 2 (fastv), "
        "68% of all tokens x layers computed"
    )
    assert stages_line(twice) in summary(twice)


@pytest.mark.parametrize("rows", [[2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        "encoder_random:retention_rate=0.5+uniform:retention_rate=0.5",
        "fastv:layer=1,retention_rate=0.6",
        "encoder_random:retention_rate=0.5+fastv:layer=1,retention_rate=0.6",
    ],
)
def test_shares_are_those_of_the_tokens(settings: str, rows: list[int]) -> None:
    report = ran(settings, rows)
    [prompt] = report.prompts
    inputs = TINY["llava"].inputs(tiny_model("llava"), rows)
    layers = tiny_model("llava").config.text_config.num_hidden_layers
    everything = int(inputs["attention_mask"].sum()) * layers
    left = sum((layers - stage.layer) * (sum(stage.tokens_in) - sum(stage.tokens_out)) for stage in prompt.stages)
    assert left > 0
    assert prompt.all_computed == everything
    assert prompt.computed_share == report.computed_share == (everything - left) / everything
    values = report_values(report)
    assert values["computed_share"] == report.computed_share
    [shown_prompt] = values["prompts"]
    assert shown_prompt["computed"] == prompt.computed
    assert [stage["tokens_out"] for stage in shown_prompt["stages"]] == [stage.tokens_out for stage in prompt.stages]
    assert "positions" not in shown_prompt["stages"][0]
    assert len(layer_tables(report)) == 2


def test_methods_of_the_cache_alone_show_nothing_new() -> None:
    report = ran("uniform:retention_rate=0.5", [2])
    assert stage_table(report.prompts[0]) is None
    assert stages_line(report) == ""
    assert len(layer_tables(report)) == 1
    assert "tokens x layers" not in summary(report)
    assert (report.computed_share, report.prompts[0].all_computed) == (1.0, 0)
    assert report_values(report)["prompts"][0]["stages"] == []
