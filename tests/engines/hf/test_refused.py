# SPDX-License-Identifier: Apache-2.0
"""More that is refused by name: models without a layer to prune, broken methods, reports and handles."""

from __future__ import annotations

import dataclasses
import gc
import json
from typing import Any

import pytest
import torch

import plphp
from invariants import generate, pruned
from plphp.engines.hf.cache_argument import passed
from plphp.families.unsupported import reason_against
from plphp.methods.registry import METHODS_BY_NAME
from plphp.policy.allocation import RowAllocation
from plphp.pruning.report import PruneReport
from test_invariants import config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")


def test_a_model_whose_layers_all_slide() -> None:
    made = TINY["idefics2"].config()
    made.text_config.sliding_window = 64
    made.text_config.layer_types = None
    import transformers

    model = getattr(transformers, TINY["idefics2"].model_class)(made).eval()
    with pytest.raises(plphp.UnsupportedModelError, match="full attention"), plphp.prune(model, plphp.PLPHPConfig()):
        generate(model, TINY["idefics2"].inputs(tiny_model("idefics2")))
    assert "generate" not in model.__dict__


def test_soft_capped_text_model() -> None:
    made = TINY["paligemma"].config()
    made.text_config.attn_logit_softcapping = 50.0
    assert "soft-caps" in (reason_against(made) or "")


@pytest.mark.parametrize("rate", [float("nan"), -0.5, 1.5])
def test_a_method_with_impossible_rates(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(scored: Any, settings: Any) -> Any:
        return [[RowAllocation(score, "uniform", rate) for score in layer.vision_score] for layer in scored]

    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})
    uniform = plphp.available_methods()["uniform"]
    assert uniform.kv is not None
    plphp.register_method(
        dataclasses.replace(uniform, name="broken", kv=dataclasses.replace(uniform.kv, allocate=allocate))
    )
    model = tiny_model("llava")
    with pytest.raises(plphp.ConfigError, match="'broken' gave retention rates"):
        pruned(model, TINY["llava"].inputs(model), plphp.PLPHPConfig(method="broken"))


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching(name: str) -> None:
    model = tiny_model("llava")
    with (
        plphp.prune(model, plphp.PLPHPConfig()),
        pytest.raises(plphp.UnsupportedFeatureError, match="continuous batching"),
    ):
        getattr(model, name)([[1, 2, 3]])


def test_a_handle_that_outlives_its_model() -> None:
    model = TINY["llava"].build()
    session = plphp.apply(model, plphp.PLPHPConfig())
    handle = model.generate
    session.close()
    del model, session
    gc.collect()
    with pytest.raises(plphp.CacheStateError, match="was freed"):
        handle()


def test_no_report_after_a_generate_that_failed() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model)
    with plphp.prune(model, plphp.PLPHPConfig()) as run:
        generate(model, inputs)
        with pytest.raises(Exception, match="nonsense"):
            generate(model, inputs, nonsense=1)
        with pytest.raises(plphp.CacheStateError, match="no report"):
            _ = run.report


@pytest.mark.parametrize(
    "path",
    [
        ("kv_bytes",),
        ("prompts",),
        ("prompts", 0, "layers", 0, "rows", 0, "rate"),
        ("prompts", 0, "images", 0, 0, "positions"),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", ["x", None, {"a": 1}, [["x"]]], ids=str)
def test_a_report_with_wrong_types(path: tuple[Any, ...], value: Any) -> None:
    model = tiny_model("llava")
    _, report = pruned(model, TINY["llava"].inputs(model), config("plphp"))
    values = json.loads(report.to_json())
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(plphp.ConfigError, match="Not a plphp report"):
        PruneReport.from_json(json.dumps(values))


def test_full_keys_are_freed_although_gradients_are_on() -> None:
    from torch.multiprocessing.reductions import StorageWeakRef

    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [3])
    cache = plphp.PrunedCache.for_inputs(model, inputs, config("plphp", retention_rate=0.2))
    seen: list[StorageWeakRef] = []
    update = plphp.engines.hf.layer.PrunedLayer.update

    def watched(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend(StorageWeakRef(one.untyped_storage()) for one in (keys, values))
        return update(self, keys, values, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(plphp.engines.hf.layer.PrunedLayer, "update", watched)
        output = model(**inputs, **passed(cache))
    del output
    gc.collect()
    assert seen
    assert all(reference.expired() for reference in seen)
