# SPDX-License-Identifier: Apache-2.0
"""The speed benchmarks run and measure what they say; how fast anything is, is not tested."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import capacity
import conversation
import decode
import end_to_end
import first_token
import measuring
import prefill
import pytest
import ragged
import scaling
import tiers
import torch
from shapes import SMALL, build_model, twin
from test_graph import Recorder

import plphp
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.graph import GraphedDecoding
from precision import assert_exact

CPU = torch.device("cpu")
ENTRY = 3 * 2 * 2 * 16 * 2
"""Bytes of a token in the tiny shape: layers, keys and values, KV heads, dimension, bf16."""


def run(script: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["script", "--shape", "tiny", "--device", "cpu", "--out", str(out), *arguments])
    script.main()
    results: dict[str, Any] = json.loads(out.read_text())
    assert results["versions"]["torch"] == torch.__version__
    return results


def test_decode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--batch", "1", "3", "--vision-tokens", "300", "--retention", "1.0", "0.4", "--steps", "2"]
    results = run(decode, monkeypatch, tmp_path / "tiers.json", *settings, "--tiers", "t10", "t10:read=0.2")["results"]
    rows = {row["variant"]: row for row in results if row["batch"] == 3}
    whole, coded, recalled = (rows[name] for name in ("plphp 1", "t10", "t10, read 20%"))
    assert whole["read_bytes"] == pytest.approx(whole["kv_bytes"], rel=0.05)
    assert recalled["read_bytes"] < coded["read_bytes"] < 0.5 * whole["read_bytes"]
    assert recalled["kv_bytes"] > coded["kv_bytes"]  # the mean values that stand in for the rest
    settings.append("--tiers")
    results = run(decode, monkeypatch, tmp_path / "decode.json", *settings)
    assert [(row["batch"], row["variant"]) for row in results["results"]] == [
        (batch, name) for batch in (1, 3) for name in ("DynamicCache", "plphp 1", "plphp 0.4")
    ]
    for row in results["results"]:
        assert row["seconds"] > 0
        moved = results["step_weight_bytes"] + row["read_bytes"]
        assert row["floor_seconds"] == pytest.approx(moved / results["copy_bandwidth"])
        tail = 16 if row["variant"].startswith("plphp") else 4  # room of the tail, or steps
        tokens = 100 + 300 * (0.4 if row["variant"] == "plphp 0.4" else 1)
        assert row["kv_bytes"] == pytest.approx(row["batch"] * ENTRY * (tokens + tail), rel=0.01)
    assert "x DynamicCache" in capsys.readouterr().out


def test_ragged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--batch", "2", "--vision-tokens", "300", "--steps", "2", "--turns", "1", "--turn-tokens", "5"]
    results = run(ragged, monkeypatch, tmp_path / "ragged.json", *settings)
    works = ["second turn", "scores of a second turn", "attention of a step", "decoding step"]
    assert [(row["retention"], row["work"]) for row in results["results"]] == [
        (rate, work) for rate in (0.25, 0.1, 0.05) for work in works
    ]
    for row in results["results"]:
        assert row["ratio"] == row["ragged_seconds"] / row["equal_seconds"] > 0
        assert row["ragged_kv_bytes"] == row["equal_kv_bytes"]
        # Of two heads none can hold more than twice the mean.
        assert row["largest_head"] == pytest.approx({0.25: 1.5, 0.1: 1.8, 0.05: 1.95}[row["retention"]], abs=0.02)
    assert "Ragged heads" in capsys.readouterr().out


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_ragged_heads_hold_as_many_entries_as_equal_ones(heads: int) -> None:
    equal, other = (ragged.kept(0.1, 4, 9, 3, heads, 400, largest).sum(-1) for largest in (None, 1.8))
    assert (equal == 100 + 40).all()
    assert (other.sum(-1) == equal.sum(-1)).all()
    largest = (other.amax(-1) - 100) / 40
    assert ((largest > 1.7) == (heads > 1)).all()


@pytest.mark.usefixtures("float64")
def test_decode_compares_like_with_like() -> None:
    """With everything kept both caches hold the same entries, so the next token's logits are the same."""
    model = build_model("tiny", torch.float64, CPU)
    tokens = torch.tensor([[5], [6]])
    with torch.inference_mode():
        stock = model(input_ids=tokens, **passed(decode.dynamic_cache(model, 2, 50))).logits
        static = model(input_ids=tokens, **passed(decode.static_cache(model, 2, 50, 9))).logits
        lease = Lease.of(model)
        ours, less = (
            model(input_ids=tokens, **passed(decode.pruned_cache(lease, 2, 50, rate))).logits for rate in (1.0, 0.4)
        )
        lease.end()
    assert_exact(ours, stock)
    assert_exact(static, stock)
    assert (less - stock).abs().max() > 1e-3


def test_decode_with_graphs_and_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does beside, recorded on the CPU and not compiled."""
    recorder = Recorder()
    monkeypatch.setattr(decode, "GraphedDecoding", partial(GraphedDecoding, capture=recorder.capture))
    monkeypatch.setattr(torch, "compile", lambda forward, mode: forward)
    model = build_model("tiny", torch.float32, CPU)
    ours = twin(model)
    lease = Lease.of(ours)
    args = argparse.Namespace(retention=[0.4], steps=3, graphs=True, compiled=True, tiers=[])
    rows = list(decode.measure(model, lease, 2, 300, args))
    lease.end()
    names = ["DynamicCache", "plphp 0.4", "StaticCache, compiled", "plphp 0.4, graph"]
    assert [row["variant"] for row in rows] == names
    assert (recorder.captures, recorder.replays) == (1, 4 + 3 - 1)


def test_graphs_need_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(decode, monkeypatch, tmp_path / "decode.json", "--graphs")
    assert "--graphs needs --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [1.0, 0.6, 0.2])
def test_kept_tokens_differ_between_layers_and_rows(rate: float) -> None:
    counts = torch.stack([decode.kept(rate, layer, 4, 3, 2, 1000).sum(-1) for layer in range(4)]) - 100
    assert counts.float().mean() == pytest.approx(1000 * rate)
    assert torch.equal(counts[..., 0], counts[..., 1])
    assert len(counts[..., 0].unique()) == (1 if rate == 1 else 3)
    assert decode.kept(rate, 0, 3, 1, 2, 1000)[:, :, [*range(50), *range(-50, 0)]].all()


def test_prefill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = ["--batch", "2", "--vision-tokens", "300", "--retention", "0.4", "--rounds", "2", "--tiers"]
    stock, pruned = run(prefill, monkeypatch, tmp_path / "prefill.json", *settings)["results"]
    assert stock["pruning_seconds"] == 0
    parts = [pruned[f"{part}_seconds"] for part in ("scoring", "compaction")]
    assert min(parts) > 0
    assert sum(parts) < pruned["pruning_seconds"]
    assert stock["kv_bytes"] == 2 * 400 * ENTRY
    assert pruned["kv_bytes"] == 2 * (100 + 0.4 * 300) * ENTRY
    assert stock["peak_bytes"] > 2 * 400 * ENTRY


def test_first_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Methods ask for the tower's last layer but one.
    monkeypatch.setattr(first_token, "SO400M", copy.deepcopy(SMALL))
    first_token.SO400M.num_hidden_layers = 2
    settings = ["--vision-tokens", "400", "--rounds", "1"]
    rows = run(first_token, monkeypatch, tmp_path / "first.json", *settings)["results"]
    alone = {row["variant"]: row for row in rows if not row["with_tower"]}
    assert alone["DynamicCache"]["tokens_x_layers"] == 3 * 500
    assert alone["divprune 50%"]["tokens_x_layers"] == alone["encoder_random 50%"]["tokens_x_layers"] == 3 * 300
    assert alone["fastv layer 2, 25% behind it"]["tokens_x_layers"] == 2 * 500 + 200
    assert alone["zipvl 25%"]["tokens_x_layers"] == 3 * 500
    with_tower = {row["variant"]: row for row in rows if row["with_tower"]}
    assert with_tower["DynamicCache"]["vision_tokens"] == 729
    assert with_tower["visionzip 25%"]["tokens_x_layers"] == 3 * (182 + 100)


def test_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = ["--batch", "2", "--images", "1", "--new-tokens", "3", "--retention", "0.4", "0.2", "--rounds", "1"]
    stock, *pruned = run(end_to_end, monkeypatch, tmp_path / "end_to_end.json", *settings)["results"]
    assert [row["variant"] for row in pruned] == ["plphp 0.4", "plphp 0.2"]
    assert stock["kv_bytes"] == 2 * (100 + 729) * ENTRY
    for row, rate in zip(pruned, (0.4, 0.2), strict=True):
        assert row["kv_bytes"] == pytest.approx(2 * (100 + rate * 729) * ENTRY, rel=0.01)
        assert row["total_seconds"] == row["first_token_seconds"] + 2 * row["seconds_per_token"]
        assert row["ratio_total"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process is Linux's")
def test_capacity(tmp_path: Path) -> None:
    """In a process of its own, as its memory is limited."""
    out = tmp_path / "capacity.json"
    command = [sys.executable, capacity.__file__, "--shape", "tiny", "--device", "cpu", "--out", str(out)]
    command += ["--memory", "0.1", "--vision-tokens", "16000", "--retention", "1.0", "0.2", "--tiers", "c3"]
    environment = {**os.environ, "PYTHONPATH": str(Path(plphp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    rows = json.loads(out.read_text())["results"]
    stock, full, less, coded = rows
    assert full["sequence_bytes"] == ENTRY * 16101
    assert less["sequence_bytes"] == ENTRY * 3301
    for row in rows:
        assert 0 < row["largest_batch"] <= row["worked_out"]
    assert stock["largest_batch"] > 0.7 * stock["worked_out"]
    assert less["largest_batch"] > 1.5 * full["largest_batch"]
    assert coded["sequence_bytes"] < 0.25 * full["sequence_bytes"]


@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 9, 1000])
def test_the_largest_that_works_is_found(most: int) -> None:
    tried: list[int] = []

    def works(number: int) -> bool:
        tried.append(number)
        return number <= most

    assert capacity.largest(works) == most
    assert len(tried) < 25


def test_scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = ["--batch", "1", "2", "--vision-tokens", "200", "400", "--retention", "0.5", "--steps", "2", "--tiers"]
    results = run(scaling, monkeypatch, tmp_path / "scaling.json", *settings)
    assert len(results["results"]) == 8
    assert set(results["lines"]) == {"DynamicCache", "plphp, all retentions"}


def test_a_line_is_fitted() -> None:
    rows = [{"read_bytes": count, "seconds": 0.25 + count / 2e9} for count in (10**6, 10**7, 10**8, 10**9)]
    assert scaling.line(rows) == pytest.approx({"fixed_seconds": 0.25, "seconds_per_byte": 5e-10, "explained": 1.0})
    rows[0]["seconds"] += 0.1
    assert scaling.line(rows)["explained"] < 0.99


def test_timing_waits_in_turn() -> None:
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measuring.interleaved(works, CPU, rounds=2, warm_up=1)
    assert "".join(order) == "ababab"
    assert set(times) == set("ab")


def test_peak_is_of_what_is_alive_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(2**20, dtype=torch.uint8)

    def together() -> None:
        kept = [torch.ones(2**20, dtype=torch.uint8) for _ in range(3)]
        kept.clear()

    peaks = [measuring.peak_bytes(work, CPU) for work in (one_after_the_other, together)]
    assert peaks == pytest.approx([2**20, 3 * 2**20], rel=0.01)


def test_tiers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--batch", "2", "--vision-tokens", "300", "--steps", "2", "--prompt", "50", "--turns", "1"]
    results = run(tiers, monkeypatch, tmp_path / "tiers.json", *settings)
    held = {row["variant"]: row["kv_bytes"] for row in results["results"]}
    assert list(held) == ["DynamicCache", "whole 0.4", "t10", "t10, read 20%", "c3", "t10, torch"]
    assert all(row["seconds"] > 0 for row in results["results"])
    assert held["t10"] < held["c3"] < held["whole 0.4"] < held["DynamicCache"]
    assert held["t10"] < held["t10, read 20%"]  # the mean values that stand in for the rest
    assert [row["ladder"] for row in results["encoding"]] == ["t10", "c3", "prefill"]
    assert "Encoding 50 tokens" in capsys.readouterr().out


def test_conversation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, budget = tmp_path / "conversation.json", "query_bank:bank=bundled,retention_rate=1,vision_budget=200 tokens"
    settings = ["--turns", "2", "--beside", "1", "--images", "2", "--config", budget, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["script", *settings, "--out", str(out)])
    conversation.main()
    results: dict[str, Any] = json.loads(out.read_text())
    first, *later = results["turns"]
    assert first["vision_bytes"] == first["full_bytes"] * 196 // first["tokens"]  # whole: the budget does not bind yet
    for row in later:
        assert 0.9 < row["vision_bytes"] * 196 / 200 / first["vision_bytes"] <= 1
    assert first["right"] == first["right_full"] == first["right_alone"]  # no history yet
    assert first["full_seconds"] > 0
    assert "right_full" not in later[0]
    for row in results["turns"]:
        # What is noted of entries is alive and no part of the bytes held of them.
        assert row["kv_bytes"] <= row["storage_bytes"] < 1.2 * row["kv_bytes"]
    [again] = results["again"]
    assert again["again_tokens"] > 2 * 196 > again["goes_on_tokens"] > 196
    assert "A message is taken out" in capsys.readouterr().out
