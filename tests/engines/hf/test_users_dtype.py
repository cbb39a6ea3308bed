# SPDX-License-Identifier: Apache-2.0
"""The invariants in the dtypes that users run, with the kernels that they get there.

Float noise differs from processor to processor, so that no bound here is a number: the truth is the same model in
float64, and what stock transformers is off from it in the same test says what noise is. Tokens are those of the pruned
run, and so are the entries that the truth masks: a near tie is no error. Models with routers are left to the tests in
float64, as with them a near tie sends a token to another expert.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from invariants import evicted_entries_masked, generate, last_row_attention, pruned
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from precision import float64, max_difference
from test_invariants import config
from tiny_models import TINY, tiny_model


def wide_llava() -> Any:
    config = TINY["llava"].config()
    config.text_config.head_dim = 32
    return config


MODELS = {name: TINY[name] for name in ("llava", "qwen2-vl", "gemma3", "idefics3")}
MODELS["llava-wide"] = dataclasses.replace(TINY["llava"], config=wide_llava)
"""With heads that are wide enough for the C++ kernel."""
FAMILIES = tuple(MODELS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARGIN = 4
"""Times the noise of stock: the largest of some hundred random numbers varies by a factor of 2."""
METHODS = ("plphp", "snapkv", "recall_rank", "expected_attention", "tgv_kv", "mixkv", "prompt_queries")
ROWS = (2, 0, 1)


@functools.cache
def model_of(family: str, dtype: torch.dtype) -> Any:
    return MODELS[family].build(dtype=dtype)


@functools.cache
def twin(family: str, dtype: torch.dtype) -> Any:
    """The same weights in float64, as the dtype has rounded them."""
    return copy.deepcopy(model_of(family, dtype)).double()


def inputs_of(family: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of the model, and the same pixels in float64."""
    inputs = MODELS[family].inputs(model_of(family, dtype), ROWS)
    return inputs, doubled(inputs)


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}


class Forced(LogitsProcessor):
    """Goes on with given tokens, so that the logits of two runs are of the same text."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.sequences[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def forced(model: Any, inputs: dict[str, Any], output: Any, **kwargs: Any) -> Any:
    return generate(model, inputs, logits_processor=[Forced(output.sequences)], **kwargs)


def error(output: Any, truth: Any) -> float:
    """Largest difference of the logits."""
    assert torch.equal(output.sequences, truth.sequences)
    return max(max_difference(a, b) for a, b in zip(output.logits, truth.logits, strict=True))


CASES = [(family, dtype, "plphp") for family in FAMILIES for dtype in DTYPES]
CASES += [("llava", dtype, method) for dtype in DTYPES for method in METHODS[1:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_retention_is_stock_generate(family: str, dtype: torch.dtype) -> None:
    model, (inputs, same) = model_of(family, dtype), inputs_of(family, dtype)
    output, _ = pruned(model, inputs, PLPHPConfig(retention_rate=1.0))
    with float64():
        truth = forced(twin(family, dtype), same, output)
    noise = error(forced(model, inputs, output), truth)
    assert error(output, truth) < MARGIN * noise


@pytest.mark.parametrize(("family", "dtype", "method"), CASES, ids=str)
def test_compacted_cache_is_full_cache_with_evicted_entries_masked(
    family: str, dtype: torch.dtype, method: str
) -> None:
    model, (inputs, same) = model_of(family, dtype), inputs_of(family, dtype)
    output, report = pruned(model, inputs, config(method, retention_rate=0.3))
    with float64(), evicted_entries_masked(twin(family, dtype), report):
        truth = forced(twin(family, dtype), same, output)
    with evicted_entries_masked(model, report):
        noise = error(forced(model, inputs, output), truth)
    assert error(output, truth) < MARGIN * noise
    if dtype is torch.float32:  # what pruning changes is there up to a million times the noise
        assert error(forced(model, inputs, output), truth) > 1000 * noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_turn_is_one_with_evicted_entries_masked(family: str, dtype: torch.dtype) -> None:
    model, tiny, (inputs, same) = model_of(family, dtype), MODELS[family], inputs_of(family, dtype)
    twin(family, dtype)  # a model is not copied while a cache is in use on it
    cache = PrunedCache.for_inputs(model, inputs, config("plphp", retention_rate=0.3))
    first = generate(model, inputs, **passed(cache))
    turn = tiny.second_turn(model, inputs, first.sequences, with_image=tiny.stock.second_turn_image)
    second = generate(model, turn, **passed(cache))
    report = cache.report()
    assert {layer.prefix.keys.dtype for layer in cache.layers if hasattr(layer, "prefix")} == {dtype}

    def masked(own: Any, prompt: dict[str, Any], later: dict[str, Any]) -> Any:
        stock = DynamicCache(config=own.config.get_text_config())
        with evicted_entries_masked(own, report):
            forced(own, prompt, first, **passed(stock))
            return forced(own, later, second, **passed(stock))

    with float64():
        truth = masked(twin(family, dtype), same, doubled(turn))
    assert error(second, truth) < MARGIN * error(masked(model, inputs, turn), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "idefics3"])
def test_kept_entries_are_the_top_scores(family: str, dtype: torch.dtype) -> None:
    """But for ties within the noise of attention weights in this dtype."""
    model, (inputs, same) = model_of(family, dtype), inputs_of(family, dtype)
    with float64():
        truth = last_row_attention(twin(family, dtype), same)
    stock = last_row_attention(model, inputs)
    heads = model.config.get_text_config().num_key_value_heads
    _, report = pruned(model, inputs, config("plphp", retention_rate=0.3))
    (prompt,) = report.prompts
    for layer, exact, rounded in zip(prompt.layers, truth, stock, strict=True):
        noise = max_difference(rounded, exact)
        for row in (0, 2):
            vision = [position for image in prompt.images[row] for position in image.positions]
            share, seen = (one[row].double()[:, vision].sum(-1) for one in (exact, rounded))
            assert abs(layer.rows[row].vision_score - share.mean().item()) < MARGIN * max_difference(seen, share)
            for head, kept in enumerate(layer.rows[row].kept_positions):
                score = exact[row].unflatten(0, (heads, -1))[head].mean(0)
                evicted = sorted(set(vision) - set(kept))
                assert score[kept].min() > score[evicted].max() - MARGIN * noise


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("line", ["vl_cache:p=0.3,retention_rate=0.4", "random:retention_rate=0.4", "plphp", "zipvl"])
def test_the_default_dtype_of_torch_changes_nothing(line: str) -> None:
    """Scripts set it to load a model in half precision."""
    model, tiny, settings = tiny_model("llava"), TINY["llava"], PLPHPConfig.parse(line)
    inputs = tiny.inputs(model, [2, 1])
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        cache = PrunedCache.for_inputs(model, inputs, settings)
        turn = tiny.second_turn(model, inputs, inputs["input_ids"], with_image=True)
        with default_dtype(dtype), torch.no_grad():
            model(**inputs, **passed(cache))
            generate(model, turn, **passed(cache), max_new_tokens=1)
        runs.append([layer for prompt in cache.report().prompts for layer in prompt.layers])
    assert len(runs[0]) == 6
    assert runs[0] == runs[1]
