# SPDX-License-Identifier: Apache-2.0
"""Statistics of answers' queries, the attention to expect from them, and the method that ranks by it."""

from __future__ import annotations

import functools
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

import plphp
from invariants import assert_same_generation, eager_attention, evicted_entries_masked, generate, live_bytes, pruned
from plphp import AnswerQueries, ConfigError, PLPHPConfig, PrunedCache, UnsupportedModelError
from plphp.answer_queries import AHEAD, FORMAT, LayerQueries, expected_attention
from plphp.methods.expected_attention import METHOD
from plphp.rotary import Rotation
from plphp.rotary_probe import find_rotations
from plphp.types import LayerScores
from test_branch import assert_rows_are_ordinary_runs
from test_invariants import FAMILIES
from test_turns import two_turns
from tiny_models import TINY, tiny_model

NEW = 6


def prompts(family: str, count: int = 3) -> list[dict[str, Any]]:
    return [TINY[family].inputs(tiny_model(family), [2], seed=seed) for seed in range(10, 10 + count)]


@functools.cache
def statistics(family: str) -> AnswerQueries:
    return plphp.collect_answer_queries(tiny_model(family), prompts(family), max_new_tokens=NEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("statistics")


def settings(folder: Path, family: str, **options: Any) -> PLPHPConfig:
    path = folder / f"{family}.safetensors"
    if not path.exists():
        statistics(family).save(path)
    return PLPHPConfig(method="expected_attention", retention_rate=0.3, options={"statistics": str(path), **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_are_those_of_the_model(family: str) -> None:
    """The frequencies follow from the config; layers without positions have none."""
    model = tiny_model(family)
    text = model.config.get_text_config(decoder=True)
    parameters = text.rope_parameters
    kinds = getattr(text, "layer_types", None)
    for layer, rotation in find_rotations(model).items():
        own = parameters.get(kinds[layer], parameters) if kinds else parameters
        found = rotation.frequencies[rotation.frequencies > 0]
        if family in ("aya-vision", "cohere2-vision", "exaone4.5", "llama4"):
            assert len(found) == 0  # NoPE layers
            continue
        pairs = len(rotation.frequencies)
        assert len(found) >= pairs // 4 > 0  # most of Gemma 4's are 0
        width = 2 * pairs
        expected = own["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        assert torch.allclose(found, expected[: len(found)], rtol=1e-5), (layer, rotation)
        assert rotation.interleaved == (family in ("glm4v", "glm46v"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_is_complex_multiplication(interleaved: bool) -> None:
    frequencies = torch.tensor([1.0, 0.3, 0.01])
    vectors = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))  # 6 of 8 are turned
    position = torch.tensor([[0.0], [7.0]])
    turned = Rotation(frequencies, interleaved).turned(vectors, position)
    moved = vectors[..., :6]
    pairs = moved.unflatten(-1, (3, 2)) if interleaved else moved.unflatten(-1, (2, 3)).mT
    numbers = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * position[..., None] * frequencies)
    expected = torch.view_as_real(numbers)
    expected = expected.flatten(-2) if interleaved else expected.mT.flatten(-2)
    assert torch.allclose(turned[..., :6], expected, atol=1e-5)
    assert torch.equal(turned[..., 6:], vectors[..., 6:])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen2.5-vl", "glm4v", "internvl", "smolvlm"])
def test_statistics_are_those_of_the_projected_queries(family: str) -> None:
    """What the query projections of a stock model give before any rotation, while it answers."""
    model = tiny_model(family)
    layers = model.get_decoder().layers
    heads = model.config.get_text_config().num_attention_heads
    heard: dict[int, list[Tensor]] = {number: [] for number in range(len(layers))}

    def listen(number: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if output.shape[1] == 1:  # decoding
                heard[number].append(output[0, 0].unflatten(0, (heads, -1)))

        return hook

    hooks = [layer.self_attn.q_proj.register_forward_hook(listen(i)) for i, layer in enumerate(layers)]
    try:
        for inputs in prompts(family):
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = statistics(family)
    assert found.record["query_rows"] == len(heard[0]) > NEW
    for number, rows in heard.items():
        expected = torch.stack(rows).double()
        mean = expected.mean(0)
        centred = (expected - mean).transpose(0, 1)
        assert torch.allclose(found.layers[number].mean.double(), mean, atol=1e-4)
        covariance = centred.mT @ centred / len(expected)
        assert torch.allclose(found.layers[number].covariance.double(), covariance, atol=1e-4)
        assert covariance.abs().max() > 1e-2
    assert "generate" not in model.__dict__


def naive_expected(queries: LayerQueries, keys: Tensor, position: int, vision: list[int], scaling: float) -> Tensor:
    """[q_heads, vision]; in float64, key by key, with rotation matrices."""
    q_heads, dim = queries.mean.shape
    group = q_heads // keys.shape[0]
    total = torch.zeros(q_heads, len(vision), dtype=torch.float64)
    for ahead in AHEAD:
        turn = queries.rotation.turned(torch.eye(dim), float(position + ahead)).double().T  # columns are the axes
        for head in range(q_heads):
            mean = turn @ queries.mean[head].double()
            covariance = turn @ queries.covariance[head].double() @ turn.T
            own = keys[head // group].double()
            logits = [scaling * own[j] @ mean + scaling**2 / 2 * own[j] @ covariance @ own[j] for j in vision]
            total[head] += torch.stack(logits).softmax(0)
    return total


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_expected_attention_is_its_formula(reduction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 2, 9, 8, generator=generator)
    half = torch.randn(4, 8, 8, generator=generator) * 0.3
    rotation = Rotation(torch.tensor([1.0, 0.2, 0.05]), interleaved=True)
    queries = LayerQueries(torch.randn(4, 8, generator=generator), half @ half.mT, rotation)
    vision = torch.zeros(2, 9, dtype=torch.bool)
    vision[0, 2:7], vision[1, [1, 8]] = True, True
    found = expected_attention(queries, keys, torch.tensor([9, 30]), vision, 0.35, reduction)
    for row, position in enumerate((9, 30)):
        places = vision[row].nonzero()[:, 0].tolist()
        naive = naive_expected(queries, keys[row], position, places, 0.35).unflatten(0, (2, 2))
        naive = naive.amax(1) if reduction == "max" else naive.sum(1)
        assert torch.allclose(found[row][:, places].double().exp(), naive, rtol=1e-4)
        assert found[row][:, ~vision[row]].exp().sum() == 0


def test_expectation_is_that_of_normal_queries() -> None:
    """Against drawn queries, without the normalisation."""
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(6, 6, generator=generator) * 0.4
    mean, keys = torch.randn(6, generator=generator), torch.randn(1, 1, 5, 6, generator=generator)
    queries = LayerQueries(mean[None], (half @ half.T)[None], Rotation(torch.zeros(1)))
    found = expected_attention(queries, keys, torch.tensor([3]), torch.ones(1, 5, dtype=torch.bool), 0.5, "mean")
    drawn = mean + torch.randn(400_000, 6, generator=generator) @ half.T
    mass = (drawn @ keys[0, 0].T * 0.5).exp().mean(0)
    assert torch.allclose(found[0, 0].softmax(0), mass / mass.sum(), rtol=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_compacted_cache_is_full_cache_with_evicted_entries_masked(family: str, folder: Path) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    output, report = pruned(model, inputs, settings(folder, family))
    with evicted_entries_masked(model, report):
        assert_same_generation(generate(model, inputs), output)
    assert report.retention < 0.4


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_row_is_the_row_alone(family: str, folder: Path) -> None:
    """The position of the answer is that of the row, whatever stands before it."""
    model, tiny = tiny_model(family), TINY[family]
    config = settings(folder, family)
    _, report = pruned(model, tiny.inputs(model, [2, 0, 1]), config)
    for row, inputs in enumerate(tiny.rows(model, [2, 0, 1])):
        _, one = pruned(model, inputs, config)
        if not one.prompts:
            continue
        for many, few in zip(report.prompts[0].layers, one.prompts[0].layers, strict=True):
            shift = many.rows[row].kept_positions[0][0] - few.rows[0].kept_positions[0][0]
            assert [[place - shift for place in head] for head in many.rows[row].kept_positions] == few.rows[
                0
            ].kept_positions


@pytest.mark.parametrize("peak", [0, 2, 0.5])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen3-vl", "glm4v"])
def test_kept_are_the_best_places(family: str, peak: float, folder: Path) -> None:
    """Recomputed from a stock cache, naively."""
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2])
    config = settings(folder, family, peak=peak)
    _, report = pruned(model, inputs, config)
    with torch.no_grad():
        stock = model(**inputs, use_cache=True).past_key_values
    delta = 0
    for holder in (model, model.model):
        if getattr(holder, "rope_deltas", None) is not None:
            delta = int(holder.rope_deltas.flatten()[0])
    vision = [position for image in report.prompts[0].images[0] for position in image.positions]
    best = best_attention(model, inputs, max(vision) + 1)
    found = statistics(family)
    for layer in report.prompts[0].layers:
        keys = stock.layers[layer.layer].keys[0]
        queries = found.layers[layer.layer]
        position = inputs["input_ids"].shape[1] + delta
        scaling = getattr(model.get_decoder().layers[layer.layer].self_attn, "scaling", keys.shape[-1] ** -0.5)
        expected = naive_expected(queries, keys, position, vision, scaling)
        kv_heads = keys.shape[0]
        for head, kept in enumerate(layer.rows[0].kept_positions):
            own = expected.unflatten(0, (kv_heads, -1))[head].sum(0)
            of_peak = best[layer.layer].unflatten(0, (kv_heads, -1))[head].mean(0)[vision]
            by_expected = own.argsort(descending=True).argsort()
            by_peak = of_peak.argsort(descending=True).argsort()
            order = [
                (min(float(e), peak * float(p)) if peak else float(e), int(e))
                for e, p in zip(by_expected, by_peak, strict=True)
            ]
            top = sorted(range(len(vision)), key=order.__getitem__)[: len(kept)]
            assert kept == sorted(vision[j] for j in top)


@pytest.mark.parametrize("weight", [0.01, 0.1, 0.5, 1.1, 2, 3])
def test_ties_alone_go_by_what_is_expected(weight: float) -> None:
    tokens, generator = 60, torch.Generator().manual_seed(3)
    by_expected, by_peak = (torch.randperm(tokens, generator=generator) for _ in range(2))
    scores = LayerScores(
        attention=torch.rand(1, 1, tokens, generator=generator),
        segment=torch.zeros(1, tokens, dtype=torch.int64),
        real=torch.ones(1, tokens, dtype=torch.bool),
        layer=0,
        kv_heads=1,
        peak=-by_peak.view(1, 1, -1).float(),
        expected=-by_expected.view(1, 1, -1).float(),
    )
    config = PLPHPConfig(method="expected_attention", options={"statistics": "any", "peak": weight})
    places = [
        (min(Fraction(e), Fraction(str(weight)) * p), e)
        for e, p in zip(by_expected.tolist(), by_peak.tolist(), strict=True)
    ]
    order = METHOD.rank(scores, config)[0, 0].argsort(descending=True).tolist()
    assert order == sorted(range(tokens), key=places.__getitem__)


def best_attention(model: Any, inputs: dict[str, Any], begin: int) -> dict[int, Tensor]:
    """By layer, the largest attention of any row from ``begin`` on, [q_heads, seq]."""
    return {layer: one[0, :, begin:].amax(1) for layer, one in enumerate(eager_attention(model, inputs))}


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_branch_and_bytes_and_later_turns(family: str, folder: Path) -> None:
    model, tiny = tiny_model(family), TINY[family]
    configs = [settings(folder, family), settings(folder, family, peak=0, random_share=0.3)]
    maximum = PLPHPConfig.from_dict({**configs[0].to_dict(), "gqa_reduction": "max"})
    assert_rows_are_ordinary_runs(model, tiny.inputs(model, [2]), [*configs, PLPHPConfig(), maximum])
    inputs = tiny.inputs(model, [3, 1])
    cache = PrunedCache.for_inputs(model, inputs, configs[0])
    first, second = two_turns(model, family, cache, tiny.stock.second_turn_image, (3, 1))
    report = cache.report()
    assert report.kv_bytes == live_bytes(cache)
    assert len(report.prompts) == 1 + tiny.stock.second_turn_image
    stock = DynamicCache(config=model.config.get_text_config())
    with evicted_entries_masked(model, report):
        expected = two_turns(model, family, stock, tiny.stock.second_turn_image, (3, 1))
    assert_same_generation(expected[0], first)
    assert_same_generation(expected[1], second)


def test_a_saved_file_is_read_back(tmp_path: Path) -> None:
    found = statistics("glm4v")
    found.save(tmp_path / "s.safetensors")
    read = AnswerQueries.load(tmp_path / "s.safetensors")
    assert dict(read.record) == json.loads(json.dumps(dict(found.record)))
    assert read.layers.keys() == found.layers.keys()
    for number, layer in found.layers.items():
        assert torch.equal(read.layers[number].covariance, layer.covariance)
        assert torch.equal(read.layers[number].mean, layer.mean)
        assert read.layers[number].rotation.interleaved
        assert torch.equal(read.layers[number].rotation.frequencies, layer.rotation.frequencies)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2])
    path = tmp_path / "s.safetensors"
    config = PLPHPConfig(method="expected_attention", retention_rate=0.3, options={"statistics": str(path), "peak": 0})
    kept = []
    for number, sign in enumerate((1, -1)):
        found = statistics("llava")
        layers = {n: LayerQueries(sign * 30 * q.mean, q.covariance, q.rotation) for n, q in found.layers.items()}
        AnswerQueries(layers, found.record).save(path)
        os.utime(path, (number, number))
        _, report = pruned(model, inputs, config)
        kept.append(report.prompts[0].layers[0].rows[0].kept_positions)
    assert kept[0] != kept[1]


def test_what_cannot_be_is_refused(tmp_path: Path, folder: Path) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [1])

    def refused(match: str, path: object, **options: Any) -> None:
        config = PLPHPConfig(method="expected_attention", options={"statistics": str(path), **options})
        with pytest.raises(ConfigError, match=match):
            PrunedCache.for_inputs(model, inputs, config)
        assert "generate" not in model.__dict__

    refused("needs statistics.*plphp collect", "")
    refused("Cannot read the statistics .*none.safetensors: No such file", tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, this is text")
    refused("not a safetensors file", tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    refused("does not hold the statistics", tmp_path / "other")
    about = {"format": FORMAT, "interleaved": '{"0": false}', "record": "{}"}
    save_file({"0.mean": torch.zeros(4, 12)}, tmp_path / "lacking", metadata=about)
    refused(r"are broken \(KeyError\('0.covariance'\)\): make them with plphp collect", tmp_path / "lacking")
    other = settings(folder, "qwen3-vl").options["statistics"]
    refused("4 decoder layers, and this one has 3", other)
    with pytest.raises(ConfigError, match=r"'statistics'.*must be text, got 3"):
        PLPHPConfig.from_dict({"method": "expected_attention", "options": {"statistics": 3}})
    found = statistics("llava")
    layers = {n: LayerQueries(q.mean[:3], q.covariance[:3], q.rotation) for n, q in found.layers.items()}
    AnswerQueries(layers, found.record).save(tmp_path / "heads")
    config = PLPHPConfig(method="expected_attention", options={"statistics": str(tmp_path / "heads")})
    with pytest.raises(ConfigError, match=r"3 query heads of dimension 12.*collect them with this model"):
        pruned(model, inputs, config)
    AnswerQueries({0: found.layers[0]}, found.record).save(tmp_path / "few")
    config = PLPHPConfig(method="expected_attention", options={"statistics": str(tmp_path / "few")})
    with pytest.raises(ConfigError, match="layers 0, not of layer 1"):
        pruned(model, inputs, config)
    assert "generate" not in model.__dict__


def test_prompts_that_cannot_be_collected_from_are_refused() -> None:
    model, tiny = tiny_model("llava"), TINY["llava"]
    with pytest.raises(ConfigError, match="Prompt 1 has 2 rows or padding") as padded:
        plphp.collect_answer_queries(model, [tiny.inputs(model, [1, 1])])
    with pytest.raises(ConfigError, match="Prompt 2 has no vision token"):
        plphp.collect_answer_queries(model, [*prompts("llava", 1), tiny.inputs(model, [0])])
    assert "generate" not in model.__dict__, padded  # the error is kept, and what its traceback holds
    with pytest.raises(ConfigError, match=r"0 prompt\(s\) gave 0 query rows"):
        plphp.collect_answer_queries(model, [])
    with pytest.raises(ConfigError, match=r"1 prompt\(s\) gave 0 query rows"):
        plphp.collect_answer_queries(model, prompts("llava", 1), max_new_tokens=1)
    assert "generate" not in model.__dict__


def test_rotations_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llava"].build()
    text = model.config.get_text_config()
    monkeypatch.setitem(text.rope_parameters, "rope_type", "dynamic")
    with pytest.raises(UnsupportedModelError, match="of the kind 'dynamic'"):
        find_rotations(model)
    monkeypatch.undo()
    original = model.get_decoder().rotary_emb.forward
    monkeypatch.setattr(
        model.get_decoder().rotary_emb, "forward", lambda x, position_ids: original(x, position_ids * 1.5)
    )
    with pytest.raises(UnsupportedModelError, match=r"queries of layer 0 .* do not turn"):
        find_rotations(model)
    assert "generate" not in model.__dict__
