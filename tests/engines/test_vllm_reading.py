# SPDX-License-Identifier: Apache-2.0
"""What the vLLM plugin does with a prompt, without vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plphp import PLPHPConfig
from plphp.engines.vllm.reading import RequestReading, vision_spans
from plphp.engines.vllm.rounding import evict_whole_blocks
from plphp.engines.vllm.setup import Setup
from plphp.engines.vllm.state import Pruning
from plphp.engines.vllm.step import Row, Step
from plphp.engines.vllm.tensor_parallel import TensorParallel
from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.methods.registry import chain_of
from plphp.policy.evidence import LayerScores
from plphp.policy.states import LayerStates
from precision import assert_exact

pytestmark = pytest.mark.usefixtures("float64")

Q_HEADS, KV_HEADS, DIM, LAYERS, BLOCK = 4, 2, 8, 3, 4
TOKENS, IMAGES = 40, ((3, 12), (20, 10))
"""A prompt with two images, each with its first position and its length."""


def feature(offset: int, length: int, modality: str = "image") -> Any:
    place = SimpleNamespace(offset=offset, extract_embeds_range=lambda: [(offset, offset + length - 1)])
    return SimpleNamespace(modality=modality, mm_position=place)


def request(tokens: int = TOKENS, images: Any = IMAGES) -> Any:
    return SimpleNamespace(
        num_prompt_tokens=tokens, mm_features=[feature(*one) for one in images], mrope_position_delta=None
    )


def scores(vision: int = 20, seq: int = 24) -> LayerScores:
    segment = torch.full((1, seq), -1)
    segment[0, 2 : 2 + vision] = 0
    attention = torch.rand(1, Q_HEADS, seq, generator=torch.Generator().manual_seed(1))
    return LayerScores(attention, segment, torch.ones(1, seq, dtype=torch.bool), 0, KV_HEADS)


def test_vision_spans() -> None:
    spans = vision_spans([feature(20, 3), feature(9, 5, "audio"), feature(2, 4)], 30)
    assert [(spans.segment == number).nonzero()[:, 1].tolist() for number in (0, 1)] == [[2, 3, 4, 5], [20, 21, 22]]
    assert spans.vision.sum() == 7
    assert spans.valid.all()


@pytest.mark.parametrize(("kept", "stays", "blocks"), [(20, 20, 0), (17, 20, 0), (16, 16, 1), (9, 12, 2), (1, 4, 4)])
def test_what_leaves_fills_whole_blocks(kept: int, stays: int, blocks: int) -> None:
    known = scores()
    rank = torch.rand(1, KV_HEADS, 24, generator=torch.Generator().manual_seed(2))
    keep = torch.ones(1, KV_HEADS, 24, dtype=torch.bool)
    best = rank[:, :, 2:22].sort(descending=True).indices + 2
    for head in range(KV_HEADS):
        keep[0, head, best[0, head, kept:]] = False
    found = evict_whole_blocks(keep, rank, known, BLOCK)
    assert (~found).sum(-1).tolist() == [[blocks * BLOCK] * KV_HEADS]
    for head in range(KV_HEADS):
        assert sorted(best[0, head, :stays].tolist()) == found[0, head, 2:22].nonzero()[:, 0].add(2).tolist()
    assert found[0, :, :2].all()
    assert found[0, :, 22:].all()


def test_candidates_of_no_rank_fill_blocks_too() -> None:
    keep = torch.ones(1, KV_HEADS, 24, dtype=torch.bool)
    keep[:, :, 4:22] = False
    found = evict_whole_blocks(keep, torch.full((1, KV_HEADS, 24), -torch.inf), scores(), BLOCK)
    assert (~found).sum(-1).tolist() == [[16] * KV_HEADS]


def test_heads_with_different_numbers_are_refused() -> None:
    keep = torch.ones(1, KV_HEADS, 24, dtype=torch.bool)
    keep[0, 0, 5] = False
    with pytest.raises(UnsupportedFeatureError, match="0 to 1"):
        evict_whole_blocks(keep, torch.rand(1, KV_HEADS, 24), scores(), BLOCK)


class Paged:
    """The paged cache of one layer, of entries that NaN stands for until they are written."""

    def __init__(self, blocks: int, heads: int = KV_HEADS) -> None:
        self.keys = torch.full((blocks * BLOCK, heads, DIM), torch.nan, dtype=torch.float64)
        self.values = self.keys.clone()

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        self.keys[slots], self.values[slots] = keys, values


def states(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (Q_HEADS, KV_HEADS, KV_HEADS)
    query, keys, values = (torch.randn(tokens, count, DIM, generator=generator).double() for count in heads)
    return query, keys, values


def pruning_of(**settings: Any) -> Pruning:
    rate = {} if "target_retention" in settings else {"retention_rate": 0.3}
    config = PLPHPConfig.from_dict({"method": "uniform", **rate, **settings})
    return Pruning(Setup(chain_of(config, LAYERS), LAYERS, BLOCK))


def reading_of(pruning: Pruning) -> RequestReading:
    return RequestReading.of(request(), pruning.setup)


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Naive attention of [tokens, heads, dim], the queries being the last tokens."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (one.repeat_interleave(group, 1) for one in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", query, keys) * DIM**-0.5
    seen = torch.arange(len(keys)) <= torch.arange(len(keys) - len(query), len(keys))[:, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def run(
    pruning: Pruning, prompt: Any, chunks: list[int], table: Tensor, heads: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[list[Paged], list[Tensor]]:
    """Read the tokens of a request in chunks; return the caches and the attention of the last chunk by layer."""
    of_layer = [[heads(one) for one in states(sum(chunks), layer)] for layer in range(LAYERS)]
    caches = [Paged(32, keys.shape[1]) for _, keys, _ in of_layer]
    begin, outputs = 0, []
    for chunk in chunks:
        reading = pruning.reading("one", prompt, begin)
        step = Step(pruning, [Row("one", reading, 0, chunk, begin)])
        outputs = []
        for layer, (query, keys, values) in enumerate(of_layer):
            step._tables[layer] = table
            now = slice(begin, begin + chunk)
            position = torch.arange(begin, begin + chunk)
            slots = table[0, position // BLOCK].long() * BLOCK + position % BLOCK
            caches[layer].write(keys[now], values[now], slots)
            output = attention(query[now], keys[: begin + chunk], values[: begin + chunk]).flatten(1)
            step.after_attention(layer, (query[now], keys[now], values[now]), output, DIM**-0.5, caches[layer].write)
            outputs.append(output)
        begin += chunk
    return caches, outputs


TABLE = torch.randperm(32, generator=torch.Generator().manual_seed(3))[:16][None].int()
# 22 vision tokens: 7 stay, 15 leave, of which 12 fill 3 blocks; so 10 vision tokens and 18 of text are left.
LEFT = TOKENS - 3 * BLOCK


@pytest.mark.parametrize("chunks", [[40], [16, 24], [5, 20, 14, 1]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"method": "plphp", "target_retention": 0.3}], ids=str)
def test_what_is_kept_lies_behind_the_empty_blocks(chunks: list[int], settings: dict[str, Any]) -> None:
    pruning = pruning_of(**settings)
    caches, _ = run(pruning, request(), chunks, TABLE)
    told = pruning.take_pruned()["one"]
    assert told.vision_tokens == 22
    assert pruning.take_pruned() == {}
    for layer, cache in enumerate(caches):
        empty = told.blocks[layer]
        if not settings:
            assert empty == 3
            assert told.kept[layer] == 10
        position = torch.arange(empty * BLOCK, TOKENS)
        slots = TABLE[0, position // BLOCK].long() * BLOCK + position % BLOCK
        _, keys, values = states(TOKENS, layer)
        for head in range(KV_HEADS):
            # every entry that is there is one of the prompt, in order, and all text is among them
            rows = [(keys[:, head] == one).all(1).nonzero()[:, 0].tolist() for one in cache.keys[slots, head]]
            found = [one for (one,) in rows]
            assert found == sorted(found)
            text = [one for one in range(TOKENS) if not any(first <= one < first + n for first, n in IMAGES)]
            assert set(text) <= set(found)
            assert torch.equal(cache.values[slots, head], values[found, head])


def test_layers_whose_rates_wait_are_held_in_full() -> None:
    """What was to be evicted fills up blocks: nothing of it is dropped before the last layer is scored."""
    reading = reading_of(pruning_of(method="plphp", target_retention=0.3))
    for layer in range(LAYERS - 1):
        assert not list(reading.read(layer, *states(TOKENS, layer), DIM**-0.5))
    assert [entries.tail()[0].shape[2] for entries in reading._layers.values()] == [TOKENS] * (LAYERS - 1)
    parts = list(reading.read(LAYERS - 1, *states(TOKENS, LAYERS - 1), DIM**-0.5))
    assert [part.layer for part in parts] == list(range(LAYERS))


def test_tokens_behind_the_prompt_see_what_is_left_of_it() -> None:
    pruning = pruning_of()
    caches, outputs = run(pruning, request(), [16, 30], TABLE)
    assert pruning.take_pruned()["one"].blocks == dict.fromkeys(range(LAYERS), 3)
    for layer, (cache, output) in enumerate(zip(caches, outputs, strict=True)):
        query, _, _ = states(46, layer)
        position = torch.arange(3 * BLOCK, 46)
        slots = TABLE[0, position // BLOCK].long() * BLOCK + position % BLOCK
        expected = attention(query[TOKENS:], cache.keys[slots], cache.values[slots])
        assert_exact(output[TOKENS - 16 :], expected.flatten(1))


def test_a_request_that_begins_anew_is_pruned_anew() -> None:
    pruning = pruning_of()
    run(pruning, request(), [40], TABLE)
    known = pruning.reading("one", request(), TOKENS)
    assert known.dropped == dict.fromkeys(range(LAYERS), 3)
    assert pruning.reading("one", request(), 0).dropped == {}


def test_requests_that_have_ended_are_forgotten() -> None:
    pruning = pruning_of()
    run(pruning, request(), [20], TABLE)
    pruning.forget_all_but([])
    assert not pruning._readings
    assert pruning.take_pruned() == {}


def test_text_is_left_alone() -> None:
    pruning = pruning_of()
    caches, _ = run(pruning, request(images=()), [40], TABLE)
    assert pruning.take_pruned() == {}
    assert pruning.reading("one", request(), TOKENS).dropped == {}
    assert len(caches[0].keys.isnan().any(-1).any(-1).nonzero()) == 32 * BLOCK - TOKENS


def test_attention_that_is_not_finite_keeps_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    pruning = pruning_of()
    reading = reading_of(pruning)
    query, keys, values = states(TOKENS, 0)
    step = Step(pruning, [Row("one", reading, 0, TOKENS, 0)])
    step.after_attention(0, (query * torch.nan, keys, values), query.flatten(1), 1.0, Paged(32).write)
    assert reading.prompt is None
    assert reading.dropped == {}
    assert "request one whole" in caplog.text


def test_a_request_that_cannot_be_pruned_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise ConfigError("no rank for this")

    pruning = pruning_of()
    kv = pruning.setup.chain.kv
    broken = dataclasses.replace(kv, stage=dataclasses.replace(kv.stage, score=fail))
    chain = dataclasses.replace(pruning.setup.chain, kv=broken)
    pruning.setup = dataclasses.replace(pruning.setup, chain=chain)
    run(pruning, request(), [16, 24], TABLE)
    assert pruning.take_pruned() == {}
    assert pruning.reading("one", request(), TOKENS).dropped == {}
    assert "no rank for this" in caplog.text


def test_block_tables_begin_behind_the_empty_blocks() -> None:
    pruning = pruning_of()
    rows = [Row(str(n), RequestReading(40, pruning.setup, None, {0: n}), n, 1, 40) for n in (2, 0)]
    step = Step(pruning, rows)
    made: dict[str, Tensor] = {}
    table = torch.tensor([[4, 5, 6, 7], [8, 9, 1, 2]], dtype=torch.int32)
    common = SimpleNamespace(
        block_table_tensor=table, seq_lens=torch.tensor([15, 9], dtype=torch.int32), replace=made.update
    )
    step.shortened(0, BLOCK, common)
    assert made["seq_lens"].tolist() == [7, 9]
    assert made["seq_lens"].dtype == torch.int32
    assert made["block_table_tensor"][:, :2].tolist() == [[6, 7], [8, 9]]
    assert table.tolist() == [[4, 5, 6, 7], [8, 9, 1, 2]]
    assert step.shortened(1, BLOCK, common) is common
    with pytest.raises(UnsupportedFeatureError, match="--block-size 8"):
        step.shortened(0, 8, common)


ZIPVL = {"method": "zipvl", "options": {"attention": "dense"}, "retention_rate": 0.5}


@pytest.mark.parametrize("settings", [{}, {"method": "shared"}, ZIPVL], ids=str)
def test_two_processes_decide_as_one_would(settings: dict[str, Any]) -> None:
    """With a KV head each, and waiting for each other, as the processes of tensor parallelism do."""
    alone = pruning_of(**settings)
    expected, _ = run(alone, request(), [16, 24], TABLE)
    reported = alone.take_pruned()
    meeting = Barrier(2, timeout=60)
    brought: list[Tensor] = [torch.empty(0)] * 2

    def process(own: int) -> tuple[list[Paged], Any]:
        def gather(part: Tensor) -> Tensor:
            brought[own] = part
            meeting.wait()
            whole = torch.cat(brought, dim=1)
            meeting.wait()
            return whole

        pruning = pruning_of(**settings)
        shared = TensorParallel(2, own, gather)
        pruning.setup = dataclasses.replace(pruning.setup, tensor_parallel=shared)
        caches, _ = run(pruning, request(), [16, 24], TABLE, heads=shared.own_heads)
        return caches, pruning.take_pruned()

    with ThreadPoolExecutor(2) as processes:
        found = list(processes.map(process, range(2)))
    for own, (caches, pruned) in enumerate(found):
        assert pruned == reported
        for cache, whole in zip(caches, expected, strict=True):
            assert torch.equal(cache.keys.nan_to_num(9), whole.keys[:, own : own + 1].nan_to_num(9))
            assert torch.equal(cache.values.nan_to_num(9), whole.values[:, own : own + 1].nan_to_num(9))


@pytest.mark.parametrize("settings", [{"method": "tgv_kv"}, {"method": "mixkv", "options": {"window": 4}}], ids=str)
def test_methods_that_look_at_states_and_weighed_rows_run_in_one_process(settings: dict[str, Any]) -> None:
    pruning = pruning_of(retention_rate=0.3, **settings)
    run(pruning, request(), [16, 24], TABLE)
    assert pruning.take_pruned()


def test_weighed_attention_of_all_heads_is_joined_and_states_are_refused() -> None:
    whole = dataclasses.replace(scores(), weighted_attention=torch.rand(1, Q_HEADS, 24))
    own = dataclasses.replace(
        whole,
        attention=whole.attention[:, :2],
        weighted_attention=whole.weighted_attention[:, :2],  # type: ignore[index]
        kv_heads=1,
    )
    rest = {id(own.attention): whole.attention[:, 2:], id(own.weighted_attention): whole.weighted_attention[:, 2:]}  # type: ignore[index]
    shared = TensorParallel(2, 0, lambda part: torch.cat([part, rest.pop(next(iter(rest)))], dim=1))
    joined = shared.all_heads(own)
    assert torch.equal(joined.attention, whole.attention)
    assert torch.equal(joined.need("weighted_attention"), whole.need("weighted_attention"))
    states = LayerStates(
        lambda: (torch.zeros(1), torch.zeros(1)),
        {},
        torch.ones(1, 1, dtype=torch.bool),
        *[torch.zeros(1, 1, dtype=torch.long)] * 3,
        1.0,
    )
    with pytest.raises(UnsupportedFeatureError, match="not gathered in tensor parallelism"):
        shared.all_heads(dataclasses.replace(own, states=states))
