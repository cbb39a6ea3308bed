# SPDX-License-Identifier: Apache-2.0
"""``plphp estimate``: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import error, ok

import tiny_hub
from plphp.inputs.loading import empty_model
from plphp.studies.accelerators import accelerator
from plphp.studies.estimate import Workload, estimate
from plphp.studies.model_cost import model_cost
from plphp.studies.schedule import Schedule


def values(*arguments: object) -> dict[str, Any]:
    return json.loads(ok("estimate", "--json", *arguments))


def test_the_processor_says_the_vision_tokens(folder: Path) -> None:
    figures = values("--model", folder, "--images", 3)
    assert figures["workload"]["vision_tokens"] == 3 * tiny_hub.IMAGE_TOKENS
    assert figures["unpruned"]["fits"] is None
    assert values("--config", folder, "--images", 3) == figures


def test_the_figures_are_those_of_the_functions(folder: Path) -> None:
    gpu = accelerator("1GB,50GB/s")
    figures = values(
        *("--model", folder, "--tokens-per-image", 700, "--images", 10, "--text-tokens", 40, "--new-tokens", 9),
        *("--batch", 6, "--target-retention", 0.25, "--gpu", "1GB,50GB/s", "--reserve", 0.2, "--dtype", "bfloat16"),
    )
    cost = model_cost(empty_model(folder, "bfloat16"))
    workload = Workload(7000, 40, 9, 6)
    for name, rate in (("unpruned", 1.0), ("pruned", 0.25)):
        assert figures[name] == vars(estimate(cost, workload, rate, gpu, 0.2))
    assert figures["step_weight_bytes"] == cost.step_weight_bytes
    assert figures["dtype"] == "bfloat16"


def test_the_table(folder: Path) -> None:
    shown = ok("estimate", "--model", folder, "--gpu", "H200", "--tokens-per-image", 7000, "--target-retention", 0.4)
    for text in ("7000 vision, 100 text and 256 new tokens, batch 1", "retention 0.4", "largest batch", "0.43"):
        assert text in shown
    assert "largest batch" not in ok("estimate", "--model", folder)
    assert ok("estimate", "--gpu", "1MB,1GB/s").count("no ") >= 2  # not even the weights fit


def test_what_leaves_early(folder: Path) -> None:
    size = ("--model", folder, "--tokens-per-image", 40, "--images", 3)
    asked = (*size, "--encoder-retention", 0.5, "--prefill", "1:.2")
    figures = values(*asked, "--gpu", "H100")
    schedule = Schedule(0.5, {1: 0.2}, 3)
    cost = model_cost(empty_model(folder, "auto"))
    expected = estimate(cost, Workload(120, 100), 1.0, accelerator("H100"), schedule=schedule)
    assert figures["pruned"] == vars(expected)
    slow = values(*asked, "--gpu", "1GB,1TB/s,1TFLOP/s")
    assert slow["pruned"]["first_token_seconds"] < slow["unpruned"]["first_token_seconds"]
    assert values(*asked, "--target-retention", 0.3)["pruned"]["retention"] == 0.3
    shown = ok("estimate", *asked, "--gpu", "H100")
    for text in ("encoder 0.5, prefill 1:0.2", "tokens x layers of prefill", "first token takes at least"):
        assert text in shown
    assert "tower is not counted: --tokens-per-image" in shown
    assert "such as 2:0.5" in error("estimate", "--prefill", "2")
    assert "between 0 and 1" in error("estimate", "--prefill", "2:7")
    assert "got 1.5" in error("estimate", "--encoder-retention", 1.5)
    assert "names others" in error("estimate", "--prefill", "99:0.5", "--model", folder)


def test_attention_among_some_tokens(folder: Path) -> None:
    asked = ("--model", folder, "--tokens-per-image", 4000, "--attention-retention", 0.25)
    cost, workload = model_cost(empty_model(folder, "auto")), Workload(4000, 100)
    expected = estimate(cost, workload, 0.25, accelerator("H100"), schedule=Schedule(attention=0.25))
    figures = values(*asked, "--gpu", "H100")
    assert figures["pruned"] == vars(expected)
    assert figures["pruned"]["computed"] == figures["unpruned"]["computed"]
    assert figures["pruned"]["prefill_flops"] < figures["unpruned"]["prefill_flops"]
    assert "retention 0.25, attention 0.25" in ok("estimate", *asked)
    assert "says how much is kept, as well as" in error("estimate", *asked, "--target-retention", 0.5)
    assert "got 1.5" in error("estimate", "--attention-retention", 1.5)


def test_the_tower_and_the_peak(folder: Path) -> None:
    figures = values("--model", folder, "--gpu", "T4", "--images", 2)
    assert figures["unpruned"]["tower_flops"] == 2 * values("--model", folder)["unpruned"]["tower_flops"] > 0
    assert figures["unpruned"]["first_token_seconds"] is None
    shown = ok("estimate", "--model", folder, "--gpu", "T4")
    assert "prefill at least, vision tower" in shown
    assert "The peak of T4 in bf16 is not known" in shown
    assert "first token" not in shown.split("The peak of T4")[0]
    assert "not known" not in ok("estimate", "--model", folder, "--gpu", "16GB,320GB/s,65TFLOP/s")


def test_a_ladder() -> None:
    asked = ("--tokens-per-image", 7000, "--tiers", "t10", "--read", 0.2, "--gpu", "H200")
    figures = values(*asked)["pruned"]
    cost = model_cost(empty_model(None, "auto"))
    assert figures == vars(estimate(cost, Workload(7000, 100), 1.0, accelerator("H200"), tiers="t10", read=0.2))
    assert (figures["tiers"], figures["read"], figures["retention"]) == ("t10", 0.2, 0.76)
    shown = ok("estimate", *asked)
    assert "tiers t10, 0.2 read" in shown
    assert "codebooks of the model" in shown
    assert "leave target_retention out" in error("estimate", "--tiers", "t10", "--target-retention", 0.4)
    assert "Unknown ladder" in error("estimate", "--tiers", "t7.4")


def test_mistakes_end_as_one_line(folder: Path, tmp_path: Path) -> None:
    assert "WIDTHxHEIGHT in pixels, such as 1024x768, got '640'" in error("estimate", "--image-size", "640")
    assert "WIDTHxHEIGHT" in error("estimate", "--image-size", "0x5")
    assert "Did you mean 'H200'" in error("estimate", "--gpu", "H20")
    assert "There is no model folder" in error("estimate", "--model", tmp_path / "none")
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "With --tokens-per-image no processor is needed." in error("estimate", "--model", tmp_path)
    assert "dtype must be one of" in error("estimate", "--dtype", "int4")
