# SPDX-License-Identifier: Apache-2.0
"""Invariant 10 over families x rungs: tiers are the full cache with entries replaced by what their codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from invariants import assert_same_generation, generate, live_bytes, pruned, tensors_of, two_turns
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.kernels.coded_bytes import means_nbytes, tier_nbytes
from plphp.kernels.rungs import RUNGS
from precision import assert_exact
from test_invariants import FAMILIES, KINDS
from tier_reference import Held, books_file, entries_replaced, noting_what_is_held
from tiny_models import TIERS, tiers_model

pytestmark = pytest.mark.usefixtures("float64")

MIXED = 'random:tiers="pr2=.2,whole=.1,kivi4=.15,rvq=.2,pq=.15"'
"""Rungs of all kinds, with a part that stays whole and a part that is dropped."""
CHOSEN = 'prompt_queries:rows=4,tiers="r4=.2,c3=.3,r1"'
RECALL = 'random:tiers="r4=.2,r3=.3,r2=.3",read=.3'
"""Rungs whose index has a scale for every entry: with one byte an entry, as pq has here, entries tie."""
RUNGS_OF_8 = sorted(RUNGS.keys() - {"pq16"})  # whose parts are of 16 channels, and these models have 8
PAIRS = [(family, rung) for family in KINDS for rung in RUNGS_OF_8 if family == "llava" or rung in ("c3", "pr2")]
ROWS = [2, 0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("books")


def settings(line: str, folder: Path, family: str) -> PLPHPConfig:
    """A line of settings, with codebooks where its rungs need them."""
    needed = any(rung.needs_books and f"{rung.name}=" in line + "=" for rung in RUNGS.values())
    return PLPHPConfig.parse(f"{line},books={books_file(folder, family)}" if needed else line)


def held(model: Any, inputs: dict[str, Any], config: PLPHPConfig, **kwargs: Any) -> tuple[Any, PrunedCache, list[Held]]:
    """Generate with tiers; the output, the cache, and what its layers hold."""
    with noting_what_is_held() as notes:
        cache = PrunedCache.for_inputs(model, inputs, config)
        return generate(model, inputs, **passed(cache), **kwargs), cache, notes


def assert_codes_replace_entries(family: str, config: PLPHPConfig, rows: list[int], **kwargs: Any) -> list[Held]:
    model = tiers_model(family)
    inputs = TIERS[family].inputs(model, rows)
    output, cache, notes = held(model, inputs, config, **kwargs)
    with entries_replaced(model, cache, notes):
        assert_same_generation(generate(model, inputs, **kwargs), output)
    assert any(bool(note.coded.any()) for note in notes)
    return notes


@pytest.mark.parametrize(("family", "rung"), PAIRS)
def test_codes_stand_for_every_entry_of_the_full_cache(family: str, rung: str, folder: Path) -> None:
    notes = assert_codes_replace_entries(family, settings(f"quantized:tiers={rung}", folder, family), ROWS)
    for note in notes:
        vision = note.placement[0] != 255
        assert set(note.placement[0][vision].tolist()) == {1}
        assert bool((note.placement[1] == 255).sum() > 0)  # a row without an image is whole, but for its padding
        assert not bool(note.coded[1].any())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ladder_of_many_rungs_drops_and_replaces(family: str, folder: Path) -> None:
    notes = assert_codes_replace_entries(family, settings(MIXED, folder, family), ROWS)
    for note in notes:
        coded = note.coded[0]
        assert set(note.placement[0][coded].tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("family", KINDS)
def test_recall_is_the_same_with_the_unread_masked(family: str, folder: Path) -> None:
    assert_codes_replace_entries(family, settings(RECALL, folder, family), ROWS)
    alone = settings(f"{RECALL},rest=false", folder, family)
    assert_codes_replace_entries(family, alone, ROWS)


@pytest.mark.parametrize("family", KINDS)
def test_beams_read_codes(family: str, folder: Path) -> None:
    model, inputs = tiers_model(family), TIERS[family].inputs(tiers_model(family), [2, 1])
    output, cache, notes = held(model, inputs, settings(MIXED, folder, family), num_beams=3)
    assert {len(note.placement) for note in notes} == {6}
    with entries_replaced(model, cache, notes):
        expected = generate(model, inputs, num_beams=3)
    assert torch.equal(expected.sequences, output.sequences)
    assert torch.allclose(expected.logits[-1], output.logits[-1], atol=1e-9)
    assert {block.batch for layer in cache.layers for block in getattr(layer, "coded", ())} == {6}


def test_returned_sequences_share_the_choice_of_their_prompt(folder: Path) -> None:
    """The same draw for each: with one beam and no sampling, answers are those of one sequence."""
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2, 1])
    config = settings(RECALL, folder, "llava")
    several, _, _ = held(model, inputs, config, num_beams=2, num_return_sequences=2)
    alone, _, _ = held(model, inputs, config, num_beams=2)
    assert torch.equal(several.sequences[::2], alone.sequences)


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize(("family", "line"), [(family, MIXED) for family in KINDS] + [("llava", RECALL)])
def test_later_turns_read_codes(family: str, line: str, with_image: bool, folder: Path) -> None:
    """Text behind them, or a new image with codes of its own, which is scored with those of the first."""
    model, tiny = tiers_model(family), TIERS[family]
    if with_image and not tiny.stock.second_turn_image:
        pytest.skip("stock generate gives wrong answers here, or none")
    with noting_what_is_held() as notes:
        cache = PrunedCache.for_inputs(model, tiny.inputs(model, (2, 1)), settings(line, folder, family))
        first, second = two_turns(model, tiny, cache, with_image, (2, 1))
    assert {len(layer.coded) for layer in cache.layers if hasattr(layer, "coded")} == {1 + with_image}
    with entries_replaced(model, cache, notes):
        stock = DynamicCache(config=model.config.get_text_config())
        expected_first, expected = two_turns(model, tiny, stock, with_image, (2, 1))
    assert_same_generation(expected_first, first)
    assert_same_generation(expected, second)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_an_image_of_a_later_turn_is_scored_beside_the_codes_of_the_first(family: str) -> None:
    """Its softmax counts what they stand for, so that the vision attention score is that of the replaced cache."""
    model, tiny = tiers_model(family), TIERS[family]
    if not tiny.stock.second_turn_image:
        pytest.skip("stock generate gives wrong answers here, or none")
    inputs = tiny.inputs(model, (1,))
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse('plphp:tiers="r3=.3,r1=.3"'))
    with noting_what_is_held() as notes:
        first, _ = two_turns(model, tiny, cache, True, (1,))
    [_, prompt] = cache.report().prompts
    stock = DynamicCache(config=model.config.get_text_config())
    with entries_replaced(model, cache, [note for note in notes if note.start == 0]) as attention:
        generate(model, inputs, **passed(stock))
        turn = tiny.second_turn(model, inputs, first.sequences, with_image=True)
        generate(model, turn, max_new_tokens=1, **passed(stock))
    vision = [position for image in prompt.images[0] for position in image.positions]
    for layer in prompt.layers:
        expected = attention[layer.layer][0][:, vision].sum(-1).mean().item()
        assert layer.rows[0].vision_score == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("line", [MIXED, CHOSEN, RECALL], ids=["mixed", "chosen", "recall"])
@pytest.mark.parametrize("family", KINDS)
def test_a_padded_row_is_the_row_alone(family: str, line: str, folder: Path) -> None:
    model, tiny, config, counts = tiers_model(family), TIERS[family], settings(line, folder, family), [2, 0, 1]
    together, cache, _ = held(model, tiny.inputs(model, counts), config, max_new_tokens=2)
    for row, inputs in enumerate(tiny.rows(model, counts)):
        alone, own, _ = held(model, inputs, config, max_new_tokens=2)
        for batched, single in zip(together.logits, alone.logits, strict=True):
            assert_exact(batched[row], single[0])
        for many, few in zip(cache.layers, own.layers, strict=True):
            for block, of_row in zip(getattr(many, "coded", ()), getattr(few, "coded", ()), strict=False):
                assert block.held[row] == of_row.held[0]


@pytest.mark.parametrize("line", [MIXED, CHOSEN, RECALL, "quantized:tiers=c4"], ids=["mixed", "chosen", "recall", "c4"])
def test_a_prompt_in_chunks_is_the_prompt_at_once(line: str, folder: Path) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2])
    config = settings(line, folder, "llava")
    whole = PrunedCache.for_inputs(model, inputs, config)
    model(**inputs, **passed(whole), use_cache=True)
    cache = PrunedCache.for_inputs(model, inputs, config)
    embeds = model.get_input_embeddings()(inputs["input_ids"].clamp(min=0))
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    embeds[inputs["input_ids"] == model.config.image_token_id] = features.to(embeds.dtype)
    for part in embeds.chunk(3, dim=1):
        model(inputs_embeds=part, **passed(cache), use_cache=True)
    for one, other in zip(whole.layers, cache.layers, strict=True):
        for ours, theirs in zip(
            one.coded[0].decoded(torch.float64), other.coded[0].decoded(torch.float64), strict=True
        ):
            assert ours.counts == theirs.counts
            # Scales are rounded to float16, where noise of float64 may fall to either side: once in a million numbers.
            assert torch.allclose(ours.keys, theirs.keys, atol=1e-9)
            assert torch.allclose(ours.values, theirs.values, atol=1e-9)


@pytest.mark.parametrize("family", KINDS)
def test_a_ladder_of_whole_entries_is_eviction(family: str) -> None:
    model, inputs = tiers_model(family), TIERS[family].inputs(tiers_model(family), ROWS)
    tiers, of_tiers = pruned(model, inputs, PLPHPConfig.parse("random:tiers=whole=.3"))
    rate, of_rate = pruned(model, inputs, PLPHPConfig.parse("random:retention_rate=.3"))
    assert_same_generation(tiers, rate)
    assert of_tiers.kv_bytes == of_rate.kv_bytes
    assert [layer.rows for layer in of_tiers.prompts[0].layers] == [layer.rows for layer in of_rate.prompts[0].layers]
    everything, _ = pruned(model, inputs, PLPHPConfig.parse("random:tiers=whole"))
    assert_same_generation(everything, generate(model, inputs))


def test_exempt_layers_and_rows_without_images_are_whole(folder: Path) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), ROWS)
    config = settings(f"{MIXED},exempt_layers=1", folder, "llava")
    output, cache, notes = held(model, inputs, config)
    with entries_replaced(model, cache, notes):
        assert_same_generation(generate(model, inputs), output)
    assert [bool(note.coded.any()) for note in notes] == [True, False, True]
    assert not notes[1].dropped[inputs["attention_mask"].bool()[:, None].expand(notes[1].dropped.shape)].any()
    assert cache.layers[1].coded == ()


@pytest.mark.parametrize("line", [MIXED, RECALL, "quantized:tiers=kivi2"], ids=["mixed", "recall", "kivi2"])
@pytest.mark.parametrize("family", KINDS)
def test_bytes_of_the_report_are_those_of_the_live_tensors(family: str, line: str, folder: Path) -> None:
    model, inputs = tiers_model(family), TIERS[family].inputs(tiers_model(family), [3, 1])
    _, cache, _ = held(model, inputs, settings(line, folder, family), max_new_tokens=2)
    if "linear_attention" not in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        assert cache.report().kv_bytes == live_bytes(cache)
    for layer in cache.layers:
        for block in getattr(layer, "coded", ()):
            rows = [sum(tier_nbytes(tier, row) for tier in block.tiers) + means_nbytes(block, row) for row in range(2)]
            assert sum(rows) == block.nbytes == sum(tensor.nbytes for tensor in tensors_of(block))
