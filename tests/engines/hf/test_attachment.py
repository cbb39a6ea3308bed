# SPDX-License-Identifier: Apache-2.0
"""What a model carries while plphp is in use, and that it is gone afterwards."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import plphp
from invariants import assert_same_generation, generate
from plphp import CacheStateError, ConfigError, PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf import wrappers
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache_argument import cache_among
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")


def state(model: Any) -> tuple[Any, ...]:
    """All that an attachment may change on a model."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return dict(model.__dict__), [(id(config), dict(config.__dict__)) for config in configs]


def names(model: Any) -> set[str]:
    """Attention names of the text layers."""
    return {layer.self_attn.config._attn_implementation for layer in model.get_decoder().layers}


def test_the_last_lease_to_end_restores_the_model(llava: Any) -> None:
    before = state(llava)
    leases = [Lease.of(llava) for _ in range(3)]
    assert len({id(lease.attachment) for lease in leases}) == 1
    for lease in (leases[1], leases[0]):
        lease.end()
        lease.end()  # a second end counts for nothing
        assert leases[2].attachment.active
        assert names(llava) == {"plphp_sdpa"}
    leases[2].end()
    assert not leases[2].attachment.active
    assert state(llava) == before


def test_a_lease_that_is_freed_ends(llava: Any) -> None:
    before = state(llava)
    lease = Lease.of(llava)
    other = copy.deepcopy(lease)
    del lease
    assert names(llava) == {"plphp_sdpa"}
    del other
    assert state(llava) == before


def test_only_the_text_model_is_changed(llava: Any) -> None:
    with plphp.prune(llava, PLPHPConfig()):
        assert names(llava) == {"plphp_sdpa"}
        assert llava.model.vision_tower.config._attn_implementation == "sdpa"


def test_threads_that_come_and_go(llava: Any) -> None:
    before, errors = state(llava), []

    def work() -> None:
        try:
            for _ in range(50):
                with plphp.prune(llava, PLPHPConfig()):
                    assert names(llava) == {"plphp_sdpa"}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert state(llava) == before


def test_each_thread_uses_its_own_session(llava: Any) -> None:
    inputs, opened, reports = TINY["llava"].inputs(llava), threading.Event(), []

    def work() -> None:
        with plphp.prune(llava, PLPHPConfig(retention_rate=1.0)) as run:
            opened.wait()
            generate(llava, inputs)
            reports.append(run.report)

    thread = threading.Thread(target=work)
    thread.start()
    with plphp.prune(llava, PLPHPConfig(method="uniform", retention_rate=0.5)) as run:  # the newest of all
        opened.set()
        thread.join()
        assert [report.retention for report in reports] == [1.0]
        generate(llava, inputs)
    assert run.report.retention == 0.5


def test_a_failure_in_the_middle_of_attaching_changes_nothing(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, signature = state(llava), inspect.signature
    monkeypatch.setattr(wrappers.inspect, "signature", lambda method: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plphp.apply(llava, PLPHPConfig())
    assert state(llava) == before
    monkeypatch.setattr(wrappers.inspect, "signature", signature)
    with plphp.prune(llava, PLPHPConfig()):
        assert names(llava) == {"plphp_sdpa"}
    assert state(llava) == before


@pytest.mark.parametrize("config", [PLPHPConfig(method="nope"), PLPHPConfig(exempt_layers=(99,)), {"method": "plphp"}])
def test_an_error_that_the_caller_keeps_does_not_keep_the_model_attached(llava: Any, config: Any) -> None:
    before, inputs = state(llava), TINY["llava"].inputs(llava)
    kept = []
    for make in (lambda: PrunedCache.for_inputs(llava, inputs, config), lambda: plphp.apply(llava, config)):
        try:
            make()
            plphp.remove(llava)  # exempt_layers are read when a cache is made
        except ConfigError as error:
            kept.append(error)
        assert state(llava) == before
    assert kept


def test_span_error_that_the_caller_keeps_does_not_keep_the_model_attached(llava: Any) -> None:
    before = state(llava)
    with pytest.raises(plphp.SpanError) as error:
        PrunedCache.for_inputs(llava, {}, plphp.PLPHPConfig())
    assert state(llava) == before
    assert error.value is not None


def test_copies_and_pickles_of_an_attached_model_are_refused(tmp_path: Path) -> None:
    model = TINY["llava"].build()  # one that never ran: older transformers leave hooks that no pickle takes
    with plphp.prune(model, plphp.PLPHPConfig()):
        for attempt in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
            with pytest.raises(UnsupportedFeatureError, match=r"leave the session, call plphp.remove"):
                attempt(model)
    assert names(copy.deepcopy(model)) == {"sdpa"}
    assert names(pickle.loads(pickle.dumps(model))) == {"sdpa"}


def test_state_dict_and_save_pretrained_of_an_attached_model_are_clean(llava: Any, tmp_path: Path) -> None:
    inputs, keys = TINY["llava"].inputs(llava), set(llava.state_dict())
    expected = generate(llava, inputs)
    with plphp.prune(llava, PLPHPConfig()):
        assert set(llava.state_dict()) == keys
        llava.save_pretrained(tmp_path)
    assert not any("plphp" in path.read_text() for path in tmp_path.glob("*.json"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert names(again) == {"sdpa"}
    assert_same_generation(generate(again, inputs), expected)


def test_signature_name_and_doc_of_generate_stay(llava: Any) -> None:
    before = inspect.signature(llava.generate)
    with plphp.prune(llava, PLPHPConfig()):
        assert inspect.signature(llava.generate) == before
        assert llava.generate.__name__ == "generate"
        assert llava.generate.__doc__ == type(llava).generate.__doc__


def test_generate_that_was_taken_out_of_a_session_is_stock_afterwards(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    with plphp.prune(llava, PLPHPConfig()):
        bound = llava.generate
    output = bound(**inputs, max_new_tokens=2)
    assert torch.equal(output, llava.generate(**inputs, max_new_tokens=2))


def test_generate_that_the_user_replaced_is_called_and_comes_back(llava: Any) -> None:
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(llava).generate(llava, *args, **kwargs)

    llava.generate = mine
    try:
        with plphp.prune(llava, PLPHPConfig()) as run:
            generate(llava, TINY["llava"].inputs(llava))
        assert run.report.retention < 1
        assert isinstance(cache_among(calls[0]), PrunedCache)
        assert llava.generate is mine
    finally:
        del llava.generate


def test_attention_that_the_user_sets_inside_a_session(llava: Any) -> None:
    """What comes out is either pruned rightly or refused, and the user's choice stays."""
    inputs = TINY["llava"].inputs(llava)
    expected = generate(llava, inputs)
    try:
        with plphp.prune(llava, PLPHPConfig()):
            llava.set_attn_implementation("eager")
            with pytest.raises(CacheStateError, match="did not read it through plphp's attention function"):
                generate(llava, inputs)
        assert names(llava) == {"eager"}
        assert_same_generation(generate(llava, inputs), expected)
        with plphp.prune(llava, PLPHPConfig()) as run:
            generate(llava, inputs)
        assert run.report.retention < 1
    finally:
        llava.set_attn_implementation("sdpa")


def test_attention_that_the_user_sets_back_to_plphp_goes_on(llava: Any) -> None:
    inputs = TINY["llava"].inputs(llava)
    with plphp.prune(llava, PLPHPConfig()) as run:
        expected = generate(llava, inputs)
        llava.set_attn_implementation("eager")
        llava.get_decoder().set_attn_implementation("plphp_sdpa")
        assert_same_generation(generate(llava, inputs), expected)
    assert run.report.retention < 1
    llava.set_attn_implementation("sdpa")


def test_a_model_that_is_freed_inside_a_session_is_freed() -> None:
    model = TINY["llava"].build()
    session = plphp.apply(model, plphp.PLPHPConfig())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(CacheStateError, match="model of this PrunedCache was freed"):
        _ = session._lease.attachment.model
    session.close()


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    model = TINY["llava"].build()
    with plphp.prune(model, plphp.PLPHPConfig()):
        pass
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["a model", None, torch.nn.Linear(2, 2)], ids=["text", "none", "module"])
def test_what_is_no_model_is_refused(what: Any) -> None:
    with (
        pytest.raises(plphp.UnsupportedModelError, match="Expected a transformers PreTrainedModel, got"),
        plphp.prune(what, plphp.PLPHPConfig()),
    ):
        pass


def test_a_text_model_is_refused() -> None:
    model = tiny_model("llava").get_decoder()
    with (
        pytest.raises(plphp.UnsupportedModelError, match="does not know 'llama' models"),
        plphp.prune(model, plphp.PLPHPConfig()),
    ):
        pass
