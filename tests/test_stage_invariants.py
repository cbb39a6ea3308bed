# SPDX-License-Identifier: Apache-2.0
"""Invariant 9: a run that tokens left before a layer equals one in which they are masked from that layer on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_query_bank import bank
from transformers import DynamicCache

import plphp
from invariants import assert_same_generation, generate, logit_difference, pruned, two_turns
from left_masked import left_tokens_masked
from plphp import PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf.cache_argument import passed
from plphp.policy.image_tokens import ImageTokens
from plphp.pruning.report import PruneReport
from precision import assert_exact
from tiny_models import TINY, tiny_model
from tiny_models.stock import NEWEST

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = sorted(TINY)
WITH_STATE = {"qwen3.5", "qwen3.5-moe", "lfm2-vl"}
"""Families whose recurrent states or convolutions have no masked reference."""
KINDS = ("llava", "qwen2-vl", "gemma3")
"""Families that see every method inside prefill: plain, with m-RoPE, with sliding windows."""
ENCODER = "encoder_random:retention_rate=0.5"
ROWS = ([1], [2, 0, 1])


def first_late(family: str) -> int:
    """The first layer behind one with full attention."""
    kinds = getattr(TINY[family].config().get_text_config(), "layer_types", None) or ["full_attention"]
    return kinds.index("full_attention") + 1


def late(family: str) -> str:
    """A method inside prefill, at the first layer where it can act."""
    first = first_late(family)
    layers = TINY[family].config().get_text_config().num_hidden_layers
    return f"fastv:layer={first},retention_rate={(first + 0.5 * (layers - first)) / layers}"


def in_steps(family: str) -> dict[str, str]:
    """Methods inside prefill that let tokens leave before several layers."""
    first, layers = first_late(family), TINY[family].config().get_text_config().num_hidden_layers
    sigmoid = f"p_sigmoid:first={first},retention_rate={(first + 0.4 * (layers - first)) / layers}"
    steps = f"pyramiddrop:stages={4 if first == 1 else 2},retention_rate=0.7"
    return {"steps": steps, "sigmoid": sigmoid, "both-sigmoid": f"{ENCODER}+{sigmoid}"}


def chains(family: str) -> dict[str, str]:
    layers = TINY[family].config().get_text_config().num_hidden_layers
    inside = late(family)
    if f"layer={layers}," in inside:
        return {"encoder": ENCODER}
    several = in_steps(family) if family in KINDS else {}
    return {"encoder": ENCODER, "prefill": inside, "both": f"{ENCODER}+{inside}", **several}


CASES = [(family, stages) for family in FAMILIES for stages in chains(family)]
MASKED = [(family, stages) for family, stages in CASES if family not in WITH_STATE]


def assert_something_left(report: PruneReport) -> None:
    for prompt in report.prompts:
        assert prompt.stages
        for stage in prompt.stages:
            assert sum(stage.tokens_out) < sum(stage.tokens_in)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("family", "stages"), MASKED)
def test_left_tokens_are_masked_tokens(family: str, stages: str, rows: list[int]) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), rows)
    output, report = pruned(model, inputs, PLPHPConfig.parse(chains(family)[stages]))
    assert_something_left(report)
    with left_tokens_masked(model, report):
        assert_same_generation(generate(model, inputs), output)
    # The masks do something: without them the logits are others.
    assert logit_difference(generate(model, inputs), output) > 1e-4


@pytest.mark.parametrize("stages", ["prefill", "steps", "sigmoid"])
@pytest.mark.parametrize("family", KINDS)
def test_tokens_that_left_by_a_query_bank_are_masked_tokens(family: str, stages: str, tmp_path: Path) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    bank(family).save(tmp_path / "bank.safetensors")
    line = chains(family)[stages]
    _, by_last_row = pruned(model, inputs, PLPHPConfig.parse(line))
    output, report = pruned(model, inputs, PLPHPConfig.parse(f"{line},evidence=bank,bank={tmp_path}/bank.safetensors"))
    assert_something_left(report)
    left, otherwise = (
        [(stage.layer, stage.tokens_out) for stage in r.prompts[0].stages] for r in (report, by_last_row)
    )
    assert left == otherwise
    assert report.prompts[0].stages != by_last_row.prompts[0].stages
    with left_tokens_masked(model, report):
        assert_same_generation(generate(model, inputs), output)


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize(("family", "stages"), MASKED)
def test_later_turns(family: str, stages: str, with_image: bool) -> None:
    model, tiny = tiny_model(family), TINY[family]
    rows = [2, 1]
    cache = PrunedCache.for_inputs(model, tiny.inputs(model, rows), PLPHPConfig.parse(chains(family)[stages]))
    turns = two_turns(model, tiny, cache, with_image, rows)
    report = cache.report()
    assert_something_left(report)
    assert len(report.prompts) == 1 + with_image
    del cache
    with left_tokens_masked(model, report):
        expected = two_turns(model, tiny, DynamicCache(config=model.config.get_text_config()), with_image, rows)
    for output, reference in zip(turns, expected, strict=True):
        assert_same_generation(reference, output)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_stock(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    output, report = pruned(model, inputs, PLPHPConfig.parse("encoder_random:retention_rate=1.0"))
    assert_same_generation(generate(model, inputs), output)
    assert report.retention == 1


@pytest.mark.parametrize(("family", "stages"), CASES)
def test_a_padded_row_is_the_row_alone(family: str, stages: str) -> None:
    model, tiny = tiny_model(family), TINY[family]
    config = PLPHPConfig.parse(chains(family)[stages])
    rows = tiny.rows(model, [2, 0, 1])
    together, _ = pruned(model, tiny.inputs(model, [2, 0, 1]), config)
    for number, row in enumerate(rows):
        alone, _ = pruned(model, row, config)
        for whole, own in zip(together.logits, alone.logits, strict=True):
            assert (whole[number] - own[0]).abs().max() < 1e-9


def computed_tokens(model: Any, inputs: Any, config: PLPHPConfig) -> tuple[list[int], PruneReport]:
    """Tokens that the layers' own modules were given for a prompt."""
    given: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output: given.append(args[0].shape[1]))
        for layer in model.get_decoder().layers
    ]
    try:
        cache = PrunedCache.for_inputs(model, inputs, config)
        with torch.no_grad():
            model(**inputs, **passed(cache))
    finally:
        for handle in handles:
            handle.remove()
    return given, cache.report()


@pytest.mark.parametrize("stages", ["encoder", "prefill", "both", "steps", "both-sigmoid"])
def test_what_left_is_not_computed_and_not_held(stages: str) -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [2])
    given, report = computed_tokens(model, inputs, PLPHPConfig.parse(chains("llava")[stages]))
    [prompt] = report.prompts
    left = {stage.layer: stage.tokens_in[0] - stage.tokens_out[0] for stage in prompt.stages}
    expected, tokens = [], inputs["input_ids"].shape[1]
    for layer in range(3):
        tokens -= left.get(layer, 0)
        expected.append(tokens)
    assert given == expected == prompt.computed
    assert [layer.whole + layer.tail for layer in report.held] == [
        tokens * report.prompts[0].layers[0].rows[0].entry_bytes * model.config.text_config.num_key_value_heads
        for tokens in expected
    ]


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("stages", ["encoder", "prefill", "both"])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_beams_and_samples(family: str, stages: str, kwargs: dict[str, Any]) -> None:
    images = min(2, TINY[family].stock.expanded_images)  # 5.17 repeats those of a row with several in the wrong order
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [images, 1])
    torch.manual_seed(0)
    output, report = pruned(model, inputs, PLPHPConfig.parse(chains(family)[stages]), **kwargs)
    assert report.batch > 2
    with left_tokens_masked(model, report):
        torch.manual_seed(0)
        assert_same_generation(generate(model, inputs, **kwargs), output)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_the_tower_is_read_once_for_all_beams_and_samples(family: str, kwargs: dict[str, Any]) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 1])
    config = PLPHPConfig.parse("vtc_cls:start=0,retention_rate=0.5")
    _, alone = pruned(model, inputs, config)
    if not NEWEST:  # 5.17 repeats the images before the tower
        with pytest.raises(UnsupportedFeatureError, match="once for every beam"):
            pruned(model, inputs, config, **kwargs)
        return
    _, report = pruned(model, inputs, config, **kwargs)
    times = report.batch // 2
    [once], [stage] = alone.prompts[0].stages, report.prompts[0].stages
    assert stage.positions == [once.positions[row // times] for row in range(report.batch)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if TINY[family].videos and family not in WITH_STATE])
def test_videos(family: str) -> None:
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, [1, 1], video=True)
    for stages, line in chains(family).items():
        output, report = pruned(model, inputs, PLPHPConfig.parse(line))
        assert_something_left(report)
        with left_tokens_masked(model, report):
            assert_same_generation(generate(model, inputs), output)
        assert stages


@pytest.mark.parametrize("family", sorted(WITH_STATE & set(FAMILIES)))
def test_layers_with_a_state_read_the_short_sequence(family: str) -> None:
    """They have no mask by which a token could be hidden: what they read is the prompt without it, at its positions."""
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2])
    output, report = pruned(model, inputs, PLPHPConfig.parse(ENCODER))
    given: dict[str, Any] = {}
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        [image_tokens] = [[place for image in row for place in image.positions] for row in report.prompts[0].images]
        [kept] = report.prompts[0].stages[0].positions
        gone = set(image_tokens) - set(kept)
        short = [place for place in range(inputs["input_ids"].shape[1]) if place not in gone]
        assert len(short) < inputs["input_ids"].shape[1]
        position_ids = given.get("position_ids")
        places = torch.tensor(short)[None] if position_ids is None else position_ids[..., short]
        # Without a mask, transformers takes positions with gaps for several sequences in one row.
        seen = torch.ones(1, len(short), dtype=torch.long)
        read = {"inputs_embeds": given["inputs_embeds"][:, short], "position_ids": places, "attention_mask": seen}
        states = decoder(**read, use_cache=False)
        logits = model.get_output_embeddings()(states.last_hidden_state[:, -1])
    assert_exact(output.logits[0], logits)


@contextmanager
def features_replaced(model: Any, report: PruneReport, line: str) -> Iterator[None]:
    """Give the first layer of a full model the merged features, in the places of the tokens that stay."""
    config = PLPHPConfig.parse(line)
    stage = plphp.available_methods()[config.method].encoder
    [prompt] = report.prompts
    assert stage is not None

    def merge(module: Any, args: Any, kwargs: Any) -> Any:
        states = args[0].clone()
        for row, images in enumerate(prompt.images if states.shape[1] == prompt.end else []):
            for number, image in enumerate(images):
                own = ImageTokens(states[row, image.positions], states[row, :0], image.grid, row, number)
                chosen = stage.choose(own, config)
                kept = [place for place, stays in zip(image.positions, chosen.stay.tolist(), strict=True) if stays]
                assert set(kept) <= set(prompt.stages[0].positions[row])
                states[row, kept] = chosen.features
        return (states, *args[1:]), kwargs

    handle = model.get_decoder().layers[0].register_forward_pre_hook(merge, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_merged_features_stand_in_the_places_of_tokens_that_stay(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    line = "pool:retention_rate=0.5"
    output, report = pruned(model, inputs, PLPHPConfig.parse(line))
    with left_tokens_masked(model, report), features_replaced(model, report, line):
        assert_same_generation(generate(model, inputs), output)
    with left_tokens_masked(model, report):
        assert logit_difference(generate(model, inputs), output) > 1e-4
