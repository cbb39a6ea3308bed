# SPDX-License-Identifier: Apache-2.0
"""Tiers in the life of a cache: branches, copies, crops, other dtypes, gradients, bad rows, and errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import plphp
from invariants import assert_same_generation, generate, live_bytes, pruned, tensors_of
from plphp import CacheStateError, ConfigError, PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf.cache_argument import passed
from plphp.kernels.coded_bytes import tier_nbytes
from plphp.pruning import too_large
from precision import assert_exact
from test_tier_invariants import CHOSEN, MIXED, RECALL, held, settings
from tier_reference import books_file, entries_replaced, noting_what_is_held
from tiny_models import TIERS, TINY, collate, drop_empty, tiers_model, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

DRAFT = torch.tensor([[5, 17, 60, 33, 9]])
BRANCHES = (
    "quantized:tiers=c3",
    "quantized:tiers=kivi2",
    MIXED,
    RECALL,
    f"{RECALL},rest=false",
    'random:tiers="kivi4=.5,r2=.3",read=.4',
    "random:tiers=whole=.3",
    CHOSEN,
    "plphp:retention_rate=.3",
    "none",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("books")


def read(model: Any, inputs: dict[str, Any], config: PLPHPConfig) -> PrunedCache:
    """A cache that has read a prompt."""
    cache = PrunedCache.for_inputs(model, inputs, config)
    with torch.no_grad():
        model(**inputs, **passed(cache))
    return cache


def drafted(model: Any, cache: Any, rows: int = 1) -> Tensor:
    """Logits of an answer that is given."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=DRAFT.expand(rows, -1), **passed(cache)).logits
    return logits


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2-vl"])
def test_rows_of_a_branch_are_ordinary_runs(family: str, folder: Path) -> None:
    model = tiers_model(family)
    inputs = TIERS[family].inputs(model, [2])
    lines = [*BRANCHES, "fastv:layer=1,retention_rate=0.6+quantized:tiers=r3"] if family == "llava" else BRANCHES
    configs = [settings(line, folder, family) for line in lines]
    branches = plphp.branch(model, inputs, configs)
    together = drafted(model, branches.cache, len(configs))
    for row, config in enumerate(configs):
        cache = read(model, inputs, config)
        assert_exact(together[row], drafted(model, cache)[0])
        for many, few in zip(branches.cache.layers, cache.layers, strict=True):
            nbytes = [
                sum(
                    tier_nbytes(tier, block.rows[number])
                    for block in getattr(layer, "coded", ())
                    for tier in block.tiers
                )
                for number, layer in ((row, many), (0, few))
            ]
            assert nbytes[0] == nbytes[1]
        assert branches.vision_kept[row] == pytest.approx(cache.report().retention)


@pytest.mark.parametrize("line", ["quantized", "fastv:layer=1,retention_rate=0.6+quantized", "none"])
def test_a_report_names_the_ladder_that_a_method_has_of_its_own(line: str) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2])
    config = read(model, inputs, PLPHPConfig.parse(line)).report().config
    assert config["tiers"] == ("c3" if "quantized" in line else None)
    assert [part["tiers"] for part in config["earlier"]] == [None] * line.count("+")


@pytest.mark.parametrize("method", ["plphp", "shared", "recall_rank:floor=0,layers=vision_attention"])
def test_layer_classes_hold_as_much_as_the_same_rate_everywhere(method: str) -> None:
    """The ladder is the mean over the layers, in the report, in bytes, and in a branch."""
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2])
    tiers = 'tiers="r3=.3,r1=.3"'
    config = PLPHPConfig.parse(f"{method}{',' if ':' in method else ':'}{tiers}")
    report = read(model, inputs, config).report()
    even = read(model, inputs, PLPHPConfig.parse(f"uniform:{tiers}")).report()
    tokens = report.prompts[0].layers[0].rows[0].vision_tokens
    assert report.retention == pytest.approx(even.retention, abs=0.5 / tokens)
    assert report.kv_bytes == pytest.approx(even.kv_bytes, rel=0.02)
    rates = {layer.rows[0].rate for layer in report.prompts[0].layers}
    assert len(rates) > 1
    [branch] = plphp.branch(model, inputs, [config]).vision_kept
    assert branch == pytest.approx(report.retention)


def test_a_copy_goes_on_by_itself(folder: Path) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2])
    cache = read(model, inputs, settings(MIXED, folder, "llava"))
    copied = copy.deepcopy(cache)
    assert copied.layers[0].coded[0].books is cache.layers[0].coded[0].books
    first = drafted(model, copied)
    assert torch.equal(drafted(model, cache), first)


def test_tokens_behind_a_prompt_are_taken_back(folder: Path) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2])
    cache = read(model, inputs, settings(MIXED, folder, "llava"))
    first = drafted(model, cache)
    cache.crop(-DRAFT.shape[1])
    assert_exact(drafted(model, cache), first)
    with pytest.raises(UnsupportedFeatureError, match="only the 5 seen after"):
        cache.crop(-6)


def test_rows_are_selected_with_their_codes(folder: Path) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2, 1, 0])
    order = torch.tensor([1, 2, 0, 1])
    padding = torch.cat([inputs["attention_mask"], torch.ones(3, DRAFT.shape[1], dtype=torch.long)], 1)
    logits = []
    for rows in (torch.arange(3), order):
        cache = read(model, inputs, settings(MIXED, folder, "llava"))
        cache.reorder_cache(rows)
        drafts = DRAFT.expand(len(rows), -1)
        with torch.no_grad():
            logits.append(model(input_ids=drafts, attention_mask=padding[rows], **passed(cache)).logits)
    assert_exact(logits[1], logits[0][order])


def test_rows_that_hold_nothing_in_few_bits_stay_alone(folder: Path) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2, 0])
    padding = torch.cat([inputs["attention_mask"], torch.ones(2, DRAFT.shape[1], dtype=torch.long)], 1)
    logits = []
    for rows in ([0, 1], [1], [1, 1]):
        cache = read(model, inputs, settings(RECALL, folder, "llava"))
        cache.batch_select_indices(torch.tensor(rows))
        assert all(bool(layer.coded) == (0 in rows) for layer in cache.layers)
        with torch.no_grad():
            drafts = DRAFT.expand(len(rows), -1)
            logits.append(model(input_ids=drafts, attention_mask=padding[rows], **passed(cache)).logits)
    for alone in (*logits[1], *logits[2]):
        assert_exact(alone, logits[0][1])


@pytest.mark.own_dtype
def test_rows_are_branched_and_selected_under_autocast(folder: Path) -> None:
    model = tiers_model("llava", torch.float32)
    inputs = TIERS["llava"].inputs(model, [2])
    configs = [settings(line, folder, "llava") for line in (MIXED, "quantized:tiers=r3", "none", RECALL)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branches = plphp.branch(model, inputs, configs).cache
        for row, config in enumerate(configs):
            alone = read(model, inputs, config)
            for many, few in zip(branches.layers, alone.layers, strict=True):
                found = [block.select([row]) for block in many.coded]
                found = [tier for block in found for tier in block.decoded(torch.float64) if len(tier.keys)]
                expected = [tier for block in few.coded for tier in block.decoded(torch.float64)]
                assert {tier.counts for tier in found} == {tier.counts for tier in expected}
                sums = [
                    sum(float(tier.keys.sum() + tier.values.sum()) for tier in tiers) for tiers in (found, expected)
                ]
                assert sums[0] == pytest.approx(sums[1], rel=1e-12)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_prompts_that_are_read_in_any_mode_are_answered_in_any(mode: Any, folder: Path) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2])
    config = settings(RECALL, folder, "llava")
    expected = drafted(model, read(model, inputs, config))
    cache = PrunedCache.for_inputs(model, inputs, config)
    with mode():
        model(**inputs, **passed(cache))
    for block in (block for layer in cache.layers for block in layer.coded):
        assert not any(tensor.requires_grad for tensor in tensors_of(block))
    if mode is torch.inference_mode:  # torch lets no gradient pass by what was made under it, stock caches included
        assert_exact(drafted(model, cache), expected)
        return
    logits = model(input_ids=DRAFT, **passed(cache)).logits
    assert_exact(logits.detach(), expected)
    logits.square().sum().backward()  # what is held is no part of the graph, and the new queries are
    gradient = model.get_input_embeddings().weight.grad
    assert bool(gradient.isfinite().all())
    assert bool(gradient[DRAFT[0]].any())
    model.zero_grad()


@pytest.mark.own_dtype
@pytest.mark.parametrize("line", ["quantized:tiers=r2", MIXED, RECALL], ids=["r2", "mixed", "recall"])
@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_in_the_dtypes_of_users(kind: str, line: str, folder: Path) -> None:
    """No further from the replaced cache than stock attention is from the naive one of float64."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = tiers_model("llava", dtype)
    inputs = TIERS["llava"].inputs(model, [2])

    def stock() -> Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**inputs, **passed(cache))
        return drafted(model, cache).double()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"), noting_what_is_held() as notes:
        config = settings(line, folder, "llava")
        cache = read(model, inputs, config)
        found = drafted(model, cache).double()
        full = stock()
        with entries_replaced(model, cache, []):
            noise = (stock() - full).square().mean().sqrt()
        with entries_replaced(model, cache, notes):
            expected = stock()
    error, effect = ((found - other).square().mean().sqrt() for other in (expected, full))
    assert error < 3 * noise + 1e-6
    assert effect > 5 * error


def test_a_row_that_is_not_finite_is_whole_beside_codes(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    model = tiers_model("llava")
    rows = TIERS["llava"]._rows(model, (1, 1, 2), (5, 7), 0, video=False)
    config = settings(MIXED, folder, "llava")
    expected, _, _ = held(model, drop_empty(collate(rows)), config)
    rows[1]["pixel_values"] = torch.full_like(rows[1]["pixel_values"], torch.nan)
    found, cache, notes = held(model, drop_empty(collate(rows)), config)
    assert "The attention of row 1 is NaN or inf" in caplog.text
    for row in (0, 2):
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert_exact(ours[row], theirs[row])
    assert not any(bool(note.coded[1].any()) for note in notes)
    assert all(sum(block.held[1]) == 0 for layer in cache.layers for block in layer.coded)


@contextmanager
def factor_on_values(model: Any, factor: float) -> Iterator[None]:
    """Multiply the values of layer 1 of a prompt's row 1 in KV head 0."""

    def changed(_: Any, __: Any, output: Tensor) -> Tensor:
        if output.shape[1] > 1:
            output = output.clone()
            output[1, :, :8] *= factor
        return output

    hook = model.model.language_model.layers[1].self_attn.v_proj.register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("line", ["quantized:tiers=kivi4", "quantized:tiers=c3", MIXED, f"{RECALL},rest=true"])
def test_a_head_that_is_too_large_for_scales_is_whole_beside_codes(
    line: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2, 1, 1])
    config = settings(line, folder, "llava")
    usual, _, of_usual = held(model, inputs, config)
    too_large._warn_once.cache_clear()
    with factor_on_values(model, 1e6):
        found, cache, notes = held(model, inputs, config)
        with entries_replaced(model, cache, notes):
            expected = generate(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs, before in zip(found.logits, expected.logits, usual.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)
        assert_exact(ours[[0, 2]], before[[0, 2]])
    for number, (note, before) in enumerate(zip(notes, of_usual, strict=True)):
        same = torch.ones_like(note.coded[:, :, :1])
        same[1] = number == 0  # what comes behind layer 1 is of other entries, and as many of them
        assert torch.equal(note.placement.where(same, 0), before.placement.where(same, 0))
        assert torch.equal(note.coded.any(-1), before.coded.any(-1)) == (number != 1)
    assert before.coded[1, 0].any()
    assert not notes[1].coded[1, 0].any()
    assert notes[1].coded[1, 1].any()
    assert torch.equal(notes[1].dropped[1, 0], of_usual[1].dropped[1, 0])
    assert cache.report().kv_bytes == live_bytes(cache)
    told = [record.getMessage() for record in caplog.records if record.name == "plphp"]
    assert len([text for text in told if "layer 1 are beyond 65,504 in KV head(s) 0" in text]) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    """They are not too large: the answer would not be one."""
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2, 1, 1])
    config = PLPHPConfig.parse("quantized:tiers=c3")
    with factor_on_values(model, bad), pytest.raises(UnsupportedFeatureError, match="are NaN or beyond 65,504"):
        pruned(model, inputs, config)


def test_an_error_while_encoding_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiers_model("llava"), TIERS["llava"].inputs(tiers_model("llava"), [2])
    before = generate(model, inputs)
    attributes = set(model.__dict__), model.config.get_text_config()._attn_implementation
    config = PLPHPConfig.parse("quantized:tiers=r3")
    cache = PrunedCache.for_inputs(model, inputs, config)

    def fail(*_: Any) -> Any:
        raise UnsupportedFeatureError("too large for float16")

    with monkeypatch.context() as patch:
        patch.setattr("plphp.kernels.centred.Centred._rotated", fail)
        with pytest.raises(UnsupportedFeatureError, match="Too large for float16; this PrunedCache"):
            generate(model, inputs, **passed(cache))
        with (
            pytest.raises(UnsupportedFeatureError, match="Too large for float16; this PrunedCache"),
            plphp.prune(model, config),
        ):
            generate(model, inputs)
    with pytest.raises(CacheStateError, match=r"cannot be used any more: [Tt]oo large for float16"):
        cache.plan(inputs)
    assert cache.nbytes == 0
    del cache
    assert (set(model.__dict__), model.config.get_text_config()._attn_implementation) == attributes
    assert_same_generation(generate(model, inputs), before)
    pruned(model, inputs, config)


def test_what_tiers_cannot_hold_is_refused_before_anything_is_wrong(folder: Path) -> None:
    narrow = tiny_model("llava")  # heads of 12 channels
    with pytest.raises(UnsupportedFeatureError, match="multiple of 8, and this model has 12: take the method 'none'"):
        plphp.PrunedCache.for_inputs(narrow, TINY["llava"].inputs(narrow, [1]), PLPHPConfig.parse("quantized:tiers=c3"))
    model = tiers_model("gemma4")  # of as many layers as gemma3, with wider heads
    foreign = PLPHPConfig(method="quantized", tiers="pq", books=books_file(folder, "gemma3"))
    with pytest.raises(
        ConfigError, match=r"codebooks are of 2 KV heads with keys of 8 and values of 8 .* has 2 with 16"
    ):
        pruned(model, TIERS["gemma4"].inputs(model, [1]), foreign)
    for layer in plphp.branch(model, TIERS["gemma4"].inputs(model, [1]), [PLPHPConfig(method="none")]).cache.layers:
        assert getattr(layer, "coded", ()) == ()
