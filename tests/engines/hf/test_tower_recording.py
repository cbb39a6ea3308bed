# SPDX-License-Identifier: Apache-2.0
"""Recording the attention of vision towers: the model stays as it is, and the record is what eager attention says."""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import plphp
from plphp.engines.hf.tower_layers import core_of
from plphp.engines.hf.tower_record import TowerRecord
from plphp.engines.hf.tower_recording import recorded_tower
from plphp.errors import ConfigError, UnsupportedFeatureError, UnsupportedModelError
from plphp.families.registry import FAMILIES_BY_NAME, family_of
from plphp.families.towers import VisionTower
from precision import assert_exact
from tiny_models import TINY, tiny_model

NAMES = sorted(TINY)
CASES = [(name, video) for name in NAMES for video in (False, True) if not video or TINY[name].videos is not None]
GREEDY: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}


def tower_of(model: Any) -> nn.Module:
    family = family_of(model.config)
    assert family.tower is not None
    return core_of(model).get_submodule(family.tower.module)


def state(model: Any) -> tuple[Any, ...]:
    """What a recording might leave behind."""
    tower = tower_of(model)
    configs = [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")]
    own = [sorted(part.__dict__) for part in model.modules()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in tower.modules()]
    return configs, own, hooks


def called(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def recorded(model: Any, inputs: dict[str, Any], **options: Any) -> TowerRecord:
    with recorded_tower(model, **options) as record:
        called(model, inputs)
    return record


@pytest.mark.parametrize(("name", "video"), CASES)
def test_the_model_runs_once_and_as_before(name: str, video: bool) -> None:
    model = tiny_model(name)
    inputs = TINY[name].inputs(model, [2, 1], video=video)
    before = called(model, inputs)
    whole = state(model)
    runs: list[None] = []
    with tower_of(model).register_forward_hook(lambda *args: runs.append(None)), recorded_tower(model) as record:
        assert torch.equal(called(model, inputs), before)
    assert len(runs) == len(record.passes) == 1
    assert state(model) == whole
    assert torch.equal(called(model, inputs), before)
    assert len(record.passes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_generate_is_recorded(name: str) -> None:
    model = tiny_model(name)
    inputs = TINY[name].inputs(model, [1, 2])
    before = model.generate(**inputs, **GREEDY)
    with recorded_tower(model, [0]) as record:
        assert torch.equal(model.generate(**inputs, **GREEDY), before)
    (of_generate,) = record.passes
    (of_forward,) = recorded(model, inputs, layers=[0]).passes
    assert torch.equal(of_generate.received[0], of_forward.received[0])


class Weights:
    """Collects the weights of eager attention, by the module that attends."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_module: dict[nn.Module, list[Tensor]] = {}
        parts = [
            part for part in tower_of(model).modules() if isinstance(getattr(part, "config", None), PretrainedConfig)
        ]
        for part in parts:
            monkeypatch.setattr(part.config, "_attn_implementation", "eager")
        for name in {type(part).__module__ for part in parts}:
            file = sys.modules[name]
            for function in ("eager_attention_forward", "vision_eager_attention_forward"):
                if hasattr(file, function):
                    monkeypatch.setattr(file, function, self._collecting(getattr(file, function)))

    def _collecting(self, eager: Any) -> Any:
        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output, weights = eager(module, *args, **kwargs)
            self.by_module.setdefault(module, []).append(weights)
            return output, weights

        return attend


def column_means(weights: Tensor) -> Tensor:
    """Mean over heads and over the rows that see a column, of weights [batch, heads, seq, seq] that are 0 elsewhere."""
    mean = weights.mean(1)
    real = mean.diagonal(dim1=1, dim2=2)[:, :, None] > 0
    return (mean * real).sum(1) / ((mean > 0) & real).sum(1).clamp(min=1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "video"), CASES)
def test_the_record_is_what_eager_attention_says(name: str, video: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several sizes and rows with fewer images, so that towers pad."""
    model = tiny_model(name)
    inputs = TINY[name].inputs(model, [2, 1], video=video)
    tower = family_of(model.config).tower
    assert tower is not None
    from_sdpa = recorded(model, inputs, layers=[0, -1]).passes[0]
    weights = Weights(model, monkeypatch)
    (run,) = recorded(model, inputs, layers=[0, -1]).passes
    full = range(len(weights.by_module)) if tower.full_attention is None else tower.full_attention(model.config)
    for number, layer in enumerate((full[0], full[-1])):
        calls = list(weights.by_module.values())[layer]
        assert_exact(run.received[number], torch.cat([column_means(call) for call in calls], -1))
        assert_exact(run.received[number], from_sdpa.received[number])
        position = tower.class_token(model.config)
        assert (run.class_rows is None) == (position is None)
        if run.class_rows is not None and position is not None:
            assert_exact(run.class_rows[number], calls[0][:, :, position].mean(1))
    assert run.received[0].shape == run.received[1].shape


@pytest.mark.parametrize("name", ["qwen2.5-vl", "exaone4.5"])
def test_layers_with_windows_are_not_counted(name: str) -> None:
    model = tiny_model(name)
    inputs = TINY[name].inputs(model, [1])
    assert torch.equal(
        recorded(model, inputs, layers=[0]).passes[0].received[0],
        recorded(model, inputs, layers=[-1]).passes[0].received[0],
    )
    with pytest.raises(ConfigError, match="from -1 to 0"), recorded_tower(model, [1]):
        pass


@pytest.mark.parametrize("layers", [[2], [-3], []])
def test_layers_that_are_not_there(layers: list[int]) -> None:
    model = tiny_model("llava")
    whole = state(model)
    with pytest.raises(ConfigError, match="from -2 to 1"), recorded_tower(model, layers):
        pass
    assert state(model) == whole


def test_a_pass_that_stops_leaves_nothing() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    called(model, inputs)  # transformers puts hooks of its own on a model when it first runs
    whole, last = state(model), tower_of(model).encoder.layers[1].mlp  # type: ignore[union-attr,index]

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with recorded_tower(model, [0]) as record:
        with last.register_forward_hook(stop), pytest.raises(KeyboardInterrupt):
            called(model, inputs)
        assert record.passes == []
        called(model, inputs)
    assert record.passes[0].received[0].shape == (1, 17)
    with pytest.raises(KeyboardInterrupt), recorded_tower(model):
        stop()
    assert state(model) == whole


def test_recordings_inside_each_other() -> None:
    model, other = tiny_model("llava"), TINY["llava"].build(seed=1)
    inputs = TINY["llava"].inputs(model, [1])
    called(model, inputs)  # transformers puts hooks of its own on a model when it first runs
    whole = state(model)
    with recorded_tower(model, [0]) as outer:
        with recorded_tower(model, [1]) as inner, recorded_tower(other) as of_other:
            called(model, inputs)
        called(model, inputs)
    assert (len(outer.passes), len(inner.passes), len(of_other.passes)) == (2, 1, 0)
    assert not torch.equal(outer.passes[0].received[0], inner.passes[0].received[0])
    assert state(model) == whole


def test_a_recording_hears_its_own_thread_alone() -> None:
    model, other = tiny_model("llava"), TINY["llava"].build(seed=1)
    inputs = [TINY["llava"].inputs(model, [count]) for count in (1, 2)]
    expected = [recorded(model, inputs[0]), recorded(other, inputs[1]), recorded(model, inputs[1])]
    barrier = threading.Barrier(4)
    records: list[TowerRecord | None] = [None] * 4

    def work(number: int, target: Any, given: dict[str, Any], listen: bool) -> None:
        barrier.wait()
        for _ in range(5):
            if listen:
                records[number] = recorded(target, given)
            else:
                called(target, given)

    jobs = [(model, inputs[0], True), (other, inputs[1], True), (model, inputs[1], True), (model, inputs[1], False)]
    threads = [threading.Thread(target=work, args=(number, *job)) for number, job in enumerate(jobs)]
    whole = state(model)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert records[3] is None
    for record, alone in zip(records[:3], expected, strict=True):
        assert record is not None
        assert len(record.passes) == 1
        assert torch.equal(record.passes[0].received[0], alone.passes[0].received[0])
    assert state(model) == whole


def test_beside_a_session() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    called(model, inputs)  # transformers puts hooks of its own on a model when it first runs
    whole = state(model)
    with plphp.prune(model, plphp.PLPHPConfig(retention_rate=0.5)):
        pruned = model.generate(**inputs, **GREEDY)
        with recorded_tower(model) as record:
            assert torch.equal(model.generate(**inputs, **GREEDY), pruned)
    assert torch.equal(record.passes[0].received[0], recorded(model, inputs).passes[0].received[0])
    assert state(model) == whole


def test_packed_sequences_of_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention is given all images in a row, with their ends, and a tower records them one by one."""
    model = copy.deepcopy(tiny_model("qwen2-vl"))
    inputs = TINY["qwen2-vl"].inputs(model, [2])
    expected = recorded(model, inputs)

    def flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        lengths = options["cu_seq_lens_q"].diff().tolist()
        parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return torch.cat([sdpa(module, *part, None, is_causal=False)[0] for part in parts], dim=1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    model.config.vision_config._attn_implementation = "flash_attention_2"
    assert torch.equal(recorded(model, inputs).passes[0].received[0], expected.passes[0].received[0])
    assert model.config.vision_config._attn_implementation == "flash_attention_2"


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_model("llava"))
    model.train()
    with pytest.raises(UnsupportedFeatureError, match="training mode"), recorded_tower(model):
        pass
    model.eval()
    model.config.vision_config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedFeatureError, match="uses 'flex_attention'"), recorded_tower(model):
        pass
    assert model.config.vision_config._attn_implementation == "flex_attention"
    model.config.vision_config._attn_implementation = "sdpa"
    sharing = copy.deepcopy(model)
    for part in tower_of(sharing).modules():
        if hasattr(part, "config"):
            part.config = model.config.vision_config
    with (
        recorded_tower(model),
        pytest.raises(UnsupportedFeatureError, match="config of its own"),
        recorded_tower(sharing),
    ):
        pass
    inputs = TINY["llava"].inputs(model, [1])
    with recorded_tower(model):
        model.config.vision_config._attn_implementation = "sdpa"
        with pytest.raises(UnsupportedFeatureError, match="ran without plphp's attention"):
            called(model, inputs)
    assert model.config.vision_config._attn_implementation == "sdpa"
    for layer in tower_of(model).modules():
        if hasattr(layer, "is_causal"):
            layer.is_causal = True
    with pytest.raises(UnsupportedModelError, match="is_causal"):
        recorded(model, inputs)
    elsewhere = dataclasses.replace(family_of(model.config), tower=VisionTower("tower", None))
    monkeypatch.setitem(FAMILIES_BY_NAME.registered, "llava", elsewhere)
    with pytest.raises(UnsupportedFeatureError, match="has no module 'tower'"):
        recorded(model, inputs)
    unknown = dataclasses.replace(family_of(model.config), tower=None)
    monkeypatch.setitem(FAMILIES_BY_NAME.registered, "llava", unknown)
    with pytest.raises(UnsupportedFeatureError, match="does not know the vision tower of the family 'llava'"):
        recorded(model, inputs)
