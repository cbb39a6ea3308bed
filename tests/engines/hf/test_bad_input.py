# SPDX-License-Identifier: Apache-2.0
"""Bad input, unsupported use, and failures in the middle: refused by name, and nothing is left behind."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache
from transformers.generation.streamers import BaseStreamer

import plphp
from invariants import assert_same_generation, attention_set, evicted_entries_masked, generate, live_bytes, pruned
from plphp import (
    CacheMemoryError,
    CacheStateError,
    ConfigError,
    NonFiniteAttentionError,
    PLPHPConfig,
    PrunedCache,
    SpanError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from plphp.engines.hf.cache_argument import NAME, cache_in, passed
from precision import assert_exact
from test_invariants import config
from tiny_models import IMAGE, PAD, TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

SETTINGS = config("plphp", retention_rate=0.3)


def llava_inputs(rows: tuple[int, ...] = (2, 1)) -> dict[str, Any]:
    return TINY["llava"].inputs(tiny_model("llava"), rows)


def model_state(model: Any) -> tuple[Any, ...]:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    attentions = [(id(one), one._attn_implementation) for one in configs]
    return dict(model.__dict__), weights, attentions, model.generation_config.to_dict()


def assert_as_before(model: Any, before: tuple[Any, ...]) -> None:
    after = model_state(model)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())
    assert after[2:] == before[2:]


# --- what generate is asked for ---------------------------------------------------------------------------

REFUSED = {
    "static": (
        {"cache_implementation": "static"},
        "'static' .* static.* cannot hold ragged entries",
    ),
    "offloaded": ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded' .* offloaded"),
    "dynamic": ({"cache_implementation": "dynamic"}, "'dynamic' asks for another cache than a PrunedCache"),
    "quantized": ({"cache_implementation": "quantized"}, "cache_implementation='quantized' .* quantized"),
    "output_attentions": ({"output_attentions": True}, "output_attentions=True .* run.report"),
    "use_cache": ({"use_cache": False}, "use_cache=False leaves no KV cache to prune"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive search"),
    "assisted": ({"prompt_lookup_num_tokens": 2}, "does not prune assisted generation"),
}


@contextmanager
def generation_defaults(model: Any, values: dict[str, Any]) -> Iterator[None]:
    before = copy.deepcopy(model.generation_config)
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    try:
        yield
    finally:
        model.generation_config = before


@pytest.mark.parametrize("how", ["argument", "GenerationConfig", "model", "model under a GenerationConfig"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_the_reason(llava: Any, name: str, how: str) -> None:
    values, message = REFUSED[name]
    inputs, before = llava_inputs(), model_state(llava)
    kwargs: dict[str, Any] = {"max_new_tokens": 2}
    defaults = values if how.startswith("model") else {}
    if how == "argument":
        kwargs |= values
    elif how == "GenerationConfig":
        kwargs = {"generation_config": GenerationConfig(max_new_tokens=2, **values)}
    elif how == "model under a GenerationConfig":
        kwargs = {"generation_config": GenerationConfig(max_new_tokens=2)}
    with (
        generation_defaults(llava, defaults),
        plphp.prune(llava, SETTINGS),
        pytest.raises(UnsupportedFeatureError, match=message),
    ):
        llava.generate(**inputs, **kwargs)
    before[0]["generation_config"] = llava.generation_config
    assert_as_before(llava, before)


def test_an_argument_wins_over_a_refused_default(llava: Any) -> None:
    with generation_defaults(llava, {"use_cache": False}), plphp.prune(llava, SETTINGS) as run:
        generate(llava, llava_inputs(), use_cache=True)
    assert run.report.retention < 1


def test_the_hybrid_cache_that_old_checkpoints_ask_for_is_the_default_one() -> None:
    model = tiny_model("gemma3")
    inputs = TINY["gemma3"].inputs(model, [1])
    expected, _ = pruned(model, inputs, SETTINGS)
    with generation_defaults(model, {"cache_implementation": "hybrid"}):
        assert_same_generation(expected, pruned(model, inputs, SETTINGS)[0])


def test_assistant_model_is_refused(llava: Any) -> None:
    with plphp.prune(llava, SETTINGS), pytest.raises(UnsupportedFeatureError, match="assisted generation"):
        llava.generate(**llava_inputs((1,)), assistant_model=llava, max_new_tokens=2)


def test_custom_generate_is_refused(llava: Any) -> None:
    with plphp.prune(llava, SETTINGS), pytest.raises(UnsupportedFeatureError, match="custom_generate"):
        llava.generate(**llava_inputs(), custom_generate=lambda *a, **k: None)


def test_other_caches_are_refused(llava: Any) -> None:
    text = llava.config.get_text_config()
    for cache in (DynamicCache(config=text), StaticCache(config=text, max_cache_len=99), "cache"):
        with (
            plphp.prune(llava, SETTINGS),
            pytest.raises(UnsupportedFeatureError, match=f"must be a PrunedCache, got {NAME}={type(cache).__name__}"),
        ):
            generate(llava, llava_inputs(), **passed(cache))


def test_training_mode_is_refused(llava: Any) -> None:
    llava.train()
    try:
        with (
            plphp.prune(llava, SETTINGS),
            pytest.raises(UnsupportedFeatureError, match=r"training mode.*model.eval\(\)"),
        ):
            generate(llava, llava_inputs())
    finally:
        llava.eval()


def test_training_mode_is_refused_in_a_forward_pass(llava: Any) -> None:
    inputs = llava_inputs()
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    llava.train()
    try:
        with pytest.raises(UnsupportedFeatureError, match=r"training mode.*model.eval\(\)"), torch.no_grad():
            llava(**inputs, **passed(cache))
    finally:
        llava.eval()


def test_continuous_batching_is_refused(llava: Any) -> None:
    with plphp.prune(llava, SETTINGS), pytest.raises(UnsupportedFeatureError, match="continuous batching"):
        llava.generate_batch([[1, 2, 3]])


def test_wrong_generation_config(llava: Any) -> None:
    with (
        plphp.prune(llava, SETTINGS),
        pytest.raises(UnsupportedFeatureError, match="must be a GenerationConfig, got str"),
    ):
        generate(llava, llava_inputs(), generation_config="greedy")


def test_unsupported_attention_is_refused() -> None:
    model = TINY["llava"].build()
    model.set_attn_implementation("flex_attention")
    before = model_state(model)
    with pytest.raises(UnsupportedFeatureError, match=r"'flex_attention'.*set_attn_implementation\('sdpa'\)"):
        plphp.apply(model, SETTINGS)
    assert_as_before(model, before)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2-vl"])
def test_eager_attention_is_as_good_as_sdpa(family: str) -> None:
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, [2, 0, 1])
    sdpa, report = pruned(model, inputs, SETTINGS)
    with attention_set(model, "eager"):
        eager, other = pruned(model, inputs, SETTINGS)
    assert_same_generation(sdpa, eager)
    assert [layer.rows[0].kept_positions for layer in report.prompts[0].layers] == [
        layer.rows[0].kept_positions for layer in other.prompts[0].layers
    ]


# --- settings and prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plphp.apply, lambda m, c: PrunedCache.for_inputs(m, llava_inputs(), c)])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention_rate": 0.5}, "config must be a PLPHPConfig, got dict: .*from_dict"),
        ("plphp", "config must be a PLPHPConfig, got str: .*PLPHPConfig.parse"),
        (PLPHPConfig(method="plph"), r"Unknown method 'plph'\. Did you mean 'plphp'\?"),
    ],
)
def test_settings_that_are_none(llava: Any, make: Callable[..., Any], settings: Any, message: str) -> None:
    before = model_state(llava)
    with pytest.raises(ConfigError, match=message):
        make(llava, settings)
    assert_as_before(llava, before)


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_exempt_layers_that_the_model_does_not_have(llava: Any, layer: int) -> None:
    settings = PLPHPConfig(exempt_layers=(0, layer))
    with plphp.prune(llava, settings), pytest.raises(ConfigError, match=f"names layer {layer}, .* 0 to 2"):
        generate(llava, llava_inputs())


BAD_PROMPTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "too few vision tokens": (
        lambda x: {**x, "input_ids": x["input_ids"].where((x["input_ids"] == IMAGE).cumsum(1) != 3, 5)},
        "vision tokens but the images fill 48",
    ),
    "an image too few": (lambda x: {**x, "pixel_values": x["pixel_values"][1:]}, "48 vision tokens .* fill 32"),
    "an image too many": (
        lambda x: {**x, "pixel_values": x["pixel_values"][[0, 0, 1, 2]]},
        "48 vision tokens .* fill 64",
    ),
    "truncated": (
        lambda x: {**x, "input_ids": x["input_ids"][:, :20], "attention_mask": x["attention_mask"][:, :20]},
        "do not truncate",
    ),
    "no slot": (lambda x: {**x, "input_ids": x["input_ids"].clamp(max=90)}, "pixel_values are given, .* no vision"),
    "zero tokens": (
        lambda x: {**x, "input_ids": x["input_ids"][:, :0], "attention_mask": x["attention_mask"][:, :0]},
        "holds no tokens",
    ),
    "zero rows": (
        lambda x: {**x, "input_ids": x["input_ids"][:0], "attention_mask": x["attention_mask"][:0]},
        "holds no tokens",
    ),
    "no prompt": (lambda x: {"pixel_values": x["pixel_values"]}, "neither input_ids nor inputs_embeds"),
    "long mask": (
        lambda x: {**x, "attention_mask": torch.nn.functional.pad(x["attention_mask"], (0, 3), value=1)},
        "attention_mask covers",
    ),
    "only padding": (
        lambda x: {**x, "attention_mask": x["attention_mask"] * torch.tensor([[1], [0]])},
        "A row of the prompt is all padding",
    ),
    "embeddings": (
        lambda x: {"inputs_embeds": torch.randn(1, 5, 48), "attention_mask": torch.ones(1, 5)},
        "vision_mask",
    ),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_prompt_that_does_not_match_its_features(llava: Any, name: str) -> None:
    change, message = BAD_PROMPTS[name]
    good = llava_inputs()
    bad = change(good)
    before = model_state(llava)
    with plphp.prune(llava, SETTINGS):
        with pytest.raises(SpanError, match=message):
            generate(llava, bad)
        again = generate(llava, good)
    with pytest.raises(SpanError, match=message):
        PrunedCache.for_inputs(llava, bad, SETTINGS)
    assert_as_before(llava, before)
    assert_same_generation(pruned(llava, good, SETTINGS)[0], again)


@pytest.mark.parametrize("method", ["plphp", "shared", "uniform", "random"])
def test_rate_zero_without_a_minimum_evicts_every_vision_token(method: str) -> None:
    model, inputs = tiny_model("llava"), llava_inputs((2, 0, 1))
    settings = PLPHPConfig(method=method, retention_rate=0.0, min_kept=0)
    output, report = pruned(model, inputs, settings)
    assert report.retention == 0
    with evicted_entries_masked(model, report):
        assert_same_generation(generate(model, inputs), output)


def test_prompt_of_nothing_but_vision_tokens() -> None:
    """Its cache is empty after prefill; the first new token sees itself alone."""
    model = tiny_model("llava")
    inputs = llava_inputs((1, 1))
    ids = torch.full((2, 16), IMAGE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    output, report = pruned(model, inputs, PLPHPConfig(retention_rate=0.0, min_kept=0))
    assert report.retention == 0
    with evicted_entries_masked(model, report):
        assert_same_generation(generate(model, inputs), output)


# --- padding and embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["model", "GenerationConfig", "argument"])
def test_padding_that_generate_infers_is_not_kept(how: str) -> None:
    """Without an attention_mask generate finds the padding by its id, wherever that comes from."""
    model, inputs = tiny_model("llava"), llava_inputs((2, 0, 1))
    expected, report = pruned(model, inputs, SETTINGS)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    kwargs: dict[str, Any] = {}
    if how == "GenerationConfig":
        kwargs = {
            "generation_config": GenerationConfig(suppress_tokens=model.generation_config.suppress_tokens),
        }
    elif how == "argument":
        kwargs = {"pad_token_id": PAD}
    output, other = pruned(model, bare, SETTINGS, **kwargs)
    assert_same_generation(expected, output)
    assert other.kv_bytes == report.kv_bytes


def embedded(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.model.get_image_features(inputs["pixel_values"])
    features = getattr(features, "pooler_output", features)
    features = torch.cat([one.reshape(-1, embeds.shape[-1]) for one in features])
    embeds[inputs["input_ids"] == IMAGE] = features
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


def test_embeddings_with_a_vision_mask_equal_the_ids(llava: Any) -> None:
    inputs = llava_inputs((2, 0, 1))
    expected, report = pruned(llava, inputs, SETTINGS)
    mask = inputs["input_ids"] == IMAGE
    cache = PrunedCache.for_inputs(llava, embedded(llava, inputs), SETTINGS, vision_mask=mask)
    output = generate(llava, embedded(llava, inputs), **passed(cache))
    assert torch.equal(output.sequences, expected.sequences[:, inputs["input_ids"].shape[1] :])
    for one, other in zip(expected.logits, output.logits, strict=True):
        assert_exact(other, one)
    for layer, other_layer in zip(report.prompts[0].layers, cache.report().prompts[0].layers, strict=True):
        assert [row.kept_positions for row in layer.rows] == [row.kept_positions for row in other_layer.rows]


@pytest.mark.parametrize("change", ["longer", "shorter", "more rows", "fewer rows"])
def test_a_planned_vision_mask_and_another_prompt(llava: Any, change: str) -> None:
    inputs = embedded(llava, llava_inputs((1, 1)))
    mask = llava_inputs((1, 1))["input_ids"] == IMAGE
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS, vision_mask=mask)
    other = {
        "longer": {k: torch.cat([v, v[:, -2:]], 1) for k, v in inputs.items()},
        "shorter": {k: v[:, :-2] for k, v in inputs.items()},
        "more rows": {k: torch.cat([v, v]) for k, v in inputs.items()},
        "fewer rows": {k: v[:1] for k, v in inputs.items()},
    }[change]
    with pytest.raises(SpanError, match="planned for"):
        generate(llava, other, **passed(cache))


# --- a cache that is used wrongly -------------------------------------------------------------------------


def test_a_cache_for_one_prompt_takes_the_prompt_that_generate_gets(llava: Any) -> None:
    for rows in ((2, 1), (1,), (1, 1, 1)):
        cache = PrunedCache.for_inputs(llava, llava_inputs((1, 2)), SETTINGS)
        output = generate(llava, llava_inputs(rows), **passed(cache))
        assert_same_generation(pruned(llava, llava_inputs(rows), SETTINGS)[0], output)


@torch.no_grad()
def test_a_forward_pass_of_a_longer_prompt_than_planned(llava: Any) -> None:
    short, long = llava_inputs((1,)), llava_inputs((2,))
    cache = PrunedCache.for_inputs(llava, short, SETTINGS)
    length = [one["input_ids"].shape[1] for one in (short, long)]
    with pytest.raises(SpanError, match=f"planned for a prompt of {length[0]} tokens and would hold {length[1]}"):
        llava(**long, **passed(cache))
    # Nothing was read, so the cache still takes its own prompt.
    expected = PrunedCache.for_inputs(llava, short, SETTINGS)
    assert torch.equal(llava(**short, **passed(cache)).logits, llava(**short, **passed(expected)).logits)


@torch.no_grad()
def test_a_forward_pass_of_another_batch_size_than_planned(llava: Any) -> None:
    cache = PrunedCache.for_inputs(llava, llava_inputs((1, 1)), SETTINGS)
    one = TINY["llava"].rows(llava, [1, 1])[1]
    with pytest.raises(CacheStateError, match="planned for 2 rows and read 1"):
        llava(**one, **passed(cache))
    with pytest.raises(CacheStateError, match="cannot be used any more"):
        llava(**one, **passed(cache))


@torch.no_grad()
def test_a_batch_that_changes_its_size_after_the_prompt(llava: Any) -> None:
    inputs = llava_inputs((1, 1))
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    generate(llava, inputs, **passed(cache))
    for rows in (1, 3):
        with pytest.raises((CacheStateError, SpanError, RuntimeError)):
            llava(input_ids=torch.full((rows, 1), 7), **passed(cache))


def test_a_cache_outside_its_session(llava: Any) -> None:
    inputs = llava_inputs()
    with plphp.prune(llava, SETTINGS):
        first = generate(llava, inputs)
    more = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    with pytest.raises(CacheStateError, match="outside the session"):
        generate(llava, more, **passed(cache_in(first)))


def test_a_cache_with_another_model(llava: Any) -> None:
    other, inputs = TINY["llava"].build(seed=1), llava_inputs()
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    with (
        plphp.prune(other, SETTINGS),
        pytest.raises(UnsupportedFeatureError, match="made for another model"),
    ):
        generate(other, inputs, **passed(cache))
    with pytest.raises(CacheStateError, match="did not read it through plphp's attention function"):
        generate(other, inputs, **passed(cache))
    with pytest.raises(CacheStateError, match="cannot be used any more"):
        generate(llava, inputs, **passed(cache))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3.5"])
def test_a_cache_after_reset_is_a_new_one(family: str) -> None:
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, [2, 1])
    cache = PrunedCache.for_inputs(model, tiny.inputs(model, [1, 1], seed=3), SETTINGS)
    generate(model, tiny.inputs(model, [1, 1], seed=3), **passed(cache))
    cache.reset()
    assert (cache.get_seq_length(), cache.report().prompts) == (0, [])
    assert_same_generation(pruned(model, inputs, SETTINGS)[0], generate(model, inputs, **passed(cache)))
    assert len(cache.report().prompts) == 1


def test_a_prompt_that_the_cache_holds_already(llava: Any) -> None:
    inputs = llava_inputs()
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    first = generate(llava, inputs, **passed(cache))
    with pytest.raises(SpanError, match=r"holds \d+ tokens already"):
        generate(llava, inputs, **passed(cache))
    # That left the cache as it was.
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    generate(llava, {"input_ids": first.sequences, "attention_mask": mask}, **passed(cache))


def test_offloading_a_cache_is_refused(llava: Any) -> None:
    cache = PrunedCache.for_inputs(llava, llava_inputs(), SETTINGS)
    with pytest.raises(UnsupportedFeatureError, match="offloaded"):
        cache.offload(0)


def test_cropping_into_the_prompt_is_refused(llava: Any) -> None:
    inputs = llava_inputs()
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    generate(llava, inputs, **passed(cache))
    cache.crop(-1)
    with pytest.raises(UnsupportedFeatureError, match="Cannot remove the last 50 tokens"):
        cache.crop(-50)


# --- failures in the middle -------------------------------------------------------------------------------


class BoomError(Exception):
    pass


class FailingStreamer(BaseStreamer):
    def __init__(self, error: type[BaseException] = BoomError, after: int = 2) -> None:
        self.left, self.error = after, error

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self) -> None:
        pass


class FailingProcessor(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise BoomError
        return scores


@contextmanager
def failing(module: Any, after: int = 0, error: type[BaseException] = BoomError, pre: bool = False) -> Iterator[None]:
    """Let a module raise, before or after its forward, from its call number ``after`` on."""
    calls = 0

    def hook(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error

    handle = module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


FAMILIES = ("llava", "gemma3", "qwen3.5")
"""Full attention alone; with sliding-window layers; with linear-attention layers."""


def assert_right_or_dead(model: Any, inputs: dict[str, Any], cache: PrunedCache, expected: Any) -> bool:
    """A cache after a failure either works as if nothing had happened, or says that it is dead."""
    held = cache.get_seq_length()
    try:
        cache.check_alive()
    except CacheStateError:
        assert live_bytes(cache) == 0
        with pytest.raises(CacheStateError, match=r"cannot be used any more: .*(middle of a step|attention of layer)"):
            generate(model, inputs, **passed(cache))
        return False
    if held == 0:
        assert_same_generation(expected, generate(model, inputs, **passed(cache)))
        return True
    # It holds the prompt and some of the answer: the next step gives the logits that it would have given.
    length = inputs["input_ids"].shape[1]
    done = held - length
    assert done >= 0
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(inputs["input_ids"]), done + 1)], 1).long()
    turn = {"input_ids": expected.sequences[:, : held + 1], "attention_mask": mask}
    more = generate(model, turn, **passed(cache), max_new_tokens=1)
    assert_exact(more.logits[0], expected.logits[done + 1])
    return True


@pytest.mark.parametrize("where", ["vision", "first", "middle", "last", "head"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("pre", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_inside_the_model(family: str, where: str, when: str, pre: bool) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [1, 1])
    layers = model.get_decoder().layers
    vision = getattr(model.model, "vision_tower", None) or getattr(model.model, "visual", None)
    module = {
        "vision": vision,
        "first": layers[0],
        "middle": layers[1],
        "last": layers[-1],
        "head": model.lm_head,
    }[where]
    if where == "vision" and when == "decode":
        return
    before = model_state(model)
    expected, _ = pruned(model, inputs, SETTINGS)
    cache = PrunedCache.for_inputs(model, inputs, SETTINGS)
    with failing(module, after=2 * (when == "decode"), pre=pre), pytest.raises(BoomError):
        generate(model, inputs, **passed(cache))
    assert_right_or_dead(model, inputs, cache, expected)
    with plphp.prune(model, SETTINGS):
        with failing(module, after=2 * (when == "decode"), pre=pre), pytest.raises(BoomError):
            generate(model, inputs)
        assert_same_generation(expected, generate(model, inputs))
    del cache
    assert_as_before(model, before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_forward_pass_that_failed_is_not_gone_on_with(family: str) -> None:
    """Without generate nobody tells the cache of the failure: it finds out at the next forward pass."""
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, SETTINGS)
    with failing(model.get_decoder().layers[1], pre=True), pytest.raises(BoomError):
        model(**inputs, **passed(cache))
    with pytest.raises(CacheStateError, match="middle of a step"):
        model(**inputs, **passed(cache))


@pytest.mark.parametrize("where", ["first", "middle", "attention", "last attention"])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_decoding_step_that_failed_is_taken_back(family: str, where: str) -> None:
    """Nothing is evicted while decoding, so the cache goes back to before the step."""
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [1, 1])
    layers = model.get_decoder().layers
    module = {
        "first": layers[0],
        "middle": layers[1].mlp,
        "attention": layers[1].self_attn.v_proj,
        "last attention": layers[-1].self_attn.q_proj,
    }[where]
    expected, _ = pruned(model, inputs, SETTINGS)
    cache = PrunedCache.for_inputs(model, inputs, SETTINGS)
    with failing(module, after=2), pytest.raises(BoomError):
        generate(model, inputs, **passed(cache))
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1
    assert assert_right_or_dead(model, inputs, cache, expected)


def test_beams_that_failed_are_not_gone_on_with(llava: Any) -> None:
    inputs = llava_inputs((1,))
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    with failing(llava.get_decoder().layers[1], after=2), pytest.raises(BoomError):
        generate(llava, inputs, **passed(cache), num_beams=2)
    ids = torch.cat([inputs["input_ids"], torch.full((1, 4), 5)], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(UnsupportedFeatureError, match="the beams that were running"):
        generate(llava, more, **passed(cache))


def test_a_turn_of_text_that_failed_leaves_nothing_behind(llava: Any) -> None:
    ids = torch.arange(5, 12)[None]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = PrunedCache.for_inputs(llava, text, SETTINGS)
    with failing(llava.get_decoder().layers[1]), pytest.raises(BoomError):
        generate(llava, text, **passed(cache))
    assert cache.nbytes == 0
    both = {name: value.expand(2, -1) for name, value in text.items()}
    assert_same_generation(generate(llava, both), generate(llava, both, **passed(cache)))


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize(
    ("error", "text"), [(torch.OutOfMemoryError, "CUDA out of memory"), (RuntimeError, "can't allocate memory")]
)
@torch.no_grad()
def test_no_memory_for_the_next_token(
    llava: Any, call: int, error: type[RuntimeError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys or values, in any layer."""
    inputs = llava_inputs((1, 1))
    expected, _ = pruned(llava, inputs, SETTINGS)
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    llava(**inputs, **passed(cache))
    length = cache.get_seq_length()
    token = expected.sequences[:, length][:, None]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1)], 1).long()
    calls, stock = itertools.count(), torch.Tensor.new_zeros

    def new_zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == call:
            raise error(text)
        return stock(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", new_zeros)
        with pytest.raises(CacheMemoryError, match=f"memory.* room for 17 tokens .*holds {length} tokens as before"):
            llava(input_ids=token, attention_mask=mask, **passed(cache))
    assert cache.get_seq_length() == length
    logits = llava(input_ids=token, attention_mask=mask, **passed(cache)).logits
    assert_exact(logits[:, -1], expected.logits[1])


@torch.no_grad()
def test_no_memory_where_a_step_cannot_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding-window layers forget what a step pushes out."""
    model = tiny_model("gemma3")
    inputs = TINY["gemma3"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, SETTINGS)

    def no_memory(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model(**inputs, **passed(cache))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", no_memory)
        with pytest.raises(CacheMemoryError, match=r"answers; this PrunedCache cannot be used any more\.$"):
            model(input_ids=inputs["input_ids"][:, -1:], **passed(cache))
    with pytest.raises(CacheStateError, match="cannot be used any more"):
        model(input_ids=inputs["input_ids"][:, -1:], **passed(cache))


@pytest.mark.parametrize("text", ["something else", "CUDA error: an illegal memory access was encountered"])
def test_other_errors_are_not_taken_for_a_lack_of_memory(
    llava: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(text)

    inputs = llava_inputs((1,))
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    monkeypatch.setattr(torch.Tensor, "new_zeros", broken)
    with pytest.raises(RuntimeError, match=text):
        generate(llava, inputs, **passed(cache))


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["streamer", "processor", "prompt"])
def test_an_exception_between_the_steps_leaves_a_cache_that_works(
    llava: Any, what: str, error: type[BaseException]
) -> None:
    inputs, before = llava_inputs((1,)), model_state(llava)
    expected, _ = pruned(llava, inputs, SETTINGS)
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    kwargs: dict[str, Any] = {"streamer": FailingStreamer(error)}
    if what == "processor":
        kwargs, error = {"logits_processor": [FailingProcessor(1)]}, BoomError
    elif what == "prompt":
        kwargs = {"streamer": FailingStreamer(error, after=0)}
    with pytest.raises(error):
        generate(llava, inputs, **passed(cache), **kwargs)
    assert assert_right_or_dead(llava, inputs, cache, expected)
    del cache
    with pytest.raises(error), plphp.prune(llava, SETTINGS):
        generate(llava, inputs, **(kwargs if what == "processor" else {"streamer": FailingStreamer(error)}))
    assert_as_before(llava, before)


def test_a_failure_between_the_chunks_of_a_prompt(llava: Any) -> None:
    """Every layer is whole, but the vision tokens of the first chunk could not be pruned any more."""
    inputs = llava_inputs((1,))
    expected, _ = pruned(llava, inputs, SETTINGS)
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    with failing(llava.get_decoder(), after=1, pre=True), pytest.raises(BoomError):
        generate(llava, inputs, **passed(cache), prefill_chunk_size=20)
    assert not assert_right_or_dead(llava, inputs, cache, expected)


def test_an_interrupt_inside_a_layer(llava: Any) -> None:
    inputs, before = llava_inputs((1,)), model_state(llava)
    expected, _ = pruned(llava, inputs, SETTINGS)
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    layer = llava.get_decoder().layers[1].self_attn.o_proj
    with failing(layer, error=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        generate(llava, inputs, **passed(cache))
    assert not assert_right_or_dead(llava, inputs, cache, expected)
    del cache
    assert_as_before(llava, before)


@pytest.mark.parametrize("target", [None, 0.4], ids=["thresholds", "target"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_that_is_not_finite(layer: int, bad: float, target: float | None) -> None:
    model = TINY["llava"].build()
    inputs, before = llava_inputs(), model_state(model)
    settings = PLPHPConfig(target_retention=target)
    expected, _ = pruned(model, inputs, settings)
    weight = model.get_decoder().layers[layer].self_attn.q_proj.weight
    good = weight.detach().clone()
    cache = PrunedCache.for_inputs(model, inputs, settings)
    with torch.no_grad():
        weight[0, 0] = bad
    with pytest.raises(NonFiniteAttentionError, match=f"layer {layer} "):
        generate(model, inputs, **passed(cache))
    with pytest.raises(NonFiniteAttentionError), plphp.prune(model, settings):
        generate(model, inputs)
    with torch.no_grad():
        weight.copy_(good)
    assert not assert_right_or_dead(model, inputs, cache, expected)
    del cache
    assert_as_before(model, before)
    assert_same_generation(expected, pruned(model, inputs, settings)[0])


def test_text_layers_that_do_not_read_through_the_attention_function_are_found(llava: Any) -> None:
    """As in a model class that calls torch's attention by itself, or a fused kernel put in its place."""
    attention = llava.get_decoder().layers[1].self_attn
    stock = attention.config
    inputs = llava_inputs()
    with plphp.prune(llava, SETTINGS):
        own = copy.deepcopy(stock)
        own._attn_implementation = "sdpa"
        attention.config = own
        try:
            with pytest.raises(CacheStateError, match="Layer 1 did not read it through plphp's attention function"):
                generate(llava, inputs)
        finally:
            attention.config = stock
        assert generate(llava, inputs).sequences.shape[0] == 2


def test_a_last_layer_that_does_not_read_through_the_attention_function_is_found(llava: Any) -> None:
    attention = llava.get_decoder().layers[-1].self_attn
    stock, inputs = attention.config, llava_inputs()
    with plphp.prune(llava, SETTINGS):
        attention.config = copy.deepcopy(stock)
        attention.config._attn_implementation = "sdpa"
        try:
            for tokens in (1, 2):
                with pytest.raises(CacheStateError, match="Layer 2 did not read it through plphp's"):
                    generate(llava, inputs, max_new_tokens=tokens)
        finally:
            attention.config = stock


def test_terms_that_change_the_softmax_are_refused(llava: Any) -> None:
    attention = llava.get_decoder().layers[0].self_attn
    stock = attention.forward
    attention.forward = lambda *args, **kwargs: stock(*args, softcap=30.0, **kwargs)
    try:
        with (
            plphp.prune(llava, SETTINGS),
            pytest.raises(UnsupportedModelError, match="LlamaAttention passes softcap"),
        ):
            generate(llava, llava_inputs())
    finally:
        del attention.forward


# --- accelerate -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # weights on the meta device
@pytest.mark.parametrize("how", ["cpu_offload", "hooks"])
def test_accelerate_hooks_change_nothing(how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = TINY["llava"].build(), llava_inputs()
    expected, report = pruned(model, inputs, SETTINGS)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    output, other = pruned(model, inputs, SETTINGS)
    assert_same_generation(expected, output)
    assert other.prompts == report.prompts
    assert (other.kv_bytes, other.kv_bytes_full) == (report.kv_bytes, report.kv_bytes_full)
    assert "_hf_hook" in model.__dict__
    assert "generate" not in model.__dict__
