# SPDX-License-Identifier: Apache-2.0
"""Queries of a model's answers: how they are collected and turned, and the method that asks with them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_branch import assert_rows_are_ordinary_runs
from torch import Tensor
from transformers import DynamicCache

import plphp
from invariants import assert_same_generation, evicted_entries_masked, generate, live_bytes, pruned, two_turns
from plphp import ConfigError, PLPHPConfig, PrunedCache, QueryBank, UnsupportedModelError
from plphp.engines.hf.cache_argument import cache_in
from plphp.engines.hf.rotation_probe import find_rotations
from plphp.methods.registry import resolve
from plphp.policy.bank import FORMAT, LayerBank
from plphp.policy.rotation import Rotation
from precision import EXACT, working_dtype
from test_invariants import FAMILIES
from tiny_models import TINY, tiny_model
from tiny_models.family import TinyFamily

pytestmark = pytest.mark.usefixtures("float64")

NEW = 6


def prompts(family: str, count: int = 3) -> list[dict[str, Any]]:
    return [TINY[family].inputs(tiny_model(family), [2], seed=seed) for seed in range(10, 10 + count)]


def bank(family: str) -> QueryBank:
    """Of the tiny model in the dtype of the test that asks, which is not everywhere float64."""
    return _collected(family, working_dtype())


@functools.cache
def _collected(family: str, dtype: torch.dtype) -> QueryBank:
    return plphp.collect_query_bank(tiny_model(family), prompts(family), max_new_tokens=NEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("banks")


def settings(folder: Path, family: str, **options: Any) -> PLPHPConfig:
    path = folder / f"{family}.safetensors"
    if not path.exists():
        bank(family).save(path)
    if family == "gemma4":  # it normalises its values, so that float error would rank them
        options = {"value_norm": 0, **options}
    return PLPHPConfig(method="query_bank", retention_rate=0.3, options={"bank": str(path), **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_are_those_of_the_model(family: str) -> None:
    """The frequencies follow from the config; layers without positions have none."""
    model = tiny_model(family)
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    for layer, rotation in find_rotations(model).items():
        own = text.rope_parameters.get(kinds[layer], text.rope_parameters) if kinds else text.rope_parameters
        turning = rotation.frequencies[rotation.frequencies > 0]
        if family in ("aya-vision", "cohere2-vision", "exaone4.5", "llama4"):
            assert len(turning) == 0
            continue
        width = 2 * len(rotation.frequencies)
        expected = own["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
        assert torch.allclose(turning, expected[: len(turning)], rtol=EXACT), (layer, rotation)
        assert rotation.interleaved == (family in ("glm4v", "glm46v"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_is_complex_multiplication(interleaved: bool) -> None:
    frequencies = torch.tensor([1.0, 0.3, 0.01]).double()
    vectors = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()  # 6 of 8 are turned
    position = torch.tensor([[0.0], [7.0]])
    turned = Rotation(frequencies, interleaved).rotated(vectors, position)
    moved = vectors[..., :6]
    pairs = moved.unflatten(-1, (3, 2)) if interleaved else moved.unflatten(-1, (2, 3)).mT
    numbers = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * position[..., None] * frequencies)
    expected = torch.view_as_real(numbers)
    expected = expected.flatten(-2) if interleaved else expected.mT.flatten(-2)
    assert torch.allclose(turned[..., :6], expected, atol=EXACT)
    assert torch.equal(turned[..., 6:], vectors[..., 6:])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen2.5-vl", "glm4v", "internvl", "smolvlm"])
def test_the_bank_holds_the_projected_queries(family: str) -> None:
    """What the query projections of a stock model give before any rotation, while it answers."""
    model = tiny_model(family)
    layers = model.get_decoder().layers
    heads = model.config.get_text_config().num_attention_heads
    heard: dict[int, list[Tensor]] = {number: [] for number in range(len(layers))}
    ahead: list[int] = []

    def listen(number: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if output.shape[1] == 1:  # decoding
                heard[number].append(output[0, 0].unflatten(0, (heads, -1)))

        return hook

    hooks = [layer.self_attn.q_proj.register_forward_hook(listen(i)) for i, layer in enumerate(layers)]
    try:
        for inputs in prompts(family):
            before = len(heard[0])
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            ahead += range(len(heard[0]) - before)
    finally:
        for hook in hooks:
            hook.remove()
    collected = bank(family)
    assert collected.record["answer_tokens"] == collected.record["samples"] == len(ahead) > NEW
    assert collected.ahead.tolist() == ahead
    for number, rows in heard.items():
        assert (collected.layers[number].queries - torch.stack(rows, dim=1)).abs().max() < EXACT
    assert "generate" not in model.__dict__


def wide(family: str) -> TinyFamily:
    """A tiny model whose heads have product codes of both widths: 16 channels of keys and values."""
    tiny = TINY[family]

    def config() -> Any:
        made = tiny.config()
        made.get_text_config().head_dim = 16
        return made

    return dataclasses.replace(tiny, config=config)


@pytest.mark.parametrize("family", ["llava", "internvl", "exaone4.5"])
def test_the_codebooks_are_of_the_vision_entries_of_a_stock_cache(family: str) -> None:
    """There are fewer than 256, so that each is a centroid, less the mean of its prompt."""
    tiny = wide(family)
    model = tiny.build()
    inputs = [tiny.inputs(model, [2], seed=seed) for seed in (10, 11)]
    collected = plphp.collect_query_bank(model, inputs, max_new_tokens=NEW)
    books = collected.books
    assert books is not None
    assert books.keys() == collected.layers.keys()
    assert collected.sampled is None
    expected: dict[int, list[list[Tensor]]] = {layer: [[], []] for layer in books}
    for prompt in inputs:
        with plphp.prune(model, PLPHPConfig(retention_rate=0.3)) as run:
            generate(model, prompt, max_new_tokens=2)
        vision = [position for image in run.report.prompts[0].images[0] for position in image.positions]
        with torch.no_grad():
            stock = cache_in(model(**prompt, use_cache=True))
        for layer, sides in expected.items():
            for side, states in zip(sides, (stock.layers[layer].keys, stock.layers[layer].values), strict=True):
                of_vision = states[0][:, vision].double()
                side.append(of_vision - of_vision.mean(1, keepdim=True))
    count = sum(part.shape[1] for part in expected[max(books)][0])
    assert 20 < count < 256
    assert (collected.record["book_tokens"], collected.record["book_prompts"]) == (count, 2)
    for layer, sides in expected.items():
        for own, parts in zip((books[layer].keys, books[layer].values), sides, strict=True):
            vectors = torch.cat(parts, dim=1)
            for centroids, width in ((own.fine, 8), (own.coarse, 16)):
                assert centroids is not None
                held = vectors.unflatten(2, (-1, width)).transpose(1, 2)
                far = torch.cdist(held, centroids.double()).amin(-1)
                assert (far <= 1e-3 * held.norm(dim=-1).amax()).all(), "a vision entry is no centroid"


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
        _, single = pruned(model, inputs, config)
        if not single.prompts:
            continue
        for many, few in zip(report.prompts[0].layers, single.prompts[0].layers, strict=True):
            together, alone = many.rows[row], few.rows[0]
            assert together.vision_score == pytest.approx(alone.vision_score, abs=EXACT)
            shift = together.kept_positions[0][0] - alone.kept_positions[0][0]
            assert [[position - shift for position in head] for head in together.kept_positions] == alone.kept_positions


@pytest.mark.parametrize("options", [{}, {"reduce": "mean"}, {"value_norm": 0}, {"reduce": "peak"}], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen3-vl", "glm4v"])
def test_kept_are_what_the_bank_looks_at(family: str, options: dict[str, Any], folder: Path) -> None:
    """Recomputed from a stock cache in float64, query by query, with rotation matrices."""
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2])
    config = settings(folder, family, **options)
    _, report = pruned(model, inputs, config)
    with torch.no_grad():
        stock = cache_in(model(**inputs, use_cache=True))
    deltas = [getattr(holder, "rope_deltas", None) for holder in (model, model.model)]
    delta = next((int(tensor.flatten()[0]) for tensor in deltas if tensor is not None), 0)
    begin = inputs["input_ids"].shape[1] + delta
    vision = [position for image in report.prompts[0].images[0] for position in image.positions]
    read = QueryBank.load(str(config.options["bank"]))
    for layer in report.prompts[0].layers:
        keys, values = stock.layers[layer.layer].keys[0].double(), stock.layers[layer.layer].values[0]
        own = read.layers[layer.layer]
        scaling = getattr(model.get_decoder().layers[layer.layer].self_attn, "scaling", keys.shape[-1] ** -0.5)
        q_heads, samples, dim = own.queries.shape
        group = q_heads // len(keys)
        mass = torch.zeros(q_heads, samples, keys.shape[1], dtype=torch.float64)
        for sample, ahead in enumerate(read.ahead.tolist()):
            turn = own.rotation.rotated(torch.eye(dim), float(begin + ahead)).double().T  # columns are the axes
            for head in range(q_heads):
                query = turn @ own.queries[head, sample].double()
                mass[head, sample] = (keys[head // group] @ query * scaling).softmax(-1)
        mass = mass.unflatten(0, (-1, group))[..., vision]
        assert layer.rows[0].vision_score == pytest.approx(mass.sum(-1).mean().item(), abs=EXACT)
        for head, kept in enumerate(layer.rows[0].kept_positions):
            reduce = options.get("reduce", "best_rank")
            if reduce == "mean":
                score = mass[head].mean((0, 1))
            elif reduce == "best_rank":
                of_group = mass[head].mean(0)
                best = of_group.argsort(dim=-1, descending=True).argsort(dim=-1).amin(0)
                mean = of_group.mean(0)
                score = 1 / (2 + best - mean / mean.max())
            else:
                score = mass[head].amax(1).mean(0)
            if options.get("value_norm", 1):
                score = score * values[head][vision].double().norm(dim=-1)
            top = score.argsort(descending=True)[: len(kept)]
            assert kept == sorted(vision[j] for j in top.tolist())


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_branch_and_bytes_and_later_turns(family: str, folder: Path) -> None:
    model, tiny = tiny_model(family), TINY[family]
    configs = [settings(folder, family, reduce="peak"), settings(folder, family, random_share=0.3)]
    maximum = PLPHPConfig.from_dict({**configs[1].to_dict(), "gqa_reduction": "max"})
    assert_rows_are_ordinary_runs(model, tiny.inputs(model, [2]), [*configs, PLPHPConfig(), maximum])
    inputs = tiny.inputs(model, [3, 1])
    cache = PrunedCache.for_inputs(model, inputs, configs[0])
    first, second = two_turns(model, TINY[family], cache, tiny.stock.second_turn_image, (3, 1))
    report = cache.report()
    assert report.kv_bytes == live_bytes(cache)
    assert len(report.prompts) == 1 + tiny.stock.second_turn_image
    stock = DynamicCache(config=model.config.get_text_config())
    with evicted_entries_masked(model, report):
        expected = two_turns(model, TINY[family], stock, tiny.stock.second_turn_image, (3, 1))
    assert_same_generation(expected[0], first)
    assert_same_generation(expected[1], second)


def test_beams_are_placed_like_their_prompt(folder: Path) -> None:
    model, inputs = tiny_model("qwen2-vl"), TINY["qwen2-vl"].inputs(tiny_model("qwen2-vl"), [2])
    config = settings(folder, "qwen2-vl")
    _, greedy = pruned(model, inputs, config)
    _, beams = pruned(model, inputs, config, num_beams=3)
    for single, layer in zip(greedy.prompts[0].layers, beams.prompts[0].layers, strict=True):
        assert all(row.kept_positions == single.rows[0].kept_positions for row in layer.rows)


def test_a_saved_file_is_read_back(tmp_path: Path) -> None:
    collected = bank("glm4v")
    collected.save(tmp_path / "bank.safetensors")
    read = QueryBank.load(tmp_path / "bank.safetensors")
    assert dict(read.record) == json.loads(json.dumps(dict(collected.record)))
    assert read.layers.keys() == collected.layers.keys()
    assert torch.equal(read.ahead, collected.ahead)
    for number, layer in collected.layers.items():
        assert torch.equal(read.layers[number].queries, layer.queries.to(torch.bfloat16))
        assert read.layers[number].rotation.interleaved
        assert torch.equal(read.layers[number].rotation.frequencies, layer.rotation.frequencies)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2])
    path = tmp_path / "bank.safetensors"
    config = PLPHPConfig(method="query_bank", retention_rate=0.3, options={"bank": str(path)})
    kept = []
    for number, factor in enumerate((1, -30)):
        layers = {n: LayerBank(factor * layer.queries, layer.rotation) for n, layer in bank("llava").layers.items()}
        dataclasses.replace(bank("llava"), layers=layers).save(path)
        os.utime(path, (number, number))
        _, report = pruned(model, inputs, config)
        kept.append(report.prompts[0].layers[0].rows[0].kept_positions)
    assert kept[0] != kept[1]


def test_what_cannot_be_is_refused(tmp_path: Path, folder: Path) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [1])

    def refused(match: str, path: object, **changes: Any) -> None:
        config = PLPHPConfig(method="query_bank", options={"bank": str(path)}, **changes)
        with pytest.raises(ConfigError, match=match):
            pruned(model, inputs, config)
        assert "generate" not in model.__dict__

    refused(r"Cannot read the query bank .*none.safetensors: No such file", tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, this is text")
    refused("not a safetensors file", tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "tensors")
    refused("does not hold a query bank", tmp_path / "tensors")
    about = {"format": FORMAT, "interleaved": '{"0": false}', "record": '{"decoder_layers": 3}'}
    save_file({"ahead": torch.zeros(4)}, tmp_path / "lacking", metadata=about)
    refused(r"is broken \(KeyError\('0.queries'\)\)\. Make it with plphp collect", tmp_path / "lacking")
    refused("4 decoder layers, and this one has 3", settings(folder, "qwen3-vl").options["bank"])
    refused("got query_rows='text': leave it out", settings(folder, "llava").options["bank"], query_rows="text")
    with pytest.raises(ConfigError, match=r"'bank'.*must be text, got 3"):
        resolve(PLPHPConfig.from_dict({"method": "query_bank", "options": {"bank": 3}}))
    collected = bank("llava")
    layers = {n: LayerBank(layer.queries[:3], layer.rotation) for n, layer in collected.layers.items()}
    dataclasses.replace(collected, layers=layers).save(tmp_path / "heads")
    refused(r"of 3 query heads of dimension 12, and this model has 4 of dimension 12", tmp_path / "heads")
    dataclasses.replace(collected, layers={0: collected.layers[0]}).save(tmp_path / "few")
    refused("layers 0, not of layer 1", tmp_path / "few")


def never_asked() -> Iterator[Any]:
    """Prompts for a call that has to be refused before the model answers one."""
    raise AssertionError("a prompt was asked for")
    yield


def test_prompts_that_cannot_be_collected_from_are_refused() -> None:
    model, tiny = tiny_model("llava"), TINY["llava"]
    with pytest.raises(ConfigError, match="Prompt 1 has 2 rows or padding") as padded:
        plphp.collect_query_bank(model, [tiny.inputs(model, [1, 1])])
    with pytest.raises(ConfigError, match="Prompt 2 has no vision token"):
        plphp.collect_query_bank(model, [*prompts("llava", 1), tiny.inputs(model, [0])])
    assert "generate" not in model.__dict__, padded  # the error is kept, and what its traceback holds
    for questions, longest in (([], NEW), (prompts("llava", 1), 1)):
        with pytest.raises(ConfigError, match=r"prompt\(s\) gave no answer of more than one token"):
            plphp.collect_query_bank(model, questions, max_new_tokens=longest)
    assert bank("llava").books is None, "12 channels have no product code"
    for name in ("samples", "book_tokens", "max_new_tokens", "seed"):
        for number in (-1, 2.5, True, "2"):
            asked: dict[str, Any] = {name: number}
            with pytest.raises(ConfigError, match=f"{name} must be an integer of at least [01], got"):
                plphp.collect_query_bank(model, never_asked(), **asked)
    assert "generate" not in model.__dict__


def test_rotations_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llava"].build()
    text = model.config.get_text_config()
    monkeypatch.setitem(text.rope_parameters, "rope_type", "dynamic")
    with pytest.raises(UnsupportedModelError, match="of the kind 'dynamic'"):
        find_rotations(model)
    monkeypatch.undo()
    rotary = model.get_decoder().rotary_emb
    original = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: original(x, position_ids * 1.5))
    with pytest.raises(UnsupportedModelError, match=r"queries of layer 0 .* do not turn"):
        find_rotations(model)
    assert "generate" not in model.__dict__
