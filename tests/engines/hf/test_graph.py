# SPDX-License-Identifier: Apache-2.0
"""Decoding from a captured step, on the CPU: what a CUDA graph would hold fast is recorded and replayed.

The recorder notes every operation with the tensors that it read and wrote. A replay does the same operations on the
same tensors, and runs no Python of the model; some of what asks the device for a number cannot be recorded. Streams,
memory pools and kernels' own launches are what only a GPU can show.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import plphp
from invariants import assert_same_generation, generate, pruned
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf import captured, dispatch, generation, graph
from plphp.engines.hf.cache_argument import cache_among, passed
from plphp.engines.hf.layer import PrunedLayer
from plphp.errors import CacheMemoryError, ConfigError, UnsupportedFeatureError
from precision import EXACT
from test_invariants import config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = ("llava", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "idefics3", "glm4v")
ASKS_THE_DEVICE = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal", "lift_fresh", "bincount")


class Recorder(TorchDispatchMode):
    """Stands in for `capture_cuda`; counts captures and replays."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = self.captures = self.replays = 0
        self.difference = 0.0
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ASKS_THE_DEVICE):
            raise RuntimeError(f"{func} asks the device for a number")
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out

    def capture(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        assert device.type == "cpu"
        self.attempts += 1
        run()
        self._operations = operations = []
        with self:
            logits = run()
        self.captures += 1

        def replay() -> Tensor:
            self.replays += 1
            for func, args, kwargs, out in operations:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return logits + self.difference

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(generation, "replayed", partial(dispatch.replayed, capture=made.capture))
    monkeypatch.setattr(
        generation, "graph_obstacle", lambda _, beams: "beams are moved between steps" if beams > 1 else None
    )
    graph._failed.clear()
    return made


def setup(family: str, rows: tuple[int, ...] = (2, 0, 1)) -> tuple[Any, dict[str, Any]]:
    model = tiny_model(family)
    return model, TINY[family].inputs(model, rows)


def graphed(model: Any, inputs: dict[str, Any], settings: PLPHPConfig, decode: str = "graph", **kwargs: Any) -> Any:
    with plphp.prune(model, settings, decode=decode):
        return generate(model, inputs, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_same(family: str, recorder: Recorder) -> None:
    model, inputs = setup(family)
    expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=9)
    assert_same_generation(graphed(model, inputs, config("plphp"), max_new_tokens=9), expected)
    assert (recorder.captures, recorder.replays) == (1, 7)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    "kwargs",
    [{"do_sample": True, "temperature": 1.5}, {"do_sample": True, "num_return_sequences": 3}, {"eos_token_id": True}],
    ids=["sampling", "several", "eos"],
)
def test_inside_the_ordinary_generate(kwargs: dict[str, Any], recorder: Recorder) -> None:
    model, inputs = setup("llava", (1, 0, 1))
    if "eos_token_id" in kwargs:
        output, _ = pruned(model, inputs, config("plphp"), max_new_tokens=9)
        ends = [output.sequences[0, -5].item(), output.sequences[1, -3].item(), output.sequences[2, -2].item()]
        kwargs = {"eos_token_id": ends, "pad_token_id": 0}
    kwargs = {**kwargs, "max_new_tokens": 9}
    torch.manual_seed(5)
    expected, _ = pruned(model, inputs, config("plphp"), **kwargs)
    torch.manual_seed(5)
    assert_same_generation(graphed(model, inputs, config("plphp"), **kwargs), expected)
    assert recorder.replays == len(expected.logits) - 2 > 1


def test_a_longer_answer_is_captured_anew(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_ROOM", 4)
    model, inputs = setup("llava")
    expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=15)
    assert_same_generation(graphed(model, inputs, config("plphp"), max_new_tokens=15), expected)
    assert (recorder.captures, recorder.replays) == (4, 13)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_later_turn_goes_on_from_what_was_replayed(family: str, recorder: Recorder) -> None:
    model, inputs = setup(family, (1,))
    outputs = []
    for decode in ("eager", "graph"):
        cache = PrunedCache.for_inputs(model, inputs, config("plphp"), decode=decode)
        first = generate(model, inputs, **passed(cache), max_new_tokens=8)
        longer = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        later = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            later["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, longer.shape[1] - types.shape[1]))
        outputs.append(generate(model, later, **passed(cache), max_new_tokens=8))
        assert all(layer.slot is None for layer in cache.layers if isinstance(layer, PrunedLayer))
    assert_same_generation(*outputs)
    assert (recorder.captures, recorder.replays) == (2, 12)


def test_room_that_was_not_written_is_not_read(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory behind the tail may hold anything."""
    model, inputs = setup("llava")
    expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=6)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert_same_generation(graphed(model, inputs, config("plphp"), max_new_tokens=6), expected)


def test_a_replay_that_differs_is_not_gone_on_with(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    recorder.difference = 0.5
    model, inputs = setup("llava")
    kwargs = {"max_new_tokens": graph.FEWEST_STEPS}
    expected, _ = pruned(model, inputs, config("plphp"), **kwargs)
    assert_same_generation(graphed(model, inputs, config("plphp"), "auto", **kwargs), expected)
    assert recorder.replays == 1
    assert "a replayed step differs from an eager one" in caplog.text
    graphed(model, inputs, config("plphp"), "auto", **kwargs)
    assert recorder.captures == 1  # once is enough
    with pytest.raises(UnsupportedFeatureError, match="decode='graph' cannot be done here: a replayed step differs"):
        graphed(model, inputs, config("plphp"), **kwargs)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("family", "kwargs", "reason"),
    [
        ("gemma3", {}, "not every layer of the cache was pruned"),
        ("llava", {"output_hidden_states": True}, "hidden states or attentions are asked for"),
        ("llava", {"num_beams": 2}, "beams are moved between steps"),
    ],
)
def test_what_cannot_be_captured_is_named(
    family: str, kwargs: dict[str, Any], reason: str, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = setup(family, (1, 1))
    kwargs = {**kwargs, "max_new_tokens": graph.FEWEST_STEPS}
    with pytest.raises(UnsupportedFeatureError, match=reason):
        graphed(model, inputs, config("plphp"), **kwargs)
    expected, _ = pruned(model, inputs, config("plphp"), **kwargs)
    assert_same_generation(graphed(model, inputs, config("plphp"), "auto", **kwargs), expected)
    assert recorder.captures == 0
    assert (reason in caplog.text) == ("num_beams" not in kwargs)


def test_a_model_that_asks_the_device_for_a_number(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = setup("llava")
    layer = model.model.language_model.layers[1]
    hook = layer.register_forward_pre_hook(lambda _, given: given if given[0].sum().item() else None)
    try:
        expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=50)
        for _ in range(2):
            assert_same_generation(graphed(model, inputs, config("plphp"), "auto", max_new_tokens=50), expected)
    finally:
        hook.remove()
    assert (recorder.attempts, recorder.captures) == (1, 0)
    assert "Decoding without a CUDA graph: RuntimeError: aten._local_scalar_dense" in caplog.text


def test_a_number_that_a_capture_holds_fast_is_found_out(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that works with the tokens it has read, as a number of Python."""
    model, inputs = setup("llava")
    forward = type(model).forward

    @wraps(forward)
    def by_length(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * (1 + cache_among(kwargs)._before)
        return output

    monkeypatch.setattr(type(model), "forward", by_length)
    monkeypatch.setitem(graph.TOLERANCE, torch.float64, EXACT)
    expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=50)
    found = graphed(model, inputs, config("plphp"), "auto", max_new_tokens=50)
    assert torch.equal(found.sequences, expected.sequences)
    assert recorder.replays == 2
    assert "a replayed step differs" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.own_dtype)], ids=str)
def test_a_position_that_a_capture_holds_fast_is_found_out(
    dtype: torch.dtype, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the logits hardly show it."""
    model = tiny_model("llava", dtype)
    inputs = TINY["llava"].inputs(model, (2, 0, 1))
    expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=50)
    taken = captured.CapturedStep.__call__

    def stale(self: Any, kwargs: dict[str, Any]) -> Tensor:
        return taken(self, {**kwargs, "position_ids": self._inputs["position_ids"].clone()})

    monkeypatch.setattr(captured.CapturedStep, "__call__", stale)
    monkeypatch.setitem(graph.TOLERANCE, dtype, 1e9)
    found = graphed(model, inputs, config("plphp"), "auto", max_new_tokens=50)
    if dtype is torch.float64:  # elsewhere the rounding of one right replay may turn a near tie in a later token
        assert_same_generation(found, expected)
    assert recorder.replays == 2
    assert "a replayed step differs" in caplog.text


def test_what_a_graph_reads_stays_alive(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses, no tensors."""
    made: list[weakref.ref[Tensor]] = []
    steps: list[captured.CapturedStep] = []
    started = captured.CapturedStep.__init__

    def watched(self: Any, *args: Any) -> None:
        started(self, *args)
        steps.append(self)

    def capture(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        for cell in run.__closure__ or ():
            made.extend(weakref.ref(one) for one in tree_leaves(cell.cell_contents) if isinstance(one, Tensor))
        logits = run()
        return lambda: logits

    monkeypatch.setattr(captured.CapturedStep, "__init__", watched)
    monkeypatch.setattr(generation, "replayed", partial(dispatch.replayed, capture=capture))
    model, inputs = setup("llava")
    graphed(model, inputs, config("plphp"), "auto", max_new_tokens=50)
    gc.collect()
    assert len(made) >= 2
    assert all(one() is not None for one in made)


def test_tails_that_moved_are_captured_anew(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = setup("llava")
    expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=9)
    taken = captured.CapturedStep.__call__

    def moving(self: Any, kwargs: dict[str, Any]) -> Tensor:
        logits = taken(self, kwargs)
        if recorder.replays == 4:
            layer = self._layers[0]
            old, layer.keys = layer.keys, layer.keys.clone()
            old.fill_(torch.nan)
        return logits

    monkeypatch.setattr(captured.CapturedStep, "__call__", moving)
    assert_same_generation(graphed(model, inputs, config("plphp"), max_new_tokens=9), expected)
    assert recorder.captures == 2


def test_the_cache_is_freed_without_a_collection(recorder: Recorder) -> None:
    model, inputs = setup("llava")
    gc.collect()
    gc.disable()
    try:
        cache = PrunedCache.for_inputs(model, inputs, config("plphp"), decode="graph")
        generate(model, inputs, **passed(cache), max_new_tokens=8)
        gone = weakref.ref(cache)
        recorder._operations = []
        del cache
        assert gone() is None
        assert "_plphp_attachment" not in model.__dict__
    finally:
        gc.enable()


def test_two_caches_of_one_model(recorder: Recorder) -> None:
    """One begins and ends inside the other, or they overlap, as threads do."""
    model, inputs = setup("llava")
    caches = [PrunedCache.for_inputs(model, inputs, config("plphp"), decode="graph") for _ in range(2)]
    first, second = (dispatch.replayed(model, cache, 8, required=True, capture=recorder.capture) for cache in caches)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "forward" in model.__dict__
    second.__exit__(None, None, None)
    assert "forward" not in model.__dict__


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_without_a_length_there_is_room_for_the_default(recorder: Recorder) -> None:
    model, inputs = setup("llava")
    with plphp.prune(model, config("plphp"), decode="graph"):
        model.generate(**inputs, do_sample=False)
    assert recorder.captures == 1


def test_no_memory_for_the_room(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reserve(self: PrunedLayer, room: int) -> int:
        raise CacheMemoryError(f"no memory for {room} tokens")

    monkeypatch.setattr(PrunedLayer, "reserve", reserve)
    model, inputs = setup("llava")
    expected, _ = pruned(model, inputs, config("plphp"), max_new_tokens=50)
    assert_same_generation(graphed(model, inputs, config("plphp"), "auto", max_new_tokens=50), expected)
    assert "no memory for 48 tokens" in caplog.text


def test_short_answers_are_decoded_eagerly(recorder: Recorder) -> None:
    model, inputs = setup("llava")
    graphed(model, inputs, config("plphp"), "auto", max_new_tokens=graph.FEWEST_STEPS - 1)
    assert recorder.captures == 0


def test_without_a_gpu_it_is_refused_by_name() -> None:
    model, inputs = setup("llava")
    with pytest.raises(UnsupportedFeatureError, match="it needs a model on a CUDA device"):
        graphed(model, inputs, config("plphp"))
    graphed(model, inputs, config("plphp"), "auto", max_new_tokens=graph.FEWEST_STEPS)
    with pytest.raises(ConfigError, match="decode must be one of 'eager', 'auto', 'graph', got 'fast'"):
        graphed(model, inputs, config("plphp"), "fast")
