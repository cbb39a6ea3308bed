# SPDX-License-Identifier: Apache-2.0
"""Bytes that a report claims of tiers are those of the live tensors, however rows came to be."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import plphp
from invariants import generate
from plphp import PLPHPConfig, PrunedCache, PruneReport
from plphp.engines.hf import foreign_banks
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.layer import PrunedLayer
from plphp.kernels.books import Books, LayerBooks
from plphp.kernels.coded import CodedKV
from plphp.kernels.coded_bytes import read_nbytes, row_nbytes
from plphp.kernels.rungs import RUNGS
from plphp.policy import bank as banks
from plphp.pruning import coders
from plphp.show.tables import report_values, summary
from precision import working_dtype
from tiny_models import TINY

DIM, KV_HEADS = 16, 2
LADDERS = [*RUNGS, "whole=.2,pr2=.2,rvq=.2,c3=.2", "kivi2=.3,r1=.3"]
CASES = ("padded batch", "beams", "returned sequences", "turns", "copy", "some rows")


def _config() -> Any:
    config = TINY["llava"].config()
    config.text_config.head_dim = DIM
    return config


FAMILY = dataclasses.replace(TINY["llava"], config=_config)


@functools.cache
def _model(dtype: torch.dtype) -> Any:
    return FAMILY.build(dtype=dtype)


@functools.cache
def _books(layer: int) -> LayerBooks:
    generator = torch.Generator().manual_seed(layer)

    def side() -> Books:
        shapes = [(KV_HEADS, DIM // 8, 256, 8), (KV_HEADS, DIM // 8, 256, 8), (KV_HEADS, DIM // 16, 256, 16)]
        return Books(*(torch.randn(shape, generator=generator).half() for shape in shapes))

    return LayerBooks(side(), side())


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, with codebooks for all of its layers under the name of any file."""
    model = _model(working_dtype())
    layers = model.config.get_text_config().num_hidden_layers
    books = {layer: _books(layer) for layer in range(layers)}
    bank = SimpleNamespace(decoder_layers=layers, books=books, values_hash="")
    for module in (banks, coders, foreign_banks):
        monkeypatch.setattr(module, "bank_at", lambda name: bank)
    return model


def settings(ladder: str, **more: Any) -> PLPHPConfig:
    return PLPHPConfig(
        method="uniform", tiers=ladder, books="any.safetensors" if "p" in ladder or "rvq" in ladder else None, **more
    )


def made(case: str, model: Any, config: PLPHPConfig) -> Iterator[PrunedCache]:
    """Caches after an answer."""
    inputs = FAMILY.inputs(model, [1, 1] if case == "turns" else [2, 0, 1])
    cache = PrunedCache.for_inputs(model, inputs, config)
    how = {"beams": {"num_beams": 3}, "returned sequences": {"do_sample": True, "num_return_sequences": 2}}
    first = generate(model, inputs, **passed(cache), **how.get(case, {}))
    if case == "turns":
        generate(model, FAMILY.second_turn(model, inputs, first.sequences, with_image=True), **passed(cache))
    if case == "some rows":
        cache.batch_select_indices(torch.tensor([2, 0, 2]))
    if case == "copy":
        yield copy.deepcopy(cache)
    yield cache


def tensors(item: Any) -> Iterator[Tensor]:
    """All tensors of a block but those of codebooks, found without asking for bytes."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, tuple):
        for part in item:
            yield from tensors(part)
    elif dataclasses.is_dataclass(item) and not isinstance(item, LayerBooks):
        for field in dataclasses.fields(item):
            yield from tensors(getattr(item, field.name))


def nbytes(item: Any) -> int:
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors(item)}.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ladder", LADDERS)
def test_bytes_are_those_of_the_live_tensors(ladder: str, case: str, model: Any) -> None:
    for cache in made(case, model, settings(ladder)):
        report = cache.report()
        assert [own.layer for own in report.held] == list(range(len(cache.layers)))
        for layer, own in zip(cache.layers, report.held, strict=True):
            assert isinstance(layer, PrunedLayer)
            blocks: tuple[CodedKV, ...] = layer.coded
            codes = [side for block in blocks for tier in block.tiers for side in (tier.keys, tier.values)]
            means = [mean for block in blocks for mean in (block.key_means, block.value_means) if mean is not None]
            assert own.means == sum(mean.nbytes for mean in means)
            assert sum(rung.codes for rung in own.rungs) == nbytes(tuple(side.streams for side in codes))
            assert sum(rung.scales for rung in own.rungs) == nbytes(tuple(side.scales for side in codes))
            assert sum(rung.groups for rung in own.rungs) == nbytes(tuple(side.groups for side in codes))
            assert own.coded == nbytes(blocks)
            assert own.whole == nbytes(layer.prefix)
            assert (
                own.tail + own.reserved
                == layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
            )
            assert own.tail == sum(states.numel() * states.element_size() for states in layer.tail())
            assert own.nbytes == own.whole + own.tail + own.reserved + own.coded
            for rung in own.rungs:
                tiers = [tier for block in blocks for tier in block.tiers if tier.rung.name == rung.rung]
                for head, entries in enumerate(rung.entries):
                    assert entries == sum(row[head] for tier in tiers for row in tier.counts)
        assert sum(own.nbytes for own in report.held) == report.kv_bytes
        assert report.device_bytes == {"cpu": report.kv_bytes}
        assert PruneReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("ladder", LADDERS)
def test_rows_and_heads_say_what_was_placed(ladder: str, model: Any) -> None:
    """By row and head, from positions alone; with the means that a row needs they are what is held for it."""
    for cache in made("padded batch", model, settings(ladder)):
        (prompt,) = cache.report().prompts
        for number, layer in enumerate(cache.layers):
            (block,) = layer.coded
            rows = prompt.layers[number].rows
            for row, own in enumerate(rows):
                tiers = {tier.rung: tier for tier in own.tiers}
                for tier in block.tiers:
                    claimed = tiers.get(tier.rung.name)
                    counts = [0] * KV_HEADS if claimed is None else claimed.entries
                    assert counts == list(tier.counts[row])
                for head, kept in enumerate(own.kept_positions):
                    coded = [position for tier in own.tiers for position in tier.positions[head]]
                    assert len(set(coded)) == len(coded) == len(kept) - own.whole[head]
                    assert set(coded) <= set(kept)
                read = read_nbytes(block, row)
                assert own.vision_bytes == read + own.entry_bytes * sum(own.whole)
                assert own.entry_bytes * own.vision_tokens * KV_HEADS * own.vision_held == pytest.approx(
                    own.vision_bytes
                )
            by_rung = {tier.rung.name: tier.nbytes for tier in block.tiers}
            for name, live in by_rung.items():
                assert live == sum(sum(tier.nbytes) for own in rows for tier in own.tiers if tier.rung == name)


def test_what_a_step_reads(model: Any) -> None:
    """All of it without recall, by every row; with recall what it asks for."""
    full, recalled = (
        next(made("padded batch", model, settings("pr2=.3,c4", read=read))).report() for read in (1.0, 0.25)
    )
    assert full.read_bytes <= full.entry_bytes  # a row without images needs no means
    assert full.read_bytes > full.entry_bytes - sum(layer.means for layer in full.held)
    assert recalled.read_bytes < full.read_bytes
    assert recalled.entry_bytes >= full.entry_bytes
    assert "a step reads at most" in summary(recalled)
    assert "a step reads" not in summary(full)
    shared = next(made("some rows", model, settings("r2"))).report()
    assert shared.read_bytes > shared.entry_bytes  # two rows read what is held once


def test_codebooks_are_counted_apart(model: Any) -> None:
    with_books, without = (next(made("beams", model, settings(ladder))).report() for ladder in ("pq", "r1"))
    assert without.book_bytes == 0
    assert with_books.book_bytes == len(with_books.held) * 2 * KV_HEADS * DIM * 256 * 2 * 3


def test_branches_report_every_row_by_itself(model: Any) -> None:
    inputs = FAMILY.inputs(model, [1])
    ladders = ("kivi2=.5", "pq=.2,r2=.4", "c3", "whole=.2,kivi2")
    lines = [settings(ladder) for ladder in ladders]
    lines[1:1] = [PLPHPConfig(retention_rate=0.3)]
    lines[3:3] = [dataclasses.replace(settings("r3=.5"), method="plphp")]
    cache = plphp.branch(model, inputs, lines).cache
    together = cache.report()
    assert sum(own.nbytes for own in together.held) == together.kv_bytes
    for row, config in enumerate(lines):
        alone = PrunedCache.for_inputs(model, inputs, config)
        with torch.no_grad():
            model(**inputs, **passed(alone))
        for many, few in zip(together.prompts[0].layers, alone.report().prompts[0].layers, strict=True):
            own, layer = many.rows[row], cache.layers[many.layer]
            assert own == few.rows[0]
            coded = sum(row_nbytes(block, row) for block in layer.coded)
            assert own.vision_bytes - own.entry_bytes * sum(own.whole) == coded


def test_what_is_shown(model: Any) -> None:
    report = next(made("padded batch", model, settings("pq=.2,r2=.4")))
    shown = report.report()
    assert f"in {shown.vision_held:.1%} of their bytes (pq, r2)" in summary(shown)
    values = report_values(shown)
    assert values["rung_bytes"] == shown.rung_bytes
    assert values["held"][0]["rungs"][1]["rung"] == "r2"
    [tiers] = [values["prompts"][0]["layers"][0]["rows"][0]["tiers"]]
    assert list(tiers) == ["pq", "r2"]


def test_reports_of_earlier_versions(model: Any) -> None:
    """Without bytes of layers and rows they say what they said."""
    report = next(made("beams", model, PLPHPConfig(retention_rate=0.3))).report()
    rows = [
        dataclasses.replace(layer, rows=[dataclasses.replace(row, entry_bytes=0) for row in layer.rows])
        for layer in report.prompts[0].layers
    ]
    old = dataclasses.replace(report, held=[], prompts=[dataclasses.replace(report.prompts[0], layers=rows)])
    assert (old.vision_held, old.read_bytes) == (pytest.approx(report.vision_held), report.entry_bytes)
    assert (old.device_bytes, old.rung_bytes) == ({}, {})
