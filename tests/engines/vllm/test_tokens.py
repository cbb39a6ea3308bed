# SPDX-License-Identifier: Apache-2.0
"""The tokens of answers, beside the engine without the plugin and transformers with a `PrunedCache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Request, run
from plphp import PLPHPConfig
from reference import Reference, in_blocks, requests, video_request

BLOCK = 32
SQUARE, WIDE, SMALL = (448, 448), (560, 280), (280, 336)
SINGLE = requests([[(*SQUARE, 1)], [(*WIDE, 2)], [(*SQUARE, 3)], [(*SMALL, 4)]])
SEVERAL = requests([[(*SQUARE, 5), (*WIDE, 6)], [(*SMALL, 7), (*SMALL, 8), (*SQUARE, 9)], [], [(*SQUARE, 1)]])
UNIFORM = {"method": "uniform"}
KEEP_ALL = {"retention_rate": 1.0}
# Thresholds between the layers of the tiny model, so that all three classes occur.
PLPHP = {"retention_rate": 0.4, "retention_delta": 0.3, "attentive_threshold": 0.9, "indifferent_threshold": 0.75}
BFLOAT16 = {"dtype": "bfloat16"}
CHUNKED = {"max_num_batched_tokens": 160, "max_num_seqs": 4}


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def expected(reference: Reference, some: list[Request], settings: dict[str, Any]) -> tuple[list[list[int]], list[Any]]:
    """Answers of transformers with the same rates, and their reports."""
    config = PLPHPConfig.from_dict(settings)
    rounded = PLPHPConfig.from_dict({**settings, "method": in_blocks(config.method, BLOCK)})
    answers = [reference.answer(one, rounded) for one in some]
    return [tokens for tokens, _ in answers], [report for _, report in answers]


def kept(report: Any) -> list[float]:
    """Vision tokens that each layer keeps, of a report on one row."""
    layers = [layer.rows[0].kept for layer in report.prompts[0].layers]
    return [sum(heads) / len(heads) for heads in layers]


def check(found: dict[str, Any], reference: Reference, some: list[Request], settings: dict[str, Any]) -> None:
    """Equal tokens and equal numbers of kept entries for each request."""
    tokens, reports = expected(reference, some, settings)
    assert found["prompts"] == [reference.inputs(one)["input_ids"][0].tolist() for one in some]
    assert found["tokens"] == tokens
    for number, (one, report) in enumerate(zip(some, reports, strict=True)):
        if one["images"] or one.get("videos"):
            assert found["pruned"][str(number)][-1]["kept"] == kept(report)
        else:
            assert str(number) not in found["pruned"]
    assert found["free_now"] == found["total"]


@pytest.fixture(scope="session")
def unpruned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The engine without the plugin."""
    return run(tmp_path_factory.mktemp("off"), checkpoint, requests=SINGLE + SEVERAL)


def test_the_engine_without_the_plugin_is_transformers(unpruned: dict[str, Any], reference: Reference) -> None:
    assert unpruned["tokens"] == [reference.answer(one)[0] for one in SINGLE + SEVERAL]
    assert not unpruned["pruned"]


def test_keeping_all_is_the_engine_without_the_plugin(
    checkpoint: Path, tmp_path: Path, unpruned: dict[str, Any]
) -> None:
    found = run(tmp_path, checkpoint, requests=SINGLE + SEVERAL, settings=KEEP_ALL)
    assert found["tokens"] == unpruned["tokens"]
    assert {block for one in found["pruned"].values() for told in one for block in told["blocks"]} == {0}


@pytest.mark.parametrize(
    "settings",
    [
        PLPHP,
        pytest.param({"method": "uniform", "retention_rate": 0.3}, marks=pytest.mark.thorough),
        pytest.param({"retention_rate": 0.4, "target_retention": 0.4}, marks=pytest.mark.thorough),
        pytest.param({"method": "uniform", "retention_rate": 0.1, "exempt_layers": [0]}, marks=pytest.mark.thorough),
    ],
    ids=["plphp", "uniform", "target", "exempt"],
)
def test_pruned_answers_are_those_of_transformers(
    checkpoint: Path, tmp_path: Path, reference: Reference, unpruned: dict[str, Any], settings: dict[str, Any]
) -> None:
    found = run(tmp_path, checkpoint, requests=SINGLE + SEVERAL, settings=settings)
    check(found, reference, SINGLE + SEVERAL, settings)
    differs = [a != b for a, b in zip(found["tokens"], unpruned["tokens"], strict=True)]
    assert sum(differs) >= 5, "pruning has to change answers, or the comparison says nothing"


@pytest.mark.thorough
def test_all_classes_occur(checkpoint: Path, tmp_path: Path) -> None:
    found = run(tmp_path, checkpoint, requests=SINGLE, settings=PLPHP)
    assert {name for one in found["pruned"].values() for told in one for name in told["classes"]} == {
        "attentive",
        "balanced",
        "indifferent",
    }


def test_prompts_in_chunks(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    found = run(tmp_path, checkpoint, requests=SINGLE + SEVERAL, settings=PLPHP, engine=CHUNKED)
    check(found, reference, SINGLE + SEVERAL, PLPHP)


@pytest.mark.thorough
def test_answers_after_a_preemption_are_the_same(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    some = requests([[(*SQUARE, number)] for number in range(8)], max_tokens=150)
    engine = {"num_gpu_blocks_override": 4 * 26 + 1, "max_model_len": 800}
    found = run(tmp_path, checkpoint, requests=some, settings=PLPHP, engine=engine)
    assert found["preempted"] > 0
    check(found, reference, some, PLPHP)


@pytest.mark.thorough
def test_worker_and_engine_in_processes_of_their_own(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    engine = {"distributed_executor_backend": "mp"}
    found = run(tmp_path, checkpoint, environment, requests=SINGLE, settings=PLPHP, engine=engine)
    assert found["tokens"] == expected(reference, SINGLE, PLPHP)[0]
    assert found["log"].count("blocks freed") == len(SINGLE)


@pytest.mark.thorough
def test_a_compiled_model(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    found = run(tmp_path, checkpoint, requests=SINGLE, settings=PLPHP, engine={"enforce_eager": False})
    assert "'enforce_eager': True" not in found["log"]
    check(found, reference, SINGLE, PLPHP)


@pytest.mark.thorough
def test_two_ranks_share_the_heads(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    """Each has one of the two KV heads; rates, and the ranking of methods that look at all heads, are of both."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    engine = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}
    found = run(tmp_path, checkpoint, environment, requests=SINGLE, settings=PLPHP, engine=engine)
    assert found["tokens"] == expected(reference, SINGLE, PLPHP)[0]
    assert found["log"].count("blocks freed") == len(SINGLE)


@pytest.mark.thorough
def test_settings_from_the_environment(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    environment = {"PLPHP_VLLM_CONFIG": '{"method": "uniform", "retention_rate": 0.3}'}
    found = run(tmp_path, checkpoint, environment, requests=SINGLE[:1], connector=True)
    check(found, reference, SINGLE[:1], {"method": "uniform", "retention_rate": 0.3})


@pytest.mark.thorough
def test_keeping_all_in_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    off = run(tmp_path, checkpoint, requests=SINGLE, engine=BFLOAT16)
    found = run(tmp_path, checkpoint, requests=SINGLE, engine=BFLOAT16, settings=KEEP_ALL)
    assert found["tokens"] == off["tokens"]


@pytest.mark.thorough
def test_pruned_in_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    """The engine rounds elsewhere than transformers, so that random weights may answer otherwise where logits are near.

    Where the answers part, transformers' logits of both tokens have to be nearly equal; they spread by 1, and bfloat16
    holds logits of 4 to 0.03. `test_the_bundled_model.py` compares the answers of a trained model.
    """
    settings = {"retention_rate": 0.3, **UNIFORM}
    found = run(tmp_path, checkpoint, requests=SINGLE, engine=BFLOAT16, settings=settings)
    # 256 tokens: 179 leave. 200: 140. 120: 84.
    assert [found["pruned"][str(number)][-1]["blocks"] for number in range(4)] == [[5] * 4, [4] * 4, [5] * 4, [2] * 4]
    assert found["free_now"] == found["total"]
    rounded = PLPHPConfig.from_dict({**settings, "method": in_blocks("uniform", BLOCK)})
    reference = Reference(checkpoint, torch.bfloat16)
    for one, tokens in zip(SINGLE, found["tokens"], strict=True):
        assert len(tokens) == 24
        assert reference.gap(one, rounded, tokens) < 0.1


def test_videos(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    some = [
        video_request([(4, 224, 168, 1)]),
        video_request([(4, 280, 280, 2)], [(*SQUARE, 3)]),
        video_request([(4, 168, 224, 4), (2, 280, 280, 5)]),
    ]
    engine = {"limit_mm_per_prompt": {"image": 1, "video": 2}, **CHUNKED}
    found = run(tmp_path, checkpoint, requests=some, settings=PLPHP, engine=engine)
    check(found, reference, some, PLPHP)
    assert all(sum(told[-1]["blocks"]) for told in found["pruned"].values())


def test_flash_attention_with_emulated_kernels(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    engine = {**CHUNKED, "block_size": BLOCK}
    found = run(tmp_path, checkpoint, requests=SINGLE + SEVERAL, settings=PLPHP, engine=engine, flash=True)
    assert "FlashAttention version 2" in found["log"]
    check(found, reference, SINGLE + SEVERAL, PLPHP)
