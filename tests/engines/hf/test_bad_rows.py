# SPDX-License-Identifier: Apache-2.0
"""NaN or inf in one row of a batch: the others are answered as ever, and the bad one is kept whole and named.

All in float64, where what leaks from row to row is many orders above the noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_query_bank import bank
from torch import Tensor

import plphp
from invariants import assert_same_generation, generate, pruned
from plphp import NonFiniteAttentionError, PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.graph import _difference
from plphp.pruning.finite import damage, features_of
from plphp.pruning.report import PruneReport
from plphp.show.tables import layer_table
from tiny_models import TINY, collate, drop_empty, tiny_model

NAN, INF = float("nan"), float("inf")
BAD, GOOD, ROWS = 1, [0, 2], (1, 1, 2)
SETTINGS = PLPHPConfig(retention_rate=0.4)
NO_FLOAT64 = ("qwen3-vl-moe", "qwen3.5-moe", "glm4v-moe")
FAMILIES = [name for name in TINY if name not in NO_FLOAT64]


def inputs_of(family: str, bad: float | None = None, rows: tuple[int, ...] = ROWS) -> dict[str, Any]:
    """A batch whose images of row 1 are not finite."""
    prompts = TINY[family]._rows(tiny_model(family, torch.float64), rows, (5, 7), 0, video=False)
    if bad is not None:
        prompts[BAD]["pixel_values"] = torch.full_like(prompts[BAD]["pixel_values"], bad)
    return drop_empty(collate(prompts))


def logits_of(output: Any, rows: list[int]) -> Tensor:
    return torch.stack(output.logits)[:, rows]


def assert_others_are_answered(found: Any, expected: Any, stock: Any) -> None:
    assert torch.equal(found.sequences[GOOD], expected.sequences[GOOD])
    assert (logits_of(found, GOOD) - logits_of(expected, GOOD)).abs().max() < 1e-5  # generate gives float32
    assert torch.equal(found.sequences[BAD], stock.sequences[BAD])
    assert torch.equal(logits_of(found, [BAD]).isfinite(), logits_of(stock, [BAD]).isfinite())


def strict(text: str) -> Any:
    """JSON without the words that JSON does not have."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_rows_are_answered(family: str, bad: float, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(family, torch.float64)
    expected, whole = pruned(model, inputs_of(family), SETTINGS)
    inputs = inputs_of(family, bad)
    stock = generate(model, inputs)
    if not logits_of(stock, GOOD).isfinite().all():  # a vision tower that lets images see each other, masked
        with pytest.raises(NonFiniteAttentionError, match=r"is NaN or inf in rows 0, 1, 2, and no other row is left"):
            pruned(model, inputs, SETTINGS)
        return
    assert not logits_of(stock, [BAD]).isfinite().all()
    caplog.clear()
    found, report = pruned(model, inputs, SETTINGS)
    assert_others_are_answered(found, expected, stock)
    (told,) = [record.getMessage() for record in caplog.records if record.name == "plphp"]
    assert "The attention of row 1 is NaN or inf from layer" in told
    assert f"pixel_values holds {'NaN' if bad != bad else 'inf'}" in told
    for layer, before in zip(report.prompts[0].layers, whole.prompts[0].layers, strict=True):
        assert [layer.rows[row] for row in GOOD] == [before.rows[row] for row in GOOD]
        one = layer.rows[BAD]
        assert (one.layer_class, one.rate, one.vision_score) == ("non-finite", 1.0, 0.0)
        assert one.kept == [one.vision_tokens] * len(one.kept)
    assert strict(report.to_json())
    assert PruneReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "idefics3", "gemma3"])
def test_other_rows_are_answered_in_the_dtypes_of_users(family: str, dtype: torch.dtype) -> None:
    """Here torch's fused attention makes 0 of NaN on a CPU, so that nothing of a bad row need show in its answer."""
    model = tiny_model(family, dtype)
    rows = TINY[family].rows(model, ROWS)
    expected, whole = pruned(model, collate(rows), SETTINGS)
    rows[BAD]["pixel_values"] = torch.full_like(rows[BAD]["pixel_values"], NAN)
    found, report = pruned(model, collate(rows), SETTINGS)
    for layer, before in zip(report.prompts[0].layers, whole.prompts[0].layers, strict=True):
        assert layer.rows[BAD].layer_class == "non-finite"
        for row in GOOD:
            assert layer.rows[row].kept_positions == before.rows[row].kept_positions
    assert torch.stack(found.logits)[:, GOOD].isfinite().all()
    assert torch.equal(found.sequences[GOOD, :-3], expected.sequences[GOOD, :-3])  # the token after the prompt


METHODS: dict[str, dict[str, Any]] = {
    "plphp": {},
    "plphp, target": {"method": "plphp", "target_retention": 0.4},
    "plphp, per image": {"method": "plphp", "image_quota": "per_image"},
    "plphp, max": {"method": "plphp", "gqa_reduction": "max"},
    "plphp, exempt": {"method": "plphp", "exempt_layers": (0,)},
    **{name: {"method": name} for name in ("shared", "uniform", "random", "value_norm", "none")},
    **{name: {"method": name} for name in ("snapkv", "snapkv_vision", "pyramidkv", "vl_cache", "zipvl", "vtw")},
    "zipvl, tau": {"method": "zipvl", "options": {"tau": 0.5}, "retention_rate": PLPHPConfig.retention_rate},
    "fastv": {"method": "fastv", "options": {"layer": 1}},
    "recall_rank": {"method": "recall_rank", "options": {"value_norm": 1, "floor": 0.2, "random_share": 0.2}},
    "recall_rank, target": {
        "method": "recall_rank", "options": {"layers": "vision_attention"}, "target_retention": 0.4,
    },
    **{name: {"method": name} for name in ("adakv", "tgv_kv", "mixkv", "expected_attention", "prompt_queries")},
    "query_bank": {"method": "query_bank"},
}  # fmt: skip


def settings_of(name: str, tmp_path: Path) -> PLPHPConfig:
    given = dict(METHODS[name])
    if name == "query_bank":
        bank("llava").save(tmp_path / "bank.safetensors")
        given["options"] = {"bank": str(tmp_path / "bank.safetensors"), "random_share": 0.25}
    takes_a_rate = name != "none" and "target_retention" not in given
    return PLPHPConfig(**{**({"retention_rate": 0.5} if takes_a_rate else {}), **given})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_bad_row_and_prunes_the_others(method: str, tmp_path: Path) -> None:
    model, settings = tiny_model("llava", torch.float64), settings_of(method, tmp_path)
    expected, whole = pruned(model, inputs_of("llava"), settings)
    inputs = inputs_of("llava", NAN)
    found, report = pruned(model, inputs, settings)
    assert_others_are_answered(found, expected, generate(model, inputs))
    for layer, before in zip(report.prompts[0].layers, whole.prompts[0].layers, strict=True):
        for row in GOOD:
            # Beside a bad row that keeps all its tokens the last bits of a score in float32 may differ.
            assert layer.rows[row].vision_score == pytest.approx(before.rows[row].vision_score, abs=1e-6)
            assert replace(layer.rows[row], vision_score=0.0) == replace(before.rows[row], vision_score=0.0)
        assert (layer.rows[BAD].layer_class, layer.rows[BAD].rate) == ("non-finite", 1.0)
        assert layer.rows[BAD].kept == [layer.rows[BAD].vision_tokens] * 2
        assert not any(layer.rows[BAD].evicted_text)


@contextmanager
def row_changed(module: torch.nn.Module, change: Any, steps: bool = False) -> Iterator[None]:
    """Change what a module gives for one row of a prompt, and of the steps behind it."""

    def hook(_: Any, __: Any, output: Tensor) -> Tensor | None:
        if output.shape[1] == 1 and not steps:
            return None
        output = output.clone()
        output[BAD] = change(output[BAD])
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("target", [None, 0.4], ids=["thresholds", "target"])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_a_layer_in_the_middle(projection: str, target: float | None, caplog: pytest.LogCaptureFixture) -> None:
    """The layers before it are pruned for the bad row as for any other; NaN in values shows in the layer behind."""
    model, inputs = tiny_model("llava", torch.float64), inputs_of("llava")
    settings = PLPHPConfig(retention_rate=0.4, target_retention=target)
    expected, whole = pruned(model, inputs, settings)
    attention = model.get_decoder().layers[1].self_attn
    with row_changed(getattr(attention, projection), lambda one: one * NAN):
        stock = generate(model, inputs)
        found, report = pruned(model, inputs, settings)
    assert_others_are_answered(found, expected, stock)
    first = 2 if projection == "v_proj" else 1
    for layer, before in zip(report.prompts[0].layers, whole.prompts[0].layers, strict=True):
        assert [layer.rows[row] for row in GOOD] == [before.rows[row] for row in GOOD]
        assert (layer.rows[BAD].layer_class == "non-finite") == (layer.layer >= first)
        if layer.layer < first and target is None:
            assert layer.rows[BAD] == before.rows[BAD]
    (told,) = [record.getMessage() for record in caplog.records if record.name == "plphp"]
    assert f"row 1 is NaN or inf from layer {first} on" in told
    assert "pixel_values is finite, so look for NaN in the model's weights" in told


def test_one_layer_alone() -> None:
    """Norms of values that no float32 holds; the layers behind are ranked again."""
    model, inputs = tiny_model("llava", torch.float64), inputs_of("llava")
    settings = PLPHPConfig(method="value_norm", retention_rate=0.4)
    _, whole = pruned(model, inputs, settings)
    attention = model.get_decoder().layers[1].self_attn
    with (
        row_changed(attention.v_proj, lambda one: one * 1e60, steps=True),
        row_changed(attention.o_proj, lambda one: one * 1e-60, steps=True),
    ):
        found, report = pruned(model, inputs, settings)
    assert torch.stack(found.logits).isfinite().all()
    classes = [layer.rows[BAD].layer_class for layer in report.prompts[0].layers]
    assert classes == ["uniform", "non-finite", "uniform"]
    for layer, before in zip(report.prompts[0].layers, whole.prompts[0].layers, strict=True):
        assert [layer.rows[row] for row in GOOD] == [before.rows[row] for row in GOOD]


@pytest.mark.parametrize("method", ["fastv", "vtw"])
def test_a_row_that_turns_bad_after_its_tokens_have_left(method: str) -> None:
    model, inputs = tiny_model("llava", torch.float64), inputs_of("llava")
    settings = PLPHPConfig(method=method, retention_rate=0.5, options={"layer": 1} if method == "fastv" else {})
    expected, whole = pruned(model, inputs, settings)
    with row_changed(model.get_decoder().layers[2].self_attn.k_proj, lambda one: one * NAN):
        found, report = pruned(model, inputs, settings)
    assert torch.equal(found.sequences[GOOD], expected.sequences[GOOD])
    last, before = report.prompts[0].layers[2].rows, whole.prompts[0].layers[2].rows
    assert (last[BAD].layer_class, last[BAD].rate) == ("non-finite", before[BAD].rate)
    assert last[BAD].kept_positions == before[BAD].kept_positions


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_single_prompt_is_refused_before_it_is_read(bad: float) -> None:
    model = tiny_model("llava", torch.float64)
    (inputs,) = TINY["llava"].rows(model, (1,))
    good = {name: value.clone() for name, value in inputs.items()}
    inputs["pixel_values"][0, 0, 3, 3] = bad
    expected, _ = pruned(model, good, SETTINGS)
    kind = "NaN" if bad != bad else "inf"
    message = rf"pixel_values holds {kind} in row 0, the only row, .* Nothing was read\."
    with plphp.prune(model, SETTINGS) as run:
        with pytest.raises(NonFiniteAttentionError, match=message):
            generate(model, inputs)
        assert_same_generation(generate(model, good), expected)
    assert run.report.prompts
    with pytest.raises(NonFiniteAttentionError, match=message):
        PrunedCache.for_inputs(model, inputs, SETTINGS)
    with pytest.raises(NonFiniteAttentionError, match=message):
        plphp.branch(model, inputs, [SETTINGS])
    assert "_plphp_attachment" not in model.__dict__


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "internvl", "qwen3.5"])
def test_a_chat_outlives_a_bad_image(family: str) -> None:
    model = tiny_model(family, torch.float64)
    inputs = TINY[family].inputs(model, (1,))

    def first() -> tuple[PrunedCache, dict[str, Any]]:
        cache = PrunedCache.for_inputs(model, inputs, SETTINGS)
        answer = generate(model, inputs, **passed(cache))
        return cache, TINY[family].second_turn(model, inputs, answer.sequences, with_image=True)

    cache, second = first()
    expected = generate(model, second, **passed(cache))
    cache, _ = first()
    with pytest.raises(NonFiniteAttentionError, match="pixel_values holds NaN"):
        generate(model, {**second, "pixel_values": second["pixel_values"] * NAN}, **passed(cache))
    found = generate(model, second, **passed(cache))
    assert_same_generation(found, expected)


def test_images_as_a_list_and_masks_are_told_apart() -> None:
    inputs = {
        "input_ids": torch.ones(1, 2),
        "pixel_values": [torch.ones(2), torch.tensor([1.0, INF])],
        "attention_mask": torch.tensor([[-INF, 0.0]]),
        "image_sizes": torch.ones(1, 2).long(),
        "note": "text",
    }
    assert damage(features_of(inputs)) == "pixel_values holds inf"
    assert damage(features_of({**inputs, "pixel_values": torch.full((9,), 3e38)})) is None  # their sum is inf


def test_no_row_is_left(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llava", torch.float64)
    inputs = inputs_of("llava")
    inputs["pixel_values"] *= NAN
    with pytest.raises(
        NonFiniteAttentionError, match=r"layer 0 is NaN or inf in rows 0, 1, 2, .*: pixel_values holds NaN: look at how"
    ):
        pruned(model, inputs, SETTINGS)
    assert not caplog.records


def test_a_row_of_text_is_answered_beside_a_bad_one() -> None:
    model = tiny_model("llava", torch.float64)
    rows = (0, 1)
    expected, _ = pruned(model, inputs_of("llava", rows=rows), SETTINGS)
    found, report = pruned(model, inputs_of("llava", NAN, rows=rows), SETTINGS)
    assert torch.equal(found.sequences[0], expected.sequences[0])
    assert [row.layer_class for row in report.prompts[0].layers[0].rows] == ["no-vision", "non-finite"]


def test_text_that_is_not_finite_is_no_matter_of_pruning(caplog: pytest.LogCaptureFixture) -> None:
    """A row without images has nothing to rank."""
    model, inputs = tiny_model("llava", torch.float64), inputs_of("llava", rows=(1, 0))
    expected, _ = pruned(model, inputs, SETTINGS)
    with row_changed(model.get_input_embeddings(), lambda one: one * NAN):
        found, report = pruned(model, inputs, SETTINGS)
    assert torch.equal(found.sequences[0], expected.sequences[0])
    assert report.prompts[0].layers[0].rows[1].layer_class == "no-vision"
    assert not caplog.records


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_name_the_row_of_the_prompt(how: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llava", torch.float64)
    expected, _ = pruned(model, inputs_of("llava"), SETTINGS, **how)
    found, report = pruned(model, inputs_of("llava", NAN), SETTINGS, **how)
    copies = how.get("num_return_sequences", 1)
    for row in GOOD:
        own = slice(row * copies, (row + 1) * copies)
        assert torch.equal(found.sequences[own], expected.sequences[own])
    beams = how["num_beams"]
    classes = [row.layer_class for row in report.prompts[0].layers[0].rows]
    assert [row for row, name in enumerate(classes) if name == "non-finite"] == [beams + beam for beam in range(beams)]
    (told,) = [record.getMessage() for record in caplog.records if record.name == "plphp"]
    assert "The attention of row 1 is" in told


@pytest.mark.skipif(not TINY["llava"].stock.chunked_prefill, reason="transformers drops the images")
@pytest.mark.parametrize("line", ["plphp", "zipvl:attention=dense"])
def test_a_prompt_in_chunks(line: str) -> None:
    model, settings = tiny_model("llava", torch.float64), PLPHPConfig.parse(line)
    expected, _ = pruned(model, inputs_of("llava"), settings, prefill_chunk_size=9)
    found, report = pruned(model, inputs_of("llava", NAN), settings, prefill_chunk_size=9)
    assert torch.equal(found.sequences[GOOD], expected.sequences[GOOD])
    assert {layer.rows[BAD].layer_class for layer in report.prompts[0].layers} == {"non-finite"}


def test_tables_and_plots_show_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from plphp.show.plots import plot_vision_attention

    _, report = pruned(tiny_model("llava", torch.float64), inputs_of("llava", NAN), SETTINGS)
    console = Console(record=True, width=100)
    console.print(layer_table(report, 0, BAD))
    assert "non-finite" in console.export_text()
    figure = plot_vision_attention(report, row=BAD)
    assert "non-finite" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_replayed_step_is_compared_beside_a_bad_row() -> None:
    expected = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0))
    expected[BAD] = NAN
    assert _difference(expected.clone(), expected) == 0
    wrong = expected.clone()
    wrong[2, 0, 4] += 1
    assert _difference(wrong, expected) > 0.1
    wrong[BAD] = 0
    assert _difference(wrong, expected) == INF


def test_a_bank_with_nan_is_refused(tmp_path: Path) -> None:
    found = bank("llava")
    layer = found.layers[0]
    broken = plphp.QueryBank({0: type(layer)(layer.queries * NAN, layer.rotation)}, found.ahead, found.record)
    broken.save(tmp_path / "bank.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["bank.safetensors"]
    with pytest.raises(plphp.ConfigError, match=re.escape("bank.safetensors is broken (ValueError('it holds NaN")):
        plphp.QueryBank.load(tmp_path / "bank.safetensors")
