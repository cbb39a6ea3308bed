# SPDX-License-Identifier: Apache-2.0
"""With a target retention each layer drops early what it cannot keep: less memory, and nothing else is different."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import plphp
from invariants import assert_same_generation, generate, live_bytes
from plphp import CacheStateError, PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.extend import (
    Evidence,
    KVStage,
    LayerScores,
    Method,
    by_vision_attention,
    per_head,
    register_method,
    uniform,
)
from plphp.methods.registry import METHODS_BY_NAME
from plphp.policy.stages import KVStage as Stage
from plphp.pruning.entries import LayerEntries
from plphp.pruning.report import PruneReport
from precision import assert_exact
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

BY_CLASSES = "recall_rank:layers=vision_attention,"
LAYERS = 10
DEEP = ("llava", "qwen2-vl", "gemma3", "qwen3.5", "smolvlm")
"""Families that differ in what a method may touch, see tests/test_invariants.py."""
SETTINGS = {
    "plphp": "plphp:target_retention=0.4",
    "all halves": "plphp:target_retention=0.3,class_quantile=0.5",
    "close rates": "plphp:target_retention=0.5,retention_delta=0.04",
    "high": "plphp:target_retention=0.7",
    "exempt": "plphp:target_retention=0.4,exempt_layers=0+-1",
    "quota": "plphp:target_retention=0.4,image_quota=per_image",
    "pooled": "plphp:target_retention=0.4,score_pool=3",
    "ragged": "plphp:target_retention=0.4,heads=ragged",
    "shared": "shared:target_retention=0.4",
    "recall_rank": BY_CLASSES + "target_retention=0.4",
    "inside prefill": "fastv:layer=2,retention_rate=0.8+plphp:target_retention=0.4",
}
Compacted = list[tuple[bool, tuple[int, ...]]]
Run = Callable[[], tuple[Any, PruneReport]]


def deep(family: str, layers: int = LAYERS) -> Any:
    """A tiny model with more layers; of kinds that alternate as before."""

    def config() -> Any:
        whole = TINY[family].config()
        text = whole.get_text_config()
        kinds = getattr(text, "layer_types", None)
        text.num_hidden_layers = layers
        if kinds:
            text.layer_types = (list(kinds) * layers)[:layers]
        return whole

    return dataclasses.replace(TINY[family], config=config).build()


@pytest.fixture
def compacted(monkeypatch: pytest.MonkeyPatch) -> Compacted:
    """Every placement of a layer: whether it was final, and the entries of each row that it holds then."""
    seen: Compacted = []
    compact = LayerEntries.compact

    def noted(self: LayerEntries, placement: torch.Tensor, *, final: bool = True, **coding: Any) -> torch.Tensor:
        done = compact(self, placement, final=final, **coding)
        seen.append((final, tuple((placement > 0).sum((1, 2)).tolist())))
        return done

    monkeypatch.setattr(LayerEntries, "compact", noted)
    return seen


def held_in_full(monkeypatch: pytest.MonkeyPatch, run: Run) -> tuple[Any, PruneReport]:
    """The run without early drops."""
    with monkeypatch.context() as patched:
        patched.setattr(Stage, "bounded", lambda self, config: None)
        return run()


def assert_same_report(first: PruneReport, second: PruneReport) -> None:
    """Equal but for the time."""
    assert dataclasses.replace(first, pruning_seconds=0.0) == dataclasses.replace(second, pruning_seconds=0.0)


def assert_only_earlier(monkeypatch: pytest.MonkeyPatch, compacted: Compacted, run: Run, early: bool = True) -> None:
    """Tokens, logits, what every head kept and the bytes held in the end are those of layers held in full."""
    expected, whole = held_in_full(monkeypatch, run)
    assert compacted
    assert all(final for final, _ in compacted)
    compacted.clear()
    output, report = run()
    assert_same_generation(expected, output)
    assert_same_report(whole, report)
    assert any(not final for final, _ in compacted) == early


def generating(model: Any, inputs: dict[str, Any], settings: str, **kwargs: Any) -> Run:
    """A run of generate with a cache of its own."""

    def run() -> tuple[Any, PruneReport]:
        cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(settings))
        output = generate(model, inputs, **passed(cache), **kwargs)
        report = cache.report()
        assert all(layer._provisional is None for layer in cache._pruned.values())
        if not any(getattr(layer, "conv_states", None) for layer in cache.layers):
            assert report.kv_bytes == live_bytes(cache)
        return output, report

    return run


@pytest.mark.parametrize("method", ["plphp", "recall_rank"])
@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family(family: str, method: str, monkeypatch: pytest.MonkeyPatch, compacted: Compacted) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    assert_only_earlier(monkeypatch, compacted, generating(model, inputs, SETTINGS[method]))


@pytest.mark.parametrize("family", DEEP)
@pytest.mark.parametrize("name", SETTINGS)
def test_deep_models(family: str, name: str, monkeypatch: pytest.MonkeyPatch, compacted: Compacted) -> None:
    model = deep(family)
    if name == "inside prefill" and family in ("gemma3", "qwen3.5"):
        pytest.skip("refused: not all layers have full attention")
    if name in ("exempt", "inside prefill") and family == "qwen3.5":
        pytest.skip("one layer is left to rank")
    for rows in ([2], [2, 0, 1]):
        compacted.clear()
        inputs = TINY[family].inputs(model, rows)
        assert_only_earlier(monkeypatch, compacted, generating(model, inputs, SETTINGS[name]))


@pytest.mark.parametrize("settings", [
    BY_CLASSES + "floor=0.2,target_retention=0.4",
    BY_CLASSES + "random_share=0.2,target_retention=0.4",
    "vl_cache:target_retention=0.4",
    "zipvl:attention=dense,target_retention=0.4",
    "plphp:target_retention=1.0",
])  # fmt: skip
def test_what_is_not_known_to_leave_stays_to_the_end(
    settings: str, monkeypatch: pytest.MonkeyPatch, compacted: Compacted
) -> None:
    """Where a part does not go by score, where any layer may keep everything, and where all do."""
    model = tiny_model("llava")
    run = generating(model, TINY["llava"].inputs(model, [2, 1]), settings)
    assert_only_earlier(monkeypatch, compacted, run, early=False)


@pytest.mark.parametrize("search", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_beams(search: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compacted: Compacted) -> None:
    model = deep("llava")
    run = generating(model, TINY["llava"].inputs(model, [2, 1]), SETTINGS["plphp"], **search)
    assert_only_earlier(monkeypatch, compacted, run)


@pytest.mark.parametrize("family", [name for name in DEEP if TINY[name].stock.chunked_prefill])
def test_chunks(family: str, monkeypatch: pytest.MonkeyPatch, compacted: Compacted) -> None:
    model = deep(family)
    run = generating(model, TINY[family].inputs(model, [2, 1]), SETTINGS["plphp"], prefill_chunk_size=7)
    assert_only_earlier(monkeypatch, compacted, run)


@pytest.mark.parametrize("method", ["plphp", "recall_rank", "ragged"])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_later_turns(family: str, method: str, monkeypatch: pytest.MonkeyPatch, compacted: Compacted) -> None:
    """What earlier turns have packed stays in front, and records say where the later prompt begins."""
    model, tiny = deep(family), TINY[family]

    def run() -> tuple[Any, PruneReport]:
        first = tiny.inputs(model, [2, 1])
        cache = PrunedCache.for_inputs(model, first, PLPHPConfig.parse(SETTINGS[method]))
        answered = generate(model, first, **passed(cache))
        turn = tiny.second_turn(model, first, answered.sequences, with_image=True)
        output = generate(model, turn, **passed(cache))
        report = cache.report()
        assert [len(prompt.layers) for prompt in report.prompts] == [len(cache._pruned)] * 2
        assert min(
            position for row in report.prompts[1].layers[0].rows for head in row.kept_positions for position in head
        ) >= report.prompts[1].start  # fmt: skip
        return output, report

    assert_only_earlier(monkeypatch, compacted, run)


def test_copies_between_two_chunks(monkeypatch: pytest.MonkeyPatch, compacted: Compacted) -> None:
    model = deep("llava")
    inputs = TINY["llava"].inputs(model, [2])
    ids = inputs["input_ids"]
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(SETTINGS["plphp"]))
    with torch.no_grad():
        model(**{**inputs, "input_ids": ids[:, :-3], "attention_mask": None}, **passed(cache))
        copied = copy.deepcopy(cache)
        expected = model(input_ids=ids[:, -3:], **passed(cache)).logits
        found = model(input_ids=ids[:, -3:], **passed(copied)).logits
    assert torch.equal(expected, found)
    assert_same_report(cache.report(), copied.report())
    assert any(not final for final, _ in compacted)


def test_a_row_that_cannot_be_ranked_stays_whole(monkeypatch: pytest.MonkeyPatch, compacted: Compacted) -> None:
    model = deep("llava")
    inputs = TINY["llava"].inputs(model, [1, 1, 2])
    inputs["pixel_values"][0] = torch.nan
    before = inputs["pixel_values"].clone()

    def run() -> tuple[Any, PruneReport]:
        cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(SETTINGS["plphp"]))
        with torch.no_grad():
            logits = model(**inputs, **passed(cache)).logits[1:, -1]
        return logits, cache.report()

    expected, whole = held_in_full(monkeypatch, run)
    compacted.clear()
    found, report = run()
    assert torch.equal(before.isnan(), inputs["pixel_values"].isnan())
    assert_exact(expected, found)
    assert_same_report(whole, report)
    rows = [layer.rows[0] for layer in report.prompts[0].layers]
    assert {row.layer_class for row in rows} == {"non-finite"}
    assert any(not final for final, _ in compacted)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["equal", "ragged"])
@pytest.mark.parametrize("rows", [[2], [2, 1, 1, 2]], ids=str)
def test_no_layer_adds_more_than_the_final_cache_holds(rows: list[int], heads: str) -> None:
    model, inputs = deep("llava", 16), TINY["llava"].inputs(tiny_model("llava"), rows)
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(target_retention=0.4, heads=heads))
    after: list[int] = []
    full: list[StorageWeakRef] = []

    def note(*_: Any) -> None:
        after.append(live_bytes(cache))
        assert all(reference.expired() for reference in full)  # nothing else holds what the cache has let go

    def hold(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = PrunedCache.update(self, *args, **kwargs)
        full[:] = [StorageWeakRef(states.untyped_storage()) for states in (keys, values)]
        return keys, values

    hooks = [layer.register_forward_hook(note) for layer in model.get_decoder().layers]
    cache.update = hold.__get__(cache)  # type: ignore[method-assign]
    with torch.no_grad():
        model(**inputs, **passed(cache))
    for hook in hooks:
        hook.remove()
    final, whole = cache.nbytes, cache.full_nbytes / len(cache.layers)
    assert after[-1] == final
    # In a batch rows lose their rank one by one, and a copy has to be worth it.
    assert max(after) <= final * (1 if len(rows) == 1 else 8 / 7)
    # The first layer may be the most attentive: it drops what no layer can keep.
    assert after[0] < 0.85 * whole


# --- errors -------------------------------------------------------------------------------------------------


def fail_at(layer: Any) -> Any:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    return layer.register_forward_pre_hook(fail)


@pytest.mark.parametrize("through", ["generate", "model"])
def test_a_cache_that_was_cut_off_is_dead(through: str) -> None:
    model = deep("llava")
    inputs = TINY["llava"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(SETTINGS["plphp"]))
    hook = fail_at(model.get_decoder().layers[6].mlp)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        generate(model, inputs, **passed(cache)) if through == "generate" else model(**inputs, **passed(cache))
    hook.remove()
    with pytest.raises(CacheStateError, match="n error stopped the model in the middle of a step"), torch.no_grad():
        model(**inputs, **passed(cache))
    assert cache.nbytes == live_bytes(cache) == 0


def test_rows_of_a_half_read_prompt_are_not_chosen() -> None:
    model = deep("llava")
    inputs = TINY["llava"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(SETTINGS["plphp"]))
    hook = fail_at(model.get_decoder().layers[6].mlp)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(**inputs, **passed(cache))
    hook.remove()
    with pytest.raises(CacheStateError, match="waits for its final placement"):
        cache.batch_repeat_interleave(2)


def test_a_bound_that_does_not_hold_ends_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})

    def too_low(layers: Any, config: PLPHPConfig) -> Any:
        return uniform(layers, dataclasses.replace(config, target_retention=None, retention_rate=0.2))

    stage = KVStage(by_vision_attention, per_head, uses_class_rule=lambda config: True, at_most=too_low)
    register_method(Method("too-low", "an example", "an example", kv=stage))
    model = deep("llava")
    inputs = TINY["llava"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="too-low", target_retention=0.4))
    with pytest.raises(CacheStateError, match="entries that were dropped before its retention rate was known"):
        generate(model, inputs, **passed(cache))
    with pytest.raises(CacheStateError, match="cannot be used any more"):
        generate(model, inputs, **passed(cache))


def test_a_branch_keeps_what_a_session_keeps() -> None:
    """It scores once for all and holds the prompt in full, a session drops early."""
    model = deep("llava")
    inputs = TINY["llava"].inputs(model, [2])
    config = PLPHPConfig.parse(SETTINGS["plphp"])
    branches = plphp.branch(model, inputs, [config])
    cache = PrunedCache.for_inputs(model, inputs, config)
    generate(model, inputs, **passed(cache))
    for branched, read in zip(branches.cache.records, cache.records, strict=True):
        assert torch.equal(branched.kept_vision, read.kept_vision)


def by_keys(scores: LayerScores, config: PLPHPConfig) -> torch.Tensor:
    """Score by the norm of the keys."""
    return scores.need_states().keys.norm(dim=-1)


def test_a_method_that_looks_at_keys_finds_them_until_its_rates_are_known(
    compacted: Compacted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS_BY_NAME, "registered", dict(METHODS_BY_NAME.registered))
    stage = KVStage(
        by_vision_attention,
        by_keys,
        evidence=lambda config: Evidence(states="rows"),
        uses_class_rule=lambda config: True,
        at_most=by_vision_attention,
    )
    register_method(Method("by-keys", "a test", "none", kv=stage))
    model = tiny_model("llava")
    with plphp.prune(model, PLPHPConfig(method="by-keys", target_retention=0.4)) as run:
        generate(model, TINY["llava"].inputs(model, [2]))
    assert all(final for final, _ in compacted)
    assert run.report.retention < 0.6
