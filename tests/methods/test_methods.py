# SPDX-License-Identifier: Apache-2.0
"""Each method keeps what its paper says, recomputed one number at a time from a stock model's eager attention."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import plphp
from invariants import (
    assert_same_generation,
    attention_set,
    eager_attention,
    evicted_entries_masked,
    generate,
    pruned,
    two_turns,
)
from plphp import ConfigError, PLPHPConfig, PrunedCache, UnsupportedFeatureError, UnsupportedModelError
from plphp.engines.hf.cache_argument import passed
from plphp.pruning.prompt_report import LayerReport
from plphp.pruning.report import PruneReport
from precision import EXACT, assert_exact
from test_invariants import config as method_config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = ("llava", "qwen2-vl", "qwen3-vl", "smolvlm", "internvl")
TEXT_TOO = ("snapkv", "adakv")
"""Methods that evict text as well."""


@dataclass
class Reading:
    """What a stock model does with a prompt of two images."""

    model: Any
    inputs: dict[str, Any]
    attention: list[list[list[list[float]]]]
    norms: list[list[list[float]]]
    vision: list[int]
    images: list[list[int]]
    length: int
    kv_heads: int

    @property
    def text_rows(self) -> list[int]:
        return list(range(self.vision[-1] + 1, self.length))

    @property
    def layers(self) -> int:
        return len(self.attention)

    def of_head(self, layer: int, kv_head: int, row: int) -> list[float]:
        """Attention of a row, mean over the query heads of a KV head."""
        group = len(self.attention[layer]) // self.kv_heads
        mine = self.attention[layer][kv_head * group : (kv_head + 1) * group]
        return [sum(head[row][key] for head in mine) / group for key in range(self.length)]

    def mean(self, layer: int, kv_head: int, rows: Sequence[int]) -> list[float]:
        """The same, mean over rows."""
        found = [self.of_head(layer, kv_head, row) for row in rows]
        return [sum(column) / len(rows) for column in zip(*found, strict=True)]


@functools.cache
def reading(family: str) -> Reading:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [2])
    attention = [layer[0].tolist() for layer in eager_attention(model, inputs)]
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, **passed(cache))
    norms = [layer.values[0].norm(dim=-1).tolist() for layer in cache.layers]
    _, report = pruned(model, inputs, PLPHPConfig(method="none"))
    images = [image.positions for image in report.prompts[0].images[0]]
    vision = [position for image in images for position in image]
    heads = model.config.get_text_config().num_key_value_heads
    return Reading(model, inputs, attention, norms, vision, images, inputs["input_ids"].shape[1], heads)


def run(found: Reading, line: str) -> tuple[PruneReport, list[LayerReport]]:
    _, report = pruned(found.model, found.inputs, PLPHPConfig.parse(line))
    return report, report.prompts[0].layers


def assert_best(kept: list[int], score: dict[int, float], count: int) -> None:
    """``count`` entries were kept, and none that was not has a higher score."""
    assert len(kept) == count == len(set(kept))
    assert set(kept) <= set(score)
    evicted = score.keys() - set(kept)
    if kept and evicted:
        assert min(score[position] for position in kept) >= max(score[position] for position in evicted) - EXACT


def half_up(value: float) -> int:
    return math.floor(value + 0.5)


def pool(values: list[float], kernel: int, kind: str) -> list[float]:
    """1-D pooling with zeros beyond the ends."""
    side = kernel // 2
    padded = [0.0] * side + values + [0.0] * side
    windows = [padded[index : index + kernel] for index in range(len(values))]
    return [max(window) if kind == "max" else sum(window) / kernel for window in windows]


def window_score(found: Reading, layer: int, head: int, window: int, kernel: int, kind: str) -> dict[int, float]:
    begin = found.length - window
    mean = found.mean(layer, head, range(begin, found.length))[:begin]
    return dict(enumerate(pool(mean, kernel, kind)))


@pytest.mark.parametrize(("window", "kernel", "kind"), [(4, 5, "avg"), (2, 3, "max"), (3, 1, "avg")])
@pytest.mark.parametrize("family", FAMILIES)
def test_snapkv(family: str, window: int, kernel: int, kind: str) -> None:
    found = reading(family)
    options = f"window={window},kernel={kernel},pool={kind}"
    _, layers = run(found, f"snapkv:{options},retention_rate=0.3")
    text = found.length - len(found.vision)
    budget = text + half_up(0.3 * len(found.vision))
    for layer in layers:
        (row,) = layer.rows
        for head in range(found.kv_heads):
            score = window_score(found, layer.layer, head, window, kernel, kind)
            gone = set(found.vision) - set(row.kept_positions[head]) | set(row.evicted_text[head])
            kept = [position for position in range(found.length) if position not in gone]
            assert len(kept) == budget
            assert kept[-window:] == list(range(found.length - window, found.length))
            assert_best(kept[:-window], score, budget - window)
    assert any(row.evicted_text[0] for layer in layers for row in layer.rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_snapkv_vision_and_pyramidkv(family: str) -> None:
    found = reading(family)
    _, flat = run(found, "snapkv_vision:window=4,retention_rate=0.4")
    _, pyramid = run(found, "pyramidkv:window=4,retention_rate=0.4,beta=8")
    first, last = 0.75, 0.05  # 0.4 / 8, and 2 * 0.4 - 0.05
    rates = [first + (last - first) * index / (found.layers - 1) for index in range(found.layers)]
    for layers, expected in ((flat, [0.4] * found.layers), (pyramid, rates)):
        for layer, rate in zip(layers, expected, strict=True):
            (row,) = layer.rows
            assert row.rate == pytest.approx(rate)
            assert not row.evicted_text
            for head, kept in enumerate(row.kept_positions):
                score = window_score(found, layer.layer, head, 4, 5, "avg")
                assert_best(kept, {p: score[p] for p in found.vision}, max(1, half_up(rate * len(found.vision))))


def test_a_window_that_reaches_into_the_image_keeps_it() -> None:
    found = reading("llava")
    window = found.length - found.vision[-3]
    for name, text in (("snapkv_vision", False), ("snapkv", True)):
        _, layers = run(found, f"{name}:window={window},retention_rate=0.3")
        for layer in layers:
            for head, kept in enumerate(layer.rows[0].kept_positions):
                assert kept[-3:] == found.vision[-3:]
                gone = len(found.vision) - len(kept) + (len(layer.rows[0].evicted_text[head]) if text else 0)
                assert gone == len(found.vision) - half_up(0.3 * len(found.vision))


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.6, 0.9, 1.0])
def test_pyramidkv_has_the_mean_that_is_asked_for(mean: float) -> None:
    _, layers = run(reading("llava"), f"pyramidkv:retention_rate={mean}")
    rates = [layer.rows[0].rate for layer in layers]
    assert sum(rates) / len(rates) == pytest.approx(mean)
    assert rates == sorted(rates, reverse=True)
    assert 0 <= rates[-1] <= rates[0] <= 1


@pytest.mark.parametrize("mean", [0.2, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_vl_cache(family: str, mean: float) -> None:
    found = reading(family)
    _, layers = run(found, f"vl_cache:target_retention={mean},p=0.3")
    density = []
    for heads in found.attention:
        shares = []
        for head in heads:
            for row in found.text_rows:
                seen = head[row][: row + 1]
                shares.append(sum(value >= 0.3 * max(seen) for value in seen) / len(seen))
        density.append(sum(shares) / len(shares))
    low, high = 0.0, 1e6  # the factor between density and rate
    for _ in range(200):
        factor = (low + high) / 2
        reached = sum(min(1, factor * one) for one in density) / len(density)
        low, high = (factor, high) if reached < mean else (low, factor)
    for layer, one in zip(layers, density, strict=True):
        rate = min(1, low * one)
        assert layer.rows[0].rate == pytest.approx(rate, abs=EXACT)
        for head, kept in enumerate(layer.rows[0].kept_positions):
            score = found.mean(layer.layer, head, found.text_rows)
            assert_best(kept, {p: score[p] for p in found.vision}, max(1, half_up(rate * len(found.vision))))
    assert len({round(layer.rows[0].rate, 4) for layer in layers}) > 1


def needed(found: Reading, layer: int, tau: float) -> int:
    """The least number of vision tokens that carry a share tau of the layer's attention to them."""
    heads = range(found.kv_heads)
    rows = [found.mean(layer, head, found.text_rows) for head in heads]
    mass = sorted((sum(row[p] for row in rows) for p in found.vision), reverse=True)
    count = 0
    while sum(mass[:count]) < tau * sum(mass):
        count += 1
    return count


@pytest.mark.parametrize("tau", [0.4, 0.975])
@pytest.mark.parametrize("family", FAMILIES)
def test_zipvl_with_a_fixed_tau(family: str, tau: float) -> None:
    found = reading(family)
    _, layers = run(found, f"zipvl:attention=dense,tau={tau}")
    for layer in layers:
        for head, kept in enumerate(layer.rows[0].kept_positions):
            score = found.mean(layer.layer, head, found.text_rows)
            assert_best(kept, {p: score[p] for p in found.vision}, needed(found, layer.layer, tau))


@pytest.mark.parametrize("setting", ["target_retention", "retention_rate"])
@pytest.mark.parametrize("target", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_zipvl_finds_the_tau_of_a_target(family: str, target: float, setting: str) -> None:
    found = reading(family)
    report, layers = run(found, f"zipvl:attention=dense,{setting}={target}")
    counts = [layer.rows[0].kept[0] for layer in layers]
    wanted = half_up(target * len(found.vision) * found.layers)
    assert sum(counts) == wanted
    assert report.retention == pytest.approx(target, abs=0.5 / len(found.vision))
    low, high = 0.0, 1.0
    for _ in range(60):
        tau = (low + high) / 2
        reached = sum(needed(found, layer, tau) for layer in range(found.layers))
        low, high = (tau, high) if reached < wanted else (low, tau)
    if target < 1:
        assert counts == [needed(found, layer, high) for layer in range(found.layers)]


def best_ranks(found: Reading, layer: int, head: int, rows: Sequence[int]) -> dict[int, int]:
    best = dict.fromkeys(found.vision, len(found.vision))
    for row in rows:
        attention = found.of_head(layer, head, row)
        for place, position in enumerate(sorted(found.vision, key=lambda p: (-attention[p], p))):
            best[position] = min(best[position], place)
    return best


@pytest.mark.parametrize("weighted", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_recall_rank(family: str, weighted: int) -> None:
    found = reading(family)
    _, layers = run(found, f"recall_rank:retention_rate=0.3,value_norm={weighted}")
    for layer in layers:
        for head, kept in enumerate(layer.rows[0].kept_positions):
            best = best_ranks(found, layer.layer, head, found.text_rows)
            mean = found.mean(layer.layer, head, found.text_rows)
            most = max(mean[p] for p in found.vision)
            score = {p: 1 / (2 + best[p] - mean[p] / most) for p in found.vision}
            if weighted:
                score = {p: score[p] * found.norms[layer.layer][head][p] for p in found.vision}
            assert_best(kept, score, half_up(0.3 * len(found.vision)))


def test_recall_rank_with_the_last_row_alone_ranks_as_plphp_does() -> None:
    """One row has one best place for each token: that of the row."""
    found = reading("llava")
    _, ours = run(found, "recall_rank:query_rows=1,retention_rate=0.3")
    _, theirs = run(found, "uniform:retention_rate=0.3")
    assert [layer.rows[0].kept_positions for layer in ours] == [layer.rows[0].kept_positions for layer in theirs]


def test_recall_rank_takes_the_layer_level_of_plphp() -> None:
    found = reading("llava")
    settings = "query_rows=text,target_retention=0.5"
    _, ours = run(found, f"recall_rank:layers=vision_attention,{settings}")
    _, theirs = run(found, f"plphp:{settings}")
    assert [layer.rows[0].rate for layer in ours] == [layer.rows[0].rate for layer in theirs]
    assert len({layer.rows[0].rate for layer in ours}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_floor_and_random_share(family: str) -> None:
    """The best part goes by rank, the spread reaches every image, and the count is the same."""
    found = reading(family)
    count = half_up(0.5 * len(found.vision))
    _, ranked = run(found, "recall_rank:retention_rate=0.5")
    for floor, share in ((0.4, 0.0), (0.0, 0.4), (0.3, 0.3), (1.0, 0.0)):
        line = f"recall_rank:retention_rate=0.5,floor={floor},random_share={share}"
        report, layers = run(found, line)
        assert run(found, line)[1] == layers
        assert (run(found, f"{line},seed=1")[1] != layers) == (share > 0)
        left = count - half_up(floor * count) - half_up(share * count)
        for layer in layers:
            for head, kept in enumerate(layer.rows[0].kept_positions):
                assert len(kept) == count
                best = best_ranks(found, layer.layer, head, found.text_rows)
                mean = found.mean(layer.layer, head, found.text_rows)
                order = sorted(found.vision, key=lambda p: (best[p], -mean[p]))
                assert set(order[:left]) <= set(kept)
                if floor == 1.0:
                    assert all(set(image) & set(kept) for image in found.images)
        if floor < 1:
            assert layers != ranked
        assert report.retention == pytest.approx(count / len(found.vision))


@pytest.mark.parametrize("family", FAMILIES)
def test_value_norm(family: str) -> None:
    found = reading(family)
    _, layers = run(found, "value_norm:retention_rate=0.3")
    for layer in layers:
        for head, kept in enumerate(layer.rows[0].kept_positions):
            norm = found.norms[layer.layer][head]
            assert_best(kept, {p: norm[p] for p in found.vision}, half_up(0.3 * len(found.vision)))


@pytest.mark.parametrize("family", FAMILIES)
def test_score_pool_averages_over_neighbours_of_the_same_image(family: str) -> None:
    found = reading(family)
    _, layers = run(found, "uniform:retention_rate=0.3,score_pool=3")
    for layer in layers:
        for head, kept in enumerate(layer.rows[0].kept_positions):
            last = found.of_head(layer.layer, head, found.length - 1)
            score = {}
            for image in found.images:
                for index, position in enumerate(image):
                    near = image[max(0, index - 1) : index + 2]
                    score[position] = sum(last[p] for p in near) / len(near)
            assert_best(kept, score, half_up(0.3 * len(found.vision)))


def test_zipvl_takes_a_threshold_or_a_target() -> None:
    found = reading("llava")
    with pytest.raises(ConfigError, match="tau or target_retention, not both"):
        run(found, "zipvl:tau=0.9,target_retention=0.5")


@pytest.mark.parametrize(
    "method",
    [
        *("snapkv", "snapkv_vision", "recall_rank", "vl_cache", "zipvl", "adakv", "tgv_kv", "mixkv"),
        "expected_attention",
        "prompt_queries",
    ],
)
@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2-vl"])
def test_a_later_turn_with_an_image_evicts_of_its_own_prompt_alone(family: str, method: str) -> None:
    model, rows = tiny_model(family), (2, 1)
    settings = method_config(method, retention_rate=0.3)
    cache = PrunedCache.for_inputs(model, TINY[family].inputs(model, rows), settings)
    first, second = two_turns(model, TINY[family], cache, True, rows)
    report = cache.report()
    assert len(report.prompts) == 2
    for layer in report.prompts[1].layers:
        for row in layer.rows:
            gone = [position for head in row.evicted_text for position in head]
            assert all(position >= report.prompts[1].start for position in gone)
            assert all(len(kept) < row.vision_tokens for kept in row.kept_positions) or method in TEXT_TOO
    with evicted_entries_masked(model, report):
        stock = DynamicCache(config=model.config.get_text_config())
        expected = two_turns(model, TINY[family], stock, True, rows)
    assert_same_generation(expected[0], first)
    assert_same_generation(expected[1], second)


@pytest.mark.parametrize(
    "method", ["fastv", "vtw", "snapkv", "recall_rank", "expected_attention", "tgv_kv", "prompt_queries"]
)
def test_several_sequences_of_a_prompt(method: str) -> None:
    """Rows are repeated after the prompt was planned."""
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [1, 1])
    settings = method_config(method, retention_rate=0.6)
    one, _ = pruned(model, inputs, settings)
    several, report = pruned(model, inputs, settings, num_beams=2, num_return_sequences=2)
    assert len(report.prompts[0].layers[0].rows) == 4
    assert_exact(several.logits[0][::2], one.logits[0])


# --- methods that act inside prefill ---------------------------------------------------------------------------


@contextmanager
def dropped_from(model: Any, first: int, choose: Callable[[Tensor], list[int]]) -> Iterator[None]:
    """Really drop hidden states: from layer ``first`` on the decoder runs on the positions that ``choose`` names.

    ``choose`` is given the eager attention of the layer before, [q_heads, seq, seq].
    """
    layers = model.get_decoder().layers
    kept: list[int] = []
    hooks = []

    def look(module: Any, args: Any, output: Any) -> None:
        kept[:] = choose(output[1][0])

    def drop(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if hidden.shape[1] != len(kept):
            hidden = hidden[:, kept]
        kwargs["position_embeddings"] = tuple(part[..., kept, :] for part in kwargs["position_embeddings"])
        kwargs["attention_mask"] = kwargs["attention_mask"][..., kept, :][..., kept]
        return (hidden,), kwargs

    hooks.append(layers[first - 1].self_attn.register_forward_hook(look))
    hooks += [layer.register_forward_pre_hook(drop, with_kwargs=True) for layer in layers[first:]]
    try:
        with attention_set(model, "eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "smolvlm", "internvl"])
def test_fastv_is_a_model_that_drops_the_hidden_states(family: str) -> None:
    found = reading(family)
    settings = PLPHPConfig(method="fastv", options={"layer": 1}, retention_rate=0.6)
    rate = (found.layers * 0.6 - 1) / (found.layers - 1)
    chosen: list[int] = []

    def choose(attention: Tensor) -> list[int]:
        score = attention[:, -1].mean(0).tolist()
        best = sorted(found.vision, key=lambda p: (-score[p], p))[: half_up(rate * len(found.vision))]
        chosen[:] = sorted(best)
        return [position for position in range(found.length) if position not in found.vision or position in best]

    with dropped_from(found.model, 1, choose), torch.no_grad():
        expected = found.model(**found.inputs, use_cache=False).logits[0, -1]
    output, report = pruned(found.model, found.inputs, settings)
    assert_exact(output.logits[0][0], expected)
    for layer in report.prompts[0].layers:
        (row,) = layer.rows
        assert row.rate == pytest.approx(1.0 if layer.layer == 0 else rate)
        assert row.kept_positions == [found.vision if layer.layer == 0 else chosen] * found.kv_heads
    assert report.retention == pytest.approx(0.6, abs=1 / len(found.vision))


@pytest.mark.parametrize(("rate", "first"), [(0.0, 1), (0.4, 1), (0.6, 2), (1.0, 3)])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "smolvlm"])
def test_vtw_is_a_model_that_drops_the_hidden_states(family: str, rate: float, first: int) -> None:
    found = reading(family)
    assert found.layers == 3
    text = [position for position in range(found.length) if position not in found.vision]
    output, report = pruned(found.model, found.inputs, PLPHPConfig(method="vtw", retention_rate=rate))
    if first < 3:
        with dropped_from(found.model, first, lambda attention: text), torch.no_grad():
            expected = found.model(**found.inputs, use_cache=False).logits[0, -1]
    else:
        expected = generate(found.model, found.inputs).logits[0][0]
    assert_exact(output.logits[0][0], expected)
    for layer in report.prompts[0].layers:
        assert layer.rows[0].kept_positions == [found.vision if layer.layer < first else []] * found.kv_heads
    assert report.retention == pytest.approx(first / 3)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["fastv", "vtw"])
def test_prompt_stage_over_both_attentions_and_in_a_later_turn(method: str, base: str) -> None:
    model, tiny = tiny_model("llava"), TINY["llava"]
    inputs = tiny.inputs(model, [2, 1])
    settings = method_config(method, retention_rate=0.6)
    with attention_set(model, base):
        cache = PrunedCache.for_inputs(model, inputs, settings)
        first = generate(model, inputs, **passed(cache))
        turn = tiny.second_turn(model, inputs, first.sequences, with_image=True)
        second = generate(model, turn, **passed(cache))
        report = cache.report()
        del cache
    assert len(report.prompts) == 2
    stock = DynamicCache(config=model.config.get_text_config())
    expected = []
    for number, one in enumerate((inputs, turn)):
        part = PruneReport(**{**vars(report), "prompts": report.prompts[: number + 1]})
        # Tokens of a later turn are not there yet for the first, and what left in the first stays away.
        with evicted_entries_masked(model, part, inside_prefill=True):
            expected.append(generate(model, one, **passed(stock)))
    for mine, theirs in zip((first, second), expected, strict=True):
        assert_same_generation(theirs, mine)
    for prompt in report.prompts:
        assert sum(row.vision_tokens - row.kept[0] for layer in prompt.layers for row in layer.rows) > 0


def test_a_prompt_that_ends_in_an_image_keeps_its_last_token() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1], text=(3, 0))
    last = inputs["input_ids"].shape[1] - 1
    for method in ("fastv", "vtw"):
        output, report = pruned(model, inputs, method_config(method, retention_rate=0.4))
        (row,) = report.prompts[0].layers[-1].rows
        assert row.vision_tokens
        if last in [position for image in report.prompts[0].images[0] for position in image.positions]:
            assert last in row.kept_positions[0]
        assert all(logits.isfinite().all() for logits in output.logits)


def test_a_prompt_that_begins_with_an_image_stays_finite() -> None:
    """A hidden token has no other one before it to look at."""
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    begin = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    inputs["input_ids"] = inputs["input_ids"][:, begin:]
    inputs["attention_mask"] = inputs["attention_mask"][:, begin:]
    for base in ("sdpa", "eager"):
        with attention_set(model, base):
            output, _ = pruned(model, inputs, PLPHPConfig(method="vtw", retention_rate=0.4))
        assert all(logits.isfinite().all() for logits in output.logits)


def test_what_the_prompt_stage_refuses() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model)
    with pytest.raises(ConfigError, match=r"first 2 of 3 layers, so the least retention_rate is 0\.6667, got 0\.4"):
        PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="fastv"))
    with pytest.raises(ConfigError, match="fastv's layer must be below the number of decoder layers, 3, got 3"):
        PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="fastv", options={"layer": 3}, retention_rate=1.0))
    for method in ("fastv", "vtw"):
        settings = method_config(method, retention_rate=0.5)
        with pytest.raises(ConfigError, match="leave out exempt_layers"):
            PrunedCache.for_inputs(model, inputs, method_config(method, retention_rate=0.5, exempt_layers=(0,)))
        cache = PrunedCache.for_inputs(model, inputs, settings)
        with pytest.raises(UnsupportedFeatureError, match="in one piece"), torch.no_grad():
            model(
                input_ids=inputs["input_ids"][:, :3],
                attention_mask=inputs["attention_mask"][:, :3],
                **passed(cache),
            )
        del cache
    other, settings = tiny_model("gemma3"), PLPHPConfig(method="fastv", options={"layer": 1}, retention_rate=0.5)
    behind = "by a layer with full attention, and the first of this model is layer 1"
    with pytest.raises(UnsupportedModelError, match=behind), plphp.prune(other, settings):
        generate(other, TINY["gemma3"].inputs(other))
    assert "generate" not in model.__dict__


def test_flash_attention_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llava")
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(UnsupportedFeatureError, match="was not tried with flash attention"):
        PrunedCache.for_inputs(model, TINY["llava"].inputs(model), PLPHPConfig(method="vtw"))


def test_methods_with_a_mean_rate_meet_it() -> None:
    """Measured retention is what was asked for, on average over many prompts; counts are rounded."""
    model, tiny = tiny_model("llava-next"), TINY["llava-next"]
    left_out = {"oracle", "query_bank", "quantized", "none", "snapkv", "adakv", "plphp", "shared", "vtw", "pool"}
    left_out |= {"g_search"}
    names = sorted(plphp.available_methods().keys() - left_out)
    for name in names:
        target = random.Random(name).choice([0.5, 0.7])
        _, report = pruned(model, tiny.inputs(model, [2, 1]), method_config(name, target_retention=target))
        assert report.retention == pytest.approx(target, abs=0.03), name
