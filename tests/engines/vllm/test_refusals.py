# SPDX-License-Identifier: Apache-2.0
"""What the plugin refuses when an engine starts, by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm

from engine import EngineError, run
from plphp.engines.vllm.refusals import refuse_unsupported
from plphp.errors import BackendUnavailableError, ConfigError, PLPHPError, UnsupportedFeatureError
from reference import requests

SOME = requests([[(280, 336, 1)]], max_tokens=1)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"engine": {"enable_prefix_caching": True}}, "--no-enable-prefix-caching"),
        pytest.param({"connector": False}, "add --kv-transfer-config", marks=pytest.mark.thorough),
        pytest.param({"settings": {"retention": 0.5}}, "Unknown setting 'retention'", marks=pytest.mark.thorough),
        pytest.param({"settings": None, "connector": True}, "no settings", marks=pytest.mark.thorough),
    ],
    ids=["prefix-caching", "no-connector", "unknown-setting", "no-settings"],
)
def test_an_engine_does_not_start(checkpoint: Path, tmp_path: Path, job: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        run(tmp_path, checkpoint, requests=SOME, **{"settings": {}, **job})


QUERY_BANK = {"method": "query_bank", "heads": "equal", "options": {"bank": "bundled"}}
OWN_BANK = {"method": "query_bank", "heads": "equal"}


def text_config(num_hidden_layers: int = 4, num_attention_heads: int = 8, **more: Any) -> SimpleNamespace:
    """Of a text model."""
    return SimpleNamespace(
        num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads, model_type="tiny", **more
    )


def engine_config(**changes: Any) -> SimpleNamespace:
    """What `refuse_unsupported` looks at, of an engine that it lets pass."""
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "enable_dbo": False,
        },
        "scheduler_config": {"async_scheduling": False, "disable_hybrid_kv_cache_manager": False},
        "cache_config": {"enable_prefix_caching": False, "cache_dtype": "auto", "block_size": 32},
        "kv_transfer_config": {"kv_connector": "PLPHPConnector", "kv_role": "kv_producer", "is_kv_consumer": False},
        "model_config": {
            "model": "tiny",
            "hf_text_config": text_config(),
            "is_multimodal_model": True,
            "runner_type": "generate",
            "is_encoder_decoder": False,
            "use_mla": False,
            "is_mm_prefix_lm": False,
            "get_total_num_kv_heads": lambda: 2,
            "get_head_size": lambda: 32,
            "get_sliding_window": lambda: None,
        },
    }
    parts["compilation_config"] = {"cudagraph_mode": SimpleNamespace(has_full_cudagraphs=lambda: False)}
    whole = {"speculative_config": None, "use_v2_model_runner": False, "additional_config": {"plphp": {}}}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            parts[part][key] = value
        else:
            whole[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()}, **whole)


def test_two_ranks_pass() -> None:
    refuse_unsupported(engine_config(parallel_config__tensor_parallel_size=2))


@pytest.mark.parametrize("method", ["mixkv", "tgv_kv"])
def test_rivals_pass_in_one_process(method: str) -> None:
    refuse_unsupported(engine_config(additional_config={"plphp": {"method": method}}))


def test_the_rest_passes() -> None:
    chain = refuse_unsupported(engine_config())
    assert list(chain.stages) == ["kv"]
    assert chain.kv.method == "plphp"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parallel_config__tensor_parallel_size": 4}, "tensor parallelism of 4 and 2 KV heads"),
        (
            {
                "parallel_config__tensor_parallel_size": 2,
                "additional_config": {"plphp": QUERY_BANK},
                "model_config__hf_text_config": text_config(num_hidden_layers=8),
            },
            "tensor parallelism and a query bank",
        ),
        (
            {"additional_config": {"plphp": QUERY_BANK}, "model_config__hf_text_config": text_config(8, 4)},
            "8 query heads of dimension 32, and this model has 4",
        ),
        (
            {"parallel_config__tensor_parallel_size": 2, "additional_config": {"plphp": OWN_BANK}},
            "tensor parallelism and a query bank",
        ),
        (
            {
                "additional_config": {"plphp": OWN_BANK},
                "model_config__hf_text_config": text_config(rope_parameters={"rope_type": "longrope"}),
            },
            "kind 'longrope'",
        ),
        (
            {"additional_config": {"plphp": {**OWN_BANK, "options": {"folder": "/dev/null/banks"}}}},
            "Cannot make the folder /dev/null/banks",
        ),
        (
            {"additional_config": {"plphp": {**QUERY_BANK, "tiers": "t10"}}},
            "in few bits in vLLM, as tiers=t10 of the method 'query_bank'.*block tables.*read no codes",
        ),
        (
            {"additional_config": {"plphp": {"method": "plphp", "vision_budget": "1GB"}}},
            "does not let images fade in vLLM, as vision_budget=1GB.*another request",
        ),
        ({"additional_config": {"plphp": {"method": "quantized"}}}, "tiers=c3 of the method 'quantized'"),
        ({"additional_config": {"plphp": {"method": "snapkv", "heads": "ragged"}}}, "'snapkv'.*Set heads=equal"),
        ({"additional_config": {"plphp": {"method": "query_bank"}}}, "'query_bank'.*Set heads=equal"),
        ({"additional_config": {"plphp": {"method": "prompt_queries"}}}, "'prompt_queries'.*Set heads=equal"),
        (
            {"additional_config": {"plphp": {"method": "prompt_queries", "heads": "equal"}}},
            "the method 'prompt_queries' in vLLM, which turns queries",
        ),
        (
            {"additional_config": {"plphp": {"method": "expected_attention"}}},
            "the method 'expected_attention' in vLLM, which turns queries",
        ),
        (
            {"parallel_config__tensor_parallel_size": 2, "additional_config": {"plphp": {"method": "mixkv"}}},
            "'mixkv', which asks for the keys, values and queries of all heads",
        ),
        (
            {"parallel_config__tensor_parallel_size": 2, "additional_config": {"plphp": {"method": "tgv_kv"}}},
            "'tgv_kv', which asks for the attention of all heads between its query rows",
        ),
        ({"cache_config__block_size": 16}, "multiple of 32"),
        ({"model_config__get_sliding_window": lambda: 64}, "sliding window"),
        ({"model_config__hf_text_config": text_config(attn_logit_softcapping=30.0)}, "soft cap"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism of 2"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_dbo": True}, "--enable-dbo"),
        ({"scheduler_config__async_scheduling": True}, "--no-async-scheduling"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"cache_config__cache_dtype": "fp8"}, "'fp8'"),
        ({"kv_transfer_config__kv_connector": "OffloadingConnector"}, "got 'OffloadingConnector'"),
        ({"kv_transfer_config__is_kv_consumer": True}, "clients of a KV consumer"),
        (
            {"compilation_config__cudagraph_mode": SimpleNamespace(has_full_cudagraphs=lambda: True)},
            "cudagraph_mode.*PIECEWISE",
        ),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"model_config__use_mla": True}, "multi-head latent attention"),
        ({"model_config__is_multimodal_model": False}, "nothing to prune"),
        ({"model_config__is_mm_prefix_lm": True}, "both directions"),
        ({"model_config__is_encoder_decoder": True}, "encoder"),
        ({"model_config__runner_type": "pooling"}, "does not generate"),
        (
            {"model_config__hf_text_config": text_config(layer_types=["full_attention", "sliding_attention"])},
            "no full attention",
        ),
        ({"additional_config": {"plphp": {"method": "fastv"}}}, "'fastv'"),
        ({"additional_config": {"plphp": {"method": "divprune"}}}, "'divprune' takes tokens out before the text model"),
        ({"additional_config": {"plphp": {"method": "oracle"}}}, "'oracle'"),
        ({"additional_config": {"plphp": {"exempt_layers": [4]}}}, "layers 0 to 3"),
        ({"additional_config": {"plphp": [1]}}, "table of settings"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PLPHPError, match=words):
        refuse_unsupported(engine_config(**change))


def test_an_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(BackendUnavailableError, match=r"0\.32\.x, and this is 0\.33\.0"):
        refuse_unsupported(engine_config())


def test_settings_in_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLPHP_VLLM_CONFIG", "{}")
    with pytest.raises(ConfigError, match="leave one of them out"):
        refuse_unsupported(engine_config())


def test_settings_that_are_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLPHP_VLLM_CONFIG", "{retention")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        refuse_unsupported(engine_config(additional_config={}))


@pytest.mark.parametrize(
    ("cuda", "allowed", "words"),
    [(False, "1", "the platform"), (True, "0", "PLPHP_VLLM_UNTESTED=1"), (True, "1", None)],
    ids=["neither", "cuda", "allowed"],
)
def test_other_platforms(monkeypatch: pytest.MonkeyPatch, cuda: bool, allowed: str, words: str | None) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: cuda)
    monkeypatch.setenv("PLPHP_VLLM_UNTESTED", allowed)
    if words is None:
        refuse_unsupported(engine_config())
        return
    with pytest.raises(UnsupportedFeatureError, match=words):
        refuse_unsupported(engine_config())
