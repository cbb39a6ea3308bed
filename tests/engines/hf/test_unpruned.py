# SPDX-License-Identifier: Apache-2.0
"""What would run unpruned inside a session is refused, made to work, or noticed; wrappers are looked into."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from transformers import DynamicCache

import plphp
from invariants import assert_same_generation, evicted_entries_masked, generate, pruned
from plphp import CacheStateError, ConfigError, PrunedCache, UnprunedWarning, UnsupportedFeatureError
from plphp.engines.hf.cache_argument import NAME, NAMES, cache_in, passed
from test_invariants import config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")
SETTINGS = config("plphp", retention_rate=0.4)
ROUNDABOUT: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "taken before": lambda model: model.generate,
    "of the class": lambda model: lambda **kwargs: type(model).generate(model, **kwargs),
    "compiled before": lambda model: torch.compile(model.generate, backend="eager"),
    "the model itself": lambda model: (
        lambda input_ids, attention_mask, pixel_values, **_: model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values
        )
    ),
}


def places(caught: pytest.WarningsRecorder) -> list[str]:
    """The files to which the warnings point."""
    return [warning.filename for warning in caught if issubclass(warning.category, UnprunedWarning)]


def kept(report: Any) -> Any:
    """The entries that a run kept."""
    return [[row.kept_positions for row in layer.rows] for layer in report.prompts[0].layers]


def plain_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


@pytest.mark.own_dtype  # dynamo looks into nothing while float64 is on
@pytest.mark.filterwarnings("ignore:.*Dynamo.*")
@pytest.mark.parametrize("way", ROUNDABOUT)
def test_a_model_that_runs_past_plphp_is_noticed(llava: Any, way: str) -> None:
    inputs, call = TINY["llava"].inputs(llava), ROUNDABOUT[way](llava)

    def session() -> None:
        with plphp.prune(llava, SETTINGS) as run:
            call(**inputs, max_new_tokens=1, do_sample=False)
            with pytest.raises(CacheStateError, match=r"ran without plphp .* taken from the model, or compiled"):
                _ = run.report

    with pytest.warns(UnprunedWarning, match=r"ran without plphp \(\d+ passes, with the whole cache\)") as caught:
        session()
    assert places(caught) == [__file__]


def test_it_is_noticed_beside_what_was_pruned_and_by_remove(llava: Any) -> None:
    inputs, taken = TINY["llava"].inputs(llava), llava.generate
    session = plphp.apply(llava, SETTINGS)
    generate(llava, inputs)
    assert session.report.retention < 1
    taken(**inputs, max_new_tokens=1)
    with pytest.warns(UnprunedWarning, match=r"\(1 passes") as caught:
        session = plphp.apply(llava, SETTINGS)  # ends the first one
    assert places(caught) == [__file__]
    taken(**inputs, max_new_tokens=2)
    with pytest.warns(UnprunedWarning, match=r"\(2 passes") as caught:
        plphp.remove(llava)
    assert places(caught) == [__file__]


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3.5"])
def test_what_runs_with_plphp_is_no_reason_to_warn(family: str) -> None:
    """Sliding and linear layers of a pruned cache hold what stock layers hold, and attend as those do."""
    model = tiny_model(family)
    inputs = TINY[family].inputs(model)
    generate(model, inputs)
    with plphp.prune(model, SETTINGS) as run:
        generate(model, inputs)
        model(**inputs, **passed(PrunedCache.for_inputs(model, inputs, SETTINGS)))
    generate(model, inputs)
    assert run.report.retention < 1


def test_an_exception_is_not_hidden_by_the_warning(llava: Any) -> None:
    def session() -> None:
        with plphp.prune(llava, SETTINGS):
            llava(**TINY["llava"].inputs(llava))
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        session()


@pytest.mark.parametrize("name", [*NAMES, "kv_cache"])
def test_another_cache_is_refused_under_any_keyword(llava: Any, name: str) -> None:
    inputs = TINY["llava"].inputs(llava)
    with plphp.prune(llava, SETTINGS):
        with pytest.raises(UnsupportedFeatureError, match=rf"{name}=DynamicCache"):
            llava.generate(**inputs, **{name: plain_cache(llava)}, max_new_tokens=2)
        with pytest.raises(ConfigError, match=r"one cache, got several: (cache|past_key_values|kv_cache)"):
            llava.generate(**inputs, **{name: plain_cache(llava), "other": plain_cache(llava)}, max_new_tokens=2)


def test_without_a_session_arguments_are_left_alone(llava: Any) -> None:
    """Also while a cache of plphp is alive."""
    inputs = TINY["llava"].inputs(llava)
    held = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    with pytest.raises(ValueError, match="model_kwargs"):  # by transformers
        llava.generate(**inputs, **passed(plain_cache(llava)), other=plain_cache(llava), max_new_tokens=2)
    del held


def test_no_report_after_a_call_that_was_refused(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    with plphp.prune(llava, SETTINGS) as run:
        generate(llava, inputs)
        with pytest.raises(plphp.SpanError):
            generate(llava, {**inputs, "pixel_values": inputs["pixel_values"].repeat(3, 1, 1, 1)})
        with pytest.raises(CacheStateError, match="no report"):
            _ = run.report


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_cache_is_taken_under_any_name_of_a_cache(llava: Any, name: str) -> None:
    inputs = TINY["llava"].inputs(llava)
    with plphp.prune(llava, SETTINGS):
        expected = generate(llava, inputs)
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    assert_same_generation(expected, generate(llava, inputs, **{name: cache}))
    assert cache.report().retention < 1


def test_the_name_is_that_of_the_transformers_that_is_installed(llava: Any) -> None:
    inputs, cache = TINY["llava"].inputs(llava), plain_cache(llava)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = generate(llava, inputs, **passed(cache))
    assert cache_in(output) is cache
    assert cache.get_seq_length() > 0
    assert NAME in NAMES


@pytest.mark.skipif(NAME == "cache", reason="this transformers takes the new name")
def test_a_direct_call_with_the_name_of_newer_versions_is_refused(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    with pytest.raises(UnsupportedFeatureError, match=r"does not take a cache as cache, .*: pass past_key_values"):
        llava(**inputs, cache=cache)


@pytest.mark.parametrize("value", [None, "a cache"])
def test_a_cache_in_the_generation_config_is_refused(llava: Any, value: Any) -> None:
    settings = copy.deepcopy(llava.generation_config)
    setattr(settings, NAME, value)
    with plphp.prune(llava, SETTINGS), pytest.raises(UnsupportedFeatureError, match=f"has an attribute '{NAME}'"):
        generate(llava, TINY["llava"].inputs(llava), generation_config=settings)


def test_a_generate_that_drops_the_cache_is_refused(llava: Any) -> None:
    def mine(**kwargs: Any) -> Any:
        return type(llava).generate(llava, **{name: value for name, value in kwargs.items() if name != NAME})

    llava.generate = mine
    try:
        with plphp.prune(llava, SETTINGS), pytest.raises(CacheStateError, match="ran without the cache that plphp"):
            generate(llava, TINY["llava"].inputs(llava))
    finally:
        del llava.generate


def test_the_report_is_of_the_newest_generate(llava: Any) -> None:
    inputs, taken = TINY["llava"].inputs(llava), llava.generate
    session = plphp.apply(llava, SETTINGS)
    generate(llava, inputs)
    taken(**inputs, max_new_tokens=1)
    with pytest.raises(CacheStateError, match="ran without plphp"):
        _ = session.report
    generate(llava, inputs)
    assert session.report.retention < 1
    with pytest.warns(UnprunedWarning):
        plphp.remove(llava)


def test_a_cache_is_read_by_its_own_model_alone(llava: Any) -> None:
    other, inputs = TINY["llava"].build(seed=1), TINY["llava"].inputs(llava)
    cache = PrunedCache.for_inputs(llava, inputs, SETTINGS)
    session = plphp.apply(other, SETTINGS)
    with pytest.raises(UnsupportedFeatureError, match="model read it for which it was not made"):
        other(**inputs, **passed(cache))
    plphp.remove(other)
    del cache, session


def test_models_that_share_a_config(llava: Any) -> None:
    twin = type(llava)(llava.config).double().eval()
    with plphp.prune(llava, SETTINGS):
        twin(**TINY["llava"].inputs(llava))  # no concern of the session
        with pytest.raises(UnsupportedFeatureError, match="give each a config of its own"):
            plphp.apply(twin, plphp.PLPHPConfig())


def test_a_model_that_is_deleted_under_apply_leaves_nothing() -> None:
    model = TINY["llava"].build()
    session = plphp.apply(model, SETTINGS)
    alive = [weakref.ref(thing) for thing in (model, session, session._lease.attachment)]
    del model, session
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def test_a_part_of_a_model_is_refused(llava: Any) -> None:
    for use in (plphp.apply, plphp.remove, lambda part: plphp.prune(part, plphp.PLPHPConfig()).__enter__()):
        with pytest.raises(plphp.UnsupportedModelError, match="LlavaModel has no generate to prune: pass the model"):
            use(llava.model)
    assert llava.config.get_text_config()._attn_implementation == "sdpa"


# peft asks for an attribute that newer transformers has renamed
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*", "ignore:.*Dynamo.*")
class TestWrappers:
    """The inner model is pruned, whichever of the two is named and called."""

    def test_data_parallel(self, llava: Any) -> None:
        inputs, wrapper = TINY["llava"].inputs(llava), torch.nn.DataParallel(llava)
        expected, report = pruned(llava, inputs, SETTINGS)
        with plphp.prune(wrapper, SETTINGS) as run:
            assert_same_generation(expected, generate(wrapper.module, inputs))
        assert kept(run.report) == kept(report)
        session = plphp.apply(wrapper, SETTINGS)
        assert_same_generation(expected, generate(llava, inputs))
        assert kept(session.report) == kept(report)
        plphp.remove(wrapper)
        assert "generate" not in llava.__dict__
        cache = PrunedCache.for_inputs(wrapper, inputs, SETTINGS)
        assert_same_generation(expected, generate(llava, inputs, **passed(cache)))

    @pytest.mark.own_dtype  # dynamo looks into nothing while float64 is on
    @pytest.mark.parametrize("what", ["a wrapper", "the model in place", "forward", "generate inside the session"])
    def test_compiled(self, what: str) -> None:
        model = TINY["llava"].build()  # dynamo leaves marks on it
        inputs = TINY["llava"].inputs(model)
        expected, report = pruned(model, inputs, SETTINGS)
        named = model
        if what == "a wrapper":
            named = torch.compile(model, backend="eager")
        elif what == "the model in place":
            model.compile(backend="eager")
        elif what == "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        with plphp.prune(named, SETTINGS) as run:
            call = torch.compile(model.generate, backend="eager") if what.startswith("generate") else named.generate
            tokens = call(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, expected.sequences)
        assert kept(run.report) == kept(report)
        plphp.apply(named, SETTINGS)
        plphp.remove(named)
        assert "generate" not in model.__dict__

    def test_lora(self) -> None:
        """Pruned with the adapter, and by what the adapter makes of the attention."""
        model = TINY["llava"].build()
        inputs = TINY["llava"].inputs(model)
        with plphp.prune(model, SETTINGS) as run:
            generate(model, inputs)
        without = kept(run.report)
        torch.manual_seed(5)
        wrapper = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).eval()
        with plphp.prune(wrapper, SETTINGS) as run:
            output = generate(wrapper, inputs)
        assert kept(run.report) != without
        with evicted_entries_masked(model, run.report):
            assert_same_generation(generate(wrapper, inputs), output)
        plphp.apply(wrapper, SETTINGS)
        assert_same_generation(generate(model, inputs), output)
        plphp.remove(wrapper)
        assert "generate" not in model.__dict__

    @pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
    def test_virtual_tokens_are_refused(self, kind: str) -> None:
        model = TINY["llava"].build()
        text = model.config.get_text_config()
        made = getattr(peft, kind)(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            num_layers=text.num_hidden_layers,
            token_dim=text.hidden_size,
            num_attention_heads=text.num_attention_heads,
        )
        wrapper = peft.PeftModelForCausalLM(model, made)
        with pytest.raises(UnsupportedFeatureError, match=r"tuning: it puts virtual tokens into the cache.*LoRA, work"):
            plphp.apply(wrapper, plphp.PLPHPConfig())
        with plphp.prune(model, plphp.PLPHPConfig()), pytest.raises(UnsupportedFeatureError, match="virtual tokens"):
            wrapper.generate(**TINY["llava"].inputs(model), max_new_tokens=2)
        with pytest.raises(UnsupportedFeatureError, match="virtual tokens"):
            PrunedCache.for_inputs(wrapper, TINY["llava"].inputs(model))
        assert "generate" not in model.__dict__

    def test_what_holds_a_model(self, llava: Any) -> None:
        class Pipeline:
            model = llava

        for use in (plphp.apply, plphp.remove):
            with pytest.raises(
                plphp.UnsupportedModelError, match=r"got Pipeline: pass its attribute 'model', the Llava"
            ):
                use(Pipeline())
            with pytest.raises(plphp.UnsupportedModelError, match=r"got Linear\."):
                use(torch.nn.Linear(2, 2))
