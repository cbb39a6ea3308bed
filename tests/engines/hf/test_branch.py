# SPDX-License-Identifier: Apache-2.0
"""`plphp.branch`: each row is what an ordinary run with its config gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import plphp
from invariants import attention_set
from plphp import ConfigError, PLPHPConfig, PrunedCache, SpanError, UnsupportedFeatureError
from plphp.engines.hf import branching
from plphp.engines.hf.cache_argument import cache_in, passed
from precision import EXACT, assert_exact
from test_invariants import FAMILIES, KINDS, MECHANISMS
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

LINES = (
    "plphp:retention_rate=0.3,attentive_threshold=0.6,indifferent_threshold=0.5",
    "plphp:target_retention=0.5",
    "snapkv:window=4,retention_rate=0.3",
    "none",
    "snapkv_vision:window=4,retention_rate=0.2,exempt_layers=0",
    "pyramidkv:window=3,retention_rate=0.4",
    "vl_cache:retention_rate=0.4",
    "zipvl:attention=dense,target_retention=0.3",
    "recall_rank:retention_rate=0.3,value_norm=1,floor=0.3,random_share=0.2",
    "tgv_kv:retention_rate=0.3",
    "mixkv:window=4,retention_rate=0.3",
    "expected_attention:retention_rate=0.3",
    "expected_attention:retention_rate=0.2,epsilon=0.01,heads=ragged",
    "prompt_queries:retention_rate=0.3",
    "prompt_queries:retention_rate=0.2,rows=5,ahead=0,reduce=peak,heads=equal",
    "adakv:window=4,retention_rate=0.3",
    "random:retention_rate=0.5",
    "value_norm:retention_rate=0.5,image_quota=per_image",
)
STAGE = ("fastv:layer=1,retention_rate=0.6", "vtw:retention_rate=0.34")
CONFIGS = [PLPHPConfig.parse(line) for line in LINES]
DRAFT = torch.tensor([5, 17, 60, 33, 9])


def draft_logits(model: Any, cache: Any, rows: int) -> Tensor:
    with torch.no_grad():
        return model(input_ids=DRAFT.expand(rows, -1), **passed(cache)).logits


def alone(model: Any, inputs: dict[str, Any], config: PLPHPConfig) -> tuple[PrunedCache, Tensor]:
    """An ordinary cache with the prompt, and the logits of the next token."""
    cache = PrunedCache.for_inputs(model, inputs, config)
    with torch.no_grad():
        return cache, model(**inputs, **passed(cache)).logits[:, -1]


def has_full_attention_only(model: Any) -> bool:
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"}


def assert_rows_are_ordinary_runs(model: Any, inputs: dict[str, Any], configs: list[PLPHPConfig]) -> None:
    branches = plphp.branch(model, inputs, configs)
    together = draft_logits(model, branches.cache, len(configs))
    (prompt,) = branches.cache.report().prompts
    assert branches.cache.get_seq_length() == inputs["input_ids"].shape[1] + len(DRAFT)
    for row, config in enumerate(configs):
        cache, logits = alone(model, inputs, config)
        assert_exact(branches.logits[row], logits[0])
        assert_exact(together[row], draft_logits(model, cache, 1)[0])
        report = cache.report()
        for many, one in zip(prompt.layers, report.prompts[0].layers, strict=True):
            assert many.layer == one.layer
            assert many.rows[row].kept_positions == one.rows[0].kept_positions
            assert (many.rows[row].evicted_text or [[], []]) == (one.rows[0].evicted_text or [[], []])
            assert many.rows[row].rate == pytest.approx(one.rows[0].rate)
        assert branches.vision_kept[row] == pytest.approx(report.retention)
        layers = [cache.layers[layer.layer] for layer in prompt.layers]
        entries = sum(layer.prefix.keys.shape[0] for layer in layers)
        whole = inputs["input_ids"].shape[1] * sum(layer.prefix.kv_heads for layer in layers)
        assert branches.kept[row] == pytest.approx(entries / whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_ordinary_runs(family: str) -> None:
    model = tiny_model(family)
    configs = CONFIGS.copy() if family in KINDS else [one for one in CONFIGS if one.method in (*MECHANISMS, "none")]
    if has_full_attention_only(model):
        configs[2:2] = [PLPHPConfig.parse(line) for line in STAGE]
    assert_rows_are_ordinary_runs(model, TINY[family].inputs(model, [2]), configs)


def test_model_is_as_before_when_the_cache_is_gone(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    branches = plphp.branch(llava, inputs, CONFIGS[:2])
    assert "generate" in llava.__dict__
    del branches
    with pytest.raises(ConfigError):
        plphp.branch(llava, inputs, [PLPHPConfig(exempt_layers=(9,))])


@pytest.mark.parametrize("reduce", ["best_rank", "peak", "mean"])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen3-vl", "smolvlm", "gemma3"])
def test_oracle_ranks_by_the_answer(family: str, reduce: str) -> None:
    """Recomputed from the attention of a stock model that reads prompt and answer at once."""
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, [2])
    config = PLPHPConfig(method="oracle", retention_rate=0.3, options={"reduce": reduce})
    plain = PLPHPConfig(retention_rate=0.3)
    branches = plphp.branch(model, inputs, [plain, config, plain], answer_ids=DRAFT)
    assert branches.cache.get_seq_length() == inputs["input_ids"].shape[1]
    (prompt,) = branches.cache.report().prompts
    vision = [position for image in prompt.images[0] for position in image.positions]

    end, heads = inputs["input_ids"].shape[1], model.config.get_text_config().num_key_value_heads
    with attention_set(model, "eager"), torch.no_grad():
        cache = cache_in(model(**inputs, use_cache=True))
        output = model(input_ids=DRAFT[None, :-1], **passed(cache), output_attentions=True)
    if family != "gemma3":
        assert all(attention.shape[2:] == (4, end + 4) for attention in output.attentions)
    for layer in prompt.layers:
        attention = output.attentions[layer.layer][0]
        attention = attention.unflatten(0, (heads, -1))  # [kv_heads, group, rows, seq]
        for head, kept in enumerate(layer.rows[1].kept_positions):
            mine = attention[head][:, :, vision].double()
            if reduce == "mean":
                score = mine.mean((0, 1)).tolist()
            elif reduce == "peak":
                score = mine.amax(1).mean(0).tolist()
            else:
                score = [-best for best in naive_best_rank(mine.mean(0))]
            assert len(kept) == int(0.3 * len(vision) + 0.5)
            inside = [score[index] for index, position in enumerate(vision) if position in kept]
            outside = [score[index] for index, position in enumerate(vision) if position not in kept]
            assert min(inside) >= max(outside) - EXACT
    # The answer leaves no trace in the other rows.
    reference = plphp.branch(model, inputs, [plain])
    expected, actual = (draft_logits(model, one.cache, rows) for one, rows in ((reference, 1), (branches, 3)))
    assert_exact(actual[[0, 2]], expected.expand(2, -1, -1))
    assert (actual[1] - expected[0]).abs().max() > 1e-3


def naive_best_rank(rows: Tensor) -> list[int]:
    """Best place of each entry over the rows [rows, entries]."""
    places = []
    for row in rows.tolist():
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        places.append({index: place for place, index in enumerate(order)})
    return [min(place[index] for place in places) for index in range(rows.shape[1])]


def test_what_branch_refuses(llava: Any) -> None:
    tiny = TINY["llava"]
    inputs = tiny.inputs(llava)
    oracle = PLPHPConfig(method="oracle")
    with pytest.raises(ConfigError, match="at least one config"):
        plphp.branch(llava, inputs, [])
    with pytest.raises(ConfigError, match="'oracle' ranks by the answer: pass answer_ids"):
        plphp.branch(llava, inputs, [oracle])
    for answer in (DRAFT[None], DRAFT[:0], [5, 6]):
        with pytest.raises(ConfigError, match="answer_ids must be a tensor"):
            plphp.branch(llava, inputs, [oracle], answer_ids=answer)  # type: ignore[arg-type]
    with pytest.raises(SpanError, match="without padding, got 2 rows"):
        plphp.branch(llava, tiny.inputs(llava, [1, 1]), CONFIGS)
    with pytest.raises(SpanError, match="at least one vision token"):
        plphp.branch(llava, tiny.inputs(llava, [0]), CONFIGS)
    with pytest.raises(UnsupportedFeatureError, match="branch"), plphp.prune(llava, oracle):
        llava.generate(**inputs, max_new_tokens=2)
    with pytest.raises(UnsupportedFeatureError, match="only"):
        PrunedCache.for_inputs(llava, inputs, oracle)


def test_one_answer_token_is_enough(llava: Any) -> None:
    configs = [PLPHPConfig(method="oracle"), PLPHPConfig()]
    branches = plphp.branch(llava, TINY["llava"].inputs(llava), configs, answer_ids=DRAFT[:1])
    assert branches.vision_kept[0] == pytest.approx(0.4, abs=0.1)


def test_a_later_turn_goes_on_by_direct_calls_only(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    branches = plphp.branch(llava, inputs, CONFIGS[:2])
    ids = torch.cat([inputs["input_ids"], DRAFT[None]], dim=1).expand(2, -1)
    with pytest.raises(UnsupportedFeatureError, match=r"model\(\.\.\.\) directly"):
        llava.generate(input_ids=ids, **passed(branches.cache), max_new_tokens=2)
    first = draft_logits(llava, branches.cache, 2)
    branches.cache.crop(-len(DRAFT))
    assert_exact(draft_logits(llava, branches.cache, 2), first)


def test_under_inference_mode(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    with torch.inference_mode():
        branches = plphp.branch(llava, inputs, [*CONFIGS, PLPHPConfig(method="oracle")], answer_ids=DRAFT)
        assert draft_logits(llava, branches.cache, len(CONFIGS) + 1).isfinite().all()


def test_rows_are_merged_on_the_device_of_the_model(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another device as default: the CPU stands for a GPU, so that what is made without a device is elsewhere."""
    merged = branching.merged_rows

    def elsewhere(*args: Any) -> PrunedCache:
        with torch.device("meta"):
            return merged(*args)

    inputs, configs = TINY["llava"].inputs(llava), [*CONFIGS[:4], PLPHPConfig.parse(STAGE[0])]
    expected = draft_logits(llava, plphp.branch(llava, inputs, configs).cache, len(configs))
    monkeypatch.setattr(branching, "merged_rows", elsewhere)
    assert torch.equal(draft_logits(llava, plphp.branch(llava, inputs, configs).cache, len(configs)), expected)
