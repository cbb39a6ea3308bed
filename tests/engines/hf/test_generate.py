# SPDX-License-Identifier: Apache-2.0
"""What ``generate`` can do, with pruning, against stock ``generate`` and against the masked reference."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import plphp
from invariants import assert_same_generation, evicted_entries_masked, generate, logit_difference, pruned
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import cache_in, passed
from plphp.engines.hf.layer import PrunedLayer
from precision import assert_exact
from test_invariants import config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

SOME = ("llava", "qwen2-vl", "gemma3", "idefics3")
KEEP_ALL = PLPHPConfig(retention_rate=1.0)

BEAMS = {"num_beams": 3, "num_return_sequences": 2}
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 20}


def setup(family: str, rows: tuple[int, ...] = (2, 0, 1)) -> tuple[Any, dict[str, Any]]:
    model = tiny_model(family)
    return model, TINY[family].inputs(model, rows)


def seeded(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(11)
    return generate(model, inputs, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [BEAMS, {**BEAMS, **SAMPLING}, {**SAMPLING, "num_return_sequences": 3}, {"num_beams": 2, "max_new_tokens": 9}],
    ids=["beams", "beam-sample", "sample-3", "long-beams"],
)
@pytest.mark.parametrize("family", SOME)
def test_search_modes(family: str, kwargs: dict[str, Any]) -> None:
    # transformers 5.17 repeats the images of a row with several of them in the wrong order.
    model, inputs = setup(family, (1, 0, 1))
    with plphp.prune(model, KEEP_ALL):
        full = seeded(model, inputs, **kwargs)
    assert_same_generation(seeded(model, inputs, **kwargs), full)
    with plphp.prune(model, config("plphp")) as run:
        output = seeded(model, inputs, **kwargs)
    assert 0 < run.report.retention < 1
    with evicted_entries_masked(model, run.report):
        assert_same_generation(seeded(model, inputs, **kwargs), output)


def test_scores_and_hidden_states_are_returned() -> None:
    model, inputs = setup("llava")
    output, _ = pruned(model, inputs, config("plphp"), output_scores=True, output_hidden_states=True)
    assert len(output.scores) == len(output.logits) == 4
    assert len(output.hidden_states) == 4
    assert isinstance(cache_in(output), PrunedCache)


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria() -> None:
    model, inputs = setup("llava")
    length = inputs["input_ids"].shape[1] + 2
    output, _ = pruned(model, inputs, KEEP_ALL, stopping_criteria=[StopAfter(length)])
    assert output.sequences.shape[1] == length


def test_eos_stops_single_rows() -> None:
    model, inputs = setup("llava")
    stock = generate(model, inputs)
    eos = int(stock.sequences[0, inputs["input_ids"].shape[1]])
    kwargs = {"eos_token_id": eos, "pad_token_id": 0, "max_new_tokens": 8}
    output, _ = pruned(model, inputs, KEEP_ALL, **kwargs)
    assert torch.equal(generate(model, inputs, **kwargs).sequences, output.sequences)


class CollectingStreamer(BaseStreamer):
    def __init__(self, fail_after: int = 10**6) -> None:
        self.tokens: list[int] = []
        self.fail_after = fail_after

    def put(self, value: torch.Tensor) -> None:
        if len(self.tokens) >= self.fail_after:
            raise RuntimeError("the reader went away")
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_streamer_in_its_own_thread_uses_the_session() -> None:
    model, inputs = setup("llava", (1,))
    streamer = CollectingStreamer()
    with plphp.prune(model, config("plphp")) as run:
        thread = threading.Thread(target=lambda: generate(model, inputs, streamer=streamer))
        thread.start()
        thread.join()
    assert run.report.retention < 1
    expected, _ = pruned(model, inputs, config("plphp"))
    assert streamer.tokens == expected.sequences[0].tolist()


def text_chunk(model: Any, inputs: dict[str, Any], split: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt cut into a first forward pass with the images and a second one with text alone."""
    per_token = {"input_ids", "token_type_ids", "mm_token_type_ids"}
    first = {k: v[:, :split] if k in per_token | {"attention_mask"} else v for k, v in inputs.items()}
    second = {k: v[:, split:] for k, v in inputs.items() if k in per_token}
    return first, {**second, "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("query_rows", [1, 6, "text"])
@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_prompt_in_chunks_is_one_forward(family: str, query_rows: int | str) -> None:
    model, inputs = setup(family, (2, 1))
    settings = config("plphp", query_rows=query_rows)
    whole = PrunedCache.for_inputs(model, inputs, settings)
    expected = model(**inputs, **passed(whole)).logits[:, -1]
    parts = PrunedCache.for_inputs(model, inputs, settings)
    first, second = text_chunk(model, inputs, inputs["input_ids"].shape[1] - 4)
    model(**first, **passed(parts))
    assert not parts.records
    if (deltas := getattr(model.model, "rope_deltas", None)) is not None:
        # With m-RoPE the model takes the positions of a later chunk from its caller, as generate gives them.
        positions = inputs["attention_mask"].cumsum(1)[:, -4:] - 1 + deltas
        second["position_ids"] = positions.expand(3, -1, -1)
    actual = model(**second, **passed(parts)).logits[:, -1]
    assert_exact(actual, expected)
    assert parts.report().prompts[0].layers[0].rows[0].kept_positions == (
        whole.report().prompts[0].layers[0].rows[0].kept_positions
    )
    for one, other in zip(parts.layers, whole.layers, strict=True):
        if isinstance(one, PrunedLayer):
            assert one.nbytes == other.nbytes


def test_two_threads_with_one_model_and_two_settings() -> None:
    model, inputs = setup("llava", (2, 1))
    settings = [config("plphp", retention_rate=0.2), config("uniform", retention_rate=0.7)]
    expected = [pruned(model, inputs, one) for one in settings]
    results: dict[int, Any] = {}

    def work(index: int) -> None:
        for _ in range(5):
            results[index] = pruned(model, inputs, settings[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (output, report) in enumerate(expected):
        assert_same_generation(results[index][0], output)
        assert results[index][1].retention == report.retention
    assert "generate" not in model.__dict__


def test_two_models_at_once_do_not_touch_each_other() -> None:
    first, second = tiny_model("llava"), TINY["qwen2-vl"].build()
    with plphp.prune(first, plphp.PLPHPConfig()):
        assert "generate" not in second.__dict__
        with plphp.prune(second, KEEP_ALL) as run:
            pruned(first, TINY["llava"].inputs(first), config("plphp"))
            generate(second, TINY["qwen2-vl"].inputs(second))
        assert run.report.retention == 1.0
        assert "generate" in first.__dict__
        assert "generate" not in second.__dict__


def test_nested_and_repeated_sessions() -> None:
    model, inputs = setup("llava", (1,))
    for _ in range(2):
        with plphp.prune(model, KEEP_ALL) as outer:
            with plphp.prune(model, config("uniform", retention_rate=0.5)) as inner:
                generate(model, inputs)
            assert inner.report.retention == pytest.approx(0.5, abs=0.1)
            with pytest.raises(plphp.CacheStateError, match="no report"):
                _ = outer.report
            generate(model, inputs)
            assert outer.report.retention == 1.0


def test_apply_and_remove(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    plphp.remove(llava)
    plphp.apply(llava, KEEP_ALL)
    session = plphp.apply(llava, config("uniform", retention_rate=0.5))
    generate(llava, inputs)
    assert session.report.retention == pytest.approx(0.5, abs=0.1)
    plphp.remove(llava)


def test_cache_for_inputs_restores_the_model_when_it_is_freed(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    cache = PrunedCache.for_inputs(llava, inputs, config("plphp"))
    output = generate(llava, inputs, **passed(cache))
    expected, _ = pruned(llava, inputs, config("plphp"))
    assert_same_generation(expected, output)
    assert "generate" in llava.__dict__
    # Other calls are as stock while the cache is alive.
    stock = generate(llava, inputs)
    assert not isinstance(cache_in(stock), PrunedCache)
    del cache, output, stock
    assert "generate" not in llava.__dict__


def test_deepcopy_is_an_independent_cache(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava, [1, 1])
    cache = PrunedCache.for_inputs(llava, inputs, config("plphp"))
    ids = generate(llava, inputs, **passed(cache)).sequences
    other = copy.deepcopy(cache)
    turn = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)}
    expected = generate(llava, turn, **passed(cache))
    del cache
    actual = generate(llava, turn, **passed(other))
    assert logit_difference(expected, actual) == 0
