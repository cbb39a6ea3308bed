# SPDX-License-Identifier: Apache-2.0
"""Admission arithmetic against the bytes of live tensors, over all families."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import plphp
from plphp.engines.hf import foreign_banks
from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.layer import PrunedLayer, layer_nbytes
from plphp.errors import ConfigError, UnsupportedFeatureError, UnsupportedModelError
from plphp.kernels.books import Books, LayerBooks
from plphp.kernels.coded import Reading
from plphp.policy import bank as banks
from plphp.pruning import coders
from plphp.settings.ladder import Ladder
from plphp.studies.accelerators import ACCELERATORS, Accelerator, accelerator
from plphp.studies.estimate import Workload, estimate
from plphp.studies.model_cost import LayerCost, ModelCost, model_cost
from plphp.studies.tier_cost import TierCost
from tiny_models import TINY, tiny_model

NEW = 3
GPU = Accelerator("ours", memory=1000, bandwidth=10)
COST = ModelCost(100, 60, False, (LayerCost(2, None, 0, True), LayerCost(4, 5, 7, False)))


def empty(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    family = TINY[name]
    with torch.device("meta"):
        return getattr(transformers, family.model_class)._from_config(family.config(), dtype=dtype).eval()


def held(cache: PrunedCache) -> int:
    """Bytes of the entries of a cache, without room that is reserved for more."""
    return sum(
        layer.prefix.nbytes + sum(part.nbytes for part in layer.tail())
        if isinstance(layer, PrunedLayer) and layer.prefix is not None
        else layer_nbytes(layer)
        for layer in cache.layers
    )


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_kv_bytes_are_those_of_the_live_tensors(name: str, rate: float) -> None:
    model = tiny_model(name)
    inputs = TINY[name].inputs(model)
    cache = PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig(method="uniform", retention_rate=rate))
    vision = int(cache.reading.spans.vision.sum())
    output = model(**inputs, **passed(cache))
    for _ in range(NEW):
        output = model(input_ids=output.logits[:, -1:].argmax(-1), **passed(cache))
    cost = model_cost(empty(name))
    assert cost.kv_bytes(cache.get_seq_length(), vision, rate) == held(cache)
    assert [layer.prunable for layer in cost.layers] == [isinstance(layer, PrunedLayer) for layer in cache.layers]


LADDERS = ("c3", "kivi2", "pr2=.2,rvq=.24,pq=.32", "whole=.1,c4=.3,pq16=.2", "r1=.3,kivi4")


@pytest.mark.parametrize("read", [1.0, 0.3])
@pytest.mark.parametrize("ladder", LADDERS)
@torch.inference_mode()
def test_bytes_of_a_ladder_are_those_of_a_run(ladder: str, read: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held by the live tensors, and read at most by what a report says of them."""
    config = TINY["llava"].config()
    config.text_config.head_dim = 16
    family = dataclasses.replace(TINY["llava"], config=lambda: config)
    model = family.build()
    shapes = [(2, 2, 256, 8), (2, 2, 256, 8), (2, 1, 256, 16)]
    books = LayerBooks(*(Books(*(torch.randn(shape).half() for shape in shapes)) for _ in range(2)))
    layers = config.text_config.num_hidden_layers
    bank = SimpleNamespace(decoder_layers=layers, books=dict.fromkeys(range(layers), books), values_hash="")
    for module in (banks, coders, foreign_banks):
        monkeypatch.setattr(module, "bank_at", lambda name: bank)
    needed = "any.st" if "p" in ladder else None
    settings = plphp.PLPHPConfig(method="uniform", tiers=ladder, read=read, books=needed)
    inputs = family.inputs(model, [2])
    cache = PrunedCache.for_inputs(model, inputs, settings)
    vision = int(cache.reading.spans.vision.sum())
    model(**inputs, **passed(cache))
    report, cost, tiers = cache.report(), model_cost(model), TierCost(Ladder.parse(ladder), Reading(read))
    assert cost.kv_bytes(cache.get_seq_length(), vision, tiers=tiers) == report.entry_bytes
    assert cost.read_bytes(cache.get_seq_length(), vision, tiers) == pytest.approx(report.read_bytes, abs=layers)
    assert cost.book_bytes(tiers) == (layers * books.nbytes if needed else 0)
    workload = Workload(vision, cache.get_seq_length() - vision - 1, 1, batch=3)
    figures = estimate(cost, workload, tiers=ladder, read=read, accelerator=Accelerator("ours", 10**7, 10))
    assert figures.kv_bytes == 3 * report.entry_bytes
    assert figures.step_bytes == cost.step_weight_bytes + 3 * cost.read_bytes(cache.get_seq_length(), vision, tiers)
    assert figures.memory_bytes == cost.weight_bytes + figures.book_bytes + figures.kv_bytes
    assert figures.largest_batch == (9 * 10**6 - cost.weight_bytes - figures.book_bytes) // report.entry_bytes


def test_what_is_no_ladder_of_an_estimate() -> None:
    cost = ModelCost(100, 60, False, (LayerCost(48, None, 0, True, 1, (12, 12)),))
    for arguments, message in (
        ({"tiers": "c5"}, "Unknown ladder or rung 'c5' in tiers=c5. Ladders: t15"),
        ({"tiers": "c3", "retention": 0.5}, "tiers=c3 says how much is kept, and so does retention=0.5"),
        ({"read": 0.5}, "there are none: give tiers"),
        ({"tiers": "c3", "read": 0.0}, "read must be above 0"),
        ({"tiers": "c3", "read": 1.5}, "read must be between 0 and 1, got 1.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            estimate(cost, Workload(9, 1), **arguments)
    with pytest.raises(UnsupportedFeatureError, match="multiple of 8, and this model has 12 and 12"):
        estimate(cost, Workload(9, 1), tiers="c3")
    narrow = ModelCost(100, 60, False, (LayerCost(32, None, 0, True, 1, (8, 8)),))
    with pytest.raises(UnsupportedFeatureError, match=r"'pq16' .* multiple of 16, and this model has 8 and 8"):
        estimate(narrow, Workload(9, 1), tiers="pq=.2,pq16")


@pytest.mark.parametrize("name", TINY)
def test_weight_bytes_are_those_of_the_model(name: str) -> None:
    model, cost = tiny_model(name), model_cost(empty(name))
    assert cost.experts == ("moe" in name or name == "llama4")
    assert cost.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    halved = model_cost(empty(name, torch.bfloat16))
    assert 0.45 * cost.weight_bytes <= halved.weight_bytes <= 0.55 * cost.weight_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_the_text_model_and_the_output_embeddings(tied: bool) -> None:
    config = TINY["llava"].config()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration._from_config(config)
    text, table = model.model.language_model, model.lm_head.weight
    expected = sum(weight.nbytes for weight in text.parameters()) + (0 if tied else table.nbytes)
    expected -= 0 if tied else text.embed_tokens.weight.nbytes
    assert model_cost(model).step_weight_bytes == expected


def test_the_shape_of_a_7b_model() -> None:
    config = transformers.Qwen2VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={"hidden_size": 3584},
    )
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    cost = model_cost(model.eval())
    assert cost.kv_bytes(1) == 57_344
    # 15.2 GB of text weights, of which 1.1 GB are input embeddings.
    assert cost.step_weight_bytes == pytest.approx(14.1e9, rel=0.01)
    before, after = (estimate(cost, Workload(7000, 100, 1, 64), rate, accelerator("H200")) for rate in (1.0, 0.4))
    assert before.step_bytes == cost.step_weight_bytes + 64 * 7101 * 57_344
    assert after.step_bytes == cost.step_weight_bytes + 64 * (2800 + 101) * 57_344


def test_what_does_not_grow_and_what_slides() -> None:
    assert COST.kv_bytes(3) == 3 * 2 + 3 * 4 + 7
    assert COST.kv_bytes(9) == 9 * 2 + 5 * 4 + 7
    assert COST.kv_bytes(9, vision_tokens=6, retention=0.5) == 6 * 2 + 5 * 4 + 7


def test_memory_and_time() -> None:
    figures = estimate(COST, Workload(6, 1, 2, batch=2), 0.5, GPU, reserve=0.2)
    each = 6 * 2 + 5 * 4 + 7
    assert (figures.sequence_kv_bytes, figures.kv_bytes) == (each, 2 * each)
    assert (figures.memory_bytes, figures.step_bytes) == (100 + 2 * each, 60 + 2 * each)
    assert figures.largest_batch == (800 - 100) // each
    assert figures.step_seconds == (60 + 2 * each) / 10
    assert figures.tokens_per_second == 2 / figures.step_seconds
    assert figures.most_tokens_per_second == figures.largest_batch / ((60 + figures.largest_batch * each) / 10)
    assert figures.fits
    assert estimate(COST, Workload(6, 1, 2, batch=figures.largest_batch), 0.5, GPU, reserve=0.2).fits
    assert not estimate(COST, Workload(6, 1, 2, batch=figures.largest_batch + 1), 0.5, GPU, reserve=0.2).fits


def test_weights_alone_that_do_not_fit() -> None:
    figures = estimate(COST, Workload(6, 1), 1.0, Accelerator("small", 50, 10))
    assert (figures.fits, figures.largest_batch, figures.most_tokens_per_second) == (False, 0, 0)


@given(st.integers(0, 500), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1))
def test_keeping_less_never_takes_more(vision: int, text: int, first: float, second: float) -> None:
    low, high = sorted((first, second))
    few, many = (estimate(COST, Workload(vision, text), rate, GPU) for rate in (low, high))
    assert few.step_bytes <= many.step_bytes
    assert few.largest_batch >= many.largest_batch


def test_accelerators() -> None:
    assert accelerator("rtx 4090") is ACCELERATORS["RTX-4090"]
    assert accelerator("H200").memory == 141e9
    given_ = accelerator("24 GiB, 1.5TB/s")
    assert (given_.memory, given_.bandwidth) == (24 * 2**30, 1.5e12)
    assert (accelerator("H100").flops, accelerator("T4").flops, given_.flops) == (989.5e12, None, None)
    for text in ("24GB,1TB/s,165TFLOP/s", "24GB, 1TB/s, 165 tflops"):
        assert accelerator(text).flops == 165e12
    for text, message in (
        ("H20", "Did you mean 'H200'"),
        ("24GB", "Unknown GPU '24GB'"),
        ("0GB,5GB/s", "positive numbers"),
        ("1GB,5GB/s,0TFLOP/s", "positive numbers"),
        ("1GB,5GB/s,7", "with the peak if you like"),
        ("1.2.3GB,5GB/s", "positive numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            accelerator(text)


def test_numbers_out_of_range() -> None:
    with pytest.raises(ConfigError, match="new_tokens must be an integer of at least 1, got 0"):
        Workload(1, 1, new_tokens=0)
    for retention in (True, "0.4"):
        with pytest.raises(ConfigError, match="retention must be between 0 and 1, got"):
            estimate(COST, Workload(1, 1), retention)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="retention must be between 0 and 1, got 2"):
        estimate(COST, Workload(1, 1), 2)
    with pytest.raises(ConfigError, match=r"reserve must be between 0 and 0\.99, got 1"):
        estimate(COST, Workload(1, 1), reserve=1)


def test_a_quantized_checkpoint_is_refused() -> None:
    model = empty("llava")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match=r"quantized.*name the model that it was made from"):
        model_cost(model)


def test_a_model_whose_pass_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = empty("llava")

    def fail(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no such operator\nfor meta tensors")

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(UnsupportedModelError, match=r"LlavaForConditionalGeneration cannot be told.*no such operator"):
        model_cost(model)
