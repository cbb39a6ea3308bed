# SPDX-License-Identifier: Apache-2.0
"""Keys, values and queries of different dtypes, as under ``torch.autocast`` of a float32 model.

Rotary embeddings leave queries and keys in float32 there, while values come out of their projection in bfloat16. What
is compared under autocast is compared with what stock transformers gives under the same, by how far that is from
float32. Where states of different dtypes can be had in a float64 model, a mistake is many orders above the noise.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from test_graph import Recorder
from torch import Tensor
from transformers import DynamicCache

import plphp
from invariants import evicted_entries_masked, generate, live_bytes, pruned
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf import dispatch, generation, graph
from plphp.engines.hf.cache_argument import NAME, cache_in, passed
from plphp.kernels import _decode_cpp
from tiny_models import TINY, tiny_model

EVERYTHING = PLPHPConfig(retention_rate=1.0, retention_delta=0.0)
SETTINGS = PLPHPConfig(retention_rate=0.4)
STEPS = 5
EXPERTS = ("qwen3-vl-moe", "qwen3.5-moe", "glm4v-moe", "llama4")
"""Noise sends some tokens to other experts here, so that logits are far apart without a mistake."""


def autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else nullcontext()


def drafted(model: Any, inputs: dict[str, Any], draft: Tensor, **kwargs: Any) -> Tensor:
    """Logits [batch, steps, vocab] of an answer whose tokens, [batch, steps], do not depend on them."""

    def forced(_: Any, logits: Tensor) -> Tensor:
        step = forced.step
        forced.step += 1
        return torch.full_like(logits, -torch.inf).scatter(1, draft[:, step, None], 0.0)

    forced.step = 0
    own = {"max_new_tokens": draft.shape[1], "logits_processor": [forced], **kwargs}
    return torch.stack(generate(model, inputs, **own).logits, dim=1).float()


def spread(first: Tensor, second: Tensor) -> float:
    """Root mean square of a difference."""
    return (first - second).square().mean().sqrt().item()


def draft_for(inputs: dict[str, Any]) -> Tensor:
    rows = len(inputs["input_ids"])
    return torch.randint(3, 96, (rows, STEPS), generator=torch.Generator().manual_seed(2))


def by_stock(run: Callable[[], Tensor]) -> Tensor:
    """What stock transformers gives; skips where it stops by itself.

    SmolVLM with several images does under autocast in 5.17, and values in another dtype than keys do in 5.24, where a
    dynamic cache no longer casts them.
    """
    try:
        return run()
    except RuntimeError as error:
        pytest.skip(f"stock stops: {error}")


def dynamic_bytes(model: Any, inputs: dict[str, Any], draft: Tensor) -> int:
    cache = DynamicCache(config=model.config.get_text_config())
    drafted(model, inputs, draft, **passed(cache))
    return held_bytes(cache)


def held_bytes(cache: Any) -> int:
    """Bytes of all that a cache holds, the states of linear attention included."""
    states = [
        state
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for state in getattr(layer, name, {}).values()
    ]
    return live_bytes(cache) + sum(one.untyped_storage().nbytes() for one in states if isinstance(one, Tensor))


@pytest.mark.parametrize("family", TINY)
def test_an_unpruned_cache_is_as_stock_under_autocast(family: str) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, (1, 2))
    draft = draft_for(inputs)
    exact = drafted(model, inputs, draft)
    with autocast():
        stock = by_stock(lambda: drafted(model, inputs, draft))
        cache = PrunedCache.for_inputs(model, inputs, EVERYTHING)
        found = drafted(model, inputs, draft, **passed(cache))
        assert cache.full_nbytes == dynamic_bytes(model, inputs, draft)
    assert cache.nbytes == cache.report().kv_bytes == held_bytes(cache)
    assert torch.equal(found[:, 0], stock[:, 0])
    assert found.isfinite().all()
    if family not in EXPERTS:
        assert spread(found, stock) < 3 * spread(stock, exact)


@pytest.mark.parametrize("family", [name for name in TINY if name not in EXPERTS])
def test_what_is_left_is_read_as_a_full_cache_with_a_mask_under_autocast(family: str) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, (2, 1))
    draft = draft_for(inputs)
    with autocast():
        stock = by_stock(lambda: drafted(model, inputs, draft))
        cache = PrunedCache.for_inputs(model, inputs, SETTINGS)
        found = drafted(model, inputs, draft, **passed(cache))
        with evicted_entries_masked(model, cache.report()):
            expected = drafted(model, inputs, draft)
    assert spread(found, expected) < 3 * spread(stock, drafted(model, inputs, draft))


@contextmanager
def values_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let the text layers of a model project values in another dtype, as autocast does."""
    names = [one for name, one in model.get_decoder().named_modules() if name.endswith("v_proj")]
    assert names
    hooks = [one.register_forward_hook(lambda *found: found[-1].to(dtype)) for one in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", [name for name in TINY if name not in EXPERTS[:3]])  # torch's have no float64
def test_narrower_values_in_float64(family: str) -> None:
    """No number is rounded to fewer bits than it came with, and none is lost."""
    model = tiny_model(family, torch.float64)
    inputs = TINY[family].inputs(model, (1, 2))
    draft = draft_for(inputs)
    with values_in(model, torch.float32):
        stock = by_stock(lambda: drafted64(model, inputs, draft))
        cache = PrunedCache.for_inputs(model, inputs, EVERYTHING)
        found = drafted64(model, inputs, draft, **passed(cache))
        assert (found - stock).abs().max() < 1e-9
        assert cache.full_nbytes == dynamic_bytes(model, inputs, draft)
        cache = PrunedCache.for_inputs(model, inputs, SETTINGS)
        found = drafted64(model, inputs, draft, **passed(cache))
        assert cache.nbytes == held_bytes(cache)
        assert all(one.dtypes == (torch.float64, torch.float32) for one in cache._pruned.values())
        with evicted_entries_masked(model, cache.report()):
            expected = drafted64(model, inputs, draft)
    assert (found - expected).abs().max() < 1e-9


def drafted64(model: Any, inputs: dict[str, Any], draft: Tensor, **kwargs: Any) -> Tensor:
    """Logits of prompt and draft [batch, 1 + steps, vocab] in the model's dtype: ``generate`` gives float32."""
    cache = kwargs.pop(NAME, None) or DynamicCache(config=model.config.get_text_config())
    taken: list[Tensor] = []
    hook = model.register_forward_hook(lambda *call: taken.append(call[-1].logits[:, -1]))
    try:
        drafted(model, inputs, draft, **passed(cache))
    finally:
        hook.remove()
    return torch.stack(taken, dim=1)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3", "cohere2-vision"])
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("first", [True, False], ids=["autocast first", "autocast second"])
def test_turns_inside_and_outside_of_autocast(family: str, image: bool, first: bool) -> None:
    """What is held takes the wider dtype, as concatenation gives it in a dynamic cache."""
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, (1, 2))
    ids = torch.cat([inputs["input_ids"], draft_for(inputs)[:, :1]], dim=1)  # one answer token, not read by itself
    second = TINY[family].second_turn(model, inputs, ids, with_image=image)
    draft = draft_for(inputs)

    def conversation(cache: Any, forced: bool | None = None) -> Tensor:
        with autocast(first if forced is None else forced):
            drafted(model, inputs, draft[:, :1], **passed(cache))
        with autocast(not first if forced is None else forced):
            return drafted(model, second, draft, **passed(cache))

    def dynamic() -> DynamicCache:
        return DynamicCache(config=model.config.get_text_config())

    if image and not TINY[family].stock.second_turn_image:
        pytest.skip("stock generate gives wrong answers here, or none")
    expected, exact = conversation(dynamic()), conversation(dynamic(), forced=False)
    cache = PrunedCache.for_inputs(model, inputs, EVERYTHING)
    found = conversation(cache)
    assert spread(found, expected) < (2 if not first else 0.02) * spread(expected, exact)
    assert cache.nbytes == live_bytes(cache)
    assert all(one.dtypes == (torch.float32, torch.float32) for one in cache._pruned.values())
    assert all(one.prefix.values.dtype == one.tail()[1].dtype for one in cache._pruned.values())


def test_methods_allocate_and_rank_outside_of_autocast(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = TINY["llava"].inputs(llava, (1, 2))
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    products = []

    def noted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            products.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return function(*arguments)

        return call

    kv = cache.chain.kv
    stage = dataclasses.replace(kv.stage, allocate=noted(kv.stage.allocate), score=noted(kv.stage.score))
    cache.chain = dataclasses.replace(cache.chain, kv=dataclasses.replace(kv, stage=stage))
    with autocast():
        generate(llava, inputs, **passed(cache))
    assert products == [torch.float32] * 6


@pytest.mark.parametrize("method", ["plphp", "recall_rank", "fastv", "vtw"])
def test_branches_keep_what_pruning_keeps_under_autocast(method: str) -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, (2,))
    settings = PLPHPConfig(method=method, retention_rate=0.5, options={"layer": 1} if method == "fastv" else {})
    with autocast():
        branches = plphp.branch(model, inputs, [settings, EVERYTHING])
        (branched,) = branches.cache.report().prompts
        _, report = pruned(model, inputs, settings)
        for layer, own in zip(branched.layers, report.prompts[0].layers, strict=True):
            assert layer.rows[0].kept_positions == own.rows[0].kept_positions
        draft = draft_for(inputs)[:, :2]
        stock = cache_in(model(**inputs, use_cache=True))
        expected = model(input_ids=draft, **passed(stock)).logits
        found = model(input_ids=draft.expand(2, -1), **passed(branches.cache)).logits
    assert found.isfinite().all()
    exact = model(input_ids=draft, **passed(cache_in(model(**inputs, use_cache=True)))).logits
    assert spread(found[1:], expected) < 3 * spread(expected, exact)


def test_a_step_is_captured_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = tiny_model("llava"), Recorder()

    def capture(*arguments: Any) -> Any:
        replay = recorder.capture(*arguments)

        def without() -> Tensor:
            with torch.autocast("cpu", enabled=False):  # what was recorded is what autocast made of it
                return replay()

        return without

    graph._failed.clear()
    monkeypatch.setattr(generation, "replayed", lambda *a, **k: dispatch.replayed(*a, **k, capture=capture))
    monkeypatch.setattr(generation, "graph_obstacle", lambda *_: None)
    inputs = TINY["llava"].inputs(model, (1, 2))
    draft = draft_for(inputs)
    with autocast():
        found = {}
        for decode in ("eager", "graph"):
            cache = PrunedCache.for_inputs(model, inputs, SETTINGS, decode=decode)
            found[decode] = drafted(model, inputs, draft, **passed(cache))
        assert cache.layers[0].dtypes == (torch.float32, torch.bfloat16)
    assert (recorder.captures, recorder.replays) == (1, STEPS - 2)
    exact = drafted(model, inputs, draft, **passed(PrunedCache.for_inputs(model, inputs, SETTINGS)))
    assert spread(found["graph"], found["eager"]) < 3 * spread(found["eager"], exact)


def test_the_cpp_kernel_decodes_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """With heads that are wide enough for it, and without a copy of what is kept."""
    wide = copy.copy(TINY["llava"])
    config = wide.config()
    config.text_config.head_dim = 40
    model = dataclasses.replace(wide, config=lambda: config).build()
    inputs, kernel, read = TINY["llava"].inputs(model, (1, 2)), _decode_cpp.attend, []

    def attend(*states: Any) -> Tensor:
        read.append((states[0].dtype, states[1], states[3].dtype))
        return kernel(*states)

    draft = draft_for(inputs)
    exact = drafted(model, inputs, draft)
    monkeypatch.setattr(_decode_cpp, "attend", attend)
    with autocast():
        stock = by_stock(lambda: drafted(model, inputs, draft))
        cache = PrunedCache.for_inputs(model, inputs, EVERYTHING)
        found = drafted(model, inputs, draft, **passed(cache))
    own = [states for states in read if any(states[1] is layer.prefix for layer in cache.layers)]
    assert len(own) == 3 * (STEPS - 1)
    assert {(query, values) for query, _, values in own} == {(torch.float32, torch.bfloat16)}
    assert spread(found, stock) < 3 * spread(stock, exact)


def test_rotated_keys_and_plain_values_outside_of_autocast(llava: Any) -> None:
    """As in a model whose rotary embedding leaves queries and keys wider than values: stock attention reads it."""
    inputs = TINY["llava"].inputs(llava, (1, 2))
    draft = draft_for(inputs)
    with values_in(llava, torch.bfloat16):
        stock = by_stock(lambda: drafted(llava, inputs, draft))
        cache = PrunedCache.for_inputs(llava, inputs, EVERYTHING)
        found = drafted(llava, inputs, draft, **passed(cache))
    assert cache.layers[0].dtypes == (torch.float32, torch.bfloat16)
    assert spread(found, stock) < 0.01 * spread(stock, drafted(llava, inputs, draft))  # what the narrow values do
